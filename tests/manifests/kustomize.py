"""What of kustomize the manifests use, and no more: resources, components, images, JSON6902 patches, deletions.

`kubectl kustomize` or `kustomize build` does the same where it is there, and a test holds the two together. Everything
that is not known here is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

Document = dict[str, Any]

#: The keys of a kustomization.yaml that are understood, by its kind.
_KINDS = {
    "Kustomization": "kustomize.config.k8s.io/v1beta1",
    "Component": "kustomize.config.k8s.io/v1alpha1",
}
_KEYS = {"apiVersion", "kind", "resources", "components", "images", "patches"}


class KustomizeError(Exception):
    """A kustomization that kustomize would refuse, or that this builder does not know."""


def build(directory: Path) -> list[Document]:
    """Return the objects that `kustomize build directory` prints, in no particular order."""
    return _accumulated(directory, [], "Kustomization")


def documents_of(path: Path) -> list[Document]:
    """Return the YAML documents of a file, anchors spelled out.

    Raises:
        KustomizeError: a key stands twice in a mapping.
    """
    documents = yaml.load_all(path.read_text(), _OnceLoader)
    return [_spelled_out(document) for document in documents if document is not None]


def _spelled_out(value: Any) -> Any:
    """Return `value` so that nothing of it is in two places, as what is behind an anchor is."""
    if isinstance(value, dict):
        return {key: _spelled_out(part) for key, part in value.items()}
    return [_spelled_out(part) for part in value] if isinstance(value, list) else value


class _OnceLoader(yaml.SafeLoader):
    """As `safe_load`, but a key that stands twice is an error, as it is to Kubernetes."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise KustomizeError(f"{key!r} stands twice in a mapping{node.start_mark}")
        return super().construct_mapping(node, deep=deep)


def load_once(text: str) -> Any:
    """Return what one YAML document says; a key that stands twice is an error."""
    return yaml.load(text, _OnceLoader)


def _accumulated(directory: Path, documents: list[Document], kind: str) -> list[Document]:
    (kustomization,) = documents_of(directory / "kustomization.yaml")
    unknown = set(kustomization) - _KEYS
    if unknown or (kustomization.get("kind"), kustomization.get("apiVersion")) != (kind, _KINDS[kind]):
        raise KustomizeError(
            f"{directory}: wanted a {kind} of {_KINDS[kind]} with {sorted(_KEYS)}, saw {kustomization}"
        )
    documents = list(documents)
    for entry in kustomization.get("resources", []):
        path = directory / entry
        documents += build(path) if path.is_dir() else documents_of(path)
    for entry in kustomization.get("components", []):
        documents = _accumulated(directory / entry, documents, "Component")
    for patch in kustomization.get("patches", []):
        documents = _patched(documents, patch, directory)
    for image in kustomization.get("images", []):
        _refuse_others(image, {"name", "newName", "newTag"})
        _set_image(documents, image)
    return documents


def _refuse_others(mapping: Document, known: set[str]) -> None:
    if unknown := set(mapping) - known:
        raise KustomizeError(f"wanted keys among {sorted(known)}, saw {sorted(unknown)}")


def _patched(documents: list[Document], patch: Document, directory: Path) -> list[Document]:
    _refuse_others(patch, {"path", "patch", "target"})
    if "path" in patch:
        (content,) = documents_of(directory / patch["path"])
    else:
        content = _spelled_out(load_once(patch["patch"]))
    if isinstance(content, list):
        target = patch["target"]
        _refuse_others(target, {"kind", "name"})
        for document in _selected(documents, target["kind"], target["name"]):
            for operation in content:
                _operate(document, operation)
        return documents
    if content.pop("$patch", None) != "delete" or set(content) != {"apiVersion", "kind", "metadata"}:
        raise KustomizeError("a patch of an object that does more than delete it is not known here")
    gone = _selected(documents, content["kind"], content["metadata"]["name"])
    return [document for document in documents if document not in gone]


def _selected(documents: list[Document], kind: str, name: str) -> list[Document]:
    found = [document for document in documents if (document["kind"], document["metadata"]["name"]) == (kind, name)]
    if not found:
        raise KustomizeError(f"no {kind} {name} to patch")
    return found


def _operate(document: Document, operation: Document) -> None:
    """Carry one operation of RFC 6902 out on `document`."""
    op, value = operation["op"], operation.get("value")
    _refuse_others(operation, {"op", "path"} if op == "remove" else {"op", "path", "value"})
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    place: Any = document
    try:
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place[part]
        key: Any = last if isinstance(place, dict) else len(place) if last == "-" and op == "add" else int(last)
        if op == "add" and isinstance(place, list):
            place.insert(key, _spelled_out(value))
        elif op == "add":
            place[key] = _spelled_out(value)
        elif op == "remove":
            del place[key]
        elif op == "replace" and (isinstance(place, list) or key in place):
            place[key] = _spelled_out(value)
        else:
            raise KustomizeError(f"{operation}: no such operation, or nothing there to replace")
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise KustomizeError(f"{operation}: no such path: {error!r}") from None


def _set_image(place: Any, image: Document) -> None:
    """Give containers with the image of that name another name and tag, at any depth."""
    if isinstance(place, list):
        for item in place:
            _set_image(item, image)
    elif isinstance(place, dict):
        for key, value in place.items():
            if key in ("containers", "initContainers") and isinstance(value, list):
                for container in value:
                    name, _, tag = container["image"].partition(":")
                    if name == image["name"]:
                        container["image"] = f"{image.get('newName', name)}:{image.get('newTag', tag)}"
            _set_image(value, image)
