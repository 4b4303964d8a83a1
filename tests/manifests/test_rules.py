"""What no schema holds: each wrong manifest is one line that says what was seen and what is wanted."""

from __future__ import annotations

import pytest
import yaml

from tests.manifests.checking import problems_of
from tests.manifests.kustomizations import built

CLUSTER = "spec/rayClusterConfig"
GROUP = f"{CLUSTER}/workerGroupSpecs/1"
HEAD = f"{CLUSTER}/headGroupSpec"
CONTAINER = f"{GROUP}/template/spec/containers/0"
PARAMETERS = f"{GROUP}/rayStartParams"
REMOVED = object()


def changed(overlay: str, kind: str, name: str, changes: dict[str, object]):
    """The objects of an overlay, one of them changed: values by the path to them."""
    documents = built(overlay)
    (document,) = [d for d in documents if (d["kind"], d["metadata"]["name"]) == (kind, name)]
    for path, value in changes.items():
        *parents, last = path.replace("~", "\n").split("/")
        place = document
        for part in parents:
            part = part.replace("\n", "/")
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        key = int(last) if isinstance(place, list) else last.replace("\n", "/")
        if value is REMOVED:
            del place[key]
        elif isinstance(place, list) and key == len(place):
            place.append(value)
        else:
            place[key] = value
    return documents


def ours(**sections):
    """Changes that give the application these sections, beside the base's."""
    (service,) = [document for document in built("base") if document["kind"] == "RayService"]
    document = yaml.safe_load(service["spec"]["serveConfigV2"])
    arguments = document["applications"][0]["args"]
    for section, values in sections.items():
        arguments[section] = {**arguments.get(section, {}), **values}
    return {"spec/serveConfigV2": yaml.safe_dump(document)}


