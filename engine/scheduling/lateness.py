"""How much longer first tokens take than was predicted of the queue before them: what such a prediction leaves out."""

from __future__ import annotations

_WEIGHT = 0.1  #: of a new observation
_LEAST_EXPECTED_S = 0.05  #: less says nothing about a queue
_MOST = 10.0


class Lateness:
    """Learns from each prompt that waited: later ones that went before it, and who else has the processors, count in.

    Attributes:
        factor: by which predictions of a queue are to be multiplied, 1 to 10.
    """

    def __init__(self) -> None:
        self.factor = 1.0

    def observe(self, expected_s: float, elapsed_s: float) -> None:
        """Learn that a first token took `elapsed_s`; its prompt and those before it were to take `expected_s`."""
        if expected_s >= _LEAST_EXPECTED_S:
            seen = min(max(1.0, elapsed_s / expected_s), _MOST)
            self.factor += _WEIGHT * (seen - self.factor)
