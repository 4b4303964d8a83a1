"""The kustomizations that there are, and what each of them makes."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path

from tests.manifests.kustomize import Document, build

MANIFESTS = Path(__file__).parents[2] / "manifests"
OVERLAYS = ("base", *(f"overlays/{path.name}" for path in sorted((MANIFESTS / "overlays").iterdir())))
COMPONENTS = tuple(f"components/{path.name}" for path in sorted((MANIFESTS / "components").iterdir()))


@functools.cache
def _built(name: str) -> str:
    if not name.startswith("components/"):
        return json.dumps(build(MANIFESTS / name))
    with tempfile.TemporaryDirectory() as directory:
        copied = Path(directory) / "manifests"
        shutil.copytree(MANIFESTS, copied)
        (overlay := copied / "overlays" / "with-component").mkdir()
        (overlay / "kustomization.yaml").write_text(
            "{apiVersion: kustomize.config.k8s.io/v1beta1, kind: Kustomization, "
            f"resources: [../../base], components: [../../{name}]}}"
        )
        return json.dumps(build(overlay))


def built(name: str) -> list[Document]:
    """Return the objects of a kustomization, or of the base with a component; the caller's own, to change at will."""
    return json.loads(_built(name))
