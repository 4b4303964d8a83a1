"""Where the KV of prompts came from: this pool, other holders by tier, a prefill worker, or the engine here."""

from __future__ import annotations

from collections import Counter

from engine.scheduling.sequence import RemotePull, Sequence
from messages.tier import Tier


class PromptCounts:
    """Prompt tokens since the start, each sequence's once; until then they are counted in the sequence."""

    def __init__(self) -> None:
        self._num_device_tokens = 0
        self._num_loaded_tokens: Counter[Tier] = Counter()
        self._num_pulled_tokens = 0
        self._num_computed_tokens = 0

    def stats(self) -> dict[str, int]:
        """Return the counters since the start, by name."""
        loaded = self._num_loaded_tokens
        return {
            "num_prompt_tokens_device": self._num_device_tokens,
            "num_prompt_tokens_peer": self._num_pulled_tokens + loaded["device"],
            "num_prompt_tokens_host": loaded["host"],
            "num_prompt_tokens_disk": loaded["disk"],
            "num_prompt_tokens_remote": loaded["remote"],
            "num_prompt_tokens_computed": self._num_computed_tokens,
        }

    def take(self, seq: Sequence) -> None:
        """Take in a sequence's prompt, once, when all of its KV is there, or about to be computed."""
        if seq.is_counted:
            return
        seq.is_counted = True
        self._num_device_tokens += seq.num_device_tokens
        self._num_loaded_tokens += seq.num_loaded_tokens
        self._num_pulled_tokens += seq.num_pulled_tokens
        self._num_computed_tokens += seq.num_prompt_tokens - seq.num_cached_tokens - seq.num_pulled_tokens


def count_found(seq: Sequence, index: int) -> None:
    """Count the prompt tokens of a block that the pool has: from where it was brought while `seq` waited."""
    tier = seq.brought.get(index)
    if tier is None:
        seq.num_device_tokens += seq.num_prompt_tokens_of(index)
    else:
        seq.num_loaded_tokens[tier] += seq.num_prompt_tokens_of(index)


def count_arrived(seq: Sequence, pull: RemotePull, index: int) -> None:
    """Count the prompt tokens of a block that was found, or came from a holder; not of a prompt that was taken in."""
    if seq.is_counted:
        return
    if index in pull.found:
        count_found(seq, index)
    elif index in pull.asked:
        seq.num_loaded_tokens[pull.asked[index].tier] += seq.num_prompt_tokens_of(index)
