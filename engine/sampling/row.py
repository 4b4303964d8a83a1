"""What is asked for one row of logits: whose next token it gives, and how that is chosen."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from engine.scheduling.plan import Sampled
from messages.errors import KvrayError
from messages.request import SamplingParams

#: Below it, temperature is greedy: float32 logits divided by less would overflow before they differ.
GREEDY_TEMPERATURE = 1e-5


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """The sequence whose next token a row of logits gives."""

    seq_id: str
    params: SamplingParams
    token_ids: Sequence[int]  #: prompt and output so far; not changed
    num_prompt_tokens: int
    num_awaited: int = 0  #: tokens behind `token_ids` that only the device knows yet

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence so far, awaited ones included."""
        return len(self.token_ids) + self.num_awaited

    @property
    def num_output_tokens(self) -> int:
        """Output tokens so far, which is the index of the token to be sampled."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, without a draw."""
        return self.params.temperature < GREEDY_TEMPERATURE

    @property
    def has_penalty(self) -> bool:
        """Whether tokens that came before get other logits."""
        params = self.params
        return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0

    @property
    def banned(self) -> tuple[int, ...]:
        """What must not come next, because too little has come."""
        return self.params.stop_token_ids if self.num_output_tokens < self.params.min_tokens else ()

    @property
    def is_shaped(self) -> bool:
        """Whether anything changes the row's logits before a token is chosen."""
        return self.has_penalty or bool(self.params.logit_bias or self.params.grammar or self.banned)


@dataclass(frozen=True, slots=True)
class LaunchedSamples:
    """Tokens that are on their way."""

    token_ids: Tensor  #: [num_rows] int64 on the logits' device, for what is launched next; void of a row with an error
    finish: Callable[[], list[Sampled | KvrayError]]  #: waits for them: each row's token, or why it has none; once


def uniform(seed: int, choice: int, index: int) -> float:
    """Return the number in [0, 1) that output token `index` of choice `choice` is drawn with: 53 bits of a hash."""
    digest = hashlib.blake2b(struct.pack("<QQQ", seed, choice, index), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
