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
        kinds = (greedy, drawn) if greedy and drawn else ()  # where there is one kind of rows it has them all
        indexes = [np.array(some, np.int64) for some in (*kinds, *([told] if told else []))]
        drawing = DrawSettings.arrays([rows[index] for index in drawn]) if drawn else []
        uploaded = upload([*indexes, *drawing, *self._shaper.arrays(shaping)], self._device)
        num_settings = len(indexes) + len(drawing)
        settings = DrawSettings.of(drawing, uploaded[len(indexes) : num_settings]) if drawn else None
        shaped = self._shaper.apply(logits, shaping, uploaded[num_settings:])
        token_ids, tops = _choose(shaped, settings, uploaded[: len(kinds)])
        self._shaper.note(shaping, uploaded[num_settings:], token_ids)
        facts = [token_ids, bits_of(tops), bits_of(tops if shaped is logits else logits.amax(1))]
        ks = [rows[index].params.logprobs or 0 for index in told]
        if told:
            at_told = uploaded[len(kinds)]
            facts.append(logprob_columns(logits[at_told], token_ids[at_told], max(ks)).view(-1))
        readback = Readback(torch.cat(facts))
        return LaunchedSamples(token_ids, lambda: _outcomes(readback.wait(), len(rows), shaping.errors, told, ks))


def _choose(logits: Tensor, settings: DrawSettings | None, kinds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Choose a token of each row of [n, vocab_size]; return their ids, [n] int64, and the largest logits, [n] float32.

    `settings` are of the rows that are drawn, None: none is. `kinds` are the greedy rows and those that are drawn,
    where there are both. A NaN counts as the largest logit; of several that are largest the first is taken.
    """
    if settings is None:
        token_ids = logits.argmax(1)
        return token_ids, logits.gather(1, token_ids.unsqueeze(1)).squeeze(1)
    tops = logits.amax(1)
    if not kinds:
        return draw(logits, tops, settings), tops
    greedy, drawn = kinds
    token_ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    token_ids[greedy] = logits[greedy].argmax(1)
    token_ids[drawn] = draw(logits[drawn], tops[drawn], settings)
    return token_ids, tops


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
