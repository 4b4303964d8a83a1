"""What a step costs, learned from the steps that ran, and how much prefill fits beside the decodes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

from engine.scheduling.plan import SequenceStep
from kvcache.price import LearnedPrices
from messages.price import ComputePrice

# A step that takes so many times what it was predicted to, and so many seconds at least, hangs.
_HANGS_FACTOR = 20.0
_HANGS_FLOOR_S = 30.0
_HANGS_UNMEASURED_S = 600.0  # before any step was measured
_FORGET = 0.97  # weight of a step's rate against the one after it
_NUM_FEATURES = 5
_PREFILL_TOKENS = 3


class StepCost:
    """Learns what a step costs, in seconds, as a sum of prices.

    Features: 1, decode rows, KV tokens they read, prefill tokens, query-key pairs of prefill.
    """

    def __init__(self) -> None:
        self._learned = LearnedPrices(_NUM_FEATURES)
        self._prefill_tokens = 0.0  # both forgetting; their ratio is the rate
        self._prefill_s = 0.0
        self._decode_s: deque[float] = deque(maxlen=64)

    @property
    def is_prefill_measured(self) -> bool:
        """Whether a step with prefill was seen."""
        return self._prefill_s > 0

    @property
    def price(self) -> ComputePrice | None:
        """The price learned so far; None before the first step with prefill."""
        if not self.is_prefill_measured:
            return None
        step_s, row_s, row_key_s, token_s, pair_s = self._learned.prices
        return ComputePrice(step_s=step_s, row_s=row_s, row_key_s=row_key_s, token_s=token_s, pair_s=pair_s)

    @property
    def prefill_tokens_per_s(self) -> float:
        """Rate of recent steps with prefill, the time of decodes beside it included; 0 before the first."""
        return self._prefill_tokens / self._prefill_s if self._prefill_s > 0 else 0.0

    @property
    def decode_step_s(self) -> float:
        """Median of the last 64 steps with decode rows: the ITL that running sequences see; 0 before the first."""
        return median(self._decode_s) if self._decode_s else 0.0

    def observe(self, parts: Sequence[SequenceStep], elapsed_s: float) -> None:
        """Learn from a step that took `elapsed_s`; a step without a measured time teaches nothing."""
        if elapsed_s <= 0 or not parts:
            return
        x = features(parts)
        if x[1]:
            self._decode_s.append(elapsed_s)
        if x[_PREFILL_TOKENS]:
            self._prefill_tokens = _FORGET * self._prefill_tokens + x[_PREFILL_TOKENS]
            self._prefill_s = _FORGET * self._prefill_s + elapsed_s
        self._learned.observe(x, elapsed_s)

    def seconds(self, x: Sequence[float]) -> float:
        """Return the predicted duration, in seconds, of a step with these features."""
        return self._learned.seconds(x)

    def bound_s(self, parts: Sequence[SequenceStep]) -> float:
        """Return how many seconds a step may take before it counts as one that will never end."""
        if not self.is_prefill_measured:
            return _HANGS_UNMEASURED_S
        return max(_HANGS_FLOOR_S, _HANGS_FACTOR * self.seconds(features(parts)))


def features(parts: Sequence[SequenceStep]) -> list[float]:
    """Count a step's features, in the order of StepCost."""
    x = [1.0, 0.0, 0.0, 0.0, 0.0]
    for part in parts:
        add_features(x, part.start, part.end, is_decode=part.kind == "decode")
    return x


def add_features(x: list[float], start: int, end: int, *, is_decode: bool) -> None:
    """Add tokens [start, end) of one sequence to the features `x` of a step."""
    column = 1 if is_decode else _PREFILL_TOKENS
    num_tokens = end - start
    x[column] += num_tokens
    x[column + 1] += num_tokens * (start + end + 1) / 2  # query at position p sees p + 1 keys


class ChunkBudget:
    """Decides how many tokens each chunk of one step gets.

    Prefill chunks end at fixed multiples of the quantum from position 0, or at the end of the prompt: borders must not
    depend on load, or the bits of the KV would. Replays of generated tokens may end anywhere. Beside decodes, chunks
    stop where the step would pass the ITL target, but the first chunk always gets one quantum.
    """

    def __init__(
        self,
        cost: StepCost,
        *,
        max_tokens: int,
        quantum_tokens: int,
        decode_parts: Sequence[SequenceStep],
        target_s: float,
    ) -> None:
        self._cost = cost
        self._left_tokens = max(max_tokens - len(decode_parts), quantum_tokens)
        self._quantum = quantum_tokens
        self._target_s = target_s if decode_parts else None
        self._features = features(decode_parts)
        self._is_empty = True

    def end_of(self, start: int, num_prompt_tokens: int, num_tokens: int) -> int:
        """Return one past the last token of the next chunk, which begins at `start`; `start` where none fits."""
        is_replay = start >= num_prompt_tokens
        stop = num_tokens if is_replay else num_prompt_tokens
        origin = start if is_replay else 0
        end = start
        while end < stop:
            border = min(stop, origin + ((end - origin) // self._quantum + 1) * self._quantum)
            if border - start > self._left_tokens:
                break
            is_first = self._is_empty and end == start
            if not is_first and not self._fits(start, border, is_replay=is_replay):
                break
            end = border
        return end

    def spend(self, start: int, end: int, num_prompt_tokens: int) -> None:
        """Take the chunk [start, end) off the budget."""
        add_features(self._features, start, end, is_decode=start >= num_prompt_tokens)
        self._left_tokens -= end - start
        self._is_empty = False

    def _fits(self, start: int, end: int, *, is_replay: bool) -> bool:
        if self._target_s is None:
            return True
        if not self._cost.is_prefill_measured:
            return False
        x = self._features.copy()
        add_features(x, start, end, is_decode=is_replay)
        return self._cost.seconds(x) <= self._target_s
