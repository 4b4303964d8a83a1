"""What a device does for all rows at once, here on a CPU's tensors: to the bit what the reference does row by row."""

from __future__ import annotations

import dataclasses
import math

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from engine.sampling import device_sampler, device_shaping, settings
from engine.sampling.device_logprobs import launch_known
from engine.sampling.device_sampler import DeviceSampler
from engine.sampling.grammar_masks import GrammarMasks
from engine.sampling.host_logprobs import token_logprobs
from engine.sampling.row import SamplingRow
from engine.sampling.sampler import Sampler
from engine.scheduling.plan import Sampled
from messages.errors import InvariantError, KvrayError, RequestError, WorkerError
from messages.request import MIN_REPETITION_PENALTY, Grammar, SamplingParams
from tests.engine.sampling.grammars import EOS, VOCAB, byte_tokenizer, compiler

INF, NAN = math.inf, math.nan
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def params_of(**values) -> SamplingParams:
    return SamplingParams(max_tokens=100, **values)


def on_device(vocab_size: int, grammars=None) -> DeviceSampler:
    return DeviceSampler(vocab_size, GrammarMasks(grammars), CPU)


def shown(outcomes: list[Sampled | KvrayError]) -> list[str]:
    """Every bit of the outcomes, in words: a NaN equals itself in them."""
    return [repr(each.info()) if isinstance(each, KvrayError) else repr(each) for each in outcomes]


def without_void(logits: torch.Tensor, outcomes: list[Sampled | KvrayError]) -> list[Sampled | KvrayError]:
    """Leave log-probabilities out that mean nothing: of rows with a NaN, which a ban kept from being chosen."""
    return [
        Sampled(each.token_id) if isinstance(each, Sampled) and row.isnan().any() else each
        for row, each in zip(logits, outcomes, strict=True)
    ]


def check(logits: torch.Tensor, rows: list[SamplingRow], grammars=None) -> list[Sampled | KvrayError]:
    """Hold the device's outcomes to the reference's; return them."""
    expected = Sampler(logits.shape[1], grammars).sample(logits, rows)
    before = logits.clone()
    launched = on_device(logits.shape[1], grammars).launch(logits, rows)
    found = launched.finish()
    assert shown(without_void(logits, found)) == shown(without_void(logits, expected))
    assert torch.equal(logits.view(torch.int32), before.view(torch.int32)), "they are left as they were"
    assert launched.token_ids.dtype == torch.int64
    for token_id, outcome in zip(launched.token_ids.tolist(), found, strict=True):
        assert 0 <= token_id < logits.shape[1], "the next step looks it up, whatever becomes of the row"
        assert isinstance(outcome, KvrayError) or outcome.token_id == token_id
    return found


