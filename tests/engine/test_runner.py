import dataclasses
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.memory.kv_pool import KvPool, LayerSpec
from engine.model import load as model_module
from engine.model.load import load_model
from engine.runner import Runner
from engine.sampling.sampler import Sampler
from engine.scheduling.plan import StepPlan
from messages.errors import InvariantError, RequestError, WorkerError
from messages.request import SamplingParams
from tests.models import VOCAB_SIZE, make_tiny_model
from tests.steps import Bench

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

DTYPES = ["float32", "bfloat16"]
#: rows of 1,536 and more are where a lone row differs without care (engine/model/linear.py)
WIDE = {"hidden_size": 128, "intermediate_size": 2048, "head_dim": 32}


@pytest.fixture(scope="module", params=["with kernels", "plain torch"])
def use_kernels(request):
    return request.param == "with kernels"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("wide"), eos_token_id=None, **WIDE)


@pytest.fixture(scope="module")
def loaded(directory, use_kernels):
    return load_model(directory, dtype="float32", use_kernels=use_kernels)


@pytest.fixture(scope="module", params=DTYPES)
def loaded_any(request, directory, use_kernels):
    return load_model(directory, dtype=request.param, use_kernels=use_kernels)


@pytest.fixture(scope="module")
def eager(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")


def prompt_of(length, seed=0):
    generator = random.Random(seed)
    return [generator.randrange(4, VOCAB_SIZE) for _ in range(length)]


def kv_of(bench, sequence, num_tokens):
    """K and V of the first tokens of a sequence, every layer: what another worker would have to reproduce."""
    found = []
    for view in (*bench.pool.k, *bench.pool.v):
        rows = view[torch.tensor(sequence.blocks)].transpose(0, 1).flatten(1, 2)
        found.append(rows[:, :num_tokens])
    return found


def same_bits(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def record_logits(monkeypatch, bench):
    """Every forward's logits, as they go to the sampler."""
    seen = []
    launch = bench.runner._sampler.launch

    def spy(logits, rows):
        seen.append({row.seq_id: logits[index].clone() for index, row in enumerate(rows)})
        return launch(logits, rows)

    monkeypatch.setattr(bench.runner._sampler, "launch", spy)
    return seen


# ---------------------------------------------------------------------------------------------------------- exactness


def test_a_row_has_the_same_bits_alone_and_in_a_batch_with_prefill(loaded_any, monkeypatch):
    bench = Bench(loaded_any)
    sequences = [bench.add(f"s{i}", prompt_of(20 + 9 * i, i)) for i in range(9)]
    bench.run(sequences, 1, max_step_tokens=1024)
    seen = record_logits(monkeypatch, bench)
    filler = bench.add("filler", prompt_of(50, 99))
    bench.runner.execute(StepPlan((*(bench.part(sequence, 1) for sequence in sequences), bench.part(filler, 50))))
    together = seen.pop()
    for size in (1, 2, 4):
        for begin in range(0, 9, size):
            again = tuple(bench.part(sequence, 1) for sequence in sequences[begin : begin + size])
            bench.runner.execute(StepPlan(again))
            for seq_id, logits in seen.pop().items():
                assert torch.equal(logits, together[seq_id]), (size, seq_id)


@pytest.mark.parametrize("rows_per_step", [100, 7])
def test_generated_tokens_replayed_as_decode_rows_give_the_same_kv_and_go_on_the_same(loaded_any, rows_per_step):
    home = Bench(loaded_any)
    moving = home.add("moving", prompt_of(70))
    others = [home.add(f"other{i}", prompt_of(30, i)) for i in range(5)]
    home.run([moving, *others], 40, max_step_tokens=512)

    away = Bench(loaded_any, is_reversed=True)
    replay = away.add("replay", moving.token_ids[:70])
    work = away.part(replay, 70)
    away.runner.execute(StepPlan((work,)))
    replay.num_computed = 70
    replay.token_ids = moving.token_ids[:90]  # 20 of them were generated
    while replay.num_computed < 90:
        count = min(rows_per_step, 90 - replay.num_computed)
        away.run_parts([(replay, away.part(replay, count))])
    assert same_bits(kv_of(away, replay, 90), kv_of(home, moving, 90))
    assert away.run([replay], 40)[0] == moving.output
    assert same_bits(kv_of(away, replay, 109), kv_of(home, moving, 109))


def test_cuts_at_multiples_of_256_give_the_bits_of_the_whole_prompt(loaded_any):
    prompt = prompt_of(700)
    kv = []
    for cut in (700, 512, 256):
        bench = Bench(loaded_any)
        sequence = bench.add("s", prompt)
        while sequence.num_computed < 700:
            bench.run_parts([(sequence, bench.part(sequence, min(cut, 700 - sequence.num_computed)))])
        kv.append(kv_of(bench, sequence, 700))
    assert same_bits(kv[1], kv[0])
    assert same_bits(kv[2], kv[0])


def test_greedy_tokens_are_those_of_generate_whatever_the_step_budget(loaded, eager):
    prompts = [prompt_of(length, length) for length in (1, 15, 16, 17, 64, 200)]
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = eager.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0
        )
        wanted.append(out[0, len(prompt) :].tolist())
    for budget in (9, 64, 2048):
        bench = Bench(loaded)
        sequences = [bench.add(f"s{i}", prompt) for i, prompt in enumerate(prompts)]
        assert bench.run(sequences, 24, max_step_tokens=budget) == wanted


@pytest.mark.parametrize("block_size", [1, 4, 32])
def test_any_block_size_gives_the_same_tokens(loaded, block_size):
    outputs = []
    for size in (16, block_size):
        bench = Bench(loaded, num_blocks=4096 // size, block_size=size)
        outputs.append(bench.run([bench.add(f"s{i}", prompt_of(40 + i, i)) for i in range(3)], 12))
    assert outputs[0] == outputs[1]


# --------------------------------------------------------------------------------------------------- what a step gives


def test_prompt_logprobs_are_those_of_the_whole_prompt_however_it_is_chunked(loaded, eager):
    prompt = prompt_of(150)
    with torch.inference_mode():
        wanted = eager(torch.tensor([prompt])).logits[0].log_softmax(-1)
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=2)
    bench = Bench(loaded)
    sequence, found = bench.add("s", prompt), []
    for count in (64, 1, 80, 5):
        part = bench.part(sequence, count, params=params, wants_prompt_logprobs=True)
        found += bench.run_parts([(sequence, part)]).prompt_logprobs["s"]
    assert [entry.token_id for entry in found] == prompt[1:]
    for position, entry in enumerate(found):
        row = wanted[position]
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        assert entry.rank == 1 + int((row > row[entry.token_id]).sum())
        assert [token for token, _ in entry.top] == row.topk(2).indices.tolist()


def test_a_chunk_in_mid_prompt_samples_nothing(loaded):
    bench = Bench(loaded)
    sequence = bench.add("s", prompt_of(40))
    result = bench.run_parts([(sequence, bench.part(sequence, 20))])
    assert (result.sampled, result.errors, result.prompt_logprobs) == ({}, {}, {})
    assert result.elapsed_s > 0


def test_an_empty_plan_gives_an_empty_result(loaded):
    assert Bench(loaded).runner.execute(StepPlan(())).sampled == {}


def test_a_row_that_cannot_be_sampled_fails_alone(loaded):
    bench = Bench(loaded)
    good, bad = bench.add("good", prompt_of(20)), bench.add("bad", prompt_of(20, 1))
    params = SamplingParams(max_tokens=1, logit_bias={loaded.vocab_size: 1.0})
    result = bench.runner.execute(StepPlan((bench.part(good, 20), bench.part(bad, 20, params=params))))
    assert list(result.sampled) == ["good"]
    assert isinstance(result.errors["bad"], RequestError | WorkerError)


def test_logprobs_come_with_the_sampled_token(loaded):
    bench = Bench(loaded)
    sequence = bench.add("s", prompt_of(20))
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=3)
    sampled = bench.runner.execute(StepPlan((bench.part(sequence, 20, params=params),))).sampled["s"]
    assert sampled.logprob is not None
    assert (sampled.logprob.token_id, sampled.logprob.rank, len(sampled.logprob.top)) == (sampled.token_id, 1, 3)