SERVICE_CASES = {
    "fewer at most than at least": ({f"{GROUP}/maxReplicas": 1}, "wanted minReplicas <= replicas <= maxReplicas"),
    "as few as the default, unwritten": ({f"{GROUP}/minReplicas": REMOVED}, "minReplicas"),
    "as many as the default, unwritten": ({f"{GROUP}/maxReplicas": REMOVED}, "maxReplicas"),
    "an upgrade of no kind": ({"spec/upgradeStrategy/type": "Rolling"}, "wanted one of ['NewCluster'"),
    "an incremental upgrade without its options": (
        {"spec/upgradeStrategy/type": "NewClusterWithIncrementalUpgrade"},
        "wanted a type, and options where it is incremental",
    ),
    "steps above the surge": (
        {
            "spec/upgradeStrategy": {
                "type": "NewClusterWithIncrementalUpgrade",
                "clusterUpgradeOptions": {
                    "gatewayClassName": "istio",
                    "maxSurgePercent": 10,
                    "stepSizePercent": 50,
                    "intervalSeconds": 10,
                },
            }
        },
        "wanted 0 < step <= surge",
    ),
    "a cluster that goes before its streams": ({"spec/rayClusterDeletionDelaySeconds": 60}, "request_timeout_s (600)"),
    "requests to the head": ({"spec/excludeHeadPodFromServeSvc": False}, "wanted excludeHeadPodFromServeSvc"),
    "another Ray than the constraints'": ({f"{CLUSTER}/rayVersion": "2.59.0"}, "wanted that of constraints.txt"),
    "no token": ({f"{CLUSTER}/authOptions": {"mode": "disabled"}}, "wanted mode token and a secretName"),
    "a token of KubeRay's": ({f"{CLUSTER}/authOptions/secretName": REMOVED}, "wanted mode token and a secretName"),
    "a token by hand": (
        {f"{CONTAINER}/env/2": {"name": "RAY_AUTH_TOKEN", "value": "x"}},
        "wanted them left to KubeRay, saw ['RAY_AUTH_TOKEN']",
    ),
    "the first autoscaler": ({f"{CLUSTER}/autoscalerOptions/version": "v1"}, "autoscalerOptions.version v2"),
    "pods that start again": ({f"{GROUP}/template/spec/restartPolicy": "Always"}, "wanted Never"),
    "a Redis that is nowhere": (
        {f"{CLUSTER}/gcsFaultToleranceOptions/redisAddress": "redis:6379"},
        "wanted a Redis whose Service is here",
    ),
    "work for the head": ({f"{HEAD}/resources/CPU": "4"}, "wanted CPU 0"),
    "two groups of one name": ({f"{GROUP}/groupName": "prefill"}, "'prefill' 2 times"),
    "a parameter of no command": ({f"{PARAMETERS}/node-port": "6380"}, "wanted options of `ray start`"),
    "a port that Ray draws": ({f"{PARAMETERS}/node-manager-port": REMOVED}, "wanted node-manager-port"),
    "one port twice": ({f"{PARAMETERS}/node-manager-port": "6381"}, "wanted ports that do not meet"),
    "a port among the workers'": ({f"{PARAMETERS}/node-manager-port": "12000"}, "wanted ports that do not meet"),
    "a port that is no number": ({f"{PARAMETERS}/node-manager-port": "six"}, "wanted numbers"),
    "roads on Ray's ports": (ours(network={"port_range": [15000, 15999]}), "wanted ports beside Ray's workers'"),
    "labels of no group": (ours(pools={"decode_labels": {"kvray.io/pool": "decoding"}}), "that a worker group carries"),
    "any node for a pool": (ours(pools={"decode_labels": {}}), "wanted labels that a worker group carries"),
    "one group for both pools": (
        ours(pools={"decode_labels": {"kvray.io/pool": "prefill"}}),
        "wanted a group of one pool",
    ),
    "Ray's label and the pod's apart": (
        {f"{GROUP}/template/metadata/labels/kvray.io~pool": "prefill"},
        "wanted",
    ),
    "more workers than room": (ours(pools={"decode": 9}), "wanted room for 9 workers on their groups, saw room for 8"),
    "workers larger than pods": (ours(pools={"cpus_per_worker": 5}), "saw room for 0"),
    "a secret that is mounted nowhere": (ours(network={"secret_file": "/run/secret"}), "saw /run/secret"),
    "no secret": (ours(network={"secret_file": None}), "saw None"),
    "keys beside the Secret": (ours(http={"api_key_file": "/etc/kvray/more/keys"}), "saw /etc/kvray/more/keys"),
    "a model that is mounted nowhere": (ours(model={"path": "/data/model"}), "wanted a volume with /data/model"),
    "a disk that is mounted nowhere": (ours(tiers={"disk_dir": "/disk"}), "wanted a volume at /disk"),
    "no node cache": (ours(tiers={"host_memory": None}), "wanted a size, for a node cache"),
    "more KV than memory": (ours(engine={"kv_cache_memory": "14GiB"}), "wanted memory for pool"),
    "an end before the drain's": (
        {f"{GROUP}/template/spec/terminationGracePeriodSeconds": 30},
        "above pools.drain_timeout_s",
    ),
    "more requested than allowed": ({f"{CONTAINER}/resources/requests/cpu": "8"}, "no more than the limit of 4, saw 8"),
    "a resource of no name": ({f"{CONTAINER}/resources/limits/nvidia.com~gpus": "1"}, "wanted resources among"),
    "nothing asked for": ({f"{CONTAINER}/resources/requests/cpu": "0"}, "wanted more than nothing"),
    "memory without a limit": ({f"{CONTAINER}/resources/limits/memory": REMOVED}, "wanted a limit of memory"),
    "a variable twice": ({f"{CONTAINER}/env/2": {"name": "RAY_worker_niceness", "value": "1"}}, "2 times"),
    "a variable of no value": ({f"{CONTAINER}/env/2": {"name": "KVRAY_PORT"}}, "wanted a value or where it is from"),
    "a volume that is not there": (
        {f"{CONTAINER}/volumeMounts/2": {"name": "disk", "mountPath": "/disk"}},
        "wanted a volume disk",
    ),
    "a volume that nobody mounts": ({f"{GROUP}/template/spec/volumes/2": {"name": "x", "emptyDir": {}}}, "and mounted"),
    "a secret for everybody": ({f"{GROUP}/template/spec/volumes/0/secret/defaultMode": 0o444}, "no right for others"),
    "a claim that is not there": (
        {f"{GROUP}/template/spec/volumes/1/persistentVolumeClaim/claimName": "models"},
        "wanted a PersistentVolumeClaim models",
    ),
    "root": ({f"{GROUP}/template/spec/securityContext/runAsNonRoot": False}, "wanted runAsNonRoot"),
    "rights of the kernel": ({f"{CONTAINER}/securityContext/capabilities": {"add": ["SYS_ADMIN"]}}, "no capabilities"),
    "any image": ({f"{CONTAINER}/image": "kvray:latest"}, "wanted an image with a tag of its own"),
    "a priority that is not there": ({f"{GROUP}/template/spec/priorityClassName": "high"}, "wanted a PriorityClass"),
    "spread over nothing": (
        {f"{GROUP}/template/spec/topologySpreadConstraints/0/topologyKey": "hostname"},
        "wanted one of ['kubernetes.io/hostname'",
    ),
    "spread of nobody's pods": (
        {f"{GROUP}/template/spec/topologySpreadConstraints/0/labelSelector/matchLabels": {"kvray.io/pool": "x"}},
        "wanted pods that it takes",
    ),
    "a pod that no policy closes": ({f"{HEAD}/template/metadata/labels/kvray.io~cluster": "other"}, "NetworkPolicy"),
    "a name in capitals": ({"metadata/name": "Kvray"}, "wanted a name of small letters"),
    "a name that is too long": ({"metadata/name": "k" * 50}, "wanted a name of 41 characters"),
    "a key left empty": ({"metadata/labels": None}, "metadata/labels: wanted a value, saw nothing"),
    "a deprecated threshold": ({"spec/serviceUnhealthySecondThreshold": 60}, "deprecated"),
    "YAML that is none": ({"spec/serveConfigV2": "a: [1"}, "wanted YAML"),
    "a section twice": ({"spec/serveConfigV2": "applications: []\napplications: []"}, "stands twice"),
    "no application": ({"spec/serveConfigV2": "applications: []"}, "wanted one application"),
    "an unknown setting": (ours(tiers={"host_memry": "1GiB"}), "host_memry"),
    "a setting out of its range": (ours(engine={"block_size": 0}), "args: engine.block_size"),
}


