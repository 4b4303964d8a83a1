"""Which deployments a configuration makes, and with what. No Ray: an application is a value until it runs."""

from __future__ import annotations

from typing import Any

import pytest
from ray import cloudpickle

from cluster.app import APP_NAME, build, build_application
from cluster.config import parse_config
from cluster.ingress import Ingress
from decode.worker import DecodeWorker
from engine.actor import WorkerActor
from engine.worker import WorkerOptions
from kvcache.names import tenant_number
from kvrouter.actor import RouterActor
from messages.errors import ConfigError
from nodecache.quotas import TenantQuota
from prefill.worker import PrefillWorker
from transport.secret import ClusterSecret


def deployments(listener: str | None = None, **sections: dict[str, Any]) -> dict[str, Any]:
    """By name, the ingress first, then those it is given."""
    application = build_application(parse_config(sections), listener)
    ingress = application._bound_deployment
    inner = [handle._bound_deployment for handle in ingress.init_args[3]]
    return {deployment.name: deployment for deployment in (ingress, *inner)}


def options(**sections: dict[str, Any]) -> WorkerOptions:
    """What a worker is started with: the same for both kinds."""
    made = deployments(**sections)
    for_decode, for_prefill = made["Decode"].init_args[1], made["Prefill"].init_args[1]
    assert for_decode == for_prefill
    return for_decode


# --------------------------------------------------------------------------------------------------------- deployments


def test_there_are_four_and_each_runs_its_own_class():
    made = deployments()
    assert list(made) == ["Ingress", "Router", "Decode", "Prefill"]
    classes = [made[name].func_or_class for name in made]
    assert classes == [Ingress, RouterActor, WorkerActor, WorkerActor]
    assert made["Decode"].init_args[0] is DecodeWorker
    assert made["Prefill"].init_args[0] is PrefillWorker


def test_a_fleet_without_prefill_workers_has_no_such_deployment_and_nobody_watches_it():
    made = deployments(pools={"prefill": 0})
    assert list(made) == ["Ingress", "Router", "Decode"]
    assert made["Ingress"].init_args[2] == made["Router"].init_args[3] == ["Decode"]


def test_ingress_and_router_watch_both_kinds_of_workers_of_this_application():
    made = deployments()
    assert made["Ingress"].init_args[1] == APP_NAME
    assert made["Ingress"].init_args[2] == made["Router"].init_args[3] == ["Decode", "Prefill"]
    assert made["Router"].init_args[2].args == (APP_NAME,)


def test_replicas_are_as_many_as_the_configuration_says_and_the_router_is_one():
    made = deployments(pools={"prefill": 3, "decode": 2, "ingress": 4})
    assert {name: deployment.num_replicas for name, deployment in made.items()} == {
        "Ingress": 4,
        "Router": 1,
        "Decode": 2,
        "Prefill": 3,
    }


def test_only_workers_reserve_anything_and_each_kind_goes_to_the_nodes_that_are_labelled_for_it():
    pools = {"cpus_per_worker": 2.0, "gpus_per_worker": 1.0, "decode_labels": {"zone": "a"}}
    made = {name: dict(deployment.ray_actor_options) for name, deployment in deployments(pools=pools).items()}
    for name in ("Decode", "Prefill"):
        del made[name]["runtime_env"]
    assert made["Decode"] == {"num_cpus": 2.0, "num_gpus": 1.0, "label_selector": {"zone": "a"}}
    assert made["Prefill"] == {"num_cpus": 2.0, "num_gpus": 1.0}
    assert made["Router"] == made["Ingress"] == {"num_cpus": 0}


@pytest.mark.parametrize(("listener", "ingress_s"), [(None, 77.0), ("a socket", 1.0)])
def test_who_is_stopped_may_finish_but_an_ingress_whose_streams_serve_does_not_see_is_waited_for_no_longer_than_deaf(
    listener, ingress_s
):
    made = deployments(listener, pools={"drain_timeout_s": 77.0})
    waits = {name: deployment._deployment_config.graceful_shutdown_timeout_s for name, deployment in made.items()}
    assert waits == {"Ingress": ingress_s, "Router": 77.0, "Decode": 77.0, "Prefill": 77.0}
    assert made["Ingress"].init_args[4] == listener


def test_the_replica_sets_of_all_but_the_ingress_are_watched_and_all_are_health_checked_alike():
    made = {name: deployment._deployment_config for name, deployment in deployments().items()}
    watched = [name for name in made if "FleetRouter" in str(made[name].request_router_config.request_router_class)]
    assert watched == ["Router", "Decode", "Prefill"]
    assert {(config.health_check_period_s, config.health_check_timeout_s) for config in made.values()} == {(1.0, 3.0)}


