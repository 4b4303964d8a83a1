"""Sampling on a CPU, row by row: the reference for every other device."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.kernels.cpu.native import load_kernels
from engine.sampling.candidates import argmax
from engine.sampling.grammar_masks import GrammarMasks, bans
from engine.sampling.host_draw import draw_rows
from engine.sampling.host_logprobs import token_logprobs
from engine.sampling.refusals import bias_refusal, choice_refusal
from engine.sampling.row import LaunchedSamples, SamplingRow
from engine.scheduling.plan import Sampled
from messages.errors import InvariantError, KvrayError, first_line
from messages.stream import TokenLogprob

logger = logging.getLogger(__name__)

#: [256, 8] bool: the bits of each byte, lowest first
_BITS = ((torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1).bool()


class HostSampler:
    """Samples where the logits are in the host's memory; what it launches is over at once."""

    def __init__(self, vocab_size: int, masks: GrammarMasks) -> None:
        self._vocab_size = vocab_size
        self._masks = masks
        self._penalties: dict[str, _Penalties] = {}
        self._copies = torch.empty((0, vocab_size))  # [most rows that one step changed, vocab_size] float32
        self._chosen: dict[str, int] = {}  # by sequence, what was sampled last

    def forget(self, seq_id: str) -> None:
        """Drop what is kept for a sequence; unknown ids are ignored."""
        self._penalties.pop(seq_id, None)
        self._chosen.pop(seq_id, None)

    def launch(self, logits: Tensor, rows: Sequence[SamplingRow]) -> LaunchedSamples:
        """Choose the next token of each row of `logits`, [len(rows), vocab_size] float32, as `Sampler.launch` says."""
        errors: dict[int, KvrayError] = {}
        shaped = self._shape_rows(logits, rows, errors)
        chosen = self._choose(logits, shaped, rows, errors)
        logprobs = _logprobs(logits, rows, chosen)
        outcomes = [
            errors[index] if index in errors else Sampled(chosen[index], logprobs.get(index))
            for index in range(len(rows))
        ]
        token_ids = [chosen.get(index, 0) for index in range(len(rows))]
        self._chosen.update(zip((row.seq_id for row in rows), token_ids, strict=True))
        return LaunchedSamples(torch.tensor(token_ids, dtype=torch.int64), lambda: outcomes)

    def _shape_rows(self, logits: Tensor, rows: Sequence[SamplingRow], errors: dict[int, KvrayError]) -> list[Tensor]:
        """Return the rows to choose from, each [vocab_size]: views of `logits`, copies where something is changed.

        They are valid until the next step, whose copies lie in the same place: fresh memory costs more than what is
        computed in it.
        """
        shaped = list(logits.unbind(0))
        changed = [index for index, row in enumerate(rows) if row.is_shaped]
        if self._copies.shape[0] < len(changed):
            self._copies = torch.empty((len(changed), self._vocab_size))
        for index, copy in zip(changed, self._copies, strict=False):
            row = rows[index]
            try:
                self._shape_row(shaped[index], copy, row)
                shaped[index] = copy
            except InvariantError:
                raise
            except KvrayError as error:
                errors[index] = error
            except Exception as error:  # the edge: one row's parameters must not end the others' step
                logger.exception("the next token of sequence %s cannot be chosen", row.seq_id)
                errors[index] = KvrayError(f"its next token cannot be chosen: {first_line(error)}")
        return shaped

    def _shape_row(self, logits: Tensor, shaped: Tensor, row: SamplingRow) -> None:
        """Write one row with all that its parameters change into `shaped`."""
        params = row.params
        if row.has_penalty:
            self._penalize(logits, shaped, row)
        else:
            shaped.copy_(logits)
        if params.logit_bias:
            self._add_bias(shaped, params.logit_bias)
        mask = None if params.grammar is None else self._masks.mask(row, params.grammar)
        if mask is not None:
            allowed = _BITS[torch.from_numpy(mask).view(torch.uint8).to(torch.int64)].view(-1)[: self._vocab_size]
            shaped.masked_fill_(~allowed, -torch.inf)
        if banned := bans(row, mask, self._vocab_size):
            shaped[torch.tensor(banned, dtype=torch.int64)] = -torch.inf

    def _penalize(self, logits: Tensor, shaped: Tensor, row: SamplingRow) -> None:
        penalties = self._penalties.get(row.seq_id)
        if penalties is None or penalties.num_tokens > row.num_tokens:
            penalties = self._penalties[row.seq_id] = _Penalties(row, self._vocab_size)
        penalties.update(row.token_ids)
        if penalties.num_tokens < row.num_tokens:
            if row.seq_id not in self._chosen:
                raise InvariantError(f"sequence {row.seq_id!r} awaits a token, and none was sampled for it")
            penalties.add([self._chosen[row.seq_id]])
        penalties.apply(logits, shaped)

    def _add_bias(self, shaped: Tensor, bias: dict[int, float]) -> None:
        refusal = bias_refusal(bias, self._vocab_size)
        if refusal is not None:
            raise refusal
        ids = torch.tensor(list(bias), dtype=torch.int64)
        shaped[ids] += torch.tensor(list(bias.values()), dtype=torch.float32)

    def _choose(
        self, logits: Tensor, shaped: list[Tensor], rows: Sequence[SamplingRow], errors: dict[int, KvrayError]
    ) -> dict[int, int]:
        """Choose a token id for each row. Rows whose likeliest logit is no finite number are put into `errors`."""
        chosen: dict[int, int] = {}
        tops: dict[int, float] = {}
        drawn: list[int] = []
        for index, row in enumerate(rows):
            if index in errors:
                continue
            if row.is_greedy:
                chosen[index], tops[index] = argmax(shaped[index])
            else:
                drawn.append(index)
        if drawn:
            ids, values = draw_rows([shaped[index] for index in drawn], [rows[index] for index in drawn])
            chosen.update(zip(drawn, ids, strict=True))
            tops.update(zip(drawn, values, strict=True))
        for index, top in tops.items():
            if not math.isfinite(top):
                errors[index] = choice_refusal(float(logits[index].max()), top)
                del chosen[index]
        return chosen