@pytest.mark.parametrize("case", SERVICE_CASES)
def test_a_service_is_refused_that_has(case):
    changes, wanted = SERVICE_CASES[case]
    problems = problems_of(changed("base", "RayService", "kvray", changes))
    assert any(wanted in problem for problem in problems), problems


RULE = "spec/ingress/0"
OTHER_CASES = {
    "a policy for both ways": (
        "NetworkPolicy",
        "kvray-inside",
        {"spec/policyTypes": ["Ingress", "Egress"]},
        "wanted a policy for what comes in",
    ),
    "a policy of no way": ("NetworkPolicy", "kvray-inside", {"spec/policyTypes": ["Input"]}, "wanted one of ['Egress'"),
    "a policy for all pods": (
        "NetworkPolicy",
        "kvray-clients",
        {"spec/podSelector": {}},
        "wanted pods by their labels",
    ),
    "everybody": ("NetworkPolicy", "kvray-clients", {f"{RULE}/from": REMOVED}, "wanted who may come"),
    "everybody, by an empty list": ("NetworkPolicy", "kvray-clients", {f"{RULE}/from": []}, "wanted who may come"),
    "all ports for clients": ("NetworkPolicy", "kvray-clients", {f"{RULE}/ports": REMOVED}, "wanted ports"),
    "a port inside for clients": ("NetworkPolicy", "kvray-clients", {f"{RULE}/ports/0/port": 20000}, "alone, saw"),
    "a range of ports for clients": (
        "NetworkPolicy",
        "kvray-clients",
        {f"{RULE}/ports/0/endPort": 30000},
        "alone, saw",
    ),
    "a port by a name that Ray's pods lack": (
        "NetworkPolicy",
        "kvray-clients",
        {f"{RULE}/ports/0/port": "http"},
        "alone, saw",
    ),
    "a protocol of none": ("NetworkPolicy", "kvray-clients", {f"{RULE}/ports/0/protocol": "tcp"}, "wanted one of"),
    "no network": (
        "NetworkPolicy",
        "kvray-clients",
        {f"{RULE}/from/0": {"ipBlock": {"cidr": "10.0.0/8"}}},
        "wanted a network such as",
    ),
    "the whole world": (
        "NetworkPolicy",
        "kvray-clients",
        {f"{RULE}/from/0": {"ipBlock": {"cidr": "0.0.0.0/0"}}},
        "saw the whole world",
    ),
    "an exception from elsewhere": (
        "NetworkPolicy",
        "kvray-clients",
        {f"{RULE}/from/0": {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["192.168.0.0/16"]}}},
        "wanted exceptions within",
    ),
    "pods that are not there": (
        "NetworkPolicy",
        "kvray-operator",
        {"spec/podSelector/matchLabels/ray.io~node-type": "master"},
        "wanted pods that it takes",
    ),
    "an operator of another name": (
        "NetworkPolicy",
        "kvray-operator",
        {f"{RULE}/from/0/podSelector/matchLabels/app.kubernetes.io~name": "operator"},
        "wanted pods that it takes",
    ),
    "a namespace by a label that it lacks": (
        "NetworkPolicy",
        "kvray-operator",
        {f"{RULE}/from/0/namespaceSelector/matchLabels": {"name": "kuberay-operator"}},
        "wanted one of",
    ),
    "values with an operator that takes none": (
        "NetworkPolicy",
        "kvray-redis",
        {f"{RULE}/from/0/podSelector/matchExpressions/0/operator": "Exists"},
        "wanted values with In and NotIn",
    ),
    "no way to Redis for the job that tidies up": (
        "NetworkPolicy",
        "kvray-redis",
        {f"{RULE}/from/0/podSelector/matchExpressions/0/values": ["head"]},
        "wanted redis-cleanup let in",
    ),
    "a cluster that cannot talk": (
        "NetworkPolicy",
        "kvray-inside",
        {f"{RULE}/from/0/podSelector/matchLabels/kvray.io~pool": "decode"},
        "wanted",
    ),
    "a budget that Kubernetes cannot count": (
        "PodDisruptionBudget",
        "kvray-decode",
        {"spec/minAvailable": REMOVED, "spec/maxUnavailable": 1},
        "wanted minAvailable, a whole number",
    ),
    "a budget in percent": ("PodDisruptionBudget", "kvray-decode", {"spec/minAvailable": "50%"}, "a whole number"),
    "a budget that lets nobody go": (
        "PodDisruptionBudget",
        "kvray-decode",
        {"spec/minAvailable": 2},
        "wanted fewer than are always there",
    ),
    "a budget of all pods": (
        "PodDisruptionBudget",
        "kvray-decode",
        {"spec/selector/matchLabels/kvray.io~pool": REMOVED},
        "wanted the pods of one group",
    ),
    "a policy of eviction that is none": (
        "PodDisruptionBudget",
        "kvray-decode",
        {"spec/unhealthyPodEvictionPolicy": "Always"},
        "wanted one of ['AlwaysAllow'",
    ),
    "prefill first": ("PriorityClass", "kvray-prefill", {"value": 200000}, "wanted prefill below decode"),
    "a priority of the system's": ("PriorityClass", "kvray-serving", {"value": 2_000_000_000}, "from 1 to 10^9"),
    "a priority for everybody": ("PriorityClass", "kvray-serving", {"globalDefault": True}, "saw globalDefault"),
    "a port that Redis lacks": (
        "Service",
        "kvray-redis",
        {"spec/ports/0/targetPort": "db"},
        "wanted a port of its pods",
    ),
    "a claim of no size": (
        "PersistentVolumeClaim",
        "kvray-models",
        {"spec/resources/requests/storage": "200 GB"},
        "wanted a quantity",
    ),
    "a claim of no mode": ("PersistentVolumeClaim", "kvray-models", {"spec/accessModes": ["RWX"]}, "wanted one of"),
}