def test_the_step_reaches_attention_where_a_model_drops_keywords(loaded, monkeypatch):
    bench = Bench(loaded)
    wanted = bench.run([bench.add("s", prompt_of(20))], 5)
    model, forward = bench.runner._model, bench.runner._model.forward

    def forgetful(*args, kv_step=None, **kwargs):
        assert kv_step is not None
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", forgetful)
    assert Bench(loaded).run([bench.add("s", prompt_of(20))], 5) == wanted


def test_a_step_leaves_all_other_blocks_alone(loaded):
    bench = Bench(loaded)
    bench.pool.data.fill_(7)
    sequence = bench.add("s", prompt_of(33))
    bench.run([sequence], 3)
    others = [block for block in range(bench.pool.num_blocks) if block not in sequence.blocks]
    assert (bench.pool.data[others] == 7).all()


def test_a_large_step_leaves_no_trace_in_a_small_one(loaded):
    bench = Bench(loaded)
    long = [bench.add(f"long{i}", prompt_of(200, i)) for i in range(4)]
    bench.run(long, 2, max_step_tokens=2048)
    fresh, used = Bench(loaded), [bench.add(f"s{i}", prompt_of(5, 50 + i)) for i in range(2)]
    wanted = fresh.run([fresh.add(f"s{i}", prompt_of(5, 50 + i)) for i in range(2)], 6)
    assert bench.run(used, 6) == wanted


