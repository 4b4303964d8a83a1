import dataclasses
import json
import math

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from engine.sampling import candidates, host_draw, host_sampler, settings
from engine.sampling.logprobs import launch_prompt_logprobs
from engine.sampling.row import SamplingRow, uniform
from engine.sampling.sampler import Sampler
from engine.scheduling.plan import Sampled
from messages.errors import InvariantError, KvrayError, RequestError, WorkerError
from messages.request import Grammar, SamplingParams
from tests.engine.sampling.grammars import EOS, VOCAB, byte_tokenizer, compiler

INF = float("inf")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def row_of(params: SamplingParams, tokens=(1, 2, 3), num_prompt=2, seq_id="s") -> SamplingRow:
    if params.grammar is not None:
        compiler().compile(params.grammar)
    return SamplingRow(seq_id, params, list(tokens), num_prompt)


def params_of(**values) -> SamplingParams:
    return SamplingParams(max_tokens=100, **values)


# ------------------------------------------------------------------------------------------- the formula, plainly


def shaped_plainly(logits: np.ndarray, row: SamplingRow) -> np.ndarray:
    params, shaped = row.params, logits.copy()
    output = row.token_ids[row.num_prompt_tokens :]
    for token in set(row.token_ids):
        value = shaped[token]
        if params.repetition_penalty != 1:
            penalty = np.float32(params.repetition_penalty)
            value = value / penalty if value > 0 else value * penalty
        value = np.float32(value - np.float32(params.frequency_penalty) * np.float32(output.count(token)))
        shaped[token] = np.float32(value - np.float32(params.presence_penalty) * np.float32(token in output))
    for token, bias in params.logit_bias.items():
        shaped[token] += np.float32(bias)
    if len(output) < params.min_tokens:
        shaped[list(params.stop_token_ids)] = -INF
    return shaped


def drawn_plainly(shaped: np.ndarray, row: SamplingRow) -> tuple[int, float]:
    """The token, and how near the nearest decision was to going the other way."""
    params = row.params
    order = sorted(range(len(shaped)), key=lambda token: (-shaped[token], token))
    if params.temperature == 0:
        return order[0], 1.0
    weights = [math.exp((float(shaped[i]) - float(shaped[order[0]])) / params.temperature) for i in order]
    if params.top_k:
        weights = weights[: params.top_k]
    total, margins = math.fsum(weights), [1.0]
    if params.top_p < 1:
        before = [math.fsum(weights[:i]) for i in range(len(weights))]
        margins += [abs(b / total - params.top_p) for b in before[1:]]
        weights = [w for w, b in zip(weights, before, strict=True) if b < params.top_p * total] or weights[:1]
    if params.min_p > 0:
        margins += [abs(w - params.min_p) for w in weights[1:]]
        weights = [w for w in weights if w >= params.min_p] or weights[:1]
    kept = math.fsum(weights)
    number = uniform(params.seed, params.choice, row.num_output_tokens)
    passed = 0.0
    for position, weight in enumerate(weights):
        passed += weight
        margins.append(abs(passed / kept - number))
        if passed > number * kept:
            return order[position], min(margins)
    return order[len(weights) - 1], 0.0


