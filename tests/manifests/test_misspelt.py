"""A misspelt key fails, at any depth: of objects, of a serveConfigV2 within them, of our configuration within that."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import yaml

from tests.manifests.checking import problems_of
from tests.manifests.kustomizations import COMPONENTS, OVERLAYS, built
from tests.manifests.kustomize import Document
from tests.manifests.misspelling import misspelt


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


@pytest.mark.slow
def test_every_key_of_the_base():
    assert survivors(built("base"), []) == []


@pytest.mark.slow
def test_every_key_of_what_is_for_prometheus():
    assert survivors(built("monitoring"), built("base")) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OVERLAYS[1:], *COMPONENTS])
def test_some_keys_of(name):
    assert survivors(built(name), [], random.Random(name)) == []


@pytest.mark.long
@pytest.mark.parametrize("name", [*OVERLAYS[1:], *COMPONENTS])
def test_every_key_of(name):
    assert survivors(built(name), []) == []
