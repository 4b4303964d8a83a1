"""A step's parts on the token axis, and the one run of memory that all its inputs lie in.

parts       a replay | two that generate | a chunk
positions   57 58 59 |        8 | 130    | 0 1 2 ...
slots        4  4  4 |        1 |   2    | 0 0 0 ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from engine.kernels.protocol import PrefillSpan
from engine.scheduling.plan import SequenceStep
from engine.slot_tables import SlotTables

#: In place of a token id that only the device knows yet: what was sampled last for the row's slot.
AWAITED = -1
#: In place of a block id: the token's keys and values are stored nowhere.
NOWHERE = -1

_NUM_FIELDS = 5  # of a token


class StepInputs(NamedTuple):
    """What a step computes with, where it runs: views of one run of words."""

    token_ids: torch.Tensor  #: [T] int64, or AWAITED
    positions: torch.Tensor  #: [T] int64, each sequence's own
    block_ids: torch.Tensor  #: [T] int64, where each token is stored, or NOWHERE
    offsets: torch.Tensor  #: [T] int64, within its block
    slots: torch.Tensor  #: [T] int64
    kept: torch.Tensor  #: [num_kept] int64: rows whose logits are wanted
    kv_lens: torch.Tensor  #: [num_rows] int32: of rows that decode
    spans: torch.Tensor  #: [4 * num_spans] int32: chunks, each as PrefillSpan has it

    def take_awaited(self, sampled_ids: torch.Tensor) -> None:
        """Put what was sampled last for its slot, `sampled_ids [num_slots]`, in place of each AWAITED token id."""
        num_rows = len(self.kv_lens)
        ids = self.token_ids[:num_rows]
        ids.copy_(torch.where(ids == AWAITED, sampled_ids[self.slots[:num_rows]], ids))


class HostInputs(NamedTuple):
    """The same on the host, to be written."""

    tokens: npt.NDArray[np.int64]  #: [5, T]: the first five
    kept: npt.NDArray[np.int64]
    kv_lens: npt.NDArray[np.int32]
    spans: npt.NDArray[np.int32]  #: [num_spans, 4]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """How much there is of everything in a step, whose inputs lie one after the other in words of 8 bytes.

        each of the tokens' fields, num_tokens | kept, num_kept | kv_lens, num_rows halves | spans, 4 halves each

    Each begins at a multiple of 16 bytes: Triton compiles kernels anew for tensors that do not.
    """

    num_tokens: int
    num_rows: int  #: that decode, each a token
    num_kept: int
    num_spans: int = 0

    @classmethod
    def of_bucket(cls, num_rows: int) -> StepShape:
        """Return the shape of a step of so many decode rows, all kept."""
        return cls(num_tokens=num_rows, num_rows=num_rows, num_kept=num_rows)

    @property
    def num_words(self) -> int:
        """Words of all inputs."""
        of_lens = (self.num_rows + 1) // 2
        return _NUM_FIELDS * _even(self.num_tokens) + _even(self.num_kept) + _even(of_lens) + 2 * self.num_spans

    def cut(self, words: torch.Tensor) -> StepInputs:
        """Cut `words`, `[num_words]` int64, into a step's inputs."""
        num_tokens, num_kept, of_lens = self.num_tokens, self.num_kept, (self.num_rows + 1) // 2
        of_tokens = [num_tokens, num_tokens % 2] * _NUM_FIELDS
        sizes = [*of_tokens, num_kept, num_kept % 2, of_lens, of_lens % 2, 2 * self.num_spans]
        ids, positions, block_ids, offsets, slots, kept, lens, spans = words.split_with_sizes(sizes)[::2]
        kv_lens = lens.view(torch.int32)[: self.num_rows]
        return StepInputs(ids, positions, block_ids, offsets, slots, kept, kv_lens, spans.view(torch.int32))

    def cut_host(self, words: npt.NDArray[np.int64]) -> HostInputs:
        """Do as `cut` on the host."""
        kept_at = _NUM_FIELDS * _even(self.num_tokens)
        lens_at = kept_at + _even(self.num_kept)
        spans_at = lens_at + _even((self.num_rows + 1) // 2)
        halves: npt.NDArray[np.int32] = words.view(np.int32)
        return HostInputs(
            tokens=words[:kept_at].reshape(_NUM_FIELDS, -1)[:, : self.num_tokens],
            kept=words[kept_at : kept_at + self.num_kept],
            kv_lens=halves[2 * lens_at :][: self.num_rows],
            spans=halves[2 * spans_at :].reshape(-1, len(PrefillSpan._fields)),
        )


def _even(count: int) -> int:
    return count + count % 2


@dataclass(frozen=True, slots=True)
class PackedStep:
    """A step's parts on the token axis: decode rows first, then prefill chunks."""

    parts: Sequence[SequenceStep]
    shape: StepShape
    kept: list[int]  #: rows: of `sampled` in order, then of `logprob_parts`; never empty
    sampled: list[SequenceStep]  #: parts whose last token is sampled after
    logprob_parts: list[tuple[SequenceStep, int]]  #: parts with how many of their rows give prompt logprobs
    awaiting: list[int]  #: rows whose token ids only the device knows yet
    spans: list[PrefillSpan]

    @property
    def max_kv_len(self) -> int:
        """The most keys that a decode row attends to; 0: there are no such rows."""
        return max((part.end for part in self.parts if part.kind == "decode"), default=0)

    def write(self, inputs: HostInputs, tables: SlotTables, block_size: int) -> None:
        """Write the step, whose slots are up to date, into `inputs`, which may have room for more rows.

        Rows beyond its own are padding: of no sequence, stored nowhere, with no keys to attend to.
        """
        parts, (num_tokens, num_rows) = self.parts, (self.shape.num_tokens, self.shape.num_rows)
        counts = np.array([part.num_tokens for part in parts])
        ends = np.cumsum(counts)
        tokens: Any = inputs.tokens[:, :num_tokens]
        tokens[0] = [token_id for part in parts for token_id in tables[part.slot].tokens_of(part)]
        tokens[1] = np.arange(num_tokens) + np.repeat([part.end for part in parts] - ends, counts)
        tokens[4] = np.repeat([part.slot for part in parts], counts)
        tokens[2] = tables.host_tables[tokens[4], tokens[1] // block_size]
        tokens[3] = tokens[1] % block_size
        if self.awaiting:
            tokens[0, self.awaiting] = AWAITED
        inputs.kept[: len(self.kept)] = self.kept
        inputs.kv_lens[:num_rows] = tokens[1, :num_rows] + 1
        if self.spans:
            inputs.spans[:] = self.spans
        if inputs.tokens.shape[1] > num_tokens:
            inputs.tokens[:, num_tokens:] = 0
            inputs.tokens[2, num_tokens:] = NOWHERE
            inputs.kept[len(self.kept) :] = 0
            inputs.kv_lens[num_rows:] = 0


def pack(parts: Sequence[SequenceStep], tables: SlotTables) -> PackedStep:
    """Lay `parts` out on the token axis, their slots being up to date. Only what is computed takes time."""
    num_rows = sum([part.num_tokens for part in parts if part.kind == "decode"])
    spans: list[PrefillSpan] = []
    kept: list[int] = []
    kept_for_logprobs: list[range] = []
    sampled: list[SequenceStep] = []
    logprob_parts: list[tuple[SequenceStep, int]] = []
    awaiting: list[int] = []
    end = 0
    for part in parts:
        begin, end = end, end + part.num_tokens
        if part.kind == "prefill":
            spans.append(PrefillSpan(begin - num_rows, end - num_rows, part.end, part.slot))
        if part.awaits_token:
            awaiting.append(end - 1)
        if part.is_sampled:
            kept.append(end - 1)
            sampled.append(part)
        if part.wants_prompt_logprobs:
            # a row tells of the token after it, as long as that is of the prompt
            count = max(0, min(part.end, tables[part.slot].begins.num_prompt_tokens - 1) - part.start)
            kept_for_logprobs.append(range(begin, begin + count))
            logprob_parts.append((part, count))
    for rows in kept_for_logprobs:
        kept.extend(rows)
    kept = kept or [0]
    shape = StepShape(num_tokens=end, num_rows=num_rows, num_kept=len(kept), num_spans=len(spans))
    return PackedStep(parts, shape, kept, sampled, logprob_parts, awaiting, spans)
