"""Rules for the RayService that no schema holds: what KubeRay refuses, what Ray would ignore, what ours has to find."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ray.scripts.scripts import start

from cluster.config import DEMO_MODEL, parse_size
from tests.manifests.network_rules import DASHBOARD, HTTP, METRICS
from tests.manifests.objects import Objects, Pod, quantity

RAY_VERSION = next(
    line.removeprefix("ray==")
    for line in (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    if line.startswith("ray==")
)
_RAY_OPTIONS = {name.removeprefix("--") for option in start.params for name in option.opts}
_GROUP_RESOURCES = {"CPU", "GPU", "memory"}
#: Ports of Ray's that are the same everywhere, beside those that rayStartParams name.
_GCS, _CLIENT, _AGENT = 6379, 10001, 52365
#: KubeRay makes names of clusters and pods of it.
_LONGEST_NAME = 41


def the_service(objects: Objects) -> Iterator[str]:
    """How it is rolled out and found."""
    spec = objects.service
    (document,) = objects.of("RayService")
    if len(document["metadata"]["name"]) > _LONGEST_NAME:
        yield f"wanted a name of {_LONGEST_NAME} characters at most, saw {document['metadata']['name']}"
    for name in ("serviceUnhealthySecondThreshold", "deploymentUnhealthySecondThreshold"):
        if name in spec:
            yield f"{name}: deprecated; the conditions Ready and UpgradeInProgress say how it is"
    if spec.get("excludeHeadPodFromServeSvc") is not True:
        yield "wanted excludeHeadPodFromServeSvc, saw requests sent to the head"
    delay_s, request_s = spec.get("rayClusterDeletionDelaySeconds", 60), objects.config.http.request_timeout_s
    if delay_s < request_s:
        yield f"rayClusterDeletionDelaySeconds: wanted http.request_timeout_s ({request_s:g}) at least, saw {delay_s}"
    yield from _upgrade_problems(spec)


def _upgrade_problems(spec: dict[str, Any]) -> Iterator[str]:
    strategy = spec.get("upgradeStrategy", {})
    options = strategy.get("clusterUpgradeOptions")
    is_incremental = strategy.get("type") == "NewClusterWithIncrementalUpgrade"
    if "type" not in strategy or is_incremental != (options is not None):
        yield f"upgradeStrategy: wanted a type, and options where it is incremental, saw {strategy}"
    if not is_incremental or options is None:
        return
    step, surge, pause_s = options["stepSizePercent"], options.get("maxSurgePercent", 100), options["intervalSeconds"]
    if not 0 < step <= surge <= 100 or pause_s <= 0 or not options["gatewayClassName"]:
        yield f"upgradeStrategy: wanted 0 < step <= surge <= 100, and an interval, saw {options}"
    if not spec["rayClusterConfig"].get("enableInTreeAutoscaling"):
        yield "upgradeStrategy: wanted enableInTreeAutoscaling, without which KubeRay refuses an incremental one"
    if "target_capacity" in spec["serveConfigV2"]:
        yield "serveConfigV2: wanted no target_capacity, which KubeRay sets while it moves requests"


def the_cluster(objects: Objects) -> Iterator[str]:
    """Token, autoscaler, GCS."""
    cluster = objects.service["rayClusterConfig"]
    if cluster.get("rayVersion") != RAY_VERSION:
        yield f"rayVersion: wanted that of constraints.txt, {RAY_VERSION}, saw {cluster.get('rayVersion')}"
    options = cluster.get("authOptions", {})
    if options.get("mode") != "token" or not options.get("secretName"):
        yield f"authOptions: wanted mode token and a secretName, saw {options}"
    if (
        cluster.get("enableInTreeAutoscaling") is not True
        or cluster.get("autoscalerOptions", {}).get("version") != "v2"
    ):
        yield "wanted enableInTreeAutoscaling and autoscalerOptions.version v2"
    storage = cluster.get("gcsFaultToleranceOptions", {})
    host, _, port = storage.get("redisAddress", "").rpartition(":")
    ports = [str(entry["port"]) for entry in objects.named("Service").get(host, {}).get("spec", {}).get("ports", [])]
    if storage.get("backend") != "redis" or port not in ports or "redisPassword" not in storage:
        yield f"gcsFaultToleranceOptions: wanted a Redis whose Service is here, with a password, saw {storage}"
    for pod in [objects.head, *objects.workers.values()]:
        names = {variable["name"] for variable in pod.container.get("env", [])}
        if taken := names & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_REDIS_ADDRESS", "REDIS_PASSWORD"}:
            yield f"{pod.name}: wanted them left to KubeRay, saw {sorted(taken)}"
        if pod.spec.get("restartPolicy", "Never") != "Never":
            yield f"{pod.name}: restartPolicy: wanted Never, as autoscaler v2 does, saw {pod.spec['restartPolicy']}"


def every_group(objects: Objects) -> Iterator[str]:
    """Numbers that are explicit and in order, parameters that Ray knows, ports that do not meet."""
    head = objects.service["rayClusterConfig"]["headGroupSpec"]
    if head.get("resources") != {"CPU": "0"}:
        yield f"headGroupSpec/resources: wanted CPU 0, so that no worker runs there, saw {head.get('resources')}"
    for name, count in Counter(group["groupName"] for group in objects.groups).items():
        if count > 1 or not re.fullmatch("[a-z]([-a-z0-9]{0,20}[a-z0-9])?", name):
            yield f"groupName: wanted a short name of small letters, once, saw {name!r} {count} times"
    for group in objects.groups:
        numbers = [group.get(key) for key in ("minReplicas", "replicas", "maxReplicas")]
        if any(not isinstance(number, int) for number in numbers) or numbers != sorted(numbers) or numbers[0] < 0:
            yield f"{group['groupName']}: wanted minReplicas <= replicas <= maxReplicas, all written, saw {numbers}"
        if unknown := set(group.get("resources", {})) - _GROUP_RESOURCES:
            yield f"{group['groupName']}: wanted resources among {sorted(_GROUP_RESOURCES)}, saw {sorted(unknown)}"
    for group in [head, *objects.groups]:
        yield from _parameter_problems(objects, group.get("rayStartParams", {}))


def _parameter_problems(objects: Objects, parameters: dict[str, str]) -> Iterator[str]:
    if unknown := set(parameters) - _RAY_OPTIONS:
        yield f"rayStartParams: wanted options of `ray start`, saw {sorted(unknown)}"
        return
    for name in ("node-manager-port", "object-manager-port", "dashboard-agent-grpc-port", "runtime-env-agent-port"):
        if name not in parameters:
            yield f"rayStartParams: wanted {name}, which Ray draws otherwise"
    if not all(re.fullmatch(r"\d+", value) for value in parameters.values()):
        yield f"rayStartParams: wanted numbers, saw {parameters}"
        return
    first, last = int(parameters.get("min-worker-port", 10002)), int(parameters.get("max-worker-port", 19999))
    fixed = [int(value) for name, value in parameters.items() if name.endswith("-port") and "worker-port" not in name]
    fixed += [_GCS, _CLIENT, _AGENT, HTTP, METRICS, DASHBOARD]
    roads = range(objects.config.network.port_range[0], objects.config.network.port_range[1] + 1)
    if first >= last or any(first <= port <= last or port in roads for port in fixed) or len(set(fixed)) < len(fixed):
        yield f"rayStartParams: wanted ports that do not meet each other, workers' or roads', saw {parameters}"
    if first <= roads[-1] and roads[0] <= last:
        yield f"network.port_range: wanted ports beside Ray's workers' ({first} to {last}), saw {roads}"


def the_pools(objects: Objects) -> Iterator[str]:
    """Each pool finds nodes by its labels, and room for its workers; each group is some pool's."""
    pools = objects.config.pools
    chosen = []
    for name, count, labels in (
        ("prefill", pools.prefill, pools.prefill_labels),
        ("decode", pools.decode, pools.decode_labels),
    ):
        groups = objects.groups_of(labels)
        chosen += [group["groupName"] for group in groups]
        if not labels or not groups:
            yield f"pools.{name}_labels: wanted labels that a worker group carries, saw {labels}"
        room = sum(group["maxReplicas"] * workers_of(objects, group) for group in groups)
        if room < count:
            yield f"pools.{name}: wanted room for {count} workers on their groups, saw room for {room}"
    for group in objects.groups:
        if chosen.count(group["groupName"]) != 1:
            yield f"{group['groupName']}: wanted a group of one pool, saw groups {chosen} chosen"
        if group.get("labels") != {"kvray.io/pool": objects.workers[group["groupName"]].labels.get("kvray.io/pool")}:
            yield f"{group['groupName']}: wanted the same kvray.io/pool on Ray's node and on its pod"


