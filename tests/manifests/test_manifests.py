"""Every kustomization is valid, by the schemas of Kubernetes, KubeRay and the Prometheus operator and by our rules."""

from __future__ import annotations

import pytest

from cluster.config import DEMO_MODEL
from tests.manifests.checking import problems_of
from tests.manifests.kustomizations import COMPONENTS, OVERLAYS, built
from tests.manifests.network_rules import is_let_in, scraped_port
from tests.manifests.objects import Objects, Pod

#: What listens in a pod, as far as it is the same everywhere, and some of the ports that are drawn.
PORTS = {6379, 6380, 6381, 6382, 6383, 8000, 8080, 8265, 10001, 10002, 19999, 20000, 20999, 33333, 44217, 44227, 52365}


@pytest.mark.parametrize("name", [*OVERLAYS, *COMPONENTS])
def test_nothing_is_wrong_with(name):
    assert problems_of(built(name)) == []


def test_nothing_is_wrong_with_what_is_for_prometheus():
    assert problems_of(built("monitoring"), beside=built("base")) == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_prefill_and_decode_run_on_groups_of_their_own(name):
    objects = Objects(built(name))
    prefill = objects.groups_of(objects.config.pools.prefill_labels)
    decode = objects.groups_of(objects.config.pools.decode_labels)
    assert [group["groupName"] for group in prefill + decode] == ["prefill", "decode"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_stranger_reaches_http_alone(name):
    objects = Objects(built(name))
    stranger = Pod("stranger", {"app": "something"}, {})
    for pod in objects.pods:
        open_ports = [port for port in sorted(PORTS) if is_let_in(objects, stranger, pod, port)]
        assert open_ports == ([] if "redis" in pod.name else [8000])


def test_each_overlay_is_what_it_is_named_after():
    overlays = {name.removeprefix("overlays/"): Objects(built(name)) for name in OVERLAYS}
    assert overlays["cpu-demo"].config.model.path == str(DEMO_MODEL)
    assert overlays["gpu"].config.pools.gpus_per_worker == 1
    assert overlays["gpu"].head.container["image"].endswith("-cuda")
    assert len(overlays["multi-tenant"].config.tenants.members) > 1
    tiers = overlays["disk-and-bucket"].config.tiers
    assert tiers.disk_dir is not None
    assert (tiers.remote or "").startswith("s3://")


def test_only_the_autoscaler_and_so_the_head_gets_rights_in_kubernetes():
    for name in OVERLAYS:
        for pod in Objects(built(name)).pods:
            assert pod.spec.get("automountServiceAccountToken", True) is (pod.name == "head headgroup")


def test_all_that_is_scraped_and_nothing_else_is_open_to_prometheus():
    objects = Objects([*built("monitoring"), *built("base")])
    endpoints = [end for monitor in objects.of("PodMonitor") for end in monitor["spec"]["podMetricsEndpoints"]]
    scraped = {scraped_port(endpoint) for endpoint in endpoints}
    (rule,) = objects.named("NetworkPolicy")["kvray-metrics"]["spec"]["ingress"]
    assert {port["port"] for port in rule["ports"]} == scraped
