"""What grows with the number of sequences, of their tokens, of peers: milliseconds of whoever decides.

    python benchmarks/scale.py              500 steps, a few minutes
    python benchmarks/scale.py --quick      100 steps, fewer repeats
    python benchmarks/scale.py --record     also append to benchmarks/results/scale.jsonl

256 sequences of 131,072 tokens share all blocks but their last and generate. A scheduler plans their steps, a runner
packs them, and nothing is computed. Medians; the largest is of a step in which every sequence gets a block. Peer: the
same steps packed anew each time, out of whole lists, as was done until plans carried only what is new.
Then a router comes to 40 workers of another process, each of which holds 100,000 blocks, a tenth of them the same:
until it is in step, and the longest turn of its loop meanwhile (`harness/restarted_router.py`).
Then what 1,000 workers with 256 sequences each tell a router of their load in a second, and its processor time for it,
in simulated time (`harness/load_reports.py`).
Then 8,000 sequences come one after the other, which share a prefix that another one is computing: processor time of
the scheduler for all of them (`harness/arrivals.py`).
Then one request asks for 256 choices of a prompt of 131,072 tokens: the longest turn of an event loop, at the ingress
and at the worker, which is a process whose steps compute nothing (`harness/choices.py`).
Then a prefill worker hands over 8,191 blocks that it holds, to a decode worker, both without computing anything:
the longest turn of either's loop, and all of their processor time for it (`harness/handed_over.py`).
Before all that a process connects to another one 2,000 times, as to so many peers (`harness/many_peers.py`).
Goals: packing under 2 ms, planning under 1 ms; in step within 3 s; reports under 5 MB/s; 8,000 arrivals under 500 ms;
no turn of a loop over 20 ms, nor over 5 ms by a
handoff; no descriptor left of 2,000 peers.
"""

from __future__ import annotations

import time
from statistics import median

import numpy as np
import torch
from harness.arrivals import arrivals
from harness.choices import choices_ms
from harness.handed_over import handed_over_ms
from harness.load_reports import load_reports
from harness.many_peers import peers_figures
from harness.models import model_directory
from harness.report import goal, parser, record
from harness.restarted_router import restart_ms

from engine.memory.kv_pool import KvPool
from engine.model.load import load_model
from engine.runner import Runner
from engine.sampling.sampler import Sampler
from engine.scheduling.config import SchedulerConfig
from engine.scheduling.plan import (
    RunStep,
    Sampled,
    SequenceAdded,
    SequenceSpec,
    StepEnded,
    StepPlan,
    StepResult,
    StepWanted,
)
from engine.scheduling.scheduler import Scheduler
from engine.steps.packing import pack
from kvcache.pool import BlockPool
from messages.request import SamplingParams

NUM_SEQUENCES = 256
NUM_TOKENS = 131_072
BLOCK_SIZE = 16
MAX_REPORTS_MB = 5.0  #: a second
NUM_PEERS = 2_000
#: Milliseconds, by figure.
GOALS = {
    "packing 256 decodes at 131 k tokens": 2.0,
    "planning 256 decodes at 131 k tokens": 1.0,
    "router restarted, 40 x 100 k blocks: in step": 3000.0,
    "router restarted, 40 x 100 k blocks: longest turn": 20.0,
    "adding 8,000 that share a prefix in flight": 500.0,
    "worker's longest turn, n = 256 at 131 k tokens": 20.0,
    "ingress' longest turn, n = 256 at 131 k tokens": 20.0,
    "handoff of 8,191 blocks: prefill's longest turn": 5.0,
    "handoff of 8,191 blocks: decode's longest turn": 5.0,
    "handoff of 8,191 blocks: all of prefill's turns": 5.0,
    "handoff of 8,191 blocks: all of decode's turns": 5.0,
}


class LongSequences:
    """A scheduler of many long sequences, and a runner that is told of its plans; what steps give is made up."""

    def __init__(self) -> None:
        num_blocks = NUM_TOKENS // BLOCK_SIZE + 64 * NUM_SEQUENCES
        config = SchedulerConfig(
            max_model_len=2 * NUM_TOKENS, max_num_seqs=NUM_SEQUENCES, max_num_batched_tokens=8192, itl_target_s=1e9
        )
        self._scheduler = Scheduler(config, BlockPool(num_blocks, BLOCK_SIZE), b"model")
        loaded = load_model(model_directory("long"))
        pool = KvPool(loaded.layer_specs, BLOCK_SIZE, loaded.dtype, loaded.device, num_blocks=num_blocks)
        self._runner = Runner(loaded, pool, Sampler(loaded.vocab_size, None))
        self._anew = PackedAnew(self._scheduler)
        prompt = [number % 251 for number in range(NUM_TOKENS)]
        params = SamplingParams(max_tokens=NUM_TOKENS)
        for number in range(NUM_SEQUENCES):
            spec = SequenceSpec(seq_id=f"s{number}", token_ids=prompt, num_prompt_tokens=NUM_TOKENS, params=params)
            self._scheduler.on_event(SequenceAdded(spec), 0.0)
        self.plan_ms: list[float] = []
        self.pack_ms: list[float] = []
        self.pack_anew_ms: list[float] = []

    def step(self) -> None:
        """Run one step; it is timed if all sequences generate."""
        begin_s = time.perf_counter()
        [step] = self._scheduler.on_event(StepWanted(), 0.0)
        planned_s = time.perf_counter()
        assert isinstance(step, RunStep)
        self._runner._tables.take_in(step.plan)
        packed = pack(step.plan.parts, self._runner._tables)
        inputs = self._runner._bring(packed)
        packed_s = time.perf_counter()
        if packed.shape.num_rows == NUM_SEQUENCES:
            self.plan_ms.append(1e3 * (planned_s - begin_s))
            self.pack_ms.append(1e3 * (packed_s - planned_s))
            begin_s = time.perf_counter()
            tables = self._anew.pack(step.plan)
            self.pack_anew_ms.append(1e3 * (time.perf_counter() - begin_s))
            held = self._runner._tables.block_tables[inputs.slots]
            assert torch.equal(held[:, : tables.shape[1]], tables), "both pack the same"
        sampled = {part.seq_id: Sampled(7) for part in step.plan.parts if part.is_sampled}
        self._scheduler.on_event(StepEnded(StepResult(sampled=sampled)), 0.0)