def some_logits(vocab_size: int, seed: int, scale: float, grain: float, num_masked: int, special: list[float]):
    """Normal ones; `grain` > 0 rounds them so that many tie; some are masked, some are special."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=vocab_size) * scale
    if grain:
        logits = np.round(logits / grain) * grain
    places = rng.permutation(vocab_size)
    logits[places[:num_masked]] = -INF
    logits[places[num_masked : num_masked + len(special)]] = special
    return torch.from_numpy(logits.astype(np.float32))


PARAMS = st.builds(
    params_of,
    temperature=st.sampled_from([0.0, 0.0, 1e-5, 0.2, 0.7, 1.0, 1.0, 1.5, 5.0, 100.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 5, 16, 17, 300, 10_000]),
    top_p=st.sampled_from([1.0, 1.0, 0.0, 0.1, 0.5, 0.9, 0.99, 5e-324, 1 - 2**-53]),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.3, 1.0, 5e-324]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.8, 100.0, MIN_REPETITION_PENALTY, 1e-38]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.7, -0.3]),
    logit_bias=st.one_of(
        st.just({}),
        st.dictionaries(st.integers(0, 16), st.sampled_from([-100.0, -1.0, 2.5, INF, -INF]), max_size=3),
        st.just({16: 1.0, 999_999: 1.0}),
    ),
    seed=st.integers(0, 2**64 - 1),
    choice=st.integers(0, 3),
    min_tokens=st.sampled_from([0, 0, 3, 50]),
    stop_token_ids=st.sampled_from([(), (0,), (3, 4), tuple(range(17)), (-1, 999_999, 5, 5)]),
    logprobs=st.sampled_from([None, None, 0, 3, 20]),
)
ROWS = st.lists(st.tuples(PARAMS, st.lists(st.integers(0, 16), min_size=1, max_size=12)), min_size=1, max_size=5)
LOGITS = st.tuples(
    st.integers(0, 10**6),
    st.sampled_from([0.0, 0.3, 2.0, 8.0, 1e30]),
    st.sampled_from([0.0, 0.0, 0.25, 2.0]),
    st.sampled_from([0, 0, 7, 15]),
    st.lists(st.sampled_from([NAN, -NAN, INF, -INF, -0.0, 3.0]), max_size=2) | st.just([]),
)


def rows_of(drawn: list[tuple[SamplingParams, list[int]]]) -> list[SamplingRow]:
    return [
        SamplingRow(f"s{index}", params, token_ids, max(1, len(token_ids) // 2))
        for index, (params, token_ids) in enumerate(drawn)
    ]


@pytest.mark.slow
@hypothesis_settings(max_examples=150, deadline=None)
@given(vocab_size=st.sampled_from([17, 31, 32, 255, 257, 1_003]), drawn=ROWS, data=st.data())
def test_every_outcome_is_the_references_to_the_bit(vocab_size, drawn, data):
    logits = torch.stack([some_logits(vocab_size, *data.draw(LOGITS)) for _ in drawn])
    check(logits, rows_of(drawn))


@pytest.mark.long
@hypothesis_settings(max_examples=3_000, deadline=None)
@given(vocab_size=st.integers(17, 3_000), drawn=ROWS, data=st.data())
def test_every_outcome_is_the_references_to_the_bit_over_and_over(vocab_size, drawn, data):
    logits = torch.stack([some_logits(vocab_size, *data.draw(LOGITS)) for _ in drawn])
    check(logits, rows_of(drawn))


KINDS = [
    params_of(temperature=0, logprobs=2),
    params_of(logprobs=5),
    params_of(top_p=0.9, temperature=0.8),
    params_of(top_k=40, top_p=0.95, logprobs=0),
    params_of(min_p=0.1, repetition_penalty=1.2, logprobs=1),
    params_of(temperature=1.7, frequency_penalty=0.4, logit_bias={5: 4.0}),
    params_of(top_k=2_000, top_p=0.999, temperature=2.0),
]


def mixed_rows(count: int) -> list[SamplingRow]:
    return [
        SamplingRow(f"s{i}", msgspec.structs.replace(KINDS[i % len(KINDS)], seed=i), list(range(3 + i % 5)), 2)
        for i in range(count)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vocab_size", "scale", "grain"), [(40_001, 3.0, 0.0), (200_000, 1.0, 0.0), (152_064, 2.0, 0.25)]
)
def test_wide_rows_give_the_references_outcomes_also_where_no_few_tokens_hold_the_mass(vocab_size, scale, grain):
    rows = mixed_rows(len(KINDS))
    logits = torch.stack([some_logits(vocab_size, i, scale, grain, 0, []) for i in range(len(rows))])
    assert all(isinstance(outcome, Sampled) for outcome in check(logits, rows))


def test_rows_in_several_groups_give_what_they_give_in_one(monkeypatch):
    rows = mixed_rows(9)
    logits = torch.stack([some_logits(1_003, i, 3.0, 0.125, 0, []) for i in range(len(rows))])
    whole = check(logits, rows)
    for module in ("device_draw", "device_logprobs"):
        monkeypatch.setattr(f"engine.sampling.{module}._GROUP_LOGITS", 2 * 1_003)
    monkeypatch.setattr("engine.sampling.device_penalties._GROUP_COUNTS", 1)
    assert check(logits, rows) == whole


@pytest.mark.parametrize("number", [0.0, 0.25, 0.5, 0.75, 1 - 2**-53])
def test_a_draw_on_a_boundary_falls_on_the_same_side(monkeypatch, number):
    monkeypatch.setattr(settings, "uniform", lambda seed, choice, index: number)
    for params in (params_of(), params_of(top_p=0.5), params_of(top_k=2), params_of(top_k=4, top_p=0.5, min_p=1.0)):
        check(torch.zeros(1, 4), rows_of([(params, [0])]))


# ------------------------------------------------------------------------------------------- from one step to the next


def stepped(params: list[SamplingParams], num_steps: int, ahead: set[int]) -> None:
    """Let sequences run on a device that plans some steps ahead, beside a reference that knows every token."""
    vocab_size = 50
    device, host, knowing = on_device(vocab_size), Sampler(vocab_size, None), Sampler(vocab_size, None)
    token_ids = [[3, 4, 5 + index] for index in range(len(params))]
    for step in range(num_steps):
        logits = torch.stack([some_logits(vocab_size, 100 * step + i, 1.0, 0.0, 0, []) for i in range(len(params))])
        rows = [SamplingRow(f"s{i}", each, list(token_ids[i]), 3) for i, each in enumerate(params)]
        late = rows
        if step and step in ahead:
            late = [dataclasses.replace(row, token_ids=row.token_ids[:-1], num_awaited=1) for row in rows]
        expected = knowing.sample(logits, rows)
        assert shown(device.launch(logits, late).finish()) == shown(expected)
        assert shown(host.sample(logits, late)) == shown(expected)
        for index, outcome in enumerate(expected):
            assert isinstance(outcome, Sampled)
            token_ids[index].append(outcome.token_id)


PENALIZED = [
    params_of(repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.2, seed=7),
    params_of(temperature=0, frequency_penalty=0.9),
    params_of(seed=4),
    params_of(temperature=0.8, presence_penalty=0.4, min_tokens=9, stop_token_ids=(1, 2), seed=2),
]


@pytest.mark.parametrize("ahead", [set(), set(range(30)), {2, 3, 4, 9, 11, 12, 20}], ids=["none", "all", "some"])
def test_tokens_that_only_the_device_knows_count_as_those_that_were_told(ahead):
    stepped(PENALIZED, 30, ahead)


@pytest.mark.parametrize("kind", ["device", "host"])
def test_a_row_cannot_await_what_was_not_sampled(kind):
    sampler = on_device(50) if kind == "device" else Sampler(50, None)
    row = SamplingRow("s", params_of(presence_penalty=1.0), [1], 1, num_awaited=1)
    with pytest.raises(InvariantError, match="'s' awaits a token"):
        sampler.launch(torch.zeros(1, 50), [row])


def test_a_sequence_that_begins_anew_is_counted_anew_and_places_are_used_again():
    device = on_device(50)
    logits = torch.stack([some_logits(50, i, 1.0, 0.0, 0, []) for i in range(2)])
    params = params_of(temperature=0, frequency_penalty=1.5)
    long = [SamplingRow(name, params, [1, *range(20, 45)], 1) for name in ("a", "b")]
    short = [SamplingRow(name, params, [1, 2], 1) for name in ("a", "b")]
    others = [SamplingRow(name, params, [1, 2, 3], 1) for name in ("c", "d")]
    for rows in (long, short):
        assert device.launch(logits, rows).finish() == Sampler(50, None).sample(logits, rows)
    num_places = len(device._shaper._penalties.counts)
    for name in ("a", "b", "never seen"):
        device.forget(name)
    assert device.launch(logits, others).finish() == Sampler(50, None).sample(logits, others)
    assert len(device._shaper._penalties.counts) == num_places


@pytest.mark.slow
def test_a_launch_that_failed_for_want_of_memory_may_begin_anew_wherever_that_was():
    rows = [SamplingRow(f"s{i}", each, [3, 4, 3, 5], 2) for i, each in enumerate(PENALIZED)]
    logits = torch.stack([some_logits(50, i, 1.0, 0.0, 0, []) for i in range(len(rows))])
    device, other = on_device(50), on_device(50)
    for some in (rows, [dataclasses.replace(row, num_awaited=1) for row in rows]):
        expected = shown(other.launch(logits, some).finish())
        num_operations = 0
        while True:
            num_operations += 1
            try:
                with FailingAfter(num_operations):
                    launched = device.launch(logits, some)
                break
            except torch.OutOfMemoryError:
                pass
        assert num_operations > 50
        assert shown(launched.finish()) == expected


class FailingAfter(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts operations; those after the first `limit` find no memory."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.count = limit, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count > self.limit:
            raise torch.OutOfMemoryError("out of memory")
        return func(*args, **(kwargs or {}))


# -------------------------------------------------------------------------------------------------- nothing is awaited


class _Unread:
    """In place of a `Readback`: on the meta device there is nothing to read."""

    made: list[torch.Tensor]

    def __init__(self, tensor: torch.Tensor) -> None:
        self.made.append(tensor)


def all_kinds() -> list[SamplingRow]:
    grammar = Grammar(kind="regex", spec="a*")
    compiler().compile(grammar)
    params = [
        *KINDS,
        *PENALIZED,
        params_of(grammar=grammar, min_tokens=2, stop_token_ids=(EOS,), logprobs=3),
        params_of(temperature=0, grammar=grammar, repetition_penalty=1.1),
    ]
    return [SamplingRow(f"k{i}", each, [1, 2], 2) for i, each in enumerate(params)]


def test_a_launch_reads_nothing_of_the_device_and_begins_one_copy_back(monkeypatch):
    """A tensor of the meta device has no data: whatever looks at it, as a wait for a device does, raises."""
    monkeypatch.setattr(device_sampler, "Readback", _Unread)
    meta = torch.device("meta")
    sampler = DeviceSampler(VOCAB, GrammarMasks(compiler()), meta)
    rows = all_kinds()
    logits = torch.empty(len(rows), VOCAB, device=meta)
    for late in (False, True):
        _Unread.made = []
        penalized = [dataclasses.replace(row, num_awaited=int(late and not row.params.grammar)) for row in rows]
        launched = sampler.launch(logits, penalized)
        assert launched.token_ids.device == meta
        assert len(_Unread.made) == 1


def test_rows_that_need_nothing_special_take_as_many_operations_as_one():
    counts = {}
    for params in (params_of(temperature=0), params_of(), params_of(top_k=5, top_p=0.9, min_p=0.1, logprobs=2)):
        for num_rows in (1, 64):
            rows = [SamplingRow(str(i), params, [1], 1) for i in range(num_rows)]
            with FailingAfter(10**6) as counter:
                on_device(50).launch(torch.zeros(num_rows, 50), rows)
            counts[num_rows] = counter.count
        assert counts[1] == counts[64]


# ------------------------------------------------------------------------------------------------- grammars and errors


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_held_to_grammars_follow_them_beside_others(temperature):
    params = [
        params_of(temperature=temperature, grammar=Grammar(kind="regex", spec="(ab|cd){3}"), logprobs=1, seed=3),
        params_of(temperature=temperature, seed=4, frequency_penalty=0.5),
        params_of(temperature=temperature, grammar=Grammar(kind="choice", spec='["xyz","q"]'), min_tokens=9, seed=5),
    ]
    params = [msgspec.structs.replace(each, stop_token_ids=(EOS,)) for each in params]
    for each in params:
        if each.grammar is not None:
            compiler().compile(each.grammar)
    device, host = on_device(VOCAB, compiler()), Sampler(VOCAB, compiler())
    token_ids = [[1] for _ in params]
    for step in range(7):
        logits = torch.stack([some_logits(VOCAB, 10 * step + i, 1.0, 0.0, 0, []) for i in range(len(params))])
        rows = [SamplingRow(str(i), each, list(token_ids[i]), 1) for i, each in enumerate(params)]
        found = device.launch(logits, rows).finish()
        assert shown(found) == shown(host.sample(logits, rows))
        for index, outcome in enumerate(found):
            token_ids[index].append(outcome.token_id)
    text = byte_tokenizer().decode([token for token in token_ids[0][1:] if token < EOS])
    assert text[:2] in ("ab", "cd")
    assert len(text) == 6


def test_a_row_that_asks_for_the_impossible_fails_alone():
    wrong = Grammar(kind="choice", spec='["a"]')
    compiler().compile(wrong)
    rows = [
        SamplingRow("0", params_of(logit_bias={VOCAB: 1.0}), [1], 1),
        SamplingRow("1", params_of(temperature=0), [1], 1),
        SamplingRow("2", params_of(grammar=wrong, frequency_penalty=1.0), [1, 2, 5, 5], 2),  # 5 was never allowed
        SamplingRow("3", params_of(grammar=Grammar(kind="regex", spec="never compiled")), [1], 1),
    ]
    found = check(torch.zeros(4, VOCAB), rows, compiler())
    assert [type(each) for each in found] == [RequestError, Sampled, RequestError, KvrayError]


def test_a_row_that_cannot_be_shaped_ends_alone(monkeypatch, caplog):
    def refuse(*_args):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(device_shaping, "bias_refusal", refuse)
    rows = [SamplingRow(str(bias), params_of(temperature=0, logit_bias=bias), [1], 1) for bias in ({}, {1: 2.0}, {})]
    first, second, third = on_device(5).launch(torch.arange(15.0).view(3, 5), rows).finish()
    assert (first, third) == (Sampled(4), Sampled(4))
    assert "RuntimeError: no such thing" in second.message
    assert "cannot be chosen" in caplog.text


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_row_without_finite_logits_fails_alone(temperature, bad):
    logits = torch.stack([some_logits(1_000, i, 3.0, 0.0, 0, []) for i in range(3)])
    logits[1, slice(None) if bad == -INF else 700] = bad
    rows = rows_of([(params_of(temperature=temperature, logprobs=1, seed=i), [1]) for i in range(3)])
    found = check(logits, rows)
    assert [type(each) for each in found] == [Sampled, WorkerError, Sampled]


def test_no_rows_give_nothing():
    launched = on_device(8).launch(torch.zeros(0, 8), [])
    assert launched.token_ids.shape == (0,)
    assert launched.finish() == []


# -------------------------------------------------------------------------------------------------- log-probabilities


@pytest.mark.slow
@hypothesis_settings(max_examples=100, deadline=None)
@given(
    vocab_size=st.sampled_from([1, 17, 257]), drawn=st.lists(LOGITS, max_size=4), k=st.integers(0, 25), data=st.data()
)
def test_log_probabilities_of_known_tokens_are_the_references_to_the_bit(vocab_size, drawn, k, data):
    logits = (
        torch.stack([torch.empty(0, vocab_size), *[]])
        if not drawn
        else torch.stack(
            [some_logits(vocab_size, seed, scale, grain, 0, special[:1]) for seed, scale, grain, _, special in drawn]
        )
    )
    logits = logits.view(len(drawn), vocab_size)
    targets = [data.draw(st.integers(0, vocab_size - 1)) for _ in drawn]
    # rows with a NaN are the model's fault, and no request is told of them
    whole = [index for index in range(len(drawn)) if not logits[index].isnan().any()]
    logits, targets = logits[whole], [targets[index] for index in whole]
    expected = token_logprobs(logits, targets, [k] * len(targets))
    assert repr(launch_known(logits, targets, k)()) == repr(expected)
