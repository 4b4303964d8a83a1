"""How often each token came in each sequence: counted on the device, also those that the host does not know yet."""

from __future__ import annotations

from collections.abc import Sequence
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
    num_tokens: int = 0  #: of the sequence, that are counted; 0: what its place holds is another's
    has_sampled: bool = False  #: whether its place holds the token that was sampled last


@dataclass(slots=True)
class _Changes:
    """What the table does not hold yet."""

    begun: list[int] = field(default_factory=list)  #: places of sequences that are new
    places: list[NDArray[np.int64]] = field(default_factory=list)  #: of the tokens that the host knows
    token_ids: list[NDArray[np.int64]] = field(default_factory=list)
    in_output: list[NDArray[np.int64]] = field(default_factory=list)  #: 1 where the token is output, else 0
    awaited: list[int] = field(default_factory=list)  #: places of sequences whose sampled token is to be counted


class DevicePenalties:
    """A count for each token of the vocabulary and each sequence that has penalties.

    A launch goes `arrays`, `apply`, `note`. One that failed on its way, for want of memory, may begin anew.

    Attributes:
        counts: [places, vocab_size] int32: -1 of a token that did not come yet, else how often it is in the output.
            Room for more sequences is made by doubling.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.counts = torch.empty((0, vocab_size), dtype=torch.int32, device=device)
        self._sampled = torch.empty(0, dtype=torch.int64, device=device)  # [places]: what was sampled last
        self._counted: dict[str, _Counted] = {}
        self._free: list[int] = []

    def forget(self, seq_id: str) -> None:
        """Let another sequence have the place of this one; unknown ids are ignored."""
        counted = self._counted.pop(seq_id, None)
        if counted is not None:
            self._free.append(counted.place)

    def arrays(self, rows: Sequence[SamplingRow]) -> list[NDArray[Any]]:
        """Return what is to be uploaded before `apply`, with the same rows: all of them have penalties.

        Raises:
            InvariantError: a row awaits a token, and none was sampled for its sequence.
        """
        changes = _Changes()
        places = [self._take_in(row, changes) for row in rows]
        params = [row.params for row in rows]
        factors = [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params]
        return [
            np.array(places, np.int64),
            np.array(factors, np.float32).reshape(len(rows), 3),
            np.array(changes.begun, np.int64),
            _joined(changes.places),
            _joined(changes.token_ids),
            _joined(changes.in_output),
            np.array(changes.awaited, np.int64),
        ]

    def apply(self, rows: Sequence[SamplingRow], logits: Tensor, uploaded: Sequence[Tensor]) -> Tensor:
        """Count what `arrays` told of; return the rows with their penalties, [len(rows), vocab_size] float32.

        Args:
            rows: those that `arrays` was told of.
            logits: [len(rows), vocab_size] float32; not changed.
            uploaded: what `arrays` returned, on the device.
        """
        places, factors, begun, known_places, known_ids, in_output, awaited = uploaded
        self._reserve()
        vocab_size = self.counts.shape[1]
        self.counts.index_fill_(0, begun, -1)
        flat = self.counts.view(-1)
        where = torch.cat([known_places * vocab_size + known_ids, awaited * vocab_size + self._sampled[awaited]])
        more = torch.cat([in_output, torch.ones_like(awaited)]).to(torch.int32)
        flat[where] = flat[where].clamp(min=0)
        flat.scatter_add_(0, where, more)  # the only operation that cannot be done twice: from here on it is done
        for row in rows:
            self._counted[row.seq_id].num_tokens = row.num_tokens
        group = max(1, _GROUP_COUNTS // vocab_size)
        parts = [slice(begin, begin + group) for begin in range(0, len(places), group)]
        return torch.cat([_penalized(logits[part], self.counts[places[part]], factors[part]) for part in parts])

    def note(self, rows: Sequence[SamplingRow], uploaded: Sequence[Tensor], token_ids: Tensor) -> None:
        """Keep what was sampled for the rows that `arrays` was told of, [len(rows)] int64, for rows that await it."""
        self._sampled[uploaded[0]] = token_ids
        for row in rows:
            self._counted[row.seq_id].has_sampled = True

    def _take_in(self, row: SamplingRow, changes: _Changes) -> int:
        """Note what of a row's tokens is not counted yet; return the place of its sequence."""
        counted = self._counted.get(row.seq_id)
        if counted is None:
            place = self._free.pop() if self._free else len(self._counted)
            counted = self._counted[row.seq_id] = _Counted(place)
        if counted.num_tokens > row.num_tokens:
            counted.num_tokens, counted.has_sampled = 0, False
        if not counted.num_tokens:
            changes.begun.append(counted.place)
        new = np.array(row.token_ids[counted.num_tokens :], np.int64)
        if len(new):
            changes.places.append(np.full(len(new), counted.place))
            changes.token_ids.append(new)
            positions = np.arange(counted.num_tokens, len(row.token_ids))
            changes.in_output.append((positions >= row.num_prompt_tokens).astype(np.int64))
        if max(counted.num_tokens, len(row.token_ids)) < row.num_tokens:
            if not counted.has_sampled:
                raise InvariantError(f"sequence {row.seq_id!r} awaits a token, and none was sampled for it")
            changes.awaited.append(counted.place)
        return counted.place

    def _reserve(self) -> None:
        wanted = len(self._counted) + len(self._free)
        if wanted > len(self.counts):
            num_places = max(wanted, 2 * len(self.counts))
            self.counts, self._sampled = _lengthened(self.counts, num_places), _lengthened(self._sampled, num_places)


def _lengthened(table: Tensor, length: int) -> Tensor:
    longer = table.new_zeros((length, *table.shape[1:]))
    longer[: len(table)] = table
    return longer


def _joined(arrays: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate(arrays) if arrays else np.empty(0, np.int64)


def _penalized(logits: Tensor, counts: Tensor, factors: Tensor) -> Tensor:
    """Return [n, vocab] logits with the penalties of `factors`, [n, 3]: each operation is rounded, as on a CPU."""
    repetition, frequency, presence = factors.unsqueeze(2).unbind(1)
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    penalized = torch.where(counts >= 0, repeated, logits) - frequency * counts.clamp(min=0).float()
    return penalized - presence * (counts > 0)
