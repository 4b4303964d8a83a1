"""Documents with one key misspelt."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from tests.manifests.objects import shown, walk


def misspelt(document: Any) -> Iterator[tuple[str, Any]]:
    """Yield a copy of a document for each key in it, with that key misspelt, and where."""
    for path, value in walk(document):
        for key in value if isinstance(value, dict) else ():
            changed = copy.deepcopy(document)
            place = changed
            for part in path:
                place = place[part]
            items = list(place.items())
            place.clear()
            place.update({_slip(name) if name == key else name: part for name, part in items})
            yield shown((*path, key)), changed


def _slip(key: str) -> str:
    """Another word: two letters swapped, or one too many."""
    swapped = key[:-2] + key[-1] + key[-2] if len(key) > 1 else key
    return swapped if swapped != key else f"{key}s"
