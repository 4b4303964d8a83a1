"""Numbers by name with labels, written in the text format that Prometheus scrapes.

A page of 200 workers has some 20,000 samples, and the event loop that writes it has streams to serve: nothing is made
of a sample but its line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

Kind = Literal["counter", "gauge", "histogram"]

#: What one process tells: the labels that all of its numbers get, and the numbers by name with labels,
#: `name{label="value"}` (messages.fleet.Stats).
Source: TypeAlias = tuple[Mapping[str, str], Mapping[str, float]]

NOT_DESCRIBED: Final = "Not described"
_PART_OF_HISTOGRAM: Final = re.compile("(.*)_(?:bucket|sum|count)")
_LABEL: Final = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_ESCAPED: Final = {"\\": r"\\", '"': r"\"", "\n": r"\n"}


@dataclass(slots=True)
class Family:
    """The samples of one name, whoever tells them."""

    name: str  #: with _total where it counts
    kind: Kind
    help: str
    lines: list[str] = field(default_factory=list)  #: one for each sample, as the page has them


def family_of(name: str, help_texts: Mapping[str, str]) -> Family:
    """Return the family, without samples yet, of the samples called `name`, described as in `help_texts`.

    Names that end in _total are counters, in _bucket, _sum or _count parts of a histogram, all others gauges.
    """
    part = _PART_OF_HISTOGRAM.fullmatch(name)
    family_name = part[1] if part else name
    kind: Kind = "histogram" if part else "counter" if name.endswith("_total") else "gauge"
    return Family(family_name, kind, help_texts.get(family_name, NOT_DESCRIBED))


def families(sources: Iterable[Source], help_texts: Mapping[str, str]) -> list[Family]:
    """Gather what `sources` tell into families, each described as in `help_texts`, or as not described."""
    found: dict[str, Family] = {}
    lines_of: dict[str, list[str]] = {}  # by the sample's name
    for labels, values in sources:
        common = _written(labels)
        for full_name, value in values.items():
            name, _, own = full_name.partition("{")
            lines = lines_of.get(name)
            if lines is None:
                family = family_of(name, help_texts)
                lines = lines_of[name] = found.setdefault(family.name, family).lines
            if own:
                lines.append(f"{name}{{{common}{',' if common else ''}{own} {shown(value)}\n")
            else:
                lines.append(f"{name}{{{common}}} {shown(value)}\n" if common else f"{name} {shown(value)}\n")
    return list(found.values())


def page(found: Iterable[Family]) -> bytes:
    """Write families in the text format, those of one name as one: the first one's help and kind, all samples."""
    merged: dict[str, Family] = {}
    for family in found:
        first = merged.setdefault(family.name, family)
        if first is not family:
            first.lines += family.lines
    parts: list[str] = []
    for family in merged.values():
        help_text = family.help.replace("\\", r"\\").replace("\n", r"\n")
        parts += (f"# HELP {family.name} {help_text}\n# TYPE {family.name} {family.kind}\n", *family.lines)
    return "".join(parts).encode()


def with_labels(name: str, **labels: str) -> str:
    """Return a name with labels."""
    return f"{name}{{{_written(labels)}}}"


def labels_of(text: str) -> dict[str, str]:
    """Return the labels in a name with labels."""
    return {name: _unescaped(value) for name, value in _LABEL.findall(text)}


def shown(value: float) -> str:
    """Return a number as the text format has it."""
    text = repr(value)
    return text if text[-1].isdigit() else {"inf": "+Inf", "-inf": "-Inf"}.get(text, "NaN")


def _written(labels: Mapping[str, str]) -> str:
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())


def _escaped(value: str) -> str:
    return re.sub(r'[\\"\n]', lambda met: _ESCAPED[met[0]], value)


def _unescaped(value: str) -> str:
    return re.sub(r"\\(.)", lambda met: "\n" if met[1] == "n" else met[1], value)
