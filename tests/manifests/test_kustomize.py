"""Kustomizations are ones that kustomize itself takes, and what is checked is what it makes of them."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import yaml

from tests.manifests.kustomizations import COMPONENTS, MANIFESTS, OVERLAYS, built
from tests.manifests.kustomize import KustomizeError, build
from tests.manifests.objects import walk


def the_real_one() -> list[str]:
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    if shutil.which("kubectl"):
        return ["kubectl", "kustomize"]
    pytest.skip("neither kustomize nor kubectl is here")


def in_order(documents):
    return sorted(documents, key=lambda document: (document["kind"], document["metadata"]["name"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OVERLAYS, "monitoring"])
def test_kustomize_makes_the_same_objects(name):
    done = subprocess.run([*the_real_one(), str(MANIFESTS / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert in_order(yaml.safe_load_all(done.stdout)) == in_order(built(name))


@pytest.mark.parametrize("name", COMPONENTS)
def test_kustomize_takes_the_component(name, tmp_path):
    copied = tmp_path / "manifests"
    shutil.copytree(MANIFESTS, copied)
    overlay = copied / "overlays" / "gpu" / "kustomization.yaml"
    overlay.write_text(overlay.read_text() + f"components: [../../{name}]\n")
    done = subprocess.run([*the_real_one(), str(overlay.parent)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert in_order(yaml.safe_load_all(done.stdout)) == in_order(build(overlay.parent))


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(MANIFESTS.rglob("kustomization.yaml")), ids=str)
def test_a_misspelt_key_of_a_kustomization_is_refused(path, tmp_path):
    content = yaml.safe_load(path.read_text())
    for place, value in walk(content):
        for key in value if isinstance(value, dict) else ():
            if (*place, key)[-2:] == ("target", "labelSelector"):
                continue
            copied = tmp_path / "manifests"
            shutil.rmtree(copied, ignore_errors=True)
            shutil.copytree(MANIFESTS, copied)
            changed = yaml.safe_load(path.read_text())
            there = changed
            for part in place:
                there = there[part]
            there[f"{key}s"] = there.pop(key)
            (copied / path.relative_to(MANIFESTS)).write_text(yaml.safe_dump(changed))
            with pytest.raises((KustomizeError, KeyError)):
                built_of(copied, path.parent.relative_to(MANIFESTS))


def built_of(manifests, where):
    if where.parts[0] != "components":
        return build(manifests / where)
    overlay = manifests / "overlays" / "gpu" / "kustomization.yaml"
    overlay.write_text(overlay.read_text() + f"components: [../../{where}]\n")
    return build(overlay.parent)


def test_a_key_that_stands_twice_is_refused(tmp_path):
    (tmp_path / "kustomization.yaml").write_text("kind: Kustomization\nkind: Kustomization\n")
    with pytest.raises(KustomizeError, match="stands twice"):
        build(tmp_path)
