"""What clients can do against kvray, as a page: each cell is what ran."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

_ERROR_CHARS = 160


@dataclass(frozen=True, slots=True)
class Ran:
    """One test of one client."""

    feature: str
    case: str  #: "" where the feature has only one
    outcome: str  #: "ok", "refused: KEYWORD", or what went wrong


@dataclass(frozen=True, slots=True)
class Row:
    """A client."""

    name: str
    version: str
    ran: Sequence[Ran]


def ran_from_junit(path: Path) -> Iterator[Ran]:
    """Read what pytest or node's test runner wrote: `test_tool_stream[case]` and `tool stream case` are alike."""
    for case in ElementTree.parse(path).iter("testcase"):
        name = case.attrib["name"].removeprefix("test_")
        feature, _, variant = name.partition("[")
        feature = feature.replace("_", " ")
        if feature.startswith("schemas "):
            feature, _, variant = feature.partition(" ")
        wrong = next((child for child in case if child.tag in ("failure", "error")), None)
        skipped = case.find("skipped")
        outcome = "ok"
        if wrong is not None:
            outcome = wrong.attrib.get("message", "").strip() or (wrong.text or "failed").strip()
        elif skipped is not None:
            outcome = skipped.attrib.get("message", "skipped")
        yield Ran(feature, variant.removesuffix("]"), outcome)


def is_wrong(ran: Ran) -> bool:
    """Tell whether a test failed."""
    return ran.outcome != "ok" and not ran.outcome.startswith(("refused: ", "arguments are"))


def page(rows: Sequence[Row], features: Mapping[str, str]) -> str:
    """Write the page: `features` in this order, with what each of them means."""
    head = [
        "# Clients that run against kvray",
        "",
        "Written by `make compat`: every cell is what ran, against `kvray serve` with models that nobody trained: one "
        "says what it was told to, one guesses and follows the masks. yes: all of it ran as the client's own types "
        "and exceptions want it; empty: the client has none of it, or it was not tried; *n* of *m*: schemas that its "
        "library wrote and whose output it read, the others refused by the keyword that is named.",
        "",
    ]
    table = [["client", *features], ["---"] * (len(features) + 1)]
    table += [
        [f"{row.name} {row.version}", *(_cell([r for r in row.ran if r.feature == f]) for f in features)]
        for row in rows
    ]
    body = ["| " + " | ".join(cells) + " |" for cells in table]
    legend = [f"* **{feature}**: {text}" for feature, text in features.items()]
    return "\n".join([*head, *body, "", *legend, ""])


def _cell(ran: Sequence[Ran]) -> str:
    ran = [one for one in ran if not one.outcome.startswith("arguments are")]
    if not ran:
        return ""
    wrong = [one for one in ran if is_wrong(one)]
    if wrong:
        cases = ", ".join(one.case for one in wrong[:3] if one.case)
        return f"**no** ({len(wrong)} of {len(ran)}{': ' + cases if cases else ''}): {_short(wrong[0].outcome)}"
    refused = Counter(one.outcome.removeprefix("refused: ") for one in ran if one.outcome != "ok")
    num_ok = len(ran) - refused.total()
    if refused:
        return f"{num_ok} of {len(ran)}; " + ", ".join(f"`{keyword}` {count}" for keyword, count in refused.items())
    return "yes" if len(ran) < 10 else f"{num_ok} of {len(ran)}"


def _short(text: str) -> str:
    line = re.sub(r"\s+", " ", text).replace("|", "/")
    return json.dumps(line[:_ERROR_CHARS], ensure_ascii=False)
