"""Log-probabilities of tokens that are known, on whichever device their logits are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from engine.sampling.device_logprobs import launch_known
from engine.sampling.host_logprobs import token_logprobs
from messages.stream import TokenLogprob


def launch_prompt_logprobs(logits: Tensor, targets: Sequence[int], k: int) -> Callable[[], list[TokenLogprob]]:
    """Put the log-probabilities of known tokens on their way, with the k likeliest of each place.

    Args:
        logits: [n, vocab] float32: what precedes each target. Not needed any more once this returns.
        targets: n token ids.
        k: alternatives, 0 for none.

    Returns:
        What waits for them and returns them; to be called once. On a CPU they are there by then.
    """
    if logits.device.type == "cpu":
        found = token_logprobs(logits, targets, [k] * len(targets))
        return lambda: found
    return launch_known(logits, targets, k)
