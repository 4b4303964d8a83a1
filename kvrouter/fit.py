"""What fits whom: workers each other, and requests workers."""

from __future__ import annotations

from messages.fleet import WorkerInfo
from messages.route import RouteRequest

#: Roads that end at the node.
NODE_ROADS = frozenset({"shm", "loopback"})


def can_hand_over(prefill: WorkerInfo, decode: WorkerInfo) -> bool:
    """Tell whether `decode` can use and reach what `prefill` publishes."""
    if (prefill.fingerprint, prefill.block_size, prefill.block_bytes) != (
        decode.fingerprint,
        decode.block_size,
        decode.block_bytes,
    ):
        return False
    roads = set(prefill.roads) & set(decode.roads)
    if prefill.node_id != decode.node_id:
        roads -= NODE_ROADS
    return bool(roads)


def can_ever_hold(worker: WorkerInfo, request: RouteRequest) -> bool:
    """Tell whether the prompt and one token more fit on `worker` when it is idle."""
    num_tokens = max(request.num_prompt_tokens, *request.other_prompts, 0)
    return num_tokens < worker.max_model_len and ceil_div(num_tokens + 1, worker.block_size) <= worker.num_blocks


def blocks_wanted(request: RouteRequest, block_size: int) -> int:
    """Count the blocks for the prompts and the first tokens of each choice."""
    prompts = (request.num_prompt_tokens, *request.other_prompts)
    return sum(ceil_div(num_tokens, block_size) for num_tokens in prompts) + request.num_sequences


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)
