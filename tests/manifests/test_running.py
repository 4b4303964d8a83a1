"""What the manifests say holds of a real Ray cluster: where workers run, which ports listen, how a change comes in."""

from __future__ import annotations

import asyncio
import time

import pytest

from cluster.config import KvrayConfig
from tests.cluster.chaos import CONFIG, Load
from tests.manifests.kustomizations import built
from tests.manifests.objects import Objects
from tests.manifests.ray_cluster import RayCluster, running, with_credentials
from tests.models import make_tiny_model
from tests.reference import Reference

pytestmark = [pytest.mark.alone, pytest.mark.long, pytest.mark.timeout(300), pytest.mark.usefixtures("one_thread")]

#: docs/DEPLOY.md has them too: what listens where, beside ports of a range.
ON_EVERY_NODE = {6380, 6381, 6382, 6383, 8000, 8080, 52365}
ON_THE_HEAD = {6379, 8265, 10001, 44217, 44227}
WORKER_PORTS = range(10002, 20000)
CACHED_S = 20.0
ROADS = range(*KvrayConfig().network.port_range)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=8192)


@pytest.fixture(scope="module")
def objects():
    return Objects(built("overlays/cpu-demo"))


@pytest.fixture(scope="module")
def document(objects, model_dir, tmp_path_factory):
    return with_credentials(
        objects.service["serveConfigV2"],
        tmp_path_factory.mktemp("credentials"),
        model={"path": str(model_dir), "dtype": "float32", "max_model_len": 4352},
        engine={"kv_cache_memory": "16MiB"},
        tiers={"host_memory": "16MiB"},
        http=CONFIG["http"],
    )


@pytest.fixture(scope="module")
def cluster(objects, document):
    with running(objects) as cluster:
        cluster.deploy(document)
        yield cluster


def test_workers_run_where_their_labels_are_each_beside_a_node_cache_and_none_on_the_head(cluster: RayCluster):
    for pool, deployment, other in (("prefill", "Prefill", "Decode"), ("decode", "Decode", "Prefill")):
        titles = " ".join(cluster.nodes[pool].titles())
        assert f"ServeReplica:kvray:{deployment}" in titles
        assert f"ServeReplica:kvray:{other}" not in titles
        ends_s = time.monotonic() + CACHED_S
        while "ray::CacheActor" not in " ".join(cluster.nodes[pool].titles()):
            assert time.monotonic() < ends_s, f"no node cache: {cluster.nodes[pool].titles()}"
            time.sleep(0.2)
    head = " ".join(cluster.nodes["head"].titles())
    assert "ServeReplica:kvray:Prefill" not in head
    assert "ServeReplica:kvray:Decode" not in head


def test_ports_are_those_that_are_written_down_but_for_channels_and_serves_own(cluster: RayCluster):
    for name, node in cluster.nodes.items():
        fixed = ON_EVERY_NODE | (ON_THE_HEAD if name == "head" else set())
        listening = node.listening()
        drawn = {port: who for port, who in listening.items() if port not in fixed}
        drawn = {port: who for port, who in drawn.items() if port not in WORKER_PORTS and port not in ROADS}
        # Our channels, and what Serve's replicas call each other by: no setting has their ports.
        assert {who for who in drawn.values() if not who.startswith(("ray::ServeRepli", "python"))} == set(), drawn
        assert {6380, 6381, 6382, 6383, 8080} <= set(listening)


async def test_another_configuration_is_rolled_out_in_place_while_requests_go_on(cluster, document, model_dir):
    before = {name: replicas_of(cluster, name) for name in ("Prefill", "Decode", "Router", "Ingress")}
    changed = document["applications"][0] | {"runtime_env": {"env_vars": {"ROLLED_OUT": "1"}}}
    load = Load(cluster.url, "rollout")
    async with load.running():
        await asyncio.sleep(2)
        await asyncio.to_thread(cluster.deploy, document | {"applications": [changed]})
        await asyncio.sleep(5)
    verdict = load.verdict(Reference(model_dir), [])
    print(load.summary())
    for name, replicas in before.items():
        assert not replicas & replicas_of(cluster, name), f"{name} was not started anew"
    assert not verdict.wrong
    assert not verdict.hung
    assert not verdict.failed


def replicas_of(cluster: RayCluster, deployment: str) -> set[str]:
    return {replica["replica_id"] for replica in cluster.application()["deployments"][deployment]["replicas"]}


def test_a_share_of_the_capacity_is_a_share_of_the_workers(cluster, document):
    """What KubeRay does to either cluster while an incremental upgrade moves requests."""
    for capacity in (50.0, 100.0):
        cluster.deploy(document | {"target_capacity": capacity})
        assert set(cluster.num_replicas().values()) == {1}
