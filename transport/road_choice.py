"""Which road to take to one peer: decided from what roads were measured to do. Pure: no clock, no IO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_BACK_OFF_S = 1.0  #: after a first failure; doubles up to
_MAX_BACK_OFF_S = 60.0
#: Pulls smaller than this say more about latency than about rate.
_MIN_RATED_BYTES = 1 << 18
_NEWEST_WEIGHT = 0.2  #: of the newest rate in the mean
#: A one-sided road leaves the owner's cores to its own work: another must be so many times as fast to go before it.
_ONE_SIDED_WORTH = 2.0


@dataclass(slots=True)
class RoadState:
    """The state of one road to one peer."""

    road: str
    is_direct: bool
    is_one_sided: bool
    is_proven: bool = False  #: the last transfer over it went well
    bytes_per_s: float = 0.0  #: 0: never measured
    num_failed: int = 0
    num_failed_in_a_row: int = 0
    probe_at_s: float = 0.0  #: when it may be tried, if not proven


class RoadChoice:
    """Ranks the roads that both ends have: proven ones are taken, the others are probed, with back-off.

    Direct roads go before others, faster before slower, one-sided ones taken for twice as fast as they are; what is
    left is decided by the order given.
    """

    def __init__(self, roads: Sequence[tuple[str, bool, bool]]) -> None:
        """Choose among `roads`, (name, is_direct, is_one_sided), the preferred ones first; all are to be probed."""
        self.states = {name: RoadState(name, is_direct, is_one_sided) for name, is_direct, is_one_sided in roads}

    def proven(self) -> list[str]:
        """Return the roads that can be taken now, the best first."""
        usable = [state for state in self.states.values() if state.is_proven]
        return [s.road for s in sorted(usable, key=lambda s: (not s.is_direct, -_worth(s)))]

    def due_probes(self, now_s: float) -> list[str]:
        """Return the roads to probe now; those that are not direct only while no direct one works."""
        due = [s for s in self.states.values() if not s.is_proven and s.probe_at_s <= now_s]
        direct = [s.road for s in due if s.is_direct]
        needs_others = not direct and not any(s.is_proven and s.is_direct for s in self.states.values())
        return direct or [s.road for s in due if needs_others]

    def next_probe_s(self) -> float | None:
        """Return when `due_probes` may give something next; None: never, unless a road fails."""
        is_direct_proven = any(s.is_proven and s.is_direct for s in self.states.values())
        waiting = [s for s in self.states.values() if not s.is_proven and (s.is_direct or not is_direct_proven)]
        return min((s.probe_at_s for s in waiting), default=None)

    def on_pulled(self, road: str, num_bytes: int, seconds: float) -> None:
        """Note a pull or a probe that ended well: the road is proven, and its mean rate takes this one in."""
        state = self.states[road]
        state.is_proven = True
        state.num_failed_in_a_row = 0
        if num_bytes >= _MIN_RATED_BYTES or state.bytes_per_s == 0:
            rate = num_bytes / max(seconds, 1e-9)
            weight = _NEWEST_WEIGHT if state.bytes_per_s else 1.0
            state.bytes_per_s += weight * (rate - state.bytes_per_s)

    def on_failed(self, road: str, now_s: float) -> None:
        """Note a pull or a probe that failed: the road is not taken before a probe went well, tried later each time."""
        state = self.states[road]
        state.is_proven = False
        state.num_failed += 1
        state.probe_at_s = now_s + min(_BACK_OFF_S * 2**state.num_failed_in_a_row, _MAX_BACK_OFF_S)
        state.num_failed_in_a_row += 1


def _worth(state: RoadState) -> float:
    return state.bytes_per_s * (_ONE_SIDED_WORTH if state.is_one_sided else 1.0)
