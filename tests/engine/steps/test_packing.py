from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.kernels.protocol import PrefillSpan
from engine.scheduling.plan import SequenceStep, SlotBegins, StepPlan
from engine.slot_tables import SlotTables
from engine.steps.packing import AWAITED, NOWHERE, StepShape, pack
from kvcache.names import pack_tokens
from messages.request import SamplingParams

BLOCK_SIZE = 4
counts = st.integers(0, 9)


def begin(seq_id: str, slot: int, tokens, blocks, **options) -> SequenceStep:
    begins = SlotBegins(num_prompt_tokens=options.pop("prompt", 2), params=SamplingParams(max_tokens=9))
    told = {"begins": begins, "new_token_ids": pack_tokens(tokens), "new_block_ids": tuple(blocks)}
    return SequenceStep(seq_id=seq_id, slot=slot, **told, **{"is_sampled": True, **options})


@pytest.fixture
def parts() -> list[SequenceStep]:
    """A replay of three tokens, one that generates, one that awaits its token, a chunk."""
    replay = begin("replay", 3, [1, 2, 3, 4, 5, 6], [8, 9], kind="decode", start=2, num_tokens=3, is_sampled=False)
    going = begin("going", 0, [*range(10, 20)], [3, 2, 1], kind="decode", start=9, num_tokens=1)
    waits = begin("waits", 1, [40, 41], [5], kind="decode", start=2, num_tokens=1, awaits_token=True)
    chunk = begin("chunk", 2, [50, 51, 52, 53], [7], kind="prefill", start=0, num_tokens=2, is_sampled=False, prompt=4)
    return [replay, going, waits, chunk]


def written(parts, shape=None):
    tables = SlotTables()
    tables.take_in(StepPlan(tuple(parts)))
    step = pack(parts, tables)
    shape = shape or step.shape
    words = torch.full((shape.num_words,), -99)
    step.write(shape.cut_host(words.numpy()), tables, BLOCK_SIZE)
    return step, shape.cut(words)


def test_rows_have_their_tokens_places_and_lengths(parts):
    step, inputs = written(parts)
    assert inputs.token_ids.tolist() == [3, 4, 5, 19, AWAITED, 50, 51]
    assert inputs.positions.tolist() == [2, 3, 4, 9, 2, 0, 1]
    assert inputs.block_ids.tolist() == [8, 8, 9, 1, 5, 7, 7]
    assert inputs.offsets.tolist() == [2, 3, 0, 1, 2, 0, 1]
    assert inputs.slots.tolist() == [3, 3, 3, 0, 1, 2, 2]
    assert inputs.kv_lens.tolist() == [3, 4, 5, 10, 3]
    assert inputs.kept.tolist() == [3, 4]
    assert step.spans == [PrefillSpan(0, 2, 2, 2)]
    assert inputs.spans.tolist() == [0, 2, 2, 2]
    assert (step.max_kv_len, step.awaiting) == (10, [4])
    assert [part.seq_id for part in step.sampled] == ["going", "waits"]


def test_a_bucket_has_padding_behind_its_rows_that_is_stored_nowhere_and_sees_no_key(parts):
    step, inputs = written(parts[:3], StepShape.of_bucket(8))
    assert inputs.token_ids.tolist() == [3, 4, 5, 19, AWAITED, 0, 0, 0]
    assert inputs.block_ids.tolist() == [8, 8, 9, 1, 5, NOWHERE, NOWHERE, NOWHERE]
    assert inputs.kv_lens.tolist() == [3, 4, 5, 10, 3, 0, 0, 0]
    assert inputs.kept.tolist() == [3, 4, 0, 0, 0, 0, 0, 0]
    assert inputs.slots.tolist() == [3, 3, 3, 0, 1, 0, 0, 0]
    assert step.shape.num_tokens == 5


def test_awaited_tokens_are_those_sampled_last_for_their_slots(parts):
    _, inputs = written(parts)
    inputs.take_awaited(torch.tensor([90, 91, 92, 93]))
    assert inputs.token_ids.tolist() == [3, 4, 5, 19, 91, 50, 51]


def test_a_step_that_samples_nothing_keeps_a_row(parts):
    step, inputs = written([parts[0], parts[3]])
    assert (step.kept, step.sampled, inputs.kept.tolist()) == ([0], [], [0])


@given(num_tokens=st.integers(1, 9), num_rows=counts, num_kept=st.integers(1, 9), num_spans=counts)
def test_both_sides_cut_a_step_alike_into_pieces_that_begin_at_16_bytes(num_tokens, num_rows, num_kept, num_spans):
    shape = StepShape(num_tokens=num_tokens, num_rows=num_rows, num_kept=num_kept, num_spans=num_spans)
    words = torch.arange(shape.num_words)
    inputs, host = shape.cut(words), shape.cut_host(words.numpy())
    for ours, theirs in zip(inputs, [*host.tokens, host.kept, host.kv_lens, host.spans.reshape(-1)], strict=True):
        assert ours.dtype == torch.from_numpy(np.empty(0, theirs.dtype)).dtype
        assert ours.tolist() == theirs.tolist()
        assert not len(ours) or (ours.data_ptr() - words.data_ptr()) % 16 == 0
        assert ours.is_contiguous()