@pytest.mark.parametrize("case", OTHER_CASES)
def test_an_object_is_refused_that_has(case):
    kind, name, changes, wanted = OTHER_CASES[case]
    problems = problems_of(changed("base", kind, name, changes))
    assert any(wanted in problem for problem in problems), problems


MONITOR = "spec/podMetricsEndpoints/0"
MONITOR_CASES = {
    "no key for kvray": ("kvray", {f"{MONITOR}/authorization": REMOVED}, "wanted authorization from a Secret"),
    "a key of no Secret": ("kvray", {f"{MONITOR}/authorization/credentials/name": ""}, "wanted authorization"),
    "another way to say who one is": ("kvray", {f"{MONITOR}/authorization/type": "Basic"}, "wanted one of ['Bearer']"),
    "a port without metrics": (
        "kvray-head",
        {f"{MONITOR}/relabelings/0/replacement": "$1:8265"},
        "wanted a port with metrics",
    ),
    "a port that nobody declares": ("kvray-head", {f"{MONITOR}/port": "dashboard"}, "that all of its pods have"),
    "a port that pods lack": (
        "kvray-ray",
        {f"{MONITOR}/port": "as-metrics"},
        "wanted a port that all of its pods have",
    ),
    "more time than there is": ("kvray", {f"{MONITOR}/scrapeTimeout": "20s"}, "wanted scrapeTimeout within interval"),
    "pods that are not there": ("kvray-head", {"spec/selector/matchLabels/ray.io~node-type": "hea"}, "that it takes"),
    "another path": ("kvray", {f"{MONITOR}/path": "/metric"}, "wanted /metrics"),
}


@pytest.mark.parametrize("case", MONITOR_CASES)
def test_a_monitor_is_refused_that_has(case):
    name, changes, wanted = MONITOR_CASES[case]
    problems = problems_of(changed("monitoring", "PodMonitor", name, changes), beside=built("base"))
    assert any(wanted in problem for problem in problems), problems


def test_a_disk_smaller_than_its_capacity_is_refused():
    path = f"{GROUP}/template/spec/volumes/2/ephemeral/volumeClaimTemplate/spec/resources/requests/storage"
    problems = problems_of(changed("overlays/disk-and-bucket", "RayService", "kvray", {path: "100Gi"}))
    assert any("for tiers.disk_capacity" in problem for problem in problems), problems


def test_a_kind_that_nobody_knows_is_refused():
    problems = problems_of(changed("base", "Service", "kvray-redis", {"apiVersion": "v2"}))
    assert problems == ["Service wanted a kind that is known here, saw 'v2' 'Service'"]
