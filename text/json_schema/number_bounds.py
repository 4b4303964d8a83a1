"""Bounds of numbers, drawn inwards to what the grammar library can count with: it reads bounds as doubles.

Bounds of integers become 64-bit ones, bounds of other numbers doubles of at most 2**53. What is outside is given up,
which keeps every output within the schema.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, Final

from text.json_schema.places import Place, refused, shown

KEYWORDS: Final = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf")
_MOST_INTEGER: Final = 2**63 - 1  # as a double 2**63, which the library cuts down to it again
_LEAST_INTEGER: Final = -(2**63 - 1024)  # a double; -2**63 is one more than it can negate
_MOST: Final = 2.0**53


def bounded(place: Place, *, is_integer: bool) -> dict[str, Any]:
    """Write a schema's bounds of numbers anew.

    Raises:
        RequestError: no number lies within them, or one is malformed; names the keyword.
    """
    node = place.node
    low, is_low_excluded = _bound(place, "minimum", "exclusiveMinimum")
    high, is_high_excluded = _bound(place, "maximum", "exclusiveMaximum")
    step = _number(place, "multipleOf") if "multipleOf" in node else None
    if step is not None and not 0 < step <= _MOST:
        raise refused("multipleOf", place, f"got {shown(node['multipleOf'])}, want a number above 0, at most 2**53")
    if is_integer:
        if low is not None:
            low = Fraction(_integer_above(math.floor(low) + 1 if is_low_excluded else math.ceil(low)))
        if high is not None:
            high = Fraction(_integer_below(math.ceil(high) - 1 if is_high_excluded else math.floor(high)))
        is_low_excluded = is_high_excluded = False
    else:
        if low is not None:
            low = max(_double(low, math.inf), Fraction(-_MOST))
        if high is not None:
            high = min(_double(high, -math.inf), Fraction(_MOST))
    _check_room(place, low, high, step, most=Fraction(_MOST_INTEGER if is_integer else _MOST))
    number = int if is_integer else float
    written: dict[str, Any] = {}
    if low is not None:
        written["exclusiveMinimum" if is_low_excluded else "minimum"] = number(low)
    if high is not None:
        written["exclusiveMaximum" if is_high_excluded else "maximum"] = number(high)
    if step is not None:
        written["multipleOf"] = node["multipleOf"]
    return written


def _bound(place: Place, inclusive: str, exclusive: str) -> tuple[Fraction | None, bool]:
    """Return the narrower of two bounds, and whether it is itself excluded. In draft 4 `exclusive` is a boolean."""
    node = place.node
    bound = _number(place, inclusive) if inclusive in node else None
    if isinstance(node.get(exclusive), bool):
        return bound, bound is not None and node[exclusive]
    if exclusive not in node:
        return bound, False
    other = _number(place, exclusive)
    if bound is not None and (other < bound if inclusive == "minimum" else other > bound):
        return bound, False
    return other, True


def _number(place: Place, keyword: str) -> Fraction:
    value = place.node[keyword]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refused(keyword, place, f"got {shown(value)}, want a number")
    return Fraction(value)


def _integer_above(value: int) -> int:
    """Return the least integer from `value` on that is a double too."""
    return math.ceil(_double(Fraction(value), math.inf)) if value > _LEAST_INTEGER else _LEAST_INTEGER


def _integer_below(value: int) -> int:
    return math.floor(_double(Fraction(value), -math.inf)) if value < _MOST_INTEGER else _MOST_INTEGER


def _double(value: Fraction, towards: float) -> Fraction:
    """Return the nearest double to `value` on that side of it; `value` itself where that is beyond all doubles."""
    if abs(value) > 2**1000:
        return value
    double = float(value)
    if (Fraction(double) < value) == (towards > 0) and Fraction(double) != value:
        double = math.nextafter(double, towards)
    return Fraction(double)


def _check_room(
    place: Place, low: Fraction | None, high: Fraction | None, step: Fraction | None, most: Fraction
) -> None:
    node = place.node
    if low is not None and low > most:
        raise refused("minimum" if "minimum" in node else "exclusiveMinimum", place, f"want at most {most}")
    if high is not None and high < -most:
        raise refused("maximum" if "maximum" in node else "exclusiveMaximum", place, f"want at least {-most}")
    if low is None or high is None:
        return
    if low > high or (step is not None and math.ceil(low / step) * step > high):
        seen = {keyword: node[keyword] for keyword in KEYWORDS if keyword in node}
        raise refused(next(iter(seen)), place, f"no number is within {shown(seen)}")