def test_a_pool_of_another_shape_is_refused(loaded):
    sampler = Sampler(loaded.vocab_size, None)
    for specs, dtype in (([LayerSpec(1, 16, 16)], torch.float32), (loaded.layer_specs, torch.bfloat16)):
        with pytest.raises(InvariantError, match="not laid out for llama"):
            Runner(loaded, KvPool(specs, 16, dtype, "cpu", num_blocks=4), sampler)


def test_an_interrupted_forward_leaves_no_step_behind(loaded, monkeypatch):
    bench = Bench(loaded)
    sequence, bad = bench.add("s", prompt_of(20)), bench.add("bad", [VOCAB_SIZE + 5] * 4)  # not in the embedding
    with pytest.raises(IndexError):
        bench.run([bad], 1)
    assert bench.run([sequence], 4) == Bench(loaded).run([bench.add("s", prompt_of(20))], 4)


# -------------------------------------------------------------------------------------------------------- steps ahead


def part_ahead(bench, sequence):
    """The part behind one that is on its way: it decodes the token which that one samples."""
    part = dataclasses.replace(bench.part(sequence, 1), awaits_token=True, is_sampled=True)
    sequence.slot.num_told_tokens += 1
    sequence.num_computed = part.end
    return part


def run_ahead(bench, sequences, num_output):
    """Generate so many tokens each, every step but the first launched before the one before it is finished."""
    first = []
    for sequence in sequences:
        first.append(bench.part(sequence, sequence.num_prompt_tokens))
        sequence.num_computed = sequence.num_prompt_tokens
    launched = [bench.runner.launch(StepPlan(tuple(first)))]
    found = {sequence.seq_id: [] for sequence in sequences}
    for number in range(num_output):
        if number < num_output - 1:
            launched.append(bench.runner.launch(StepPlan(tuple(part_ahead(bench, s) for s in sequences))))
        result = bench.runner.finish(launched.pop(0))
        assert not result.errors
        for seq_id, sampled in result.sampled.items():
            found[seq_id].append(sampled.token_id)
    return list(found.values())


@pytest.mark.parametrize(
    "params", [SamplingParams(max_tokens=9, temperature=0.0), SamplingParams(max_tokens=9, temperature=1.0, seed=3)]
)
def test_steps_that_await_the_tokens_of_those_before_them_give_the_same(loaded, params, monkeypatch):
    monkeypatch.setattr("tests.steps.GREEDY", params)
    outputs = []
    for run in (lambda bench, sequences: bench.run(sequences, 12), lambda *those: run_ahead(*those, 12)):
        bench = Bench(loaded)
        outputs.append(run(bench, [bench.add(f"s{i}", prompt_of(7 + i, i)) for i in range(3)]))
    assert outputs[0] == outputs[1]


