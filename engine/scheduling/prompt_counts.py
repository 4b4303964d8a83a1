"""Where the KV of prompts came from: this pool, other holders by tier, a prefill worker, or the engine here."""

from __future__ import annotations

from collections import Counter

from engine.scheduling.sequence import RemotePull, Sequence
from messages.request import Copy
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


def count_head(seq: Sequence, num_blocks: int) -> None:
    """Count the prompt tokens of so many blocks at the head that the pool has, of a sequence that begins."""
    if seq.brought:
        for index in range(num_blocks):
            _count(seq, index, seq.brought.get(index))
    else:
        seq.num_device_tokens = min(num_blocks * seq.block_size, seq.num_prompt_tokens)
        seq.origins.note(0, seq.num_device_tokens, "device")


def count_arrived(seq: Sequence, pull: RemotePull, index: int) -> None:
    """Count the prompt tokens of a block that was found, or came from a holder; not of a prompt that was taken in."""
    if not seq.is_counted and (index in pull.found or index in pull.asked):
        _count(seq, index, _copy(seq, pull, index))


def note_coming(seq: Sequence, pull: RemotePull, end_tokens: int) -> None:
    """Note where those tokens before `end_tokens` come from that were found, or were asked of holders."""
    first = last = -1  # of a run of blocks of one copy: what is noted a block takes as long as what is noted a run
    copy: Copy | None = None
    for index in sorted({*pull.found, *pull.asked}):
        if index * seq.block_size >= end_tokens:
            break
        now = _copy(seq, pull, index)
        if first < 0 or index != last + 1 or now != copy:
            _note(seq, first, last, copy)
            first, copy = index, now
        last = index
    _note(seq, first, last, copy)


def _copy(seq: Sequence, pull: RemotePull, index: int) -> Copy | None:
    """Return where a block was brought from that is here or coming; None: it was here before."""
    return seq.brought.get(index) if index in pull.found else pull.asked[index]


def _count(seq: Sequence, index: int, copy: Copy | None) -> None:
    num_tokens = seq.num_prompt_tokens_of(index)
    if copy is None:
        seq.num_device_tokens += num_tokens
    else:
        seq.num_loaded_tokens[copy.tier] += num_tokens
    _note(seq, index, index, copy)


def _note(seq: Sequence, first: int, last: int, copy: Copy | None) -> None:
    """Note where blocks `first` to `last` of a prompt come from, none of them where `first` is negative."""
    if first < 0:
        return
    begin = first * seq.block_size
    end = last * seq.block_size + seq.num_prompt_tokens_of(last)
    if copy is None:
        seq.origins.note(begin, end, "device")
    else:
        seq.origins.note_copy(begin, end, copy)