def _logprobs(logits: Tensor, rows: Sequence[SamplingRow], chosen: dict[int, int]) -> dict[int, TokenLogprob]:
    wanted = [index for index in chosen if rows[index].params.logprobs is not None]
    if not wanted:
        return {}
    ks = [rows[index].params.logprobs or 0 for index in wanted]
    return dict(zip(wanted, token_logprobs(logits[wanted], [chosen[index] for index in wanted], ks), strict=True))


class _Penalties:
    """What one sequence's tokens take from their logits: a count for each of the vocabulary.

    So a step takes as long after 131,072 tokens as after one, some 0.06 ms for 152,064 tokens in the compiled kernel
    (AVX-512, one thread). To pick the logits of 88,000 distinct tokens out and put them back takes 0.6 ms.
    """

    def __init__(self, row: SamplingRow, vocab_size: int) -> None:
        self.num_tokens = 0  #: of the sequence, that were taken in
        self._params = row.params
        self._num_prompt_tokens = row.num_prompt_tokens
        #: [vocab_size] int32: -1 of those that did not come yet, else how often each is in the output
        self._counts = torch.full((vocab_size,), -1, dtype=torch.int32)
        self._kernels = load_kernels()

    def update(self, token_ids: Sequence[int]) -> None:
        """Take in those of a sequence's first tokens that came since the last call."""
        self.add(token_ids[self.num_tokens :])

    def add(self, token_ids: Sequence[int]) -> None:
        """Take in the sequence's next tokens."""
        new = torch.from_numpy(np.array(token_ids, np.int64))
        output = new[max(0, self._num_prompt_tokens - self.num_tokens) :]
        self._counts[new] = self._counts[new].clamp(min=0)
        self._counts.index_add_(0, output, torch.ones_like(output, dtype=torch.int32))
        self.num_tokens += len(token_ids)

    def apply(self, logits: Tensor, out: Tensor) -> None:
        """Write `logits`, [vocab_size], with the penalties into `out`."""
        params, counts = self._params, self._counts
        if self._kernels is not None:
            self._kernels.penalize(logits, counts, params, out)
            return
        repeated = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
        penalized = torch.where(counts >= 0, repeated, logits) - params.frequency_penalty * counts.clamp(min=0).float()
        torch.sub(penalized, params.presence_penalty * (counts > 0), out=out)
