"""What changes logits on a device before tokens are chosen: penalties, biases, grammar masks and bans, of all rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.sampling.device_penalties import DevicePenalties
from engine.sampling.grammar_masks import GrammarMasks, bans
from engine.sampling.refusals import bias_refusal
from engine.sampling.row import SamplingRow
from messages.errors import KvrayError, first_line

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Shaping:
    """What changes the logits of some rows; each entry of a list is of one of them."""

    penalized: list[int] = field(default_factory=list)  #: rows
    penalized_rows: list[SamplingRow] = field(default_factory=list)
    biases: list[NDArray[np.float64]] = field(default_factory=list)  #: [entries, 3]: row, token id, bias
    masked: list[int] = field(default_factory=list)  #: rows
    masks: list[NDArray[np.int32]] = field(default_factory=list)  #: [ceil(vocab_size / 32)], theirs
    bans: list[NDArray[np.int64]] = field(default_factory=list)  #: [entries, 2]: row, token id
    errors: dict[int, KvrayError] = field(default_factory=dict)  #: by row, why it cannot be shaped

    @property
    def is_empty(self) -> bool:
        """Whether no row's logits change."""
        return not any((self.penalized, self.biases, self.masked, self.bans))


class DeviceShaper:
    """Changes logits as the rows' parameters want it. A launch goes `gather`, `arrays`, `apply`, `note`."""

    def __init__(self, vocab_size: int, masks: GrammarMasks, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._masks = masks
        self._device = device
        self._penalties = DevicePenalties(vocab_size, device)

    def forget(self, seq_id: str) -> None:
        """Drop what is kept for a sequence; unknown ids are ignored."""
        self._penalties.forget(seq_id)

    def gather(self, rows: Sequence[SamplingRow]) -> Shaping:
        """Gather what changes the rows' logits. A row of which that cannot be said fails alone."""
        shaping = Shaping()
        for index, row in enumerate(rows):
            if not row.is_shaped:
                continue
            try:
                self._add(shaping, index, row)
            except KvrayError as error:
                shaping.errors[index] = error
            except Exception as error:  # the edge: one row's parameters must not end the others' step
                logger.exception("the next token of sequence %s cannot be chosen", row.seq_id)
                shaping.errors[index] = KvrayError(f"its next token cannot be chosen: {first_line(error)}")
        return shaping

    def arrays(self, shaping: Shaping) -> list[NDArray[Any]]:
        """Return what is to be uploaded before `apply`. Raises as `DevicePenalties.arrays` does."""
        if shaping.is_empty:
            return []
        biases = np.concatenate([np.empty((0, 3)), *shaping.biases])
        bans = np.concatenate([np.empty((0, 2), np.int64), *shaping.bans])
        num_words = -(-self._vocab_size // 32)
        return [
            np.array(shaping.penalized, np.int64),
            biases[:, 0].astype(np.int64) * self._vocab_size + biases[:, 1].astype(np.int64),
            biases[:, 2].astype(np.float32),
            np.array(shaping.masked, np.int64),
            np.concatenate([np.empty(0, np.int32), *shaping.masks]).reshape(-1, num_words),
            bans[:, 0] * self._vocab_size + bans[:, 1],
            *self._penalties.arrays(shaping.penalized_rows),
        ]

    def apply(self, logits: Tensor, shaping: Shaping, uploaded: Sequence[Tensor]) -> Tensor:
        """Return the logits to choose from, [n, vocab_size] float32: a copy where anything changes them.

        `uploaded` is what `arrays` returned, on the device.
        """
        if shaping.is_empty:
            return logits
        penalized, bias_places, biases, masked, masks, bans, *counting = uploaded
        shaped = logits.clone()
        flat = shaped.view(-1)
        if shaping.penalized:
            shaped[penalized] = self._penalties.apply(shaping.penalized_rows, logits[penalized], counting)
        if shaping.biases:
            flat[bias_places] = flat[bias_places] + biases
        if shaping.masked:
            bits = masks.unsqueeze(2) >> torch.arange(32, dtype=torch.int32, device=self._device)
            allowed = (bits & 1).view(len(masks), -1)[:, : self._vocab_size]
            shaped[masked] = shaped[masked].masked_fill(allowed == 0, -torch.inf)
        if shaping.bans:
            flat.index_fill_(0, bans, -torch.inf)
        return shaped

    def note(self, shaping: Shaping, uploaded: Sequence[Tensor], token_ids: Tensor) -> None:
        """Keep what was sampled, [n] int64, for rows that will await it."""
        if shaping.penalized:
            penalized, _, _, _, _, _, *counting = uploaded
            self._penalties.note(shaping.penalized_rows, counting, token_ids[penalized])

    def _add(self, shaping: Shaping, index: int, row: SamplingRow) -> None:
        params, vocab_size = row.params, self._vocab_size
        refusal = bias_refusal(params.logit_bias, vocab_size)
        if refusal is not None:
            raise refusal
        mask = None if params.grammar is None else self._masks.mask(row, params.grammar)
        if row.has_penalty:
            shaping.penalized.append(index)
            shaping.penalized_rows.append(row)
        if params.logit_bias:
            shaping.biases.append(np.array([(index, *each) for each in params.logit_bias.items()], np.float64))
        if mask is not None:
            shaping.masked.append(index)
            shaping.masks.append(mask)
        if banned := bans(row, mask, vocab_size):
            shaping.bans.append(np.array([(index, token_id) for token_id in banned], np.int64))
