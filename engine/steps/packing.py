"""A step's parts on the token axis, and the one run of memory that all its inputs lie in.

parts       a replay | two that generate | a chunk
positions   57 58 59 |        8 | 130    | 0 1 2 ...
slots        4  4  4 |        1 |   2    | 0 0 0 ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.kernels.protocol import PrefillSpan
from engine.scheduling.plan import SequenceStep
from engine.slot_tables import SlotTables

#: In place of a token id that only the device knows yet: what was sampled last for the row's slot.
AWAITED = -1
#: In place of a block id: the token's keys and values are stored nowhere.
NOWHERE = -1
_NUM_FIELDS = 5  # of a token


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What a step computes with, as views of one run of words; on the host to be written, then on the device."""

    tokens: torch.Tensor  #: [5, T] int64: token ids or AWAITED, positions, block ids or NOWHERE, offsets in them, slots
    kept: torch.Tensor  #: [num_kept] int64: rows whose logits are wanted
    kv_lens: torch.Tensor  #: [num_rows] int32: of rows that decode
    spans: torch.Tensor  #: [num_spans, 4] int32: chunks, as PrefillSpan has them

    def take_awaited(self, sampled_ids: torch.Tensor) -> None:
        """Put what was sampled last for its slot, `sampled_ids [num_slots]`, in place of each AWAITED token id."""
        ids, slots = self.tokens[0, : len(self.kv_lens)], self.tokens[4, : len(self.kv_lens)]
        ids.copy_(torch.where(ids == AWAITED, sampled_ids[slots], ids))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """How much there is of everything in a step, whose inputs lie one after the other in words of 8 bytes.

        each field of the tokens, num_tokens | kept, num_kept | kv_lens, num_rows halves | spans, 4 halves each

    Each begins at a multiple of 16 bytes: kernels are compiled anew for tensors that do not.
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
        return self._spans_at + 2 * self.num_spans

    @property
    def _kept_at(self) -> int:
        return _NUM_FIELDS * _even(self.num_tokens)

    @property
    def _lens_at(self) -> int:
        return self._kept_at + _even(self.num_kept)

    @property
    def _spans_at(self) -> int:
        return self._lens_at + _even((self.num_rows + 1) // 2)

    def cut(self, words: torch.Tensor) -> StepInputs:
        """Cut `words`, `[num_words]` int64, into a step's inputs."""
        return StepInputs(
            tokens=words[: self._kept_at].view(_NUM_FIELDS, -1)[:, : self.num_tokens],
            kept=words[self._kept_at :][: self.num_kept],
            kv_lens=words[self._lens_at : self._spans_at].view(torch.int32)[: self.num_rows],
            spans=words[self._spans_at :].view(torch.int32).view(-1, len(PrefillSpan._fields)),
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
    spans: list[PrefillSpan]
    max_kv_len: int  #: of the rows that decode; 0: none does

    @property
    def awaits_tokens(self) -> bool:
        """Whether there are token ids that only the device knows yet."""
        return any(part.awaits_token for part in self.parts)

    def write(self, inputs: StepInputs, tables: SlotTables, block_size: int) -> None:
        """Write the step, whose slots are up to date, into `inputs` on the host, which may have room for more rows.

        Rows beyond its own are padding: of no sequence, stored nowhere, with no keys to attend to.
        """
        counts = np.array([part.num_tokens for part in self.parts])
        ends = np.cumsum(counts)
        num_tokens, num_rows = self.shape.num_tokens, self.shape.num_rows
        all_tokens = inputs.tokens.numpy()
        tokens = all_tokens[:, :num_tokens]
        tokens[0] = [token_id for part in self.parts for token_id in tables[part.slot].tokens_of(part)]
        tokens[1] = np.arange(num_tokens) + np.repeat([part.end for part in self.parts] - ends, counts)
        tokens[4] = np.repeat([part.slot for part in self.parts], counts)
        tokens[2] = tables.host_tables[tokens[4], tokens[1] // block_size]
        tokens[3] = tokens[1] % block_size
        awaiting = [end - 1 for part, end in zip(self.parts, ends.tolist(), strict=True) if part.awaits_token]
        tokens[0, awaiting] = AWAITED
        kept, kv_lens = inputs.kept.numpy(), inputs.kv_lens.numpy()
        kept[: len(self.kept)] = self.kept
        kv_lens[:num_rows] = tokens[1, :num_rows] + 1
        if self.spans:
            inputs.spans.numpy()[:] = self.spans
        if len(all_tokens[0]) > num_tokens:
            all_tokens[:, num_tokens:] = 0
            all_tokens[2, num_tokens:] = NOWHERE
            kept[len(self.kept) :] = 0
            kv_lens[num_rows:] = 0


def pack(parts: Sequence[SequenceStep], tables: SlotTables) -> PackedStep:
    """Lay `parts` out on the token axis, their slots being up to date. Only what is computed takes time."""
    num_rows = sum(part.num_tokens for part in parts if part.kind == "decode")
    spans: list[PrefillSpan] = []
    kept: list[int] = []
    kept_for_logprobs: list[range] = []
    sampled: list[SequenceStep] = []
    logprob_parts: list[tuple[SequenceStep, int]] = []
    end = 0
    for part in parts:
        begin, end = end, end + part.num_tokens
        if part.kind == "prefill":
            spans.append(PrefillSpan(begin - num_rows, end - num_rows, part.end, part.slot))
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
    return PackedStep(
        parts=parts,
        shape=StepShape(num_tokens=end, num_rows=num_rows, num_kept=len(kept), num_spans=len(spans)),
        kept=kept,
        sampled=sampled,
        logprob_parts=logprob_parts,
        spans=spans,
        max_kv_len=max((part.end for part in parts if part.kind == "decode"), default=0),
    )
