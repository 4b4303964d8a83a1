"""What owners of blocks count of their tiers, read off the numbers that they tell."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from cluster.openai.cache_protocol import OwnerStats, TenantStats, TierStats
from cluster.openai.exposition import labels_of
from messages.fleet import WorkerInfo
from messages.tier import TIERS, Tier


def owner_stats(info: WorkerInfo, values: dict[str, float] | None, tiers: Sequence[Tier]) -> OwnerStats:
    """Return what an owner counts of its tiers. `values`: its numbers by metric name; None: it does not answer."""
    stats = {tier: _tier_stats(info, tier, values or {}) for tier in tiers}
    return OwnerStats(
        worker_id=info.worker_id,
        role=info.role,
        node=info.node_id,
        block_bytes=info.block_bytes,
        block_size=info.block_size,
        is_answering=values is not None,
        tiers={tier: one for tier, one in stats.items() if one is not None},
        tenants=_tenant_stats(values or {}),
    )


def seen_by(tenant: str, owner: OwnerStats) -> OwnerStats:
    """Return of what an owner has only what it has of a tenant."""
    own = {name: one for name, one in owner.tenants.items() if name == tenant}
    return msgspec.structs.replace(owner, tiers={}, tenants=own)


def _tenant_stats(values: dict[str, float]) -> dict[str, dict[Tier, TenantStats]]:
    found: dict[str, dict[Tier, TenantStats]] = {}
    for full_name, value in values.items():
        if full_name.startswith("kvray_cache_tenant_bytes{"):
            name, tier = labels_of(full_name)["tenant"], labels_of(full_name)["tier"]
            quota = values.get(full_name.replace("_bytes{", "_quota_bytes{"))
            one = TenantStats(bytes=int(value), quota_bytes=None if quota is None else int(quota))
            found.setdefault(name, {}).update({known: one for known in TIERS if known == tier})
    return found


def _tier_stats(info: WorkerInfo, tier: Tier, values: dict[str, float]) -> TierStats | None:
    """Return a tier's numbers; None where the owner has no such tier."""

    def number(name: str) -> int | None:
        value = values.get(name)
        return None if value is None or not math.isfinite(value) else int(value)

    if tier in ("device", "host"):
        blocks = number("kvray_cache_blocks_held")
        return TierStats(
            blocks=blocks,
            bytes=None if blocks is None else blocks * info.block_bytes,
            capacity_bytes=info.num_blocks * info.block_bytes,
            hits=number("kvray_blocks_hit_total" if tier == "device" else 'kvray_cache_offered_total{tier="host"}'),
            evictions=number("kvray_blocks_evicted_total"),
        )
    if f"kvray_{tier}_blocks" not in values:
        return None
    return TierStats(
        blocks=number(f"kvray_{tier}_blocks"),
        bytes=number(f"kvray_{tier}_bytes"),
        capacity_bytes=number(f"kvray_{tier}_capacity_bytes"),
        hits=number(f'kvray_cache_offered_total{{tier="{tier}"}}'),
        evictions=number(f"kvray_{tier}_evicted_blocks_total"),
    )
