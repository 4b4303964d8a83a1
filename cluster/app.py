"""The Serve application: which deployments, how many replicas, with what options.

Importable as it is: `serve run cluster.app:build model=DIR`, or in a serveConfigV2:

    applications:
      - name: kvray
        import_path: cluster.app:build
        args: {model: {path: /models/x}, pools: {prefill: 2, decode: 2}}
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig as ServeAutoscaling
from ray.serve.config import AutoscalingPolicy

from cluster.autoscaling import Targets
from cluster.autoscaling_policy import LOOK_BACK_S, PERIOD_S
from cluster.config import (
    AUTO_SIZE,
    KvrayConfig,
    TenantConfig,
    TenantsConfig,
    TiersConfig,
    num_ingresses,
    parse_config,
    parse_size,
)
from cluster.credentials import cluster_secret, refuse_keys
from cluster.fleet import FleetWatch, fleet_router_config
from cluster.ingress import Ingress
from cluster.logs import open_process_log
from cluster.replica import prepared
from cluster.span_export import check_exporter
from decode.worker import DecodeWorker
from engine.actor import WorkerActor
from engine.core import EngineOptions
from engine.cores import OMP_ENVIRONMENT
from engine.worker import WorkerOptions
from kvcache.names import tenant_number
from kvrouter.actor import RouterActor, RouterOptions
from messages.tier import Tier
from nodecache.process import CacheSettings
from nodecache.quotas import TenantQuota
from prefill.worker import PrefillWorker
from transport.channel import ChannelConfig
from transport.opening import RoadOptions

APP_NAME = "kvray"

#: A replica that does not answer three times in a row, for this long each, is replaced.
_HEALTH = {"health_check_period_s": 1.0, "health_check_timeout_s": 3.0}

#: So long its clients wait once it is known not to answer; then its connections end with it.
_DEAF_S = 1.0


def build(args: dict[str, Any]) -> serve.Application:
    """Build an application from a configuration document, for `serve run` and serveConfigV2.

    Raises:
        ConfigError: the document is refused; says where, what was seen, what is wanted.
    """
    return build_application(parse_config(args))


def build_application(
    config: KvrayConfig, listener: str | None = None, log_dir: str | None = None
) -> serve.Application:
    """Build an application from a whole configuration.

    Ray hands on what is built, and Serve shows it: it says where each process finds the cluster secret and the API keys
    (cluster/credentials.py). `listener` names a socket on this machine that the ingresses accept from themselves
    (cluster/listener.py); without, requests come through Serve's proxies. In `log_dir` each process keeps a file of
    what it says (cluster/logs.py); without, Ray does.

    Raises:
        ConfigError: the configuration itself holds API keys.
    """
    refuse_keys(config)
    check_exporter(config.observability.otlp_endpoint)
    options = _worker_options(config)
    open_log = functools.partial(open_process_log, config.log.level, config.log.format, log_dir)
    prepare = functools.partial(prepared, open_log)
    read_secret = functools.partial(cluster_secret, config.network.secret_file)
    life = {
        **_HEALTH,
        "graceful_shutdown_timeout_s": config.pools.drain_timeout_s,
        "graceful_shutdown_wait_loop_s": 0.2,
    }
    common: dict[str, Any] = {"request_router_config": fleet_router_config(), **life}
    resources = {
        "num_cpus": config.pools.cpus_per_worker,
        "num_gpus": config.pools.gpus_per_worker,
        "runtime_env": {"env_vars": OMP_ENVIRONMENT},
    }
    decode = serve.deployment(
        name="Decode",
        **_replicas(config, config.pools.decode, config.autoscaling.max_decode),
        ray_actor_options=_placed(resources, config.pools.decode_labels),
        **common,
    )(WorkerActor).bind(DecodeWorker, options, read_secret, prepare, open_log)
    inner = [decode]
    if config.pools.prefill > 0:
        inner.append(
            serve.deployment(
                name="Prefill",
                **_replicas(config, config.pools.prefill, config.autoscaling.max_prefill),
                ray_actor_options=_placed(resources, config.pools.prefill_labels),
                **common,
            )(WorkerActor).bind(PrefillWorker, options, read_secret, prepare, open_log)
        )
    roles = ["Decode", "Prefill"] if config.pools.prefill > 0 else ["Decode"]
    router = serve.deployment(name="Router", ray_actor_options={"num_cpus": 0}, **_replicas(config, 1, None), **common)(
        RouterActor
    ).bind(
        _router_options(config),
        read_secret,
        functools.partial(FleetWatch, APP_NAME),
        roles,
        prepare,
    )
    if listener is not None:
        # Serve does not see what such an ingress streams, and replaces only one that does not answer.
        life["graceful_shutdown_timeout_s"] = _DEAF_S
    return serve.deployment(
        name="Ingress",
        num_replicas=num_ingresses(config.pools),
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=10_000,
        **life,
    )(Ingress).bind(config, APP_NAME, roles, [router, *inner], listener, prepare)


def _replicas(config: KvrayConfig, least: int, most: int | None) -> dict[str, Any]:
    """Return Serve's options for at least so many replicas, and at most `most`; None: no more than that.

    Where any number follows the load, Serve's policy sees those deployments alone that have such a setting.
    """
    if not config.autoscaling.is_wanted:
        return {"num_replicas": least}
    section = config.autoscaling
    targets = Targets(
        ttft_s=section.ttft_s,
        itl_s=section.itl_ms / 1000,
        grow_after_s=section.grow_after_s,
        shrink_after_s=section.shrink_after_s,
        keeps_kv=config.tiers.is_wanted,
    )
    policy = AutoscalingPolicy(
        policy_function="cluster.autoscaling_policy:DeploymentPolicy", policy_kwargs=dataclasses.asdict(targets)
    )
    setting = ServeAutoscaling(
        min_replicas=least,
        max_replicas=most or least,
        upscale_delay_s=0.0,  # ours know when
        downscale_delay_s=0.0,
        metrics_interval_s=PERIOD_S,
        look_back_period_s=LOOK_BACK_S,
        policy=policy,
    )
    return {"autoscaling_config": setting}


def _placed(resources: dict[str, Any], labels: dict[str, str]) -> dict[str, Any]:
    return {**resources, **({"label_selector": labels} if labels else {})}


def _channel(config: KvrayConfig) -> ChannelConfig:
    return ChannelConfig(heartbeat_s=config.network.heartbeat_s, lost_after_s=config.network.lost_after_s)


def _router_options(config: KvrayConfig) -> RouterOptions:
    is_observed = config.observability.level == "on"
    return RouterOptions(
        channel=_channel(config),
        host=config.network.host,
        max_ttft_s=config.http.max_ttft_s,
        routing=config.pools.routing,
        explained_requests=config.observability.explained_requests if is_observed else 0,
        is_observed=is_observed,
    )


def _worker_options(config: KvrayConfig) -> WorkerOptions:
    section = config.engine
    return WorkerOptions(
        model_dir=config.model.path,
        dtype=config.model.dtype,
        kv_cache_dtype=section.kv_cache_dtype,
        device=config.model.device,
        max_model_len=config.model.max_model_len,
        num_threads=section.num_threads,
        engine=EngineOptions(
            block_size=section.block_size,
            kv_cache_bytes=None if section.kv_cache_memory is None else parse_size(section.kv_cache_memory),
            kv_cache_share=section.kv_cache_share,
            # workers that share a GPU share its memory
            gpu_memory_utilization=section.gpu_memory_utilization * min(1.0, config.pools.gpus_per_worker or 1.0),
            max_num_seqs=section.max_num_seqs,
            max_num_batched_tokens=section.max_num_batched_tokens,
            itl_target_s=section.itl_target_ms / 1000,
            remote_timeout_s=config.network.prefill_timeout_s,
            has_lower_tiers=config.tiers.is_wanted,
            tokenizer_rules=config.model.tokenizer_rules,
        ),
        use_kernels=section.kernels == "auto",
        host=config.network.host,
        channel=_channel(config),
        lease_s=config.network.lease_s,
        stall_s=config.network.stall_s,
        cache=_cache_settings(config.tiers, config.tenants),
        tenants={tenant_number(tenant.name): tenant.name for tenant in config.tenants.members},
        roads=RoadOptions(
            names=config.network.roads,
            port_range=config.network.port_range,
            ucx_transports=config.network.ucx_transports,
            ucx_devices=config.network.ucx_devices,
        ),
    )


def _cache_settings(tiers: TiersConfig, tenants: TenantsConfig) -> CacheSettings | None:
    if not tiers.is_wanted:
        return None
    is_sized = tiers.host_memory not in (None, AUTO_SIZE)
    return CacheSettings(
        host_memory_bytes=parse_size(tiers.host_memory) if is_sized and tiers.host_memory is not None else None,
        disk_dir=tiers.disk_dir,
        disk_capacity_bytes=parse_size(tiers.disk_capacity),
        remote=tiers.remote,
        remote_compression=tiers.remote_compression,
        tenants=tuple(
            TenantQuota(tenant=tenant_number(tenant.name), name=tenant.name, max_bytes=_quotas(tenant))
            for tenant in tenants.members
        ),
    )


def _quotas(tenant: TenantConfig) -> dict[Tier, int]:
    sizes: dict[Tier, str | None] = {
        "host": tenant.host_quota,
        "disk": tenant.disk_quota,
        "remote": tenant.remote_quota,
    }
    return {tier: parse_size(size) for tier, size in sizes.items() if size is not None}
