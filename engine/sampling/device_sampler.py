"""Sampling on a device: all rows at once, no wait for the host before `finish`, one copy up and one down.

It gives what `host_sampler` gives. Runs on a CPU too, where it is held to that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.sampling.device_draw import DrawSettings, draw
from engine.sampling.device_logprobs import bits_of, from_columns, logprob_columns
from engine.sampling.device_shaping import DeviceShaper
from engine.sampling.grammar_masks import GrammarMasks
from engine.sampling.refusals import choice_refusal
from engine.sampling.row import LaunchedSamples, SamplingRow
from engine.sampling.transfers import Readback, upload
from engine.scheduling.plan import Sampled
from messages.errors import KvrayError
from messages.stream import TokenLogprob


class DeviceSampler:
    """Samples where the logits are; the host only says what is wanted, and reads the outcome."""

    def __init__(self, vocab_size: int, masks: GrammarMasks, device: torch.device) -> None:
        self._device = device
        self._shaper = DeviceShaper(vocab_size, masks, device)

    def forget(self, seq_id: str) -> None:
        """Drop what is kept for a sequence; unknown ids are ignored."""
        self._shaper.forget(seq_id)

    def launch(self, logits: Tensor, rows: Sequence[SamplingRow]) -> LaunchedSamples:
        """Put the choice of each row's token on its way, as `Sampler.launch` says.

        Args:
            logits: [len(rows), vocab_size] float32 on the device; what is launched later may write there.
            rows: the sequences.
        """
        if not rows:
            return LaunchedSamples(torch.empty(0, dtype=torch.int64, device=self._device), list)
        shaping = self._shaper.gather(rows)
        greedy = [index for index, row in enumerate(rows) if row.is_greedy]
        drawn = [index for index, row in enumerate(rows) if not row.is_greedy]
        told = [index for index, row in enumerate(rows) if row.params.logprobs is not None]
        indexes = [np.array(some, np.int64) for some in (greedy, drawn, told)]
        drawing = DrawSettings.arrays([rows[index] for index in drawn])
        uploaded = upload([*indexes, *drawing, *self._shaper.arrays(shaping)], self._device)
        num_settings = len(indexes) + len(drawing)
        at_greedy, at_drawn, at_told = uploaded[: len(indexes)]
        settings = DrawSettings.of(drawing, uploaded[len(indexes) : num_settings])
        shaped = self._shaper.apply(logits, shaping, uploaded[num_settings:])
        tops = shaped.amax(1)  # a NaN counts as the largest
        if not drawn:
            token_ids = shaped.argmax(1)  # the first of several
        elif not greedy:
            token_ids = draw(shaped, tops, settings)
        else:
            token_ids = torch.empty(len(rows), dtype=torch.int64, device=self._device)
            token_ids[at_greedy] = shaped[at_greedy].argmax(1)
            token_ids[at_drawn] = draw(shaped[at_drawn], tops[at_drawn], settings)
        self._shaper.note(shaping, uploaded[num_settings:], token_ids)
        facts = [token_ids, bits_of(tops), bits_of(tops if shaped is logits else logits.amax(1))]
        ks = [rows[index].params.logprobs or 0 for index in told]
        if told:
            facts.append(logprob_columns(logits[at_told], token_ids[at_told], max(ks)).view(-1))
        readback = Readback(torch.cat(facts))
        return LaunchedSamples(token_ids, lambda: _outcomes(readback.wait(), len(rows), shaping.errors, told, ks))


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