def test_a_plan_that_awaits_a_token_may_be_carried_out_when_that_is_known(loaded):
    outputs = []
    for is_ahead in (False, True):
        bench = Bench(loaded)
        sequence = bench.add("s", prompt_of(9))
        plans = [StepPlan((bench.part(sequence, 9),))]
        sequence.num_computed = 9
        plans += [StepPlan((part_ahead(bench, sequence),)) for _ in range(4)]
        if is_ahead:
            launched = [bench.runner.launch(plans[0])]
            results = []
            for plan in plans[1:]:
                launched.append(bench.runner.launch(plan))
                results.append(bench.runner.finish(launched.pop(0)))
            results.append(bench.runner.finish(*launched))
        else:
            results = [bench.runner.execute(plan) for plan in plans]
        outputs.append([result.sampled["s"].token_id for result in results])
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_a_step_behind_one_that_gave_no_token_runs_all_the_same_for_the_others(loaded, penalty):
    bench = Bench(loaded)
    good, bad = bench.add("good", prompt_of(20)), bench.add("bad", prompt_of(20, 1))
    params = SamplingParams(max_tokens=1, logit_bias={loaded.vocab_size: 1.0}, repetition_penalty=penalty)
    first = bench.runner.launch(StepPlan((bench.part(good, 20), bench.part(bad, 20, params=params))))
    good.num_computed = bad.num_computed = 20
    second = bench.runner.launch(StepPlan((part_ahead(bench, good), part_ahead(bench, bad))))
    results = [bench.runner.finish(first), bench.runner.finish(second)]
    alone = Bench(loaded)
    wanted = alone.run([alone.add("good", prompt_of(20))], 2)[0]
    assert [result.sampled["good"].token_id for result in results] == wanted
    assert [list(result.errors) for result in results] == [["bad"], ["bad"]]


def test_what_is_finished_is_its_own_though_others_took_its_slots(loaded):
    bench = Bench(loaded)
    first, other = bench.add("first", prompt_of(20)), bench.add("other", prompt_of(30, 2))
    alone = Bench(loaded)
    [wanted] = alone.run([alone.add("first", prompt_of(20))], 1)
    launched = bench.runner.launch(StepPlan((bench.part(first, 20),)))
    slot = first.slot
    bench.slots.give_back(slot)
    behind = bench.runner.launch(StepPlan((bench.part(other, 30),), freed_slots=(slot.index,)))
    assert other.slot.index == slot.index
    assert [bench.runner.finish(launched).sampled["first"].token_id] == wanted
    assert list(bench.runner.finish(behind).sampled) == ["other"]
    assert bench.runner._tables[slot.index].token_ids.tolist() == other.token_ids


def test_a_step_is_not_said_to_take_longer_for_what_is_launched_behind_it(loaded):
    bench = Bench(loaded)
    short, long = bench.add("short", prompt_of(5)), bench.add("long", prompt_of(900, 1))
    bench.run_parts([(short, bench.part(short, 5))])
    launched = [bench.runner.launch(StepPlan((bench.part(s, n),))) for s, n in ((short, 1), (long, 900))]
    seconds = [bench.runner.finish(each).elapsed_s for each in launched]
    assert 0 < seconds[0] < seconds[1]


def test_unpacked_linears_give_the_same_tokens(directory, loaded, monkeypatch):
    monkeypatch.setattr(model_module, "linear_name", lambda *_: "torch")
    plain = load_model(directory, dtype="float32", use_kernels=False)
    assert "onednn" not in plain.kernel_path
    prompts = [prompt_of(length, length) for length in (10, 50)]
    outputs = [
        bench.run([bench.add(f"s{i}", prompt) for i, prompt in enumerate(prompts)], 16)
        for bench in (Bench(plain), Bench(loaded))
    ]
    assert outputs[0] == outputs[1]
