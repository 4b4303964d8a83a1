"""Rules that no schema holds: who reaches what, what may be evicted, who gives way, what is scraped."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from typing import Any

from tests.manifests.objects import Objects, Pod, selects

#: Ports that somebody else than the cluster's own pods may be let to, by what listens there.
HTTP, METRICS, DASHBOARD, AUTOSCALER_METRICS, DASHBOARD_METRICS, REDIS = 8000, 8080, 8265, 44217, 44227, 6379
_FOR_OTHERS = {HTTP, METRICS, DASHBOARD, AUTOSCALER_METRICS, DASHBOARD_METRICS}
#: A job of KubeRay's that tidies up in Redis; its pod is made as the head's.
_CLEANUP = "redis-cleanup"
_DURATION = re.compile(r"(\d+)(ms|s|m|h)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def every_policy(objects: Objects) -> Iterator[str]:
    """Each policy says which way it is for, from whom and to which ports."""
    for policy in objects.of("NetworkPolicy"):
        spec, name = policy["spec"], policy["metadata"]["name"]
        if spec.get("policyTypes") != ["Ingress"] or "egress" in spec:
            yield f"{name}: wanted a policy for what comes in, saw policyTypes {spec.get('policyTypes')}"
        if not spec["podSelector"].get("matchLabels"):
            yield f"{name}: wanted pods by their labels, saw all of the namespace"
        for rule in spec.get("ingress", []):
            yield from (f"{name}: {problem}" for problem in _rule_problems(rule, objects, spec["podSelector"]))


def _rule_problems(rule: dict[str, Any], objects: Objects, selector: dict[str, Any]) -> Iterator[str]:
    if not rule.get("from"):
        yield "wanted who may come, saw everybody"
    for source in rule.get("from", []):
        if not source:
            yield "wanted who may come, saw an empty entry"
        if block := source.get("ipBlock"):
            yield from _block_problems(block)
    if rule.get("from") == [{"podSelector": selector}]:
        return  # the cluster among itself, on all ports
    if not rule.get("ports"):
        yield "wanted ports, for others than the cluster's own pods, saw all"
    is_redis = any(pod.labels.get("app.kubernetes.io/name") == "kvray-redis" for pod in objects.selected(selector))
    for port in rule.get("ports", []):
        number, last = port.get("port"), port.get("endPort", port.get("port"))
        if not isinstance(number, int) or number not in ({REDIS} if is_redis else _FOR_OTHERS) or last != number:
            yield f"wanted one of {sorted({REDIS} if is_redis else _FOR_OTHERS)} alone, saw {port}"


def _block_problems(block: dict[str, Any]) -> Iterator[str]:
    try:
        network = ipaddress.ip_network(block["cidr"])
        if not all(ipaddress.ip_network(part).subnet_of(network) for part in block.get("except", [])):  # type: ignore[arg-type]
            yield f"wanted exceptions within {network}, saw {block['except']}"
        if network.prefixlen == 0:
            yield "wanted a network, saw the whole world"
    except (ValueError, TypeError) as error:
        yield f"wanted a network such as 10.0.0.0/8, saw {block}: {error}"


def closed_pods(objects: Objects) -> Iterator[str]:
    """Every pod is closed but for what a policy opens; what has to work is open."""
    policies = objects.of("NetworkPolicy")
    for pod in objects.pods:
        if not any(selects(policy["spec"]["podSelector"], pod.labels) for policy in policies):
            yield f"{pod.name}: wanted a NetworkPolicy that closes it, saw none"
    ray = [objects.head, *objects.workers.values()]
    for source in ray:
        for pod in ray:
            if not is_let_in(objects, source, pod, objects.config.network.port_range[0]):
                yield f"{pod.name}: wanted {source.name} let in on all ports"
    cleanup = Pod(_CLEANUP, {**objects.head.labels, "ray.io/node-type": _CLEANUP}, objects.head.spec)
    for redis in (pod for pod in objects.pods if pod not in ray):
        for source in (objects.head, cleanup):
            if not is_let_in(objects, source, redis, REDIS):
                yield f"{redis.name}: wanted {source.name} let in"


def is_let_in(objects: Objects, source: Pod, pod: Pod, port: int) -> bool:
    """Return whether some policy lets a pod of the same namespace in on that port."""
    return any(
        selects(policy["spec"]["podSelector"], pod.labels)
        and any(selects(peer["podSelector"], source.labels) for peer in rule["from"] if set(peer) == {"podSelector"})
        and ("ports" not in rule or any(port == entry["port"] for entry in rule["ports"]))
        for policy in objects.of("NetworkPolicy")
        for rule in policy["spec"].get("ingress", [])
    )


def every_budget(objects: Objects) -> Iterator[str]:
    """A RayCluster has no scale, so that a whole minAvailable alone counts for its pods; fewer than there are."""
    for budget in objects.of("PodDisruptionBudget"):
        spec, name = budget["spec"], budget["metadata"]["name"]
        least = spec.get("minAvailable")
        if not isinstance(least, int) or isinstance(least, bool) or least < 1 or "maxUnavailable" in spec:
            yield f"{name}: wanted minAvailable, a whole number from 1, and no maxUnavailable, saw {spec}"
            continue
        groups = [g for g in objects.groups if selects(spec["selector"], objects.workers[g["groupName"]].labels)]
        if len(groups) != 1 or selects(spec["selector"], objects.head.labels):
            yield f"{name}: wanted the pods of one group, saw {[group['groupName'] for group in groups]}"
        elif least >= max(groups[0]["minReplicas"], _wanted(objects, groups[0])):
            yield f"{name}: wanted fewer than are always there, saw minAvailable {least}"


def _wanted(objects: Objects, group: dict[str, Any]) -> int:
    """Return how many workers the pool wants whose labels the group carries."""
    pools = objects.config.pools
    return sum(
        count
        for count, labels in ((pools.prefill, pools.prefill_labels), (pools.decode, pools.decode_labels))
        if labels.items() <= group.get("labels", {}).items()
    )


def every_priority(objects: Objects) -> Iterator[str]:
    """Prefill gives way to decode, nobody else's pods to either by default."""
    classes = objects.named("PriorityClass")
    for name, priority in classes.items():
        if not 0 < priority["value"] <= 1_000_000_000 or name.startswith("system-"):
            yield f"{name}: wanted a value from 1 to 10^9 and no name of the system's, saw {priority['value']}"
        if priority.get("globalDefault"):
            yield f"{name}: wanted pods that name it, saw globalDefault"
    values = {pool: _priority(objects, pool) for pool in ("prefill", "decode")}
    if values["prefill"] >= values["decode"]:
        yield f"wanted prefill below decode, saw {values}"


