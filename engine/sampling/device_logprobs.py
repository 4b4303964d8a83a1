"""Log-probabilities on a device: numbers that are read back together, and made values on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.sampling.device_order import first_ids, keys_of, logits_of
from engine.sampling.device_weights import mass_units
from engine.sampling.settings import UNIT
from engine.sampling.transfers import Readback, upload
from messages.stream import TokenLogprob

#: Logits that one call compares: its intermediate results take some 40 bytes for each.
_GROUP_LOGITS = 1 << 23
#: Columns before those of the alternatives: the largest logit, the mass, the target's logit, what comes before it.
_NUM_FACTS = 4


def logprob_columns(logits: Tensor, targets: Tensor, k: int) -> Tensor:
    """Compute what `from_columns` makes log-probabilities of.

    Args:
        logits: [n, vocab] float32.
        targets: [n] int64.
        k: alternatives of each row, at most.

    Returns:
        [n, 4 + 2 * min(k, vocab)] int64.
    """
    group = max(1, _GROUP_LOGITS // logits.shape[1])
    parts = [slice(begin, begin + group) for begin in range(0, len(logits), group)]
    return torch.cat([_columns(logits[part], targets[part], k) for part in parts])


def from_columns(columns: NDArray[np.int64], targets: Sequence[int], ks: Sequence[int]) -> list[TokenLogprob]:
    """Make log-probabilities of n targets, with `ks` alternatives each, of what `logprob_columns` gave."""
    num_alternatives = (columns.shape[1] - _NUM_FACTS) // 2
    with np.errstate(invalid="ignore", divide="ignore"):
        log_norms = (_floats(columns[:, 0]) + np.log(columns[:, 1] / UNIT)).tolist()
    values, before = _floats(columns[:, 2]).tolist(), columns[:, 3].tolist()
    ids = columns[:, _NUM_FACTS:][:, :num_alternatives].tolist()
    logits = _floats(columns[:, _NUM_FACTS + num_alternatives :]).tolist()
    found = []
    for row, (target, k, log_norm) in enumerate(zip(targets, ks, log_norms, strict=True)):
        top = tuple((token_id, logit - log_norm) for token_id, logit in zip(ids[row][:k], logits[row][:k], strict=True))
        found.append(TokenLogprob(target, values[row] - log_norm, before[row] + 1, top))
    return found


def launch_known(logits: Tensor, targets: Sequence[int], k: int) -> Callable[[], list[TokenLogprob]]:
    """Do on a device as `logprobs.launch_prompt_logprobs` says."""
    if not len(targets):
        return list
    (there,) = upload([np.array(targets, np.int64)], logits.device)
    readback = Readback(logprob_columns(logits, there, k))
    return lambda: from_columns(readback.wait(), targets, [k] * len(targets))


def bits_of(numbers: Tensor) -> Tensor:
    """Return the bits of float32 numbers as int64, of which `_floats` makes them again."""
    return numbers.view(torch.int32).to(torch.int64)


def _floats(bits: NDArray[np.int64]) -> NDArray[np.float32]:
    return np.ascontiguousarray(bits.astype(np.int32)).view(np.float32)


def _columns(logits: Tensor, targets: Tensor, k: int) -> Tensor:
    vocab_size = logits.shape[1]
    tops = logits.amax(1)
    chosen = targets.unsqueeze(1)
    at_target = logits.gather(1, chosen)
    before = (logits > at_target).sum(1)
    before += ((logits == at_target) & (torch.arange(vocab_size, device=logits.device) < chosen)).sum(1)
    mass = mass_units(logits, tops, torch.ones_like(tops))
    facts = torch.stack([bits_of(tops), mass, bits_of(at_target.squeeze(1)), before], dim=1)
    keys, ids = first_ids(keys_of(logits), min(k, vocab_size))
    return torch.cat([facts, ids, bits_of(logits_of(keys))], dim=1)
