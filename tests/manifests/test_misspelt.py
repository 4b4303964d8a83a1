"""A misspelt key fails, at any depth: of objects, of a serveConfigV2 within them, of our configuration within that."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.manifests.checking import problems_of
from tests.manifests.kustomizations import COMPONENTS, OVERLAYS, built
from tests.manifests.kustomize import Document
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


def misspelt_anywhere(document: Document) -> Iterator[tuple[str, Document]]:
    """Yield what `misspelt` does, and the same for the YAML within a RayService."""
    yield from misspelt(document)
    if document["kind"] == "RayService":
        for place, text in misspelt(yaml.safe_load(document["spec"]["serveConfigV2"])):
            spec = {**document["spec"], "serveConfigV2": yaml.safe_dump(text)}
            yield f"serveConfigV2/{place}", {**document, "spec": spec}


def survivors(documents: list[Document], beside: list[Document], draw: random.Random | None = None) -> list[str]:
    """Return where a misspelt key is taken; with `draw` of some 60 keys of each kustomization only."""
    cases = [
        (f"{document['kind']} {document['metadata']['name']} {place}", number, changed)
        for number, document in enumerate(documents)
        for place, changed in misspelt_anywhere(document)
    ]
    assert len(cases) > 50
    chosen = cases if draw is None else draw.sample(cases, 60)
    return [
        place
        for place, number, changed in chosen
        if not problems_of([changed], beside=[*documents[:number], *documents[number + 1 :], *beside])
    ]


def test_every_key_of_the_base():
    assert survivors(built("base"), []) == []


def test_every_key_of_what_is_for_prometheus():
    assert survivors(built("monitoring"), built("base")) == []


@pytest.mark.parametrize("name", [*OVERLAYS[1:], *COMPONENTS])
def test_some_keys_of(name):
    assert survivors(built(name), [], random.Random(name)) == []


@pytest.mark.long
@pytest.mark.parametrize("name", [*OVERLAYS[1:], *COMPONENTS])
def test_every_key_of(name):
    assert survivors(built(name), []) == []
