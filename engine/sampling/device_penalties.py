"""How often each token came in each sequence: counted on the device, also those that the host does not know yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.sampling.row import SamplingRow
from messages.errors import InvariantError

#: Counts that one call penalizes with: its intermediate results take some 20 bytes for each.
_GROUP_COUNTS = 1 << 24


@dataclass(slots=True)
class _Counted:
    place: int  #: in the table
    num_tokens: int = 0  #: of the sequence, that are counted


@dataclass(slots=True)
class _Changes:
    """What the table does not hold yet."""

    begun: list[int] = field(default_factory=list)  #: places of sequences that are new
    places: list[NDArray[np.int64]] = field(default_factory=list)  #: of the tokens that the host knows
    token_ids: list[NDArray[np.int64]] = field(default_factory=list)
    in_output: list[NDArray[np.int64]] = field(default_factory=list)  #: 1 where the token is output, else 0
    awaited: list[tuple[int, int]] = field(default_factory=list)  #: place, and row of the launch before, of the others


class DevicePenalties:
    """A count for each token of the vocabulary and each sequence that has penalties.

    Attributes:
        counts: [places, vocab_size] int32: -1 of a token that did not come yet, else how often it is in the output.
            Room for more sequences is made by doubling.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.counts = torch.empty((0, vocab_size), dtype=torch.int32, device=device)
        self._counted: dict[str, _Counted] = {}
        self._free: list[int] = []

    def forget(self, seq_id: str) -> None:
        """Let another sequence have the place of this one; unknown ids are ignored."""
        counted = self._counted.pop(seq_id, None)
        if counted is not None:
            self._free.append(counted.place)

    def arrays(self, rows: Sequence[SamplingRow], last_rows: Mapping[str, int]) -> list[NDArray[Any]]:
        """Return what is to be uploaded before `apply`, with the same rows; they count as counted from now on.

        Args:
            rows: with penalties.
            last_rows: the row that each sequence had in the launch before this one.

        Raises:
            InvariantError: a row awaits a token of a sequence that was not in that launch.
        """
        changes = _Changes()
        places = [self._take_in(row, last_rows, changes) for row in rows]
        params = [row.params for row in rows]
        factors = [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params]
        return [
            np.array(places, np.int64),
            np.array(factors, np.float32).reshape(len(rows), 3),
            np.array(changes.begun, np.int64),
            _joined(changes.places),
            _joined(changes.token_ids),
            _joined(changes.in_output),
            np.array(changes.awaited, np.int64).reshape(-1, 2),
        ]

    def apply(self, logits: Tensor, uploaded: Sequence[Tensor], last_token_ids: Tensor) -> Tensor:
        """Count what `arrays` told of; return the rows with their penalties, [len(rows), vocab_size] float32.

        Args:
            logits: [len(rows), vocab_size] float32; not changed.
            uploaded: what `arrays` returned, on the device.
            last_token_ids: of the launch before this one, [its rows] int64.
        """
        places, factors, begun, known_places, known_ids, in_output, awaited = uploaded
        self._reserve()
        vocab_size = self.counts.shape[1]
        self.counts.index_fill_(0, begun, -1)
        flat = self.counts.view(-1)
        known = known_places * vocab_size + known_ids
        coming = awaited[:, 0] * vocab_size + last_token_ids[awaited[:, 1]]
        where = torch.cat([known, coming])
        flat[where] = flat[where].clamp(min=0)
        flat.scatter_add_(0, where, torch.cat([in_output, torch.ones_like(coming)]).to(torch.int32))
        group = max(1, _GROUP_COUNTS // vocab_size)
        parts = [slice(begin, begin + group) for begin in range(0, len(places), group)]
        return torch.cat([_penalized(logits[part], self.counts[places[part]], factors[part]) for part in parts])

    def _take_in(self, row: SamplingRow, last_rows: Mapping[str, int], changes: _Changes) -> int:
        """Note what of a row's tokens is not counted yet; return the place of its sequence."""
        counted = self._counted.get(row.seq_id)
        if counted is None or counted.num_tokens > row.num_tokens:
            place = counted.place if counted else self._free.pop() if self._free else len(self._counted)
            counted = self._counted[row.seq_id] = _Counted(place)
            changes.begun.append(place)
        new = np.array(row.token_ids[counted.num_tokens :], np.int64)
        if len(new):
            changes.places.append(np.full(len(new), counted.place))
            changes.token_ids.append(new)
            positions = np.arange(counted.num_tokens, len(row.token_ids))
            changes.in_output.append((positions >= row.num_prompt_tokens).astype(np.int64))
        if max(counted.num_tokens, len(row.token_ids)) < row.num_tokens:
            if row.seq_id not in last_rows:
                raise InvariantError(f"sequence {row.seq_id!r} awaits a token that the step before did not sample")
            changes.awaited.append((counted.place, last_rows[row.seq_id]))
        counted.num_tokens = row.num_tokens
        return counted.place

    def _reserve(self) -> None:
        wanted = len(self._counted) + len(self._free)
        if wanted > len(self.counts):
            old = self.counts
            self.counts = old.new_empty((max(wanted, 2 * len(old)), old.shape[1]))
            self.counts[: len(old)] = old


def _joined(arrays: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate(arrays) if arrays else np.empty(0, np.int64)


def _penalized(logits: Tensor, counts: Tensor, factors: Tensor) -> Tensor:
    """Return [n, vocab] logits with the penalties of `factors`, [n, 3]: each operation is rounded, as on a CPU."""
    repetition, frequency, presence = factors.unsqueeze(2).unbind(1)
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    penalized = torch.where(counts >= 0, repeated, logits) - frequency * counts.clamp(min=0).float()
    return penalized - presence * (counts > 0)
