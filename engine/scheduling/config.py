"""What a scheduler is told at its start."""

from __future__ import annotations

from dataclasses import dataclass

from messages.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """The scheduler's limits and targets.

    Raises:
        ConfigError: a number makes no sense.
    """

    max_model_len: int  #: tokens, prompt and output
    vocab_size: int = 1 << 32  #: token ids are below it: what the embedding has, and what crosses processes at most
    max_num_seqs: int = 256  #: running or pulling at once
    max_num_batched_tokens: int = 2048  #: in one step; a row for each decode and one chunk fit in any case
    chunk_quantum_tokens: int = 256  #: prefill chunks end at multiples of it
    itl_target_s: float = 0.1  #: steps with decodes take no more prefill than fits in it, but always one chunk
    remote_timeout_s: float = 30.0  #: from AskRemote to the end of the last pull
    watermark: float = 0.01  #: share of the pool left free at admission (at least a block), for who runs to grow into
    block_bytes: int = 0  #: of a block, by which loading is priced
    plans_ahead: bool = False  #: while a step runs the next one may be wanted
    has_lower_tiers: bool = False  #: then OffloadBlocks tells what sequences wrote

    def __post_init__(self) -> None:
        for name in ("max_model_len", "vocab_size", "max_num_seqs", "max_num_batched_tokens", "chunk_quantum_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; at least 1 is wanted")
        if not 0 <= self.watermark < 1:
            raise ConfigError(f"watermark is {self.watermark}; a share from 0 up to 1 is wanted")
