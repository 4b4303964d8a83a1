"""What tenants may do with what is cached, over real HTTP: each with its own blocks alone, within its quota."""

from __future__ import annotations

import json
from collections.abc import Callable

import pyarrow as pa
import pytest

from cluster.openai.backend import ServedModel
from cluster.openai.callers import NOBODY
from kvcache.names import tenant_number
from tests.cluster.openai.cache_world import ACME, GLOBEX, OPS, PROMPT, bearer, managed, names_of, until
from tests.nodecache.test_process import BLOCK_BYTES
from text.tokenizer import Tokenizer


@pytest.fixture
async def world(tmp_path, tokenizer: Tokenizer, served_model: Callable[..., ServedModel]):
    async with managed(tmp_path, tokenizer, served_model(tokenizer), num_held=0) as made:
        yield made


async def test_a_tenant_finds_clears_and_checks_its_own_blocks_alone(world):
    own, others, plain = [await world.write(PROMPT, None, who) for who in (ACME, GLOBEX, NOBODY)]
    for names, who in ((own, ACME), (others, GLOBEX), (plain, NOBODY)):
        world.worker.hold(names[:4], who.owner(None))
    assert (await world.post("lookup", key="acme-key", prompt=PROMPT))["held_tokens"] == 96
    assert (await world.post("lookup", key="acme-key", prompt=PROMPT, cache_salt="mine"))["held_tokens"] == 0
    assert (await world.post("lookup", prompt=PROMPT, tenant="globex"))["held_tokens"] == 96
    did = await world.post("clear", key="acme-key", everything=True, dry_run=False)
    assert {tier: one["blocks"] for tier, one in did["tiers"].items()} == {
        "device": 4,
        "host": 6,
        "disk": 6,
        "remote": 0,
    }
    for tier in (world.held, lambda names: [name for name in names if world.disk.find(name)]):
        assert tier([*own, *others, *plain]) == [*others, *plain]
    assert (await world.post("lookup", key="acme-key", prompt=PROMPT))["held_tokens"] == 0
    assert world.worker.held([*own, *others, *plain]) == [*others[:4], *plain[:4]]
    would = await world.post("clear", tenant="globex")
    assert world.held(others) == others
    did = await world.post("clear", tenant="globex", dry_run=False)
    assert did["tiers"] == would["tiers"]
    assert [did["tiers"][tier]["blocks"] for tier in ("device", "host", "disk")] == [4, 6, 6]
    assert world.held([*others, *plain]) == plain
    assert world.worker.held([*others, *plain]) == plain[:4]


@pytest.mark.slow
async def test_what_a_tenant_may_not_is_a_403(world):
    await world.write(PROMPT, None, GLOBEX)
    for path, body, param in (
        ("lookup", {"prompt": PROMPT, "tenant": "globex"}, "tenant"),
        ("clear", {"tenant": "globex", "dry_run": False}, "tenant"),
        ("clear", {"prompt": PROMPT, "tenant": "globex", "dry_run": False}, "tenant"),
        ("check", {}, "prompt"),
        ("check", {"prompt": PROMPT, "tenant": "globex"}, "tenant"),
        ("pin", {"prompt": PROMPT}, None),
        ("unpin", {"prompt": PROMPT}, None),
    ):
        reply = await world.http.post(f"/v1/cache/{path}", json=body, headers=bearer("acme-key"))
        assert (reply.status_code, reply.json()["error"]["param"]) == (403, param)
    reply = await world.http.get("/v1/cache/table", params={"tenant": "globex"}, headers=bearer("acme-key"))
    assert reply.status_code == 403
    assert (await world.post("lookup", key="globex-key", prompt=PROMPT))["held_tokens"] == 96


async def test_who_may_hint_pins_its_own(world):
    await world.write(PROMPT)
    assert (await world.post("pin", key="globex-key", prompt=PROMPT))["tiers"]["host"]["blocks"] == 0
    await world.write(PROMPT, None, GLOBEX)
    assert (await world.post("pin", key="globex-key", prompt=PROMPT))["tiers"]["host"]["blocks"] == 6
    assert (await world.post("unpin", key="globex-key", prompt=PROMPT))["tiers"]["host"]["blocks"] == 6


