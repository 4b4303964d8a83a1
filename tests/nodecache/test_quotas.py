from nodecache.quotas import Accounts, TenantQuota, tenant_stats

QUOTAS = (
    TenantQuota(tenant=1, name="one", max_bytes={"host": 1000, "disk": 99}),
    TenantQuota(tenant=2, name="two"),
)


def test_a_quota_is_whole_blocks():
    host, disk, remote = (Accounts.of(QUOTAS, tier, 100) for tier in ("host", "disk", "remote"))
    assert (host.room(1), disk.room(1), remote.room(1)) == (10, 0, None)
    assert host.room(2) is None


def test_blocks_are_counted_of_those_alone_who_have_an_account():
    accounts = Accounts.of(QUOTAS, "host", 100)
    for tenant in (0, 1, 2, 3):
        accounts.add(tenant, 7)
    assert [accounts[tenant] for tenant in (0, 1, 2, 3)] == [0, 7, 7, 0]
    assert (accounts.room(1), accounts.num_over(1), accounts.num_over(1, 5), accounts.num_over(2, 99)) == (3, 0, 2, 0)
    accounts.add(1, -7)
    assert accounts.room(1) == 10
    assert list(accounts.limited()) == [1]
    assert not Accounts()


def test_what_tenants_have_is_told_by_their_names():
    accounts = Accounts.of(QUOTAS, "host", 100)
    accounts.add(1, 3)
    assert tenant_stats(QUOTAS, "host", accounts, 100) == {
        'kvray_cache_tenant_bytes{tenant="one",tier="host"}': 300.0,
        'kvray_cache_tenant_quota_bytes{tenant="one",tier="host"}': 1000.0,
        'kvray_cache_tenant_bytes{tenant="two",tier="host"}': 0.0,
    }