class PackedAnew:
    """The peer: every table of a step is made into an array again."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._running = scheduler._ledger.running
        self._tokens = np.empty((4, NUM_SEQUENCES), np.int64)
        self._tables = np.empty((NUM_SEQUENCES, 2 * NUM_TOKENS // BLOCK_SIZE), np.int32)

    def pack(self, plan: StepPlan) -> torch.Tensor:
        """Pack the block tables of a step of decodes, `[len(parts), max_blocks]` int32."""
        num_columns = -(-max(part.end for part in plan.parts) // BLOCK_SIZE)
        tables = self._tables[: len(plan.parts), :num_columns]
        tables[:] = 0
        for row, part in enumerate(plan.parts):
            seq = self._running[part.seq_id]
            blocks = np.array(seq.block_table[: -(-part.end // BLOCK_SIZE)], np.int32)
            index, offset = divmod(part.start, BLOCK_SIZE)
            self._tokens[:, row] = (seq.token_ids[part.start], part.start, blocks[index], offset)
            tables[row, : len(blocks)] = blocks
        return torch.from_numpy(tables)


def long_sequences(num_steps: int) -> dict[str, list[float]]:
    """Run steps; return each one's milliseconds, by what they went to."""
    sequences = LongSequences()
    while len(sequences.pack_ms) < num_steps:
        sequences.step()
    what = "256 decodes at 131 k tokens"
    return {
        f"planning {what}": sequences.plan_ms,
        f"packing {what}": sequences.pack_ms,
        f"packing anew {what}": sequences.pack_anew_ms,
    }


def main() -> None:
    options = parser(__doc__, "scale", quick="a fifth of the steps").parse_args()
    torch.set_num_threads(1)
    peers = peers_figures(NUM_PEERS)
    print(f"{NUM_PEERS} peers: " + ", ".join(f"{name} {figure:.3g}" for name, figure in peers.items()))
    taken = long_sequences(100 if options.quick else 500)
    for restart in [restart_ms(40, 100_000) for _ in range(1 if options.quick else 5)]:
        for what, taken_ms in restart.items():
            taken.setdefault(f"router restarted, 40 x 100 k blocks: {what}", []).append(taken_ms)
    taken["adding 8,000 that share a prefix in flight"] = arrivals(8000, 2 if options.quick else 5)
    for turns in [choices_ms(256, NUM_TOKENS) for _ in range(1 if options.quick else 3)]:
        for whose, turn_ms in turns.items():
            taken.setdefault(f"{whose} longest turn, n = 256 at 131 k tokens", []).append(turn_ms)
    for role, rows in handed_over_ms(8191 * BLOCK_SIZE + 1, 3 if options.quick else 9).items():
        taken[f"handoff of 8,191 blocks: {role}'s longest turn"] = [row["longest"] for row in rows]
        taken[f"handoff of 8,191 blocks: all of {role}'s turns"] = [row["all"] for row in rows]
    figures = {name: {"median_ms": median(times), "max_ms": max(times)} for name, times in taken.items()}
    print(f"{'ms':50} {'median':>8} {'largest':>8}")
    for name, figure in figures.items():
        print(f"{name:50} {figure['median_ms']:8.2f} {figure['max_ms']:8.2f}")
    reports = load_reports(1000)
    for what, amount in reports.items():
        print(f"{'load reports of 1,000 workers a second: ' + what:50} {amount:8.2f}")
    figures["peers"] = peers
    if options.record:
        record("scale", figures | {"load reports of 1,000 workers a second": reports}, torch=torch.__version__)
    for name, under_ms in GOALS.items():
        print(goal(name, figures[name]["median_ms"], under=under_ms, unit=" ms"))
    print(goal("load reports of 1,000 workers", reports["MB"], under=MAX_REPORTS_MB, unit=" MB/s"))
    print(goal(f"peers of one process, of {NUM_PEERS}: descriptors left", peers["descriptors left"], under=1))


if __name__ == "__main__":
    main()