# --------------------------------------------------------------------------------------------------- what each is told


def test_a_workers_options_are_the_documents_in_the_engines_units():
    found = options(
        model={"path": "/models/x", "dtype": "float32", "max_model_len": 99},
        engine={
            "kv_cache_memory": "1.5MiB",
            "itl_target_ms": 25.0,
            "kernels": "off",
            "num_threads": 3,
            "kv_cache_dtype": "fp8",
        },
        network={"prefill_timeout_s": 7.0, "roads": ["socket"], "port_range": [30000, 30001]},
    )
    assert (found.model_dir, found.dtype, found.max_model_len) == ("/models/x", "float32", 99)
    assert (found.engine.kv_cache_bytes, found.engine.itl_target_s) == (3 * 2**19, 0.025)
    assert found.engine.remote_timeout_s == 7.0
    assert (found.use_kernels, found.num_threads, found.kv_cache_dtype) == (False, 3, "fp8")
    assert (found.roads.names, found.roads.port_range) == (("socket",), (30000, 30001))


def test_without_a_size_the_pool_is_a_share_of_what_is_free():
    found = options(engine={"kv_cache_share": 0.5, "gpu_memory_utilization": 0.8})
    assert (found.engine.kv_cache_bytes, found.engine.kv_cache_share, found.use_kernels) == (None, 0.5, True)
    assert found.engine.gpu_memory_utilization == 0.8


@pytest.mark.parametrize(("gpus", "share"), [(0.5, 0.4), (1, 0.8), (2, 0.8), (0, 0.8)])
def test_workers_that_share_a_gpu_share_its_memory(gpus, share):
    found = options(engine={"gpu_memory_utilization": 0.8}, pools={"gpus_per_worker": gpus})
    assert found.engine.gpu_memory_utilization == share


def test_node_caches_are_told_whose_blocks_may_take_how_much():
    member = {"name": "acme", "api_key_file": "/run/acme", "host_quota": "1KiB", "remote_quota": "2GB"}
    other = {"name": "globex", "api_key_file": "/run/globex"}
    found = options(tiers={"host_memory": "1GiB"}, tenants={"members": [member, other]})
    assert found.cache.tenants == (
        TenantQuota(tenant=tenant_number("acme"), name="acme", max_bytes={"host": 1024, "remote": 2 * 10**9}),
        TenantQuota(tenant=tenant_number("globex"), name="globex"),
    )


def test_router_and_workers_share_one_secret_and_one_idea_of_silence(tmp_path):
    secret = ClusterSecret.generate()
    path = tmp_path / "secret"
    path.write_text(secret.hex())
    path.chmod(0o600)
    network = {"heartbeat_s": 0.25, "lost_after_s": 9.0, "host": "10.0.0.1", "secret_file": str(path)}
    made = deployments(network=network)
    told = [made["Router"].init_args[:2], made["Decode"].init_args[1:3], made["Prefill"].init_args[1:3]]
    for each, read_secret in told:
        assert each.host == "10.0.0.1"
        assert read_secret() == secret
        assert (each.channel.heartbeat_s, each.channel.lost_after_s) == (0.25, 9.0)


def test_an_application_from_a_document_reads_no_credential_where_it_is_built(monkeypatch):
    secret = ClusterSecret.generate().hex()
    monkeypatch.setenv("KVRAY_SECRET", secret)
    monkeypatch.setenv("KVRAY_API_KEY", "5417041")
    ingress = build({"model": "/models/x"})._bound_deployment
    assert ingress.init_args[0].model.path == "/models/x"
    inner = [handle._bound_deployment.init_args for handle in ingress.init_args[3]]
    for handed_on in (ingress.init_args[:3], *inner):
        assert secret.encode() not in cloudpickle.dumps(handed_on)
        assert b"5417041" not in cloudpickle.dumps(handed_on)
    with pytest.raises(ConfigError, match="no such key"):
        build({"no_such_section": "/models/x"})
    with pytest.raises(ConfigError, match=r"wanted a file that every node has \(http\.api_key_file\)") as caught:
        build({"http": {"api_keys": ["5417041"]}})
    assert "5417041" not in caught.value.message


# ------------------------------------------------------------------------------------------------------------- threads


def test_each_worker_counts_its_nodes_cores_itself():
    assert options(pools={"prefill": 2, "decode": 2}).num_threads is None


def test_a_number_that_was_given_counts():
    assert options(engine={"num_threads": 5}, pools={"prefill": 4, "decode": 4}).num_threads == 5


def test_threads_of_a_worker_soon_sleep_where_they_wait():
    made = deployments()
    for name in ("Decode", "Prefill"):
        assert made[name].ray_actor_options["runtime_env"] == {"env_vars": {"GOMP_SPINCOUNT": "10000"}}