def some_logits(vocab_size: int, seed: int, scale: float, grain: float, num_masked: int = 0) -> np.ndarray:
    """Normal ones; `grain` > 0 rounds them so that many tie."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=vocab_size) * scale
    if grain:
        logits = np.round(logits / grain) * grain
    logits[rng.permutation(vocab_size)[:num_masked]] = -INF
    return logits.astype(np.float32)


all_params = st.builds(
    params_of,
    temperature=st.sampled_from([0.0, 0.2, 0.7, 1.0, 1.5, 5.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 5, 20, 300, 10_000]),
    top_p=st.sampled_from([1.0, 1.0, 0.0, 0.1, 0.5, 0.9, 0.99]),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.7, -0.3]),
    logit_bias=st.one_of(
        st.just({}), st.dictionaries(st.integers(0, 19), st.sampled_from([-100.0, -1.0, 2.5]), max_size=3)
    ),
    seed=st.integers(0, 2**64 - 1),
    choice=st.integers(0, 3),
    min_tokens=st.sampled_from([0, 0, 3, 50]),
    stop_token_ids=st.sampled_from([(), (0,), (3, 4)]),
    logprobs=st.sampled_from([None, 0, 3]),
)
tokens = st.lists(st.integers(0, 19), min_size=1, max_size=12)
shapes = st.tuples(
    st.sampled_from([20, 33, 255, 256, 257, 700]),
    st.integers(0, 10**6),
    st.sampled_from([0.0, 0.3, 2.0, 8.0]),
    st.sampled_from([0.0, 0.0, 0.25, 2.0]),
    st.sampled_from([0, 0, 7, 15]),
)


@pytest.mark.slow
@hypothesis_settings(max_examples=200, deadline=None)
@given(shapes, all_params, tokens, st.data())
def test_the_sampler_does_what_the_formula_says(shape, params, token_ids, data):
    logits = some_logits(*shape)
    row = row_of(params, token_ids, data.draw(st.integers(1, len(token_ids))))
    shaped = shaped_plainly(logits, row)
    assume(shaped.max() > -INF)
    expected, margin = drawn_plainly(shaped, row)
    assume(margin > 1e-6)  # nearer than rounding: either is right
    (outcome,) = Sampler(len(logits), None).sample(torch.from_numpy(logits)[None], [row])
    assert isinstance(outcome, Sampled)
    assert outcome.token_id == expected


@pytest.mark.slow
@hypothesis_settings(max_examples=200, deadline=None)
@given(shapes, all_params, st.integers(1, 300), st.data())
def test_the_quick_way_gives_exactly_what_sorting_everything_gives(shape, params, num_candidates, data):
    logits = torch.from_numpy(some_logits(*shape))[None]
    rows = [row_of(msgspec.structs.replace(params, temperature=params.temperature or 1.0))]
    config = settings.Settings.of(rows)
    whole = candidates.all_in_order(logits)
    few = candidates.leading(logits, min(num_candidates, logits.shape[1]))
    mass = host_draw.mass(logits, whole.values[:, 0].copy(), config.temperature)
    with np.errstate(invalid="raise"):
        position = host_draw._draw(few, mass, config)[0]
    expected = host_draw._draw(whole, mass, config)[0]
    assert expected >= 0
    assert position in (-1, expected)
    above = candidates.at_least(logits, float(whole.values[0, min(num_candidates, whole.num_sure[0]) - 1]))
    assert host_draw._draw(above, mass, config)[0] in (-1, expected)
    slowly = host_draw._draw_slowly(logits, float(whole.values[0, 0]), mass, config)
    assert slowly == whole.ids[0, expected]
    sure = few.num_sure[0]
    assert few.ids[0, :sure].tolist() == whole.ids[0, :sure].tolist()


def test_the_usual_row_is_decided_without_sorting(monkeypatch):
    monkeypatch.setattr(host_draw, "all_in_order", lambda logits: pytest.fail("sorted"))
    logits = torch.from_numpy(some_logits(32_000, 1, 4.0, 0.0))[None]
    for params in (
        params_of(top_p=0.5),
        params_of(top_p=0.9, temperature=0.7),
        params_of(top_k=50),
        params_of(top_k=50, top_p=0.9, min_p=0.01),
        params_of(min_p=0.05),
        params_of(temperature=0),
    ):
        Sampler(32_000, None).sample(logits, [row_of(params)])


# ------------------------------------------------------------------------------------- independence from the batch


def mixed_rows(count: int) -> list[SamplingRow]:
    kinds = [
        params_of(temperature=0, logprobs=2),
        params_of(logprobs=5),
        params_of(top_p=0.9, temperature=0.8),
        params_of(top_k=40, top_p=0.95, logprobs=0),
        params_of(min_p=0.1, repetition_penalty=1.2, logprobs=1),
        params_of(temperature=1.7, frequency_penalty=0.4, logit_bias={5: 4.0}),
    ]
    return [
        dataclasses.replace(
            row_of(msgspec.structs.replace(kinds[i % len(kinds)], seed=i), range(3 + i % 5)), seq_id=f"s{i}"
        )
        for i in range(count)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [1_003, 40_001])
@pytest.mark.parametrize("grain", [0.0, 0.125])
def test_a_row_gives_the_same_bits_alone_in_any_batch_and_on_any_number_of_threads(vocab_size, grain):
    rows = mixed_rows(12)
    logits = torch.from_numpy(np.stack([some_logits(vocab_size, i, 3.0, grain) for i in range(len(rows))]))
    alone = [Sampler(vocab_size, None).sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    assert all(isinstance(outcome, Sampled) for outcome in alone)
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        order = np.random.default_rng(num_threads).permutation(len(rows)).tolist()
        together = Sampler(vocab_size, None).sample(logits[order], [rows[i] for i in order])
        assert together == [alone[i] for i in order]


def test_state_kept_between_steps_changes_nothing():
    params = params_of(repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.2, seed=7)
    kept, token_ids = Sampler(50, None), [3, 4, 5]
    for step in range(40):
        logits = torch.from_numpy(some_logits(50, step, 1.0, 0.0))[None]
        row = row_of(params, token_ids, 3)
        (outcome,) = kept.sample(logits, [row])
        assert [outcome] == Sampler(50, None).sample(logits, [row])
        token_ids = [*token_ids, outcome.token_id]
    # a sequence that starts again under its old name
    row = row_of(params, [3, 4, 5], 3)
    assert kept.sample(logits, [row]) == Sampler(50, None).sample(logits, [row])
    kept.forget("s")
    kept.forget("never seen")
    assert kept.sample(logits, [row]) == Sampler(50, None).sample(logits, [row])


@pytest.mark.parametrize(
    "values",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7, "presence_penalty": -0.4},
        {"frequency_penalty": 0.3},
        {"repetition_penalty": 1.1, "frequency_penalty": -0.2, "presence_penalty": 0.7},
    ],
)
@pytest.mark.parametrize("has_kernels", [True, False])
def test_penalties_that_grow_with_their_tokens_are_those_of_the_formula_bit_for_bit(monkeypatch, has_kernels, values):
    if not has_kernels:
        monkeypatch.setattr(host_sampler, "load_kernels", lambda: None)
    rng = np.random.default_rng(0)
    history = rng.integers(0, 500, 600).tolist()
    penalties = None
    for end in (400, 401, 402, 450, 600):  # a step, a step, a replay of several, a move
        row = row_of(params_of(**values), history[:end], 400)
        penalties = penalties or host_sampler._Penalties(row, 500)
        penalties.update(row.token_ids)
        logits, found = some_logits(500, end, 3.0, 0.25, 7), np.empty(500, np.float32)
        penalties.apply(torch.from_numpy(logits), torch.from_numpy(found))
        assert (found + 0.0).tobytes() == (shaped_plainly(logits, row) + 0.0).tobytes()  # of zeros either


def test_the_repetition_penalty_is_that_of_transformers():
    logits = torch.from_numpy(some_logits(500, 1, 3.0, 0.0))[None]
    row = row_of(params_of(repetition_penalty=1.3), np.random.default_rng(0).integers(0, 500, 300).tolist(), 200)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([row.token_ids]), logits)[0]
    penalties = host_sampler._Penalties(row, 500)
    penalties.update(row.token_ids)
    penalties.apply(logits[0], found := torch.empty(500))
    assert torch.equal(found, expected)


def test_logits_and_tokens_are_left_as_they_were():
    logits = torch.from_numpy(np.stack([some_logits(1_000, i, 3.0, 0.0) for i in range(6)]))
    before, rows = logits.clone(), mixed_rows(6)
    token_ids = [list(row.token_ids) for row in rows]
    Sampler(1_000, None).sample(logits, rows)
    assert torch.equal(logits, before)
    assert [row.token_ids for row in rows] == token_ids


# ---------------------------------------------------------------------------------------------------------- the draw


def test_the_uniform_numbers_are_part_of_the_contract():
    # A stream that moves to a worker of another version must meet the same ones.
    assert uniform(0, 0, 0) == 0.156742553465558
    assert uniform(2**64 - 1, 3, 1_000_000) == 0.67073465634398
    assert len({uniform(seed, choice, i) for seed in range(8) for choice in range(8) for i in range(8)}) == 512


def chi_square(counts: np.ndarray, shares: np.ndarray) -> float:
    expected = shares * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("vary", ["seed", "choice", "index"])
def test_tokens_are_drawn_with_their_probabilities(vary):
    logits = np.array([1.0, 0.0, 2.0, -1.0, 0.5, 0.5, 1.5, -2.0], np.float32)
    shares = np.exp(logits / 0.8) / np.exp(logits / 0.8).sum()
    count = 2_000
    rows = [
        row_of(
            params_of(temperature=0.8, seed=i if vary == "seed" else 5, choice=i if vary == "choice" else 0),
            [0] * (i + 1 if vary == "index" else 1),
            1,
        )
        for i in range(count)
    ]
    outcomes = Sampler(8, None).sample(torch.from_numpy(logits).repeat(count, 1), rows)
    counts = np.bincount([outcome.token_id for outcome in outcomes], minlength=8)
    assert chi_square(counts, shares) < 29.9  # seven degrees of freedom, one in ten thousand


def test_nothing_outside_the_cuts_is_ever_drawn():
    logits = torch.tensor([[3.0, 2.9, 2.8, 0.0, -1.0]]).repeat(500, 1)
    for params in (params_of(top_k=3), params_of(top_p=0.9), params_of(min_p=0.5)):
        rows = [row_of(msgspec.structs.replace(params, seed=i)) for i in range(500)]
        drawn = {outcome.token_id for outcome in Sampler(5, None).sample(logits, rows)}
        assert drawn == {0, 1, 2}


def test_top_p_keeps_no_token_more_than_its_share_needs():
    rows = [row_of(params_of(top_p=0.5, seed=i)) for i in range(200)]
    outcomes = Sampler(4, None).sample(torch.zeros(200, 4), rows)
    assert {outcome.token_id for outcome in outcomes} == {0, 1}


def test_each_token_owns_the_numbers_from_its_beginning_up_to_the_next(monkeypatch):
    for number, token in ((0.0, 0), (0.25, 1), (0.5, 2), (0.75, 3), (1 - 2**-53, 3)):
        monkeypatch.setattr(settings, "uniform", lambda seed, choice, index, number=number: number)
        assert Sampler(4, None).sample(torch.zeros(1, 4), [row_of(params_of())]) == [Sampled(token)]


def test_of_equal_logits_greedy_takes_the_lowest_id():
    logits = torch.zeros(2, 500)
    logits[1, [70, 400]] = 3.0
    outcomes = Sampler(500, None).sample(logits, [row_of(params_of(temperature=0, logprobs=1))] * 2)
    assert [outcome.token_id for outcome in outcomes] == [0, 70]
    assert [outcome.logprob.rank for outcome in outcomes] == [1, 1]
    assert [outcome.logprob.top[0][0] for outcome in outcomes] == [0, 70]


def test_a_vanishing_temperature_is_greedy():
    logits = torch.from_numpy(some_logits(300, 3, 2.0, 0.0))[None]
    best = int(logits.argmax())
    for temperature in (5e-324, 1e-9, 1e-5, 1e-4):
        assert Sampler(300, None).sample(logits, [row_of(params_of(temperature=temperature))]) == [Sampled(best)]


# -------------------------------------------------------------------------------------------------- log-probabilities


@hypothesis_settings(max_examples=100, deadline=None)
@given(shapes, st.integers(0, 25), st.integers(0, 10**6))
def test_logprobs_are_of_the_unmodified_distribution(shape, k, pick):
    logits = some_logits(*shape[:4])
    target = pick % len(logits)
    (found,) = launch_prompt_logprobs(torch.from_numpy(logits)[None], [target], k)()
    wide = logits.astype(np.float64)
    expected = wide - wide.max() - math.log(np.exp(wide - wide.max()).sum())
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    assert found.token_id == target
    assert found.logprob == pytest.approx(expected[target], abs=1e-5)
    assert found.rank == order.index(target) + 1
    assert [token for token, _ in found.top] == order[:k]
    assert [value for _, value in found.top] == pytest.approx(expected[order[:k]], abs=1e-5)


def test_a_sampled_tokens_logprob_ignores_how_it_was_sampled():
    logits = torch.from_numpy(some_logits(300, 3, 2.0, 0.0))[None]
    params = params_of(temperature=0.3, top_k=2, repetition_penalty=2.0, logit_bias={17: 100.0}, logprobs=2)
    (outcome,) = Sampler(300, None).sample(logits, [row_of(params)])
    assert outcome.token_id == 17
    assert [outcome.logprob] == launch_prompt_logprobs(logits, [17], 2)()


def test_no_logprobs_where_none_are_wanted():
    outcomes = Sampler(300, None).sample(torch.zeros(3, 300), [row_of(params_of(logprobs=k)) for k in (None, 0, 2)])
    assert outcomes[0].logprob is None
    assert outcomes[1].logprob.top == ()
    assert len(outcomes[2].logprob.top) == 2


def test_more_alternatives_than_tokens_give_all_tokens():
    (found,) = launch_prompt_logprobs(torch.tensor([[1.0, 2.0, 2.0]]), [0], 20)()
    assert [token for token, _ in found.top] == [1, 2, 0]


# ------------------------------------------------------------------------------------------------------------ grammars


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_output_follows_its_grammar_also_after_a_move(temperature):
    params = params_of(
        temperature=temperature,
        grammar=Grammar(kind="json_schema", spec=json.dumps(SCHEMA)),
        logit_bias={byte_tokenizer().token_to_id("Ġ"): -100.0, byte_tokenizer().token_to_id("Ċ"): -100.0},
        seed=3,
    )
    sampler, token_ids = Sampler(VOCAB, compiler()), [1, 2]
    for step in range(100):
        if step == 7:
            sampler = Sampler(VOCAB, compiler())  # another worker
        if step == 9:
            sampler.forget("s")
        logits = torch.from_numpy(some_logits(VOCAB, step, 1.0, 0.0))[None]
        (outcome,) = sampler.sample(logits, [row_of(params, token_ids, 2)])
        assert isinstance(outcome, Sampled)
        token_ids = [*token_ids, outcome.token_id]
        if outcome.token_id == EOS:
            break
    value = json.loads(byte_tokenizer().decode(token_ids[2:]))
    assert 0 <= value["a"] <= 99
    assert value["b"] in ("x", "y")


def test_a_complete_grammar_ends_even_before_min_tokens():
    params = params_of(
        grammar=Grammar(kind="choice", spec='["a"]'), min_tokens=10, stop_token_ids=(EOS,), temperature=0
    )
    sampler, letter = Sampler(VOCAB, compiler()), byte_tokenizer().token_to_id("a")
    logits = torch.zeros(1, VOCAB)
    assert sampler.sample(logits, [row_of(params, [1], 1)]) == [Sampled(letter)]
    assert sampler.sample(logits, [row_of(params, [1, letter], 1)]) == [Sampled(EOS)]


def test_where_every_token_is_a_stop_token_min_tokens_yields():
    params = params_of(min_tokens=10, stop_token_ids=tuple(range(VOCAB)), temperature=0)
    assert Sampler(VOCAB, None).sample(torch.arange(float(VOCAB))[None], [row_of(params)]) == [Sampled(VOCAB - 1)]


def test_min_tokens_still_holds_where_the_grammar_can_go_on():
    params = params_of(grammar=Grammar(kind="regex", spec="a*"), min_tokens=2, stop_token_ids=(EOS,), temperature=0)
    sampler, letter = Sampler(VOCAB, compiler()), byte_tokenizer().token_to_id("a")
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS] = 9.0
    assert sampler.sample(logits, [row_of(params, [1], 1)]) == [Sampled(letter)]
    assert sampler.sample(logits, [row_of(params, [1, letter, letter], 1)]) == [Sampled(EOS)]


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
def test_a_row_without_finite_logits_fails_alone(temperature, bad):
    logits = torch.from_numpy(np.stack([some_logits(1_000, i, 3.0, 0.0) for i in range(3)]))
    rows = [row_of(params_of(temperature=temperature, logprobs=1, seed=i)) for i in range(3)]
    good = Sampler(1_000, None).sample(logits, rows)
    logits[1, slice(None) if bad == -INF else 700] = bad
    found = Sampler(1_000, None).sample(logits, rows)
    assert [found[0], found[2]] == [good[0], good[2]]
    assert isinstance(found[1], WorkerError)
    assert found[1].code == "non_finite_logits"


def test_a_row_that_asks_for_the_impossible_fails_alone():
    logits = torch.zeros(3, VOCAB)
    rows = [
        row_of(params_of(logit_bias={VOCAB: 1.0})),
        row_of(params_of(temperature=0)),
        row_of(params_of(grammar=Grammar(kind="choice", spec='["a"]')), [1, 2, 5, 5], 2),  # 5 was never allowed
    ]
    found = Sampler(VOCAB, compiler()).sample(
        logits, [dataclasses.replace(row, seq_id=str(i)) for i, row in enumerate(rows)]
    )
    assert isinstance(found[0], RequestError)
    assert found[0].param == "logit_bias"
    assert found[1] == Sampled(0)
    assert isinstance(found[2], RequestError)


def test_a_row_whose_grammar_was_not_compiled_before_fails_alone(monkeypatch):
    params = params_of(grammar=Grammar(kind="regex", spec="never compiled"))
    found = Sampler(VOCAB, compiler()).sample(
        torch.zeros(2, VOCAB), [SamplingRow("a", params, [1], 1), row_of(params_of(temperature=0), seq_id="b")]
    )
    assert isinstance(found[0], KvrayError)
    assert found[1] == Sampled(0)


def test_logits_of_another_shape_or_dtype_are_a_bug():
    with pytest.raises(InvariantError, match=r"\[1, 9\]"):
        Sampler(8, None).sample(torch.zeros(1, 9), [row_of(params_of())])
    with pytest.raises(InvariantError, match="bfloat16"):
        Sampler(8, None).sample(torch.zeros(1, 8, dtype=torch.bfloat16), [row_of(params_of())])


def test_no_rows_give_nothing():
    assert Sampler(8, None).sample(torch.zeros(0, 8), []) == []


def test_a_row_that_cannot_be_shaped_ends_alone(monkeypatch, caplog):
    def refuse(*_args):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(host_sampler.HostSampler, "_add_bias", refuse)
    rows = [row_of(params_of(temperature=0.0, logit_bias=bias), seq_id=str(bias)) for bias in ({}, {1: 2.0}, {})]
    first, second, third = Sampler(5, None).sample(torch.arange(15.0).view(3, 5), rows)
    assert (first, third) == (Sampled(4), Sampled(4))
    assert "RuntimeError: no such thing" in second.message
    assert "cannot be chosen" in caplog.text
