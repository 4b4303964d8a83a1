"""Rules for every object that no schema holds: names, labels, quantities, enumerations, what refers to what."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tests.manifests.objects import Objects, Pod, quantity, shown, walk

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_LABEL_VALUE = re.compile(r"|[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
#: Keys of labels that our objects, pods and Ray nodes may have.
_LABELS = {"app.kubernetes.io/part-of", "app.kubernetes.io/name", "kvray.io/cluster", "kvray.io/pool"}
#: What an alert may say of itself.
_ALERT_LABELS = {"severity"}
_ANNOTATIONS = {"summary", "description", "runbook"}
_RESOURCES = {"cpu", "memory", "storage", "ephemeral-storage", "nvidia.com/gpu"}
#: What a string may be that stands under such a key, wherever that is.
_ENUMERATIONS = {
    "policyTypes": {"Ingress", "Egress"},
    "protocol": {"TCP", "UDP", "SCTP"},
    "operator": {"In", "NotIn", "Exists", "DoesNotExist", "Equal"},
    "effect": {"NoSchedule", "PreferNoSchedule", "NoExecute"},
    "whenUnsatisfiable": {"DoNotSchedule", "ScheduleAnyway"},
    "topologyKey": {"kubernetes.io/hostname", "topology.kubernetes.io/zone"},
    "accessModes": {"ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"},
    "fsGroupChangePolicy": {"OnRootMismatch", "Always"},
    "preemptionPolicy": {"Never", "PreemptLowerPriority"},
    "unhealthyPodEvictionPolicy": {"AlwaysAllow", "IfHealthyBudget"},
    "imagePullPolicy": {"Always", "IfNotPresent", "Never"},
    "seccompProfile/type": {"RuntimeDefault", "Localhost", "Unconfined"},
    "hostPath/type": {"", "Directory", "DirectoryOrCreate", "File", "FileOrCreate"},
    "upgradeStrategy/type": {"NewCluster", "NewClusterWithIncrementalUpgrade", "None"},
    "authorization/type": {"Bearer"},
    "drop": {"ALL"},
}
_SELECTORS = ("selector", "podSelector", "labelSelector")
#: Where a selector is of pods that are not ours.
_OTHERS_PODS = ({"app.kubernetes.io/name": "kuberay-operator"}, {"app.kubernetes.io/name": "prometheus"})
_NAMESPACES = (
    {"kubernetes.io/metadata.name": "kuberay-operator"},
    {"kubernetes.io/metadata.name": "monitoring"},
    {"kvray.io/clients": "true"},
)


def every_object(objects: Objects) -> Iterator[str]:
    """Names, labels and what is left empty."""
    for (kind, name), count in Counter((d["kind"], d["metadata"]["name"]) for d in objects.documents).items():
        if not _NAME.fullmatch(name):
            yield f"{kind} {name!r}: wanted a name of small letters, digits and dashes, 63 at most"
        if count > 1:
            yield f"{kind} {name}: wanted it once, saw it {count} times"
    for document in objects.documents:
        for path, value in walk(document):
            if value is None:
                yield f"{document['kind']} {shown(path)}: wanted a value, saw nothing"
            elif path and path[-1] == "labels" and isinstance(value, dict):
                yield from _label_problems(shown(path), value, _ALERT_LABELS if "rules" in path else _LABELS)
            elif path and path[-1] == "annotations" and set(value) - (_ANNOTATIONS if "rules" in path else set()):
                yield f"{shown(path)}: wanted none, or of an alert {sorted(_ANNOTATIONS)}, saw {sorted(value)}"
            else:
                yield from _enumeration_problems(path, value)


def _label_problems(place: str, labels: dict[str, str], known: set[str]) -> Iterator[str]:
    for key, value in labels.items():
        if key not in known:
            yield f"{place}: wanted labels among {sorted(known)}, saw {key!r}"
        if not _LABEL_VALUE.fullmatch(value):
            yield f"{place}/{key}: wanted letters, digits, dashes, 63 at most, saw {value!r}"


def _enumeration_problems(path: tuple[str | int, ...], value: Any) -> Iterator[str]:
    names = [str(part) for part in path if isinstance(part, str)]
    if not isinstance(value, str) or not names:
        return
    allowed = _ENUMERATIONS.get("/".join(names[-2:])) or _ENUMERATIONS.get(names[-1])
    if allowed is not None and value not in allowed:
        yield f"{shown(path)}: wanted one of {sorted(allowed)}, saw {value!r}"


def every_quantity(objects: Objects) -> Iterator[str]:
    """Resources: known names, numbers that are some, no more requested than allowed."""
    for document in objects.documents:
        for path, value in walk(document):
            if isinstance(value, dict) and value and set(value) <= {"requests", "limits"}:
                yield from _resource_problems(f"{document['kind']} {shown(path)}", value)


def _resource_problems(place: str, resources: dict[str, dict[str, Any]]) -> Iterator[str]:
    for part in resources.values():
        for name, text in part.items():
            if name not in _RESOURCES:
                yield f"{place}: wanted resources among {sorted(_RESOURCES)}, saw {name!r}"
            try:
                if quantity(text) == 0:
                    yield f"{place}/{name}: wanted more than nothing, saw {text!r}"
            except ValueError:
                yield f"{place}/{name}: wanted a quantity such as 4 or 16Gi, saw {text!r}"
                return
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    for name in requests.keys() & limits.keys():
        if quantity(requests[name]) > quantity(limits[name]):
            yield f"{place}/{name}: wanted no more than the limit of {limits[name]}, saw {requests[name]}"


def every_selector(objects: Objects) -> Iterator[str]:
    """A selector that takes no pod is a mistake, and so is one that cannot."""
    for document in objects.documents:
        for path, value in walk(document):
            if not isinstance(value, dict) or not path:
                continue
            if path[-1] == "namespaceSelector" and value.get("matchLabels") not in _NAMESPACES:
                yield f"{shown(path)}: wanted one of {_NAMESPACES}, saw {value}"
            if path[-1] in _SELECTORS:
                selector = {"matchLabels": value} if document["kind"] == "Service" else value
                yield from _selector_problems(objects, f"{document['kind']} {shown(path)}", selector)
            for key in value.get("matchLabelKeys", []):
                if not any(key in pod.labels for pod in objects.pods):
                    yield f"{shown(path)}: wanted labels that pods have, saw {key!r}"


def _selector_problems(objects: Objects, place: str, selector: dict[str, Any]) -> Iterator[str]:
    for expression in selector.get("matchExpressions", []):
        if (expression["operator"] in ("In", "NotIn")) != bool(expression.get("values")):
            yield f"{place}: wanted values with In and NotIn, and only there, saw {expression}"
    if selector.get("matchLabels") not in _OTHERS_PODS and objects.pods and not objects.selected(selector):
        yield f"{place}: wanted pods that it takes, saw none with {selector}"


def every_pod(objects: Objects) -> Iterator[str]:
    """What pods refer to is there, and nothing runs with more rights than it needs."""
    for pod in objects.pods:
        yield from (f"{pod.name}: {problem}" for problem in _pod_problems(objects, pod))
    for document in objects.of("StatefulSet"):
        if document["spec"]["serviceName"] not in objects.named("Service"):
            yield f"StatefulSet: wanted a Service {document['spec']['serviceName']}"
    for document in objects.of("Service"):
        names = {
            name for pod in objects.selected({"matchLabels": document["spec"]["selector"]}) for name in pod.port_names
        }
        for port in document["spec"]["ports"]:
            if isinstance(port.get("targetPort"), str) and port["targetPort"] not in names:
                yield f"Service {document['metadata']['name']}: wanted a port of its pods, saw {port['targetPort']!r}"


def _pod_problems(objects: Objects, pod: Pod) -> Iterator[str]:
    spec = pod.spec
    if spec.get("priorityClassName") not in objects.named("PriorityClass"):
        yield f"wanted a PriorityClass that is there, saw {spec.get('priorityClassName')!r}"
    security = spec.get("securityContext", {})
    if security.get("runAsNonRoot") is not True or security.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield f"wanted runAsNonRoot and seccompProfile RuntimeDefault, saw {security}"
    claims = {
        document["metadata"]["name"]
        for d in objects.of("StatefulSet")
        for document in d["spec"]["volumeClaimTemplates"]
    }
    volumes = [volume["name"] for volume in spec.get("volumes", [])]
    mounted: set[str] = set()
    for container in spec["containers"]:
        mounts = container.get("volumeMounts", [])
        mounted |= {mount["name"] for mount in mounts}
        yield from _container_problems(container, mounts)
    for name, count in Counter(volumes).items():
        if count > 1 or name not in mounted:
            yield f"wanted volume {name} once, and mounted, saw it {count} times, and {sorted(mounted)} mounted"
    for name in mounted - set(volumes) - claims:
        yield f"wanted a volume {name}, which is mounted, saw {volumes}"
    for volume in spec.get("volumes", []):
        if "secret" in volume and volume["secret"].get("defaultMode", 0o644) & 0o007:
            yield f"secrets: wanted no right for others, saw defaultMode {volume['secret'].get('defaultMode', 0o644):o}"
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        if claim is not None and claim not in objects.named("PersistentVolumeClaim"):
            yield f"wanted a PersistentVolumeClaim {claim}, saw {sorted(objects.named('PersistentVolumeClaim'))}"


def _container_problems(container: dict[str, Any], mounts: list[dict[str, Any]]) -> Iterator[str]:
    _, _, tag = container["image"].rpartition(":")
    if not tag or tag == container["image"] or tag == "latest":
        yield f"wanted an image with a tag of its own, saw {container['image']!r}"
    security = container.get("securityContext", {})
    if security.get("allowPrivilegeEscalation") is not False or security.get("capabilities") != {"drop": ["ALL"]}:
        yield f"wanted no escalation and no capabilities, saw {security}"
    for name, count in Counter(variable["name"] for variable in container.get("env", [])).items():
        if count > 1 or not _ENVIRONMENT_NAME.fullmatch(name):
            yield f"wanted variables with names, each once, saw {name!r} {count} times"
    for variable in container.get("env", []):
        if ("value" in variable) == ("valueFrom" in variable):
            yield f"wanted a value or where it is from, saw {variable}"
    for path, count in Counter(mount["mountPath"] for mount in mounts).items():
        if count > 1 or not path.startswith("/"):
            yield f"wanted each place from / once, saw {path!r} {count} times"
    if "memory" not in container.get("resources", {}).get("limits", {}):
        yield "wanted a limit of memory, saw none"
