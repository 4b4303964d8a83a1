"""A ledger that is driven by hand, without a scheduler above it. Blocks of 4 tokens."""

from __future__ import annotations

from engine.scheduling.ledger import SequenceLedger
from engine.scheduling.plan import SequenceSpec
from engine.scheduling.sequence import Sequence
from kvcache.locations import BlockLocation
from kvcache.names import BlockNamer, block_names, pack_tokens, split_names
from kvcache.pool import BlockPool
from messages.request import SamplingParams


class LedgerBench:
    """Sequences are added by id and brought into the phase that a test is about."""

    def __init__(self, num_blocks: int = 16) -> None:
        self.pool = BlockPool(num_blocks, 4)
        self.ledger = SequenceLedger(self.pool)
        self.num_arrived = 0

    def waiting(self, seq_id: str, prompt: list[int] | int, *, generated: int = 0, **fields: object) -> Sequence:
        """`prompt`: tokens, or how many of those that this id alone has."""
        if isinstance(prompt, int):
            prompt = [1000 * sum(seq_id.encode()) + i for i in range(prompt)]
        params = SamplingParams(max_tokens=100, prompt_logprobs=fields.pop("prompt_logprobs", None))  # type: ignore[arg-type]
        spec = SequenceSpec(
            seq_id=seq_id,
            token_ids=prompt + [7] * generated,
            num_prompt_tokens=len(prompt),
            params=params,
            **fields,  # type: ignore[arg-type]
        )
        seq = Sequence(spec, order=self.num_arrived, namer=BlockNamer(b"model", b"", 4), block_size=4)
        self.num_arrived += 1
        self.ledger.enqueue(seq)
        return seq

    def running(self, seq_id: str, prompt: list[int] | int, **fields: object) -> Sequence:
        """It starts with what the pool holds of its prompt."""
        seq = self.waiting(seq_id, prompt, **fields)
        self.ledger.admit(seq, self.pool.match(seq.names[: seq.max_match_blocks]))
        return seq

    def pulling(self, seq_id: str, prompt: list[int] | int, **fields: object) -> Sequence:
        seq = self.running(seq_id, prompt, **fields)
        self.ledger.begin_pull(seq, deadline_s=30.0)
        return seq

    def compute(self, seq: Sequence, end: int) -> None:
        """As a step does it: blocks, then what they hold by name."""
        assert self.ledger.reserve(seq, end)
        self.ledger.commit_up_to(seq, end)

    def append(self, seq: Sequence, token_id: int = 7) -> None:
        seq.token_ids.append(token_id)
        seq.has_emitted = True

    def hold(self, prompt: list[int]) -> None:
        """Somebody computed `prompt` and is gone; its full blocks are still there."""
        seq = self.running(f"gone {self.num_arrived}", prompt)
        self.compute(seq, len(prompt))
        self.ledger.end(seq)


def locations(prompt: list[int], begin: int = 0, end: int | None = None) -> list[BlockLocation]:
    """What a peer would offer of `prompt`."""
    names = split_names(block_names(b"model", b"", pack_tokens(prompt), 4))
    num_blocks = (len(prompt) + 3) // 4
    return [
        BlockLocation(i, 90 + i, 5, names[i] if i < len(names) else b"", min(4, len(prompt) - 4 * i))
        for i in range(begin, num_blocks if end is None else end)
    ]
