"""What is taken in of blocks that are to be written, and what goes out for it, so that quotas hold. No IO."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from nodecache.disk.index import DiskIndex
from nodecache.store import StoredBlock


def within_quotas(
    index: DiskIndex, blocks: Sequence[StoredBlock], lacking: Collection[int]
) -> tuple[list[int], list[bytes]]:
    """Return those of `lacking`, numbers of blocks, that are taken in, heads first, and the names that go out for them.

    A tenant's least recently used blocks go, none of `blocks`; where that is not enough its last ones are left out.
    """
    taken = list(lacking)
    leaving: list[bytes] = []
    names = {block.name for block in blocks}
    for tenant in sorted({blocks[number].tenant for number in taken}):
        own = [number for number in taken if blocks[number].tenant == tenant]
        num_over = index.accounts.num_over(tenant, len(own))
        coldest = index.coldest(tenant, num_over, names) if num_over else []
        leaving += coldest
        left_out = set(own[len(own) - (num_over - len(coldest)) :])
        taken = [number for number in taken if number not in left_out]
    return taken, leaving


def above_quotas(index: DiskIndex) -> list[bytes]:
    """Return the names of what tenants have above their quotas: those of the process before may have been larger."""
    accounts = index.accounts
    return [name for tenant in accounts.limited() for name in index.coldest(tenant, accounts.num_over(tenant), ())]
