"""How much of a tier tenants have, and may have: hard limits, counted in blocks of plain bytes. Pure.

A tenant at its quota gives up its own least worthy blocks for more, or is not taken in; it never pushes out others'.
Tenants that have no account are not counted: whoever names itself, as a client's cache_salt does, fills no memory here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from messages.tier import Tier


class TenantQuota(msgspec.Struct, frozen=True, kw_only=True):
    """A tenant that is counted, and what its blocks may take; None: no limit of its own."""

    tenant: int  #: as blocks say whose they are (kvcache.names.tenant_number)
    name: str  #: for people: of letters, digits, dots, dashes and underlines
    max_bytes: dict[Tier, int] = {}  #: by tier; none: no limit of its own


class Accounts:
    """Blocks of one tier by tenant. Every call is O(1). One thread, or its owner's lock."""

    def __init__(self, max_blocks: Mapping[int, int | None] | None = None) -> None:
        """Count for these tenants; None: without a limit."""
        self.max_blocks = dict(max_blocks or {})
        self._num_blocks = dict.fromkeys(self.max_blocks, 0)

    @classmethod
    def of(cls, quotas: Sequence[TenantQuota], tier: Tier, block_bytes: int) -> Accounts:
        """Open the accounts of a tier with blocks of so many bytes."""
        limits = {quota.tenant: quota.max_bytes.get(tier) for quota in quotas}
        return cls({tenant: None if limit is None else limit // block_bytes for tenant, limit in limits.items()})

    def __bool__(self) -> bool:
        return bool(self._num_blocks)

    def __getitem__(self, tenant: int) -> int:
        """Blocks that a tenant has; 0 for one that is not counted."""
        return self._num_blocks.get(tenant, 0)

    def add(self, tenant: int, num_blocks: int) -> None:
        """Count so many more blocks of a tenant, or fewer; one without an account is not counted."""
        if tenant in self._num_blocks:
            self._num_blocks[tenant] += num_blocks

    def room(self, tenant: int) -> int | None:
        """Return how many more blocks a tenant may have; None: as many as there is room for."""
        limit = self.max_blocks.get(tenant)
        return None if limit is None else max(0, limit - self._num_blocks[tenant])

    def num_over(self, tenant: int, num_more: int = 0) -> int:
        """Return how many blocks a tenant has too many, or would have with so many more."""
        limit = self.max_blocks.get(tenant)
        return 0 if limit is None else max(0, self._num_blocks[tenant] + num_more - limit)

    def limited(self) -> Iterator[int]:
        """Yield the tenants that have a limit."""
        return (tenant for tenant, limit in self.max_blocks.items() if limit is not None)


def tenant_stats(quotas: Sequence[TenantQuota], tier: Tier, accounts: Accounts, block_bytes: int) -> dict[str, float]:
    """Return by metric name what tenants have in a tier, and what they may have, in plain bytes."""
    values: dict[str, float] = {}
    for quota in quotas:
        label = f'{{tenant="{quota.name}",tier="{tier}"}}'
        values[f"kvray_cache_tenant_bytes{label}"] = float(accounts[quota.tenant] * block_bytes)
        if tier in quota.max_bytes:
            values[f"kvray_cache_tenant_quota_bytes{label}"] = float(quota.max_bytes[tier])
    return values
