"""What a scheduler is told of a request: the same at prefill and at decode, but for what only one of them wants."""

from __future__ import annotations

from array import array

from engine.scheduling.plan import SequenceSpec
from messages.request import GenerateRequest


def spec_of(request: GenerateRequest, token_ids: array[int], now_s: float) -> SequenceSpec:
    """Return the sequence that `request`, which came at `now_s`, asks for; `token_ids` are its tokens, unpacked."""
    return SequenceSpec(
        seq_id=request.request_id,
        token_ids=token_ids,
        num_prompt_tokens=request.num_prompt_tokens,
        params=request.params,
        salt=request.salt,
        tenant=request.tenant,
        hints=request.hints,
        priority=request.priority,
        deadline_s=None if request.deadline_s is None else now_s + request.deadline_s,
        held=request.held,
    )