def workers_of(objects: Objects, group: dict[str, Any]) -> int:
    """Return how many of our workers a pod of the group has room for, by what they reserve from Ray."""
    pools, resources = objects.config.pools, objects.workers[group["groupName"]].container["resources"]
    given = resources.get("requests", {}) | resources.get("limits", {})
    rooms = []
    if pools.cpus_per_worker:
        rooms.append(int(quantity(given["cpu"]) // pools.cpus_per_worker))
    if pools.gpus_per_worker:
        rooms.append(int(quantity(given.get("nvidia.com/gpu", 0)) // pools.gpus_per_worker))
    return min(rooms, default=0)


def what_ours_needs(objects: Objects) -> Iterator[str]:
    """Files, directories, memory and time that the configuration counts on."""
    config = objects.config
    workers = list(objects.workers.values())
    files = [
        config.network.secret_file,
        config.http.api_key_file,
        config.tenants.salt_file if config.tenants.members else "",
    ]
    files += [member.api_key_file for member in config.tenants.members]
    for pod in [objects.head, *workers]:
        for file in (file for file in files if file != ""):
            if file is None or not _is_in_secret(pod, file):
                yield f"{pod.name}: wanted a file of a Secret for secret, keys and salt, saw {file}"
        if config.model.path != str(DEMO_MODEL) and not _is_mounted(pod, config.model.path):
            yield f"{pod.name}: wanted a volume with {config.model.path}"
    for pod in workers:
        if pod.spec.get("terminationGracePeriodSeconds", 30) <= config.pools.drain_timeout_s:
            yield f"{pod.name}: wanted terminationGracePeriodSeconds above pools.drain_timeout_s"
        if config.tiers.disk_dir is not None and config.tiers.disk_dir not in pod.mounts.values():
            yield f"{pod.name}: wanted a volume at {config.tiers.disk_dir}, saw {pod.mounts}"
        yield from _disk_problems(objects, pod)
    for group in objects.groups:
        needed, limit = _memory(objects, group)
        if needed > limit:
            yield f"{group['groupName']}: wanted memory for pool, tier and objects ({needed:.0f}), saw {limit:.0f}"
    if config.tiers.host_memory is None:
        yield "tiers.host_memory: wanted a size, for a node cache on every worker node"


def _is_in_secret(pod: Pod, file: str) -> bool:
    secrets = {volume["name"] for volume in pod.spec.get("volumes", []) if "secret" in volume}
    return any(name in secrets and str(PurePosixPath(file).parent) == path for name, path in pod.mounts.items())


def _is_mounted(pod: Pod, path: str) -> bool:
    return any(PurePosixPath(path).is_relative_to(place) for place in pod.mounts.values())


def _disk_problems(objects: Objects, pod: Pod) -> Iterator[str]:
    for volume in pod.spec.get("volumes", []):
        claim = volume.get("ephemeral", {}).get("volumeClaimTemplate", {}).get("spec")
        if claim is not None and pod.mounts[volume["name"]] == objects.config.tiers.disk_dir:
            size, wanted = (
                quantity(claim["resources"]["requests"]["storage"]),
                parse_size(objects.config.tiers.disk_capacity),
            )
            if size < wanted:
                yield f"{pod.name}: wanted {wanted} bytes for tiers.disk_capacity, saw a claim of {size:.0f}"


def _memory(objects: Objects, group: dict[str, Any]) -> tuple[float, float]:
    """Return what a pod needs of memory beside models and code, and what it has, in bytes."""
    config = objects.config
    pool = parse_size(config.engine.kv_cache_memory) if config.engine.kv_cache_memory else 0
    host = parse_size(config.tiers.host_memory) if config.tiers.host_memory not in (None, "auto") else 0
    stored = int(group.get("rayStartParams", {}).get("object-store-memory", 0))
    limit = quantity(objects.workers[group["groupName"]].container["resources"]["limits"]["memory"])
    return workers_of(objects, group) * pool + host + stored, limit
