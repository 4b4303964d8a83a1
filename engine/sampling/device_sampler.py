"""Sampling on a device: all rows at once, no wait for the host before `finish`, one copy up and one down.

It gives what `host_sampler` gives. Runs on a CPU too, where it is held to that.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.sampling.device_draw import DrawSettings, draw
from engine.sampling.device_logprobs import bits_of, from_columns, logprob_columns
from engine.sampling.device_penalties import DevicePenalties
from engine.sampling.grammar_masks import GrammarMasks, allows_any
from engine.sampling.refusals import bias_refusal, choice_refusal
from engine.sampling.row import LaunchedSamples, SamplingRow
from engine.sampling.transfers import Readback, upload
from engine.scheduling.plan import Sampled
from messages.errors import KvrayError, first_line
from messages.stream import TokenLogprob

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Shaping:
    """What changes logits, of all rows together; each entry of a list is of one row."""

    penalized: list[int] = field(default_factory=list)  #: rows
    biases: list[NDArray[np.float64]] = field(default_factory=list)  #: [entries, 3]: row, token id, bias
    masked: list[int] = field(default_factory=list)  #: rows
    masks: list[NDArray[np.int32]] = field(default_factory=list)  #: [ceil(vocab_size / 32)], theirs
    bans: list[NDArray[np.int64]] = field(default_factory=list)  #: [entries, 2]: row, token id


class DeviceSampler:
    """Samples where the logits are; the host only says what is wanted, and reads the outcome."""

    def __init__(self, vocab_size: int, masks: GrammarMasks, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._masks = masks
        self._device = device
        self._penalties = DevicePenalties(vocab_size, device)
        self._last_rows: dict[str, int] = {}  # by sequence, its row in the last launch
        self._last_token_ids = torch.zeros(0, dtype=torch.int64, device=device)  # what that launch chose

    def forget(self, seq_id: str) -> None:
        """Drop what is kept for a sequence; unknown ids are ignored."""
        self._penalties.forget(seq_id)

    def launch(self, logits: Tensor, rows: Sequence[SamplingRow]) -> LaunchedSamples:
        """Put the choice of each row's token on its way, as `Sampler.launch` says.

        Args:
            logits: [len(rows), vocab_size] float32 on the device, which need not stay as they are from then on.
            rows: the sequences.
        """
        if not rows:
            return LaunchedSamples(self._last_token_ids[:0], list)
        errors: dict[int, KvrayError] = {}
        shaping = self._shaping_of(rows, errors)
        greedy = [index for index, row in enumerate(rows) if row.is_greedy]
        drawn = [index for index, row in enumerate(rows) if not row.is_greedy]
        told = [index for index, row in enumerate(rows) if row.params.logprobs is not None]
        indexes = [np.array(some, np.int64) for some in (greedy, drawn, told)]
        drawing = DrawSettings.arrays([rows[index] for index in drawn])
        shaping_arrays = self._shaping_arrays(shaping, rows)
        uploaded = upload([*indexes, *drawing, *shaping_arrays], self._device)
        at_greedy, at_drawn, at_told = uploaded[:3]
        settings = DrawSettings.of(drawing, uploaded[3 : 3 + len(drawing)])
        shaped = self._shape(logits, shaping, uploaded[3 + len(drawing) :])
        tops = shaped.amax(1)  # a NaN counts as the largest
        if not drawn:
            token_ids = shaped.argmax(1)  # the first of several
        elif not greedy:
            token_ids = draw(shaped, tops, settings)
        else:
            token_ids = torch.empty(len(rows), dtype=torch.int64, device=self._device)
            token_ids[at_greedy] = shaped[at_greedy].argmax(1)
            token_ids[at_drawn] = draw(shaped[at_drawn], tops[at_drawn], settings)
        self._last_rows = {row.seq_id: index for index, row in enumerate(rows)}
        self._last_token_ids = token_ids
        facts = [token_ids, bits_of(tops), bits_of(tops if shaped is logits else logits.amax(1))]
        ks = [rows[index].params.logprobs or 0 for index in told]
        if told:
            facts.append(logprob_columns(logits[at_told], token_ids[at_told], max(ks)).view(-1))
        readback = Readback(torch.cat(facts))
        return LaunchedSamples(token_ids, lambda: _outcomes(readback.wait(), len(rows), errors, told, ks))

    def _shaping_of(self, rows: Sequence[SamplingRow], errors: dict[int, KvrayError]) -> _Shaping:
        """Gather what changes the rows' logits; rows of which that cannot be said are put into `errors`."""
        shaping = _Shaping()
        for index, row in enumerate(rows):
            if not row.is_shaped:
                continue
            try:
                self._add(shaping, index, row)
            except KvrayError as error:
                errors[index] = error
            except Exception as error:  # the edge: one row's parameters must not end the others' step
                logger.exception("the next token of sequence %s cannot be chosen", row.seq_id)
                errors[index] = KvrayError(f"its next token cannot be chosen: {first_line(error)}")
        return shaping

    def _add(self, shaping: _Shaping, index: int, row: SamplingRow) -> None:
        params, vocab_size = row.params, self._vocab_size
        refusal = bias_refusal(params.logit_bias, vocab_size)
        if refusal is not None:
            raise refusal
        mask = None if params.grammar is None else self._masks.mask(row, params.grammar)
        if row.has_penalty:
            shaping.penalized.append(index)
        if params.logit_bias:
            shaping.biases.append(np.array([(index, *each) for each in params.logit_bias.items()], np.float64))
        if mask is not None:
            shaping.masked.append(index)
            shaping.masks.append(mask)
        banned = tuple(token_id for token_id in row.banned if 0 <= token_id < vocab_size)
        # Where nothing would be left, as of a complete grammar but its end, min_tokens cannot be had and yields.
        if banned and (len(banned) < vocab_size if mask is None else allows_any(mask, banned)):
            shaping.bans.append(np.array([(index, token_id) for token_id in banned], np.int64))

    def _shaping_arrays(self, shaping: _Shaping, rows: Sequence[SamplingRow]) -> list[NDArray[Any]]:
        """Return what `_shape` is to find on the device; nothing where no row's logits change."""
        if not any((shaping.penalized, shaping.biases, shaping.masked, shaping.bans)):
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
            *self._penalties.arrays([rows[index] for index in shaping.penalized], self._last_rows),
        ]

    def _shape(self, logits: Tensor, shaping: _Shaping, uploaded: Sequence[Tensor]) -> Tensor:
        """Return the logits to choose from, [n, vocab_size]: a copy where anything changes them."""
        if not uploaded:
            return logits
        penalized, bias_places, biases, masked, masks, bans, *counting = uploaded
        shaped = logits.clone()
        flat = shaped.view(-1)
        if shaping.penalized:
            shaped[penalized] = self._penalties.apply(logits[penalized], counting, self._last_token_ids)
        if shaping.biases:
            flat[bias_places] = flat[bias_places] + biases
        if shaping.masked:
            bits = masks.unsqueeze(2) >> torch.arange(32, dtype=torch.int32, device=self._device)
            allowed = (bits & 1).view(len(masks), -1)[:, : self._vocab_size]
            shaped[masked] = shaped[masked].masked_fill(allowed == 0, -torch.inf)
        if shaping.bans:
            flat.index_fill_(0, bans, -torch.inf)
        return shaped


def _outcomes(
    read: NDArray[np.int64], num_rows: int, errors: dict[int, KvrayError], told: Sequence[int], ks: Sequence[int]
) -> list[Sampled | KvrayError]:
    """Make of what was read back each row's token, or why it has none."""
    token_ids: list[int] = read[:num_rows].tolist()
    tops, own_tops = read[num_rows : 3 * num_rows].astype(np.int32).view(np.float32).reshape(2, num_rows).tolist()
    logprobs: dict[int, TokenLogprob] = {}
    if told:
        columns = read[3 * num_rows :].reshape(len(told), -1)
        found = from_columns(columns, [token_ids[index] for index in told], ks)
        logprobs = dict(zip(told, found, strict=True))
    outcomes: list[Sampled | KvrayError] = []
    for index, (token_id, top, own_top) in enumerate(zip(token_ids, tops, own_tops, strict=True)):
        if index in errors:
            outcomes.append(errors[index])
        elif not math.isfinite(top):
            outcomes.append(choice_refusal(own_top, top))
        else:
            outcomes.append(Sampled(token_id, logprobs.get(index)))
    return outcomes
