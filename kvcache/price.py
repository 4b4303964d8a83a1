"""The one price: seconds to compute KV and seconds to move it, learned from what was measured.

Whoever decides where a prompt's KV comes from decides by these: the router and the fallback without one, the scheduler
of a decode worker, and whoever keeps blocks in other tiers. Prices travel as values (messages.price); pure: no clock.

    here   queue + compute                          + what those who run here lose meanwhile
    there  queue + compute at the source + handoff + what moving takes longer than computing
           (blocks are pulled while the rest is computed)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from messages.price import ComputePrice, MovePrice
from messages.tier import Tier

_FORGET = 0.97  #: weight of an observation against the one after it: the last hundred or so count
_SWEEPS = 3
STEP_TOKENS = 2048  #: of a long prompt's steps, about
_NUM_HANDOFFS = 8  #: the least of so many counts: others' work and first times only ever add

#: What a second that another sequence stalls is worth, in seconds of time to first token.
HARM_WEIGHT = 0.2
#: A prompt of which no more tokens are to be computed is short: workers keep a share for such.
SHORT_TOKENS = 256
#: A worker gives short prompts every second step first, so that they wait about so many times their own queue.
SHORT_WAITS = 2.0
#: Of a worker's slots and blocks, what no other prompt may take.
SHORT_SHARE = 1 / 16
#: A worker computes what was placed elsewhere only where that is so much cheaper: predictions are no better.
_CLEARLY = 0.75

#: What is assumed until it is measured.
ASSUMED_COMPUTE = ComputePrice(token_s=1e-3)
ASSUMED_MOVE = MovePrice(source="", road="", fixed_s=0.0, byte_s=1e-9, handoff_s=0.005)
#: A disk brings 0.5 GB/s, a store of objects 0.1.
ASSUMED_MOVES: dict[Tier, MovePrice] = {
    "device": ASSUMED_MOVE,
    "host": ASSUMED_MOVE,
    "disk": MovePrice(source="", tier="disk", road="", fixed_s=0.002, byte_s=2e-9, handoff_s=0.005),
    "remote": MovePrice(source="", tier="remote", road="", fixed_s=0.1, byte_s=1e-8, handoff_s=0.005),
}


class LearnedPrices:
    """Non-negative prices of features, whose sum is a duration.

    They are the least squares of the relative error, with forgetting, by a few sweeps of coordinate descent from the
    last prices. What is not seen any more keeps its price.
    """

    def __init__(self, num_features: int) -> None:
        self._normal = [[0.0] * num_features for _ in range(num_features)]
        self._target = [0.0] * num_features
        self.prices = [0.0] * num_features  #: seconds for one of each feature

    def observe(self, features: Sequence[float], elapsed_s: float) -> None:
        """Learn that something with these features took `elapsed_s`, which is above 0."""
        weight = 1.0 / (elapsed_s * elapsed_s)
        indexes = range(len(self.prices))
        for i in indexes:
            row, xi = self._normal[i], features[i] * weight
            for j in indexes:
                row[j] = _FORGET * row[j] + xi * features[j]
            self._target[i] = _FORGET * self._target[i] + xi * elapsed_s
        prices = self.prices
        for _ in range(_SWEEPS):
            for i in indexes:
                row = self._normal[i]
                if row[i] > 1e-200:  # else it was not seen, or so long ago that the last price must do
                    rest = sum(row[j] * prices[j] for j in indexes if j != i)
                    prices[i] = max(0.0, (self._target[i] - rest) / row[i])

    def seconds(self, features: Sequence[float]) -> float:
        """Return the predicted duration, in seconds, of something with these features."""
        return sum(price * value for price, value in zip(self.prices, features, strict=True))


class MoveCost:
    """Learns what blocks from one source cost: each pull and each handoff is observed."""

    def __init__(self, source: str, tier: Tier = "device") -> None:
        self._source, self._tier = source, tier
        self._road = ""
        self._pulls = LearnedPrices(2)  # 1, bytes
        self._handoffs_s: deque[float] = deque(maxlen=_NUM_HANDOFFS)

    def observe_pull(self, road: str, num_bytes: int, elapsed_s: float) -> None:
        """Learn from a pull or a probe that went well; another road than the last one's begins anew."""
        if road != self._road:
            self._road, self._pulls = road, LearnedPrices(2)
        if elapsed_s > 0:
            self._pulls.observe((1.0, float(num_bytes)), elapsed_s)

    def observe_handoff(self, elapsed_s: float, source_s: float, num_bytes: int) -> None:
        """Learn from a prompt whose KV came whole.

        `elapsed_s`: from asking until it lay here. `source_s`: what of that passed at the source, from the question to
        the last block's publication. `num_bytes`: pulled.
        """
        hidden_s = max(0.0, self._pulls.seconds((1.0, float(num_bytes))) - source_s)
        self._handoffs_s.append(max(0.0, elapsed_s - source_s - hidden_s))

    def observe_load(self, tier: Tier, num_bytes: int, elapsed_s: float) -> None:
        """Learn from blocks that their owner had to read from a slower tier: from the question until they lay here."""
        self.observe_pull(tier, num_bytes, elapsed_s)
        self._handoffs_s.append(0.0)

    @property
    def price(self) -> MovePrice | None:
        """The price learned so far; None before the first pull."""
        if not self._road:
            return None
        fixed_s, byte_s = self._pulls.prices
        handoff_s = min(self._handoffs_s, default=ASSUMED_MOVE.handoff_s)
        return MovePrice(
            source=self._source,
            tier=self._tier,
            road=self._road,
            fixed_s=fixed_s,
            byte_s=byte_s,
            handoff_s=handoff_s,
        )


class Computation(NamedTuple):
    """The parts of computing the KV of some tokens, which have a price each."""

    num_steps: int
    num_tokens: int
    num_pairs: float  #: of a query and a key

    @classmethod
    def of(cls, start: int, end: int) -> Computation:
        """Count what tokens [start, end) of a prompt take, the KV of its first `start` tokens being held."""
        num_tokens = end - start
        # the query at position p meets p + 1 keys
        return cls(-(-num_tokens // STEP_TOKENS), num_tokens, num_tokens * (start + end + 1) / 2)


def compute_s(price: ComputePrice, computation: Computation) -> float:
    """Return the seconds that `computation` takes."""
    num_steps, num_tokens, num_pairs = computation
    return num_steps * price.step_s + num_tokens * price.token_s + num_pairs * price.pair_s


def move_s(price: MovePrice, num_bytes: int) -> float:
    """Return the seconds that a pull of `num_bytes` takes."""
    return price.fixed_s + num_bytes * price.byte_s


def harm_s(computing_s: float, num_beside: int) -> float:
    """Return what `computing_s` of prefill costs those who run beside it, in seconds of time to first token.

    They are `num_beside` sequences, and one that may come meanwhile.
    """
    return HARM_WEIGHT * computing_s * (num_beside + 1)


def handoff_s(price: MovePrice, num_bytes: int, computing_s: float) -> float:
    """Return the seconds that a handoff adds to `computing_s` at the source, if `num_bytes` are to be pulled."""
    return price.handoff_s + max(0.0, move_s(price, num_bytes) - computing_s)


def is_clearly_cheaper(cost_s: float, than_s: float) -> bool:
    """Tell whether `cost_s` is so far below `than_s` that a placement by the latter is not followed."""
    return cost_s < _CLEARLY * than_s