async def test_the_table_names_tenants_and_shows_each_its_own(world):
    await world.write(PROMPT, None, ACME)
    await world.write(PROMPT)
    world.worker.hold(names_of(PROMPT, GLOBEX.salt(None))[:4], GLOBEX.owner(None))
    table = pa.ipc.open_stream((await world.http.get("/v1/cache/table")).content).read_all()
    pairs = set(zip(table["tenant"].to_pylist(), table["tenant_name"].to_pylist(), strict=True))
    assert pairs == {(tenant_number("acme"), "acme"), (tenant_number("globex"), "globex"), (0, None)}
    for key, query, num_rows in (("acme-key", {}, 12), ("globex-key", {}, 4), ("a-key", {"tenant": "acme"}, 12)):
        params = {"format": "json", **query}
        rows = (await world.http.get("/v1/cache/table", params=params, headers=bearer(key))).json()
        assert rows["num_rows"] == num_rows
        assert {row["tenant_name"] for row in rows["blocks"]} == {query.get("tenant", key.removesuffix("-key"))}


async def test_an_operator_that_names_a_tenant_is_shown_that_one_alone_its_own_too(world):
    await world.write(PROMPT, None, ACME)
    await world.write(PROMPT, None, OPS)
    for query, num_rows in (({}, 24), ({"tenant": "acme"}, 12), ({"tenant": "ops"}, 12)):
        params = {"format": "json", **query}
        rows = (await world.http.get("/v1/cache/table", params=params, headers=bearer("ops-key"))).json()
        assert rows["num_rows"] == num_rows


async def test_a_tenants_check_tells_nothing_of_how_much_others_have(world):
    await world.write(PROMPT, None, GLOBEX)
    await world.write(PROMPT, None, ACME)
    reply = await world.http.post("/v1/cache/check", json={"prompt": PROMPT}, headers=bearer("acme-key"))
    progress = [json.loads(line) for line in reply.text.splitlines()[:-1]]
    assert {line["tier"]: line["held"] for line in progress} == {"device": 0, "host": 6, "disk": 6, "remote": 0}


@pytest.mark.slow
async def test_stats_tell_what_tenants_have_and_each_its_own(world):
    await world.write(PROMPT, None, ACME)
    world.worker.hold(names_of(PROMPT, ACME.salt(None))[:4], ACME.owner(None))
    label = 'kvray_cache_tenant_bytes{tenant="acme",tier="disk"}'
    await until(lambda: world.router._cache_stats[world.cache.worker_id].values[label] == 6 * BLOCK_BYTES)
    told = (await world.http.get("/v1/cache/stats")).json()
    [worker], [cache] = told["workers"], told["caches"]
    assert worker["tenants"]["acme"] == {"device": {"bytes": 4 * BLOCK_BYTES, "quota_bytes": None}}
    one = {"bytes": 6 * BLOCK_BYTES, "quota_bytes": None}
    assert cache["tenants"]["acme"] == {"host": one | {"quota_bytes": 8 * BLOCK_BYTES}, "disk": one}
    assert cache["tenants"]["globex"]["disk"] == {"bytes": 0, "quota_bytes": None}
    stats = (await world.http.get("/v1/cache/stats", headers=bearer("acme-key"))).json()
    owners = [*stats["workers"], *stats["caches"]]
    assert [(owner["tiers"], list(owner["tenants"])) for owner in owners] == [({}, ["acme"])] * 2


async def test_a_tenant_at_its_quota_gives_up_its_own_blocks(world):
    others = await world.write(PROMPT, None, GLOBEX)
    first = await world.write(PROMPT, None, ACME)
    second = await world.write(PROMPT, "more", ACME)
    assert world.held(others) == others
    assert world.held(second) == second
    assert len(world.held(first)) == 2


@pytest.mark.slow
async def test_other_ways_to_touch_what_is_cached_are_an_operators(world):
    for path in ("evict", "move", "warm", "gc", "export", "import"):
        reply = await world.http.post(f"/v1/cache/{path}", json={"prompt": PROMPT}, headers=bearer("acme-key"))
        assert reply.status_code == 403
    names = await world.write(PROMPT, None, ACME)
    did = await world.post("evict", prompt=PROMPT, tenant="acme", dry_run=False)
    assert (did["tiers"]["host"]["blocks"], did["tiers"]["disk"]["blocks"]) == (6, 6)
    assert world.held(names) == []
