"""The choice over arrays is the one that the plain definition gives, over random fleets."""

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kvrouter.index import Holder, Run
from kvrouter.worker_state import Reserved, WorkerState
from messages.price import ComputePrice, MovePrice
from tests.kvrouter.plain_policy import PlainFleet, PlainPricing
from tests.kvrouter.test_policy import Priced, info, load, request

ROADS = (("shm", "ucx", "socket"), ("shm",), ("socket", "shm"), ("ucx",), ("socket",))
TIERS = ("host", "disk", "remote")
NUM_BLOCKS = 300
#: Some that make equals, some that tell all apart.
seconds = st.sampled_from([0.0, 0.01, 0.5]) | st.floats(0.0, 3.0)
computing = st.none() | st.builds(
    ComputePrice, step_s=seconds, token_s=st.sampled_from([1e-4, 1e-3]) | st.floats(1e-6, 1e-2), pair_s=st.just(1e-8)
)


@st.composite
def worker_infos(draw, worker_id, role):
    return info(
        worker_id,
        role,
        node_id=draw(st.sampled_from(["n0", "n1", "n2"])),
        fingerprint=draw(st.sampled_from([b"f", b"f", b"f", b"g"])),
        block_size=draw(st.sampled_from([16, 16, 16, 32])),
        num_blocks=draw(st.sampled_from([400, 1000])),
        max_num_seqs=draw(st.sampled_from([16, 64])),
        roads=draw(st.sampled_from(ROADS)),
        compute=draw(computing),
    )


@st.composite
def reports(draw, worker, sources):
    moves = [
        MovePrice(
            source=source.address,
            tier=draw(st.sampled_from(TIERS)) if source.role == "cache" else "device",
            road=draw(st.sampled_from(["shm", "ucx", "socket", "disk"])),
            fixed_s=draw(seconds) / 100,
            byte_s=draw(st.sampled_from([0.0, 1e-9, 1e-8])),
            handoff_s=draw(seconds) / 10,
        )
        for source in draw(st.lists(st.sampled_from(sources), max_size=4))
    ]
    return load(
        worker.worker_id,
        queued_s=draw(seconds),
        queued_short_s=draw(seconds),
        num_short=draw(st.integers(0, 4)),
        num_running=draw(st.integers(0, 20)),
        free_blocks=draw(st.integers(0, 400)),
        idle_blocks=draw(st.integers(0, 400)),
        reused_share=draw(st.sampled_from([0.0, 0.3])),
        compute=draw(computing),
        decode_step_s=draw(st.sampled_from([0.0, 0.02])),
        moves=tuple(moves),
    )


@st.composite
def prompt_runs(draw, infos):
    """Who holds a prompt's blocks, head first."""
    holders = [Holder(worker.worker_id) for worker in infos if worker.role != "cache"]
    holders += [Holder(worker.worker_id, tier) for worker in infos if worker.role == "cache" for tier in TIERS]
    holders.append(Holder("gone"))
    cuts = sorted(draw(st.sets(st.integers(1, NUM_BLOCKS), max_size=4)))
    return [
        Run(begin, end, tuple(sorted(draw(st.sets(st.sampled_from(holders), min_size=1)))))
        for begin, end in zip([0, *cuts], cuts, strict=False)
    ]


@pytest.mark.slow
@settings(deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.target, Phase.shrink])
@given(st.data())
def test_the_placement_is_that_of_the_plain_definition(data):
    roles = ["decode"] * data.draw(st.integers(1, 6)) + ["prefill"] * data.draw(st.integers(0, 6)) + ["cache"] * 2
    infos = [data.draw(worker_infos(f"w{number}", role)) for number, role in enumerate(roles)]
    runs = data.draw(prompt_runs(infos))
    num_prompt = data.draw(st.integers(0, 40) | st.integers(0, 16 * NUM_BLOCKS))
    num_prompt = max(num_prompt, 16 * runs[-1].end if runs else 0)
    route = request(num_prompt, num_sequences=data.draw(st.sampled_from([1, 1, 3])))

    plain = PlainFleet({worker.worker_id: WorkerState(worker) for worker in infos})
    priced = Priced(route, runs, [WorkerState(worker) for worker in infos])
    for worker in infos:
        for _ in range(0 if worker.role == "cache" else data.draw(st.integers(0, 2))):
            report = data.draw(reports(worker, infos))
            plain.report(report)
            priced.fleet.report(report)
        if worker.role != "cache" and data.draw(st.booleans()):
            reserved = Reserved(data.draw(seconds), data.draw(st.integers(0, 100)), 1)
            plain.workers[worker.worker_id].reserve("other", reserved)
            priced.fleet.reserve(worker.worker_id, "other", reserved)
    priced.fleet.find_best_compute()
    priced.fleet.check_invariants()

    # As the router calls it: those that are excluded, that warm, or whom the prompt does not fit are left out.
    there = [worker for worker in infos if worker.worker_id == "w0" or data.draw(st.integers(0, 3))]
    decodes = [worker.worker_id for worker in there if worker.role == "decode"]
    prefills = [worker.worker_id for worker in there if worker.role == "prefill"]
    rows = priced.fleet.rows_of
    expected = PlainPricing(route, runs, plain).placements(decodes, prefills)
    best = min(expected, key=lambda placement: placement.order)
    chosen = priced.pricing.best(*(np.array(rows(ids), np.int64) for ids in (decodes, prefills)))
    chosen_ids = (chosen.decode.info.worker_id, chosen.prefill.info.worker_id if chosen.prefill else None)
    assert chosen_ids == (best.decode, best.prefill)
    assert (chosen.num_computed_tokens, chosen.load_s) == (best.num_computed, best.load_s)

    explained = priced.pricing.all(*(np.array(rows(ids), np.int64) for ids in (decodes, prefills)))
    costs = {
        (candidate.decode.info.worker_id, candidate.prefill.info.worker_id if candidate.prefill else None): candidate
        for candidate in explained
    }
    assert costs.keys() == {(placement.decode, placement.prefill) for placement in expected}
    for placement in expected:
        seen_s = costs[placement.decode, placement.prefill].cost_s
        assert abs(seen_s - placement.cost_s) < 1e-6 * max(1.0, placement.cost_s)
