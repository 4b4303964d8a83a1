"""The objects of one kustomization as rules look at them: pods with all their labels, what selects what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cluster.config import KvrayConfig
from tests.manifests.kustomize import Document
from tests.manifests.serve_config import config_of

_SUFFIXES = {
    "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15,
    "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50,
}  # fmt: skip


def quantity(text: Any) -> float:
    """Return the number that a quantity of Kubernetes stands for.

    Raises:
        ValueError: it is none.
    """
    text = str(text)
    suffix = next((suffix for suffix in sorted(_SUFFIXES, key=len, reverse=True) if text.endswith(suffix)), "")
    value = float(text.removesuffix(suffix))
    if value < 0:
        raise ValueError(f"{text} is negative")
    return value * _SUFFIXES.get(suffix, 1)


@dataclass(frozen=True)
class Pod:
    """A pod that will be there: what it is for people, its labels, its spec."""

    name: str
    labels: dict[str, str]
    spec: dict[str, Any]
    #: ports that the operator adds, by name
    added_ports: tuple[str, ...] = ()

    @property
    def container(self) -> dict[str, Any]:
        return self.spec["containers"][0]

    @property
    def mounts(self) -> dict[str, str]:
        """Where each volume is mounted in the first container, by its name."""
        return {mount["name"]: mount["mountPath"] for mount in self.container.get("volumeMounts", [])}

    @property
    def port_names(self) -> set[str]:
        ports = [port.get("name") for container in self.spec["containers"] for port in container.get("ports", [])]
        return {name for name in ports if name} | set(self.added_ports)


class Objects:
    """All objects that are there together."""

    def __init__(self, documents: list[Document]) -> None:
        self.documents = documents

    def of(self, kind: str) -> list[Document]:
        return [document for document in self.documents if document["kind"] == kind]

    def named(self, kind: str) -> dict[str, Document]:
        return {document["metadata"]["name"]: document for document in self.of(kind)}

    @cached_property
    def service(self) -> dict[str, Any]:
        """The one RayService's spec."""
        (document,) = self.of("RayService")
        return document["spec"]

    @cached_property
    def config(self) -> KvrayConfig:
        return config_of(self.service["serveConfigV2"])

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.service["rayClusterConfig"]["workerGroupSpecs"]

    def groups_of(self, labels: dict[str, str]) -> list[dict[str, Any]]:
        """Return the worker groups whose Ray labels a pool's selector takes."""
        return [group for group in self.groups if labels.items() <= group.get("labels", {}).items()]

    @cached_property
    def head(self) -> Pod:
        return self._ray_pod("head", self.service["rayClusterConfig"]["headGroupSpec"], "headgroup")

    @cached_property
    def workers(self) -> dict[str, Pod]:
        """A pod of each worker group, by the group's name."""
        return {group["groupName"]: self._ray_pod("worker", group, group["groupName"]) for group in self.groups}

    @cached_property
    def pods(self) -> list[Pod]:
        pods = [
            Pod(
                document["metadata"]["name"],
                document["spec"]["template"]["metadata"].get("labels", {}),
                document["spec"]["template"]["spec"],
            )
            for document in self.of("StatefulSet")
        ]
        return [self.head, *self.workers.values(), *pods]

    @staticmethod
    def _ray_pod(kind: str, group: dict[str, Any], name: str) -> Pod:
        """Return a pod with what KubeRay 1.7 adds: its labels, and the port of Ray's metrics."""
        added = {"ray.io/node-type": kind, "ray.io/group": name, "ray.io/cluster": "", "ray.io/is-ray-node": "yes"}
        template = group["template"]
        labels = {**template.get("metadata", {}).get("labels", {}), **added}
        return Pod(f"{kind} {name}", labels, template["spec"], added_ports=("metrics",))

    def selected(self, selector: dict[str, Any]) -> list[Pod]:
        return [pod for pod in self.pods if selects(selector, pod.labels)]


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Return whether a label selector takes a pod with these labels."""
    if not selector.get("matchLabels", {}).items() <= labels.items():
        return False
    for expression in selector.get("matchExpressions", []):
        value, values = labels.get(expression["key"]), expression.get("values", [])
        match expression["operator"]:
            case "In":
                holds = value in values
            case "NotIn":
                holds = value not in values
            case "Exists":
                holds = value is not None
            case "DoesNotExist":
                holds = value is None
            case _:
                holds = False
        if not holds:
            return False
    return True


def walk(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Yield every value below `value`, itself among them, with the path to it."""
    yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from walk(part, (*path, key))


def shown(path: tuple[str | int, ...]) -> str:
    return "/".join(map(str, path))
