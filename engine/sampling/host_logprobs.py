"""Log-probabilities on a CPU: a row at a time. Rank and alternatives follow the one order of candidates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.sampling.candidates import Candidates, leading
from engine.sampling.host_draw import mass
from messages.stream import TokenLogprob


def token_logprobs(logits: Tensor, targets: Sequence[int], ks: Sequence[int]) -> list[TokenLogprob]:
    """Compute the log-probability of a token of each row, with the likeliest ones.

    Args:
        logits: [n, vocab] float32.
        targets: n token ids.
        ks: alternatives of each, 0 for none.
    """
    vocab_size = logits.shape[1]
    token_ids = torch.arange(vocab_size)
    found = []
    for index, (target, k) in enumerate(zip(targets, ks, strict=True)):
        row = logits[index]
        first = leading(row.unsqueeze(0), min(max(k, 0) + 1, vocab_size))
        with np.errstate(invalid="ignore", divide="ignore"):  # what is not finite shows in the answer
            log_norm = float((first.tops + np.log(mass(row.unsqueeze(0), first.tops, np.ones(1, np.float32))))[0])
        value = float(row[target])
        rank = int((row > value).sum() + ((row == value) & (token_ids < target)).sum()) + 1
        top = tuple((token_id, logit - log_norm) for token_id, logit in _first_k(row, first, k))
        found.append(TokenLogprob(target, value - log_norm, rank, top))
    return found


def _first_k(logits: Tensor, first: Candidates, k: int) -> list[tuple[int, float]]:
    """Return (token id, logit) of the first k of a row, [vocab], whose sure candidates may end before masked ones."""
    k = min(k, logits.shape[0])
    ids, values = first.ids[0, :k].tolist(), first.values[0, :k].tolist()
    num_sure = int(first.num_sure[0])
    if num_sure < k:
        tied = (logits == values[num_sure]).nonzero().squeeze(1)[: k - num_sure].tolist()
        ids[num_sure:] = tied
    return list(zip(ids, values, strict=True))