def _priority(objects: Objects, pool: str) -> int:
    """Return the highest priority of a pod of that pool."""
    names = [pod.spec["priorityClassName"] for pod in objects.workers.values() if pod.labels["kvray.io/pool"] == pool]
    return max((objects.named("PriorityClass")[name]["value"] for name in names), default=0)


def every_monitor(objects: Objects) -> Iterator[str]:
    """What is scraped is there, in time, and ours is asked with a key."""
    for monitor in objects.of("PodMonitor"):
        name = monitor["metadata"]["name"]
        pods = objects.selected(monitor["spec"]["selector"])
        endpoints = monitor["spec"].get("podMetricsEndpoints", [])
        if not endpoints:
            yield f"{name}: wanted endpoints, saw none"
        for endpoint in endpoints:
            yield from (f"{name}: {problem}" for problem in _endpoint_problems(endpoint, pods))


def _endpoint_problems(endpoint: dict[str, Any], pods: list[Pod]) -> Iterator[str]:
    port, number = endpoint.get("port"), scraped_port(endpoint)
    if port is None:
        yield f"wanted port, the name of one that its pods declare, as no other is found, saw {endpoint}"
    elif not all(port in pod.port_names for pod in pods):
        yield f"wanted a port that all of its pods have, saw {port!r}"
    if number not in {HTTP, METRICS, AUTOSCALER_METRICS, DASHBOARD_METRICS}:
        yield f"wanted a port with metrics, saw {number}"
    if _seconds(endpoint.get("scrapeTimeout", "10s")) > _seconds(endpoint.get("interval", "30s")):
        yield f"wanted scrapeTimeout within interval, saw {endpoint}"
    credentials = endpoint.get("authorization", {}).get("credentials", {})
    if number == HTTP and not (credentials.get("name") and credentials.get("key")):
        yield f"wanted authorization from a Secret, as kvray asks for a key, saw {endpoint}"
    if endpoint.get("path", "/metrics") != "/metrics":
        yield f"wanted /metrics, saw {endpoint['path']!r}"


def scraped_port(endpoint: dict[str, Any]) -> int:
    """Return where an endpoint's pods are asked: the port that they are found by, or the one that it is made to be."""
    for relabeling in endpoint.get("relabelings", []):
        if relabeling.get("targetLabel") == "__address__":
            address = str(relabeling.get("replacement"))
            is_pods = relabeling.get("sourceLabels") == ["__meta_kubernetes_pod_ip"] and address.startswith("$1:")
            return int(address.removeprefix("$1:")) if is_pods and address[3:].isdigit() else 0
    return METRICS


def _seconds(text: str) -> float:
    return sum(int(number) * _SECONDS[unit] for number, unit in _DURATION.findall(text))
