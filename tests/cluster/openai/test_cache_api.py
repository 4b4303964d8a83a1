"""/v1/cache/... over real HTTP, with a real dispatcher, router and node cache, and a worker that is a pool."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import cluster.caches
from cluster.openai.backend import ServedModel
from nodecache.disk.layout import Model
from nodecache.disk.store import DiskStore
from tests.cluster.openai.cache_world import HELD, PROMPT, managed, until
from tests.nodecache.blocks import BLOCK_SIZE, FINGERPRINT, checksum, content_of
from tests.nodecache.test_process import BLOCK_BYTES
from tests.served import run_kvray
from text.tokenizer import Tokenizer


def counts_of(blocks: int, **others: int) -> dict[str, int]:
    """What a WorkReply says of a tier of which so many blocks were done."""
    refused = ("without_room", "above_quota", "not_stored")
    none = dict.fromkeys(("in_use", "damaged", *refused, "freed_files", "freed_bytes"), 0) | {"below": {}}
    return {"blocks": blocks, "tokens": blocks * BLOCK_SIZE, "bytes": blocks * BLOCK_BYTES} | none | others


@pytest.fixture
async def world(tmp_path, tokenizer: Tokenizer, served_model: Callable[..., ServedModel]):
    async with managed(tmp_path, tokenizer, served_model(tokenizer)) as made:
        yield made


# ---------------------------------------------------------------------------------------------------------- looking up


async def test_lookup_says_which_tokens_lie_where(world):
    names = await world.write(PROMPT)
    await until(lambda: world.is_known(names[-1], "disk"))
    found = await world.post("lookup", prompt=PROMPT)
    assert found["num_tokens"] == 100
    assert found["block_size"] == BLOCK_SIZE
    assert found["held_tokens"] == 96
    assert found["tokens"] == {"device": HELD, "disk": 96, "host": 96}
    assert [(run["begin"], run["end"]) for run in found["runs"]] == [(0, HELD), (HELD, 96)]
    holders = {(holder["worker_id"], holder["tier"]) for holder in found["runs"][0]["holders"]}
    assert holders == {("decode-1", "device"), (world.cache.worker_id, "host"), (world.cache.worker_id, "disk")}
    assert {holder["node"] for run in found["runs"] for holder in run["holders"]} >= {"node-1"}


async def test_text_and_messages_are_looked_up_as_the_endpoints_that_answer_would_read_them(world, tokenizer):
    text = "Once upon a time there was a prompt of several blocks. " * 2
    await world.write(tokenizer.encode(text))
    assert (await world.post("lookup", prompt=text))["held_tokens"] == len(text) // BLOCK_SIZE * BLOCK_SIZE
    messages = [{"role": "user", "content": "Once upon a time"}]
    rendered = "<user>Once upon a time\n<assistant>"
    await world.write(tokenizer.encode(rendered, add_special_tokens=False))
    found = await world.post("lookup", messages=messages)
    assert (found["num_tokens"], found["held_tokens"]) == (len(rendered), len(rendered) // BLOCK_SIZE * BLOCK_SIZE)


async def test_another_salts_blocks_are_others(world):
    await world.write(PROMPT, "mine")
    assert (await world.post("lookup", prompt=PROMPT, cache_salt="mine"))["held_tokens"] == 96
    assert (await world.post("lookup", prompt=PROMPT, cache_salt="other"))["held_tokens"] == 0
    assert (await world.post("lookup", prompt=PROMPT))["held_tokens"] == HELD


async def test_a_long_prompt_is_looked_up_some_blocks_at_a_time(world, monkeypatch):
    names = await world.write(PROMPT[:80])
    await until(lambda: all(world.is_known(names[-1], tier) for tier in ("host", "disk")))
    whole = await world.post("lookup", prompt=PROMPT)
    for size in (1, 2, 4, 5):
        monkeypatch.setattr(cluster.caches, "_NAMES_LOOKED_UP", size)
        assert await world.post("lookup", prompt=PROMPT) == whole
    assert [(run["begin"], run["end"]) for run in whole["runs"]] == [(0, HELD), (HELD, 80)]


async def test_a_prompt_without_a_full_block_lies_nowhere(world):
    found = await world.post("lookup", prompt=[5, 6, 7])
    assert (found["num_tokens"], found["held_tokens"], found["tokens"], found["runs"]) == (3, 0, {}, [])


@pytest.mark.slow
async def test_stats_are_by_owner_and_tier(world):
    await world.write(PROMPT)
    await until(lambda: world.router._cache_stats[world.cache.worker_id].values["kvray_disk_blocks"] == 6)
    stats = (await world.http.get("/v1/cache/stats")).json()
    [worker], [cache] = stats["workers"], stats["caches"]
    assert (worker["worker_id"], worker["node"], worker["is_answering"]) == ("decode-1", "node-1", True)
    assert worker["tiers"] == {
        "device": {"blocks": None, "bytes": None, "capacity_bytes": 100 * BLOCK_BYTES, "hits": 12, "evictions": 3}
    }
    assert cache["tiers"]["host"] == {
        "blocks": 6,
        "bytes": 6 * BLOCK_BYTES,
        "capacity_bytes": 64 * BLOCK_BYTES,
        "hits": 0,
        "evictions": 0,
    }
    assert (cache["tiers"]["disk"]["blocks"], cache["tiers"]["disk"]["capacity_bytes"]) == (6, 64 << 20)
    assert "remote" not in cache["tiers"]


async def test_the_table_is_whole_in_every_format(world):
    names = await world.write(PROMPT)
    reply = await world.http.get("/v1/cache/table")
    assert reply.headers["content-type"] == "application/vnd.apache.arrow.stream"
    table = pa.ipc.open_stream(reply.content).read_all()
    table.validate(full=True)
    assert table.num_rows == 15 == int(reply.headers["x-num-rows"]) == int(table.schema.metadata[b"num_rows"])
    device = table.filter(pc.equal(table["tier"], "device"))
    assert sorted(device["name"].to_pylist()) == sorted(names[: HELD // BLOCK_SIZE])
    assert device["checksum"].to_pylist() == [None] * (HELD // BLOCK_SIZE)
    assert set(device["holder"].to_pylist()) == {"decode-1"}
    by_tier = {tier: table.filter(pc.equal(table["tier"], tier)) for tier in ("host", "disk")}
    for rows in by_tier.values():
        assert sorted(rows["name"].to_pylist()) == sorted(names)
        assert rows["num_tokens"].to_pylist() == [BLOCK_SIZE] * 6
        wanted = {name: checksum(memoryview(content_of(name, BLOCK_BYTES))) for name in names}
        assert dict(zip(rows["name"].to_pylist(), rows["checksum"].to_pylist(), strict=True)) == wanted
        assert set(rows["fingerprint"].to_pylist()) == {FINGERPRINT}
        assert set(rows["holder"].to_pylist()) == {world.cache.worker_id}
    assert by_tier["host"]["tenant"].to_pylist() == [0] * 6
    assert by_tier["disk"]["tenant"].to_pylist() == [0] * 6
    parquet = await world.http.get("/v1/cache/table", params={"format": "parquet", "tier": "host"})
    read = pq.read_table(io.BytesIO(parquet.content))
    assert read.drop_columns(["age_s"]).to_pylist() == by_tier["host"].drop_columns(["age_s"]).to_pylist()
    rows = (await world.http.get("/v1/cache/table", params={"format": "json", "tier": "disk"})).json()
    assert rows["num_rows"] == 6
    assert sorted(row["name"] for row in rows["blocks"]) == sorted(name.hex() for name in names)


# ------------------------------------------------------------------------------------------------------- what is done


async def test_a_prompt_is_cleared_from_all_tiers_after_a_dry_run(world):
    names, others = await world.write(PROMPT), await world.write(list(range(100, 200)))
    counts = counts_of(6)
    would = await world.post("clear", prompt=PROMPT)
    assert would["dry_run"] is True
    assert would["num_caches"] == 1
    assert would["failures"] == []
    assert would["tiers"]["host"] == would["tiers"]["disk"] == counts
    assert would["tiers"]["device"] == counts_of(HELD // BLOCK_SIZE)
    assert world.held(names) == names
    did = await world.post("clear", prompt=PROMPT, dry_run=False)
    assert did == would | {"dry_run": False}
    assert world.held([*names, *others]) == others
    assert [name for name in [*names, *others] if world.disk.find(name)] == others
    assert world.worker.held(names) == []
    await until(lambda: not any(world.is_known(names[0], tier) for tier in ("device", "host", "disk")))


async def test_what_was_cleared_is_gone_from_disk_for_good(world, tmp_path):
    await world.write(PROMPT)
    did = await world.post("clear", everything=True, tiers=["disk"], dry_run=False)
    assert did["tiers"] == {"disk": counts_of(6)}
    world.disk.close()
    reopened = DiskStore(tmp_path, Model(FINGERPRINT, 1, BLOCK_BYTES), 64 << 20, checksum)
    assert reopened.names() == []
    reopened.close()


async def test_one_salts_blocks_are_cleared_from_all_tiers_of_nodes(world):
    names = await world.write(PROMPT, "mine")
    others = await world.write(PROMPT)
    did = await world.post("clear", cache_salt="mine", dry_run=False)
    assert {tier: one["blocks"] for tier, one in did["tiers"].items()} == {
        "device": 0,
        "host": 6,
        "disk": 6,
        "remote": 0,
    }
    assert world.held([*names, *others]) == others
    assert [name for name in [*names, *others] if world.disk.find(name)] == others


async def test_a_prompt_is_pinned_and_unpinned(world):
    names = await world.write(PROMPT)
    kept = await world.post("pin", prompt=PROMPT, ttl_s=300, priority=1)
    assert kept["tiers"] == {"host": counts_of(6)}
    rows = (await world.http.get("/v1/cache/table", params={"format": "json", "tier": "host"})).json()["blocks"]
    assert all(290 < row["kept_s"] <= 300 for row in rows)
    await world.post("pin", prompt=PROMPT)
    rows = (await world.http.get("/v1/cache/table", params={"format": "json", "tier": "host"})).json()["blocks"]
    assert {row["kept_s"] for row in rows} == {"inf"}
    assert (await world.post("unpin", prompt=PROMPT))["tiers"]["host"]["blocks"] == 6
    assert world.cache.cache.pool.num_hinted(0.0) == 0
    assert world.held(names) == names


async def test_check_drops_what_is_damaged_and_says_how_far_it_is(world):
    names = await world.write(PROMPT)
    pool = world.cache.cache.pool
    pool.arena.block(int(pool.find(names[2])[0]))[7] ^= 1
    *progress, whole = await world.lines("check")
    assert {(line["worker_id"], line["tier"]) for line in progress} == {
        *((world.cache.worker_id, tier) for tier in ("host", "disk", "remote")),
        ("decode-1", "device"),
    }
    last = {line["tier"]: (line["blocks"], line["damaged"]) for line in progress}
    assert last == {"device": (0, 0), "host": (6, 1), "disk": (6, 0), "remote": (0, 0)}
    assert len([line for line in progress if line["tier"] == "disk"]) == 2  # a few blocks at a time, in this test
    assert (whole["tiers"]["host"]["damaged"], whole["tiers"]["disk"]["damaged"]) == (1, 0)
    assert world.held(names) == [name for name in names if name != names[2]]
    *_, again = await world.lines("check", prompt=PROMPT, tiers=["host"])
    assert again["tiers"]["host"] == counts_of(5)


# -------------------------------------------------------------------------------------------------- what cannot be done


VERBS = ("lookup", "clear", "evict", "pin", "unpin", "check", "move", "warm", "gc", "export", "import")
NONSENSE = [
    ("lookup", {}, "prompt", "want a prompt or messages"),
    ("lookup", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt", "either"),
    ("lookup", {"prompt": [[1], [2]]}, "prompt", "one prompt"),
    ("lookup", {"prompt": [5] * 1_000_000}, "prompt", "got 1000000 tokens, want at most 500"),
    ("lookup", {"prompt": "x" * 1_000_000}, "prompt", "at most 500"),
    ("lookup", {"prompt": [264]}, "prompt[0]", "264"),
    ("lookup", {"prompts": "a", "prompt": "a"}, None, "prompts"),
    ("lookup", {"prompt": "a", "model": "other"}, "model", "tiny"),
    ("clear", {}, "everything", "want a prompt, messages, a tenant, a cache_salt, or everything: true"),
    ("clear", {"dry_run": False, "tiers": ["host"]}, "everything", "want a prompt"),
    ("clear", {"prompt": "abc", "everything": True}, "everything", "want it false"),
    ("clear", {"cache_salt": "a", "everything": True, "tiers": ["host"]}, "everything", "want it false"),
    ("clear", {"tenant": "acme", "everything": True}, "everything", "want it false"),
    ("clear", {"tenant": "acme", "cache_salt": "a"}, "cache_salt", "a prompt or messages with it"),
    ("clear", {"tenant": "initech"}, "tenant", "one of acme, globex"),
    ("lookup", {"prompt": "a", "tenant": "initech"}, "tenant", "one of acme, globex"),
    ("check", {"tenant": "acme"}, "tenant", "a prompt or messages with it"),
    ("clear", {"everything": True, "tiers": ["tape"]}, "tiers[0]", "tape"),
    ("evict", {"tiers": ["host"]}, "prompt", "missing"),
    ("move", {"prompt": "a", "source": "host", "target": "device"}, "target", "device"),
    ("move", {"prompt": "a", "source": "host", "target": "host"}, "target", "another tier"),
    ("move", {"source": "host", "target": "disk"}, "prompt", "missing"),
    ("warm", {"prompt": "a", "worker_id": "nobody"}, "worker_id", "want one of decode-1"),
    ("gc", {"tiers": ["host"]}, "tiers[0]", "host"),
    ("export", {}, "prompt", "missing"),
    ("clear", {"everything": True, "tiers": []}, "tiers", "[]"),
    ("pin", {"ttl_s": 5}, "prompt", "missing"),
    ("pin", {"prompt": "a", "ttl_s": 0}, "ttl_s", "0"),
    ("pin", {"prompt": "a", "priority": 3}, "priority", "3"),
    ("check", {"cache_salt": "a"}, "cache_salt", "a prompt or messages with it"),
]


@pytest.mark.slow
async def test_what_makes_no_sense_is_a_400_that_says_so(world):
    for path, body, param, words in NONSENSE:
        reply = await world.http.post(f"/v1/cache/{path}", json=body)
        error = reply.json()["error"]
        assert reply.status_code == (404 if param == "model" else 400)
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
        assert words in error["message"]


@pytest.mark.parametrize(("query", "param"), [({"format": "csv"}, "format"), ({"tier": "tape"}, "tier")])
async def test_a_table_that_there_is_not_is_a_400(world, query, param):
    reply = await world.http.get("/v1/cache/table", params=query)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


@pytest.mark.slow
async def test_all_of_it_wants_an_api_key(world):
    calls = [("POST", verb) for verb in VERBS]
    for method, path in [*calls, ("GET", "stats"), ("GET", "table")]:
        headers = {"Authorization": "Bearer another"}
        reply = await world.http.request(method, f"/v1/cache/{path}", json={"prompt": [5]}, headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")


async def test_the_documentation_names_every_endpoint_and_its_fields(world):
    schema = (await world.http.get("/openapi.json")).json()
    paths = {path for path in schema["paths"] if path.startswith("/v1/cache/")}
    assert paths == {f"/v1/cache/{verb}" for verb in (*VERBS, "stats", "table")}
    assert {"prompt", "messages", "cache_salt", "tiers", "dry_run", "everything"} <= set(
        schema["components"]["schemas"]["ClearRequest"]["properties"]
    )


async def test_without_a_router_it_is_a_503(world):
    world.dispatcher.set_routers([])
    world.router.close()
    await until(lambda: world.dispatcher._router is None)
    world.dispatcher._stats_end_s = 0.0
    for path in ("lookup", "clear", "pin", "check"):
        body = {"everything": True} if path == "clear" else {"prompt": PROMPT}
        reply = await world.http.post(f"/v1/cache/{path}", json=body)
        assert (reply.status_code, "no router answers" in reply.text) == (503, True)


async def test_a_node_cache_that_is_gone_is_told_as_a_failure(world):
    await world.write(PROMPT)
    world.cache._server.close()
    did = await world.post("clear", prompt=PROMPT, tiers=["host"], dry_run=False)
    assert did["num_caches"] == 1
    assert [failure["worker_id"] for failure in did["failures"]] == [world.cache.worker_id]
    assert did["tiers"]["host"]["blocks"] == 0


# ------------------------------------------------------------------------------------------------------ kvray cache ...


async def kvray(world, *arguments, code=0):
    """What the command prints; it must end with this exit code."""
    url, key = str(world.http.base_url), {"KVRAY_API_KEY": "a-key"}
    finished, _ = await asyncio.to_thread(run_kvray, "cache", *map(str, arguments), "--url", url, extra_environment=key)
    assert finished.returncode == code, finished.stderr
    return finished


@pytest.mark.slow
async def test_the_command_line_does_all_of_it(world, tmp_path):
    names = await world.write(PROMPT)
    file = tmp_path / "prompt.json"
    file.write_text(json.dumps({"prompt": PROMPT}))
    found = (await kvray(world, "lookup", "--file", file)).stdout.splitlines()
    assert found[0] == f"96 of 100 tokens are held: {HELD} on device, 96 on disk, 96 on host"
    assert found[1].startswith("  0-48: ")
    assert json.loads((await kvray(world, "lookup", "--json", "unknown " * 5)).stdout)["held_tokens"] == 0
    stats = (await kvray(world, "stats")).stdout.splitlines()
    assert stats[0].split() == ["OWNER", "NODE", "TIER", "BLOCKS", "BYTES", "CAPACITY", "HITS", "EVICTIONS"]
    assert [line.split()[2] for line in stats[1:4]] == ["device", "host", "disk"]
    assert stats[5].split() == ["TENANT", "OWNER", "TIER", "BYTES", "QUOTA"]
    rows = [[line.split()[0], *line.split()[2:]] for line in stats[6:]]
    assert ["acme", "device", "0", "B", "-"] in rows
    assert rows.index(["acme", "host", "0", "B", "32", "KiB"]) + 1 == rows.index(["acme", "disk", "0", "B", "-"])
    assert json.loads((await kvray(world, "table")).stdout)["num_rows"] == 15
    output = tmp_path / "blocks.parquet"
    told = await kvray(world, "table", "--format", "parquet", "--tier", "disk", "--output", output)
    assert (told.stdout, told.stderr) == ("", f"6 blocks in {output}\n")
    assert pq.read_table(output).num_rows == 6
    assert json.loads((await kvray(world, "table", "--tenant", "acme")).stdout)["num_rows"] == 0
    assert "want one of acme, globex" in (await kvray(world, "lookup", "a", "--tenant", "x", code=1)).stderr
    pinned = await kvray(world, "pin", "--file", file, "--ttl", 60)
    assert pinned.stdout == "host: 6 blocks (96 tokens, 24 KiB) pinned\n"
    assert (await kvray(world, "unpin", "--file", file)).stdout.startswith("host: 6 blocks")
    assert (await kvray(world, "check")).stdout.splitlines()[2] == "disk: 6 blocks (96 tokens, 24 KiB) verified"
    would = await kvray(world, "clear", "--everything", "--tier", "host")
    assert would.stdout == "host: 6 blocks (96 tokens, 24 KiB) would be dropped\n"
    assert world.held(names) == names
    did = await kvray(world, "clear", "--everything", "--tier", "host", "--no-dry-run", "--json")
    assert json.loads(did.stdout)["tiers"]["host"]["blocks"] == 6
    assert world.held(names) == []


@pytest.mark.slow
async def test_the_command_line_says_in_one_line_what_is_wrong(world, tmp_path):
    refused = await kvray(world, "clear", code=1)
    assert refused.stderr.startswith("kvray: everything: got false, want a prompt, messages")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    assert "is no JSON" in (await kvray(world, "lookup", "--file", broken, code=2)).stderr
    assert "one of them is wanted" in (await kvray(world, "lookup", "a", "--file", broken, code=2)).stderr
    wrong = await kvray(world, "stats", "--api-key", "other", code=2)
    assert "wanted the right API key" in wrong.stderr
    assert (refused.stderr.count("\n"), wrong.stderr.count("\n")) == (1, 1)


@pytest.mark.slow
async def test_a_check_that_finds_damage_ends_with_exit_code_1(world):
    names = await world.write(PROMPT)
    pool = world.cache.cache.pool
    pool.arena.block(int(pool.find(names[0])[0]))[0] ^= 1
    told = await kvray(world, "check", "--tier", "host", code=1)
    assert told.stdout == "host: 6 blocks (96 tokens, 24 KiB) verified, 1 damaged\n"
