"""Prefixes out of one deployment and into another, moved and warmed, over real HTTP; the workers are pools."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pyarrow as pa
import pytest

from cluster.caches import Caches, PromptTokens
from cluster.openai.cache_protocol import ImportRequest
from cluster.prefix_file import PrefixFile
from cluster.prefixes import Prefixes
from kvcache.names import block_names, pack_tokens, split_names, tenant_of
from messages.errors import WorkerError
from tests.cluster.openai.cache_world import ACME, GLOBEX, HELD, PROMPT, World, managed, names_of, until
from tests.nodecache.blocks import BLOCK_SIZE, FINGERPRINT, checksum, content_of
from tests.nodecache.test_process import BLOCK_BYTES
from tests.served import run_kvray

ALL = 6  #: full blocks of the prompt
MSGPACK = {"content-type": "application/msgpack"}


@pytest.fixture
async def world(tmp_path, tokenizer, served_model):
    async with managed(tmp_path / "one", tokenizer, served_model(tokenizer)) as made:
        yield made


@pytest.fixture
async def other(tmp_path, tokenizer, served_model):
    """A second deployment of the same model, which holds nothing."""
    async with managed(tmp_path / "two", tokenizer, served_model(tokenizer), num_held=0) as made:
        yield made


async def exported(world: World, path: Path, **fields) -> int:
    """Have the prompt's blocks in a file; how many."""
    reply = await world.http.post("/v1/cache/export", json={"prompt": PROMPT} | fields)
    assert reply.status_code == 200, reply.text
    await asyncio.to_thread(path.write_bytes, reply.content)
    return int(reply.headers["x-num-rows"])


def pieces_of(path: Path) -> list[ImportRequest]:
    with contextlib.closing(PrefixFile(path)) as prefix:
        return [msgspec.structs.replace(piece, data=memoryview(bytes(piece.data))) for piece in prefix.pieces()]


async def take_in(world: World, piece: ImportRequest, **query: str | list[str]) -> httpx.Response:
    body = msgspec.msgpack.encode(piece)
    return await world.http.post("/v1/cache/import", content=body, headers=MSGPACK, params=query)


async def test_what_one_deployment_holds_is_read_from_another_ones_host_and_disk(world, other, tmp_path):
    names = await world.write(PROMPT)
    await until(lambda: world.is_known(names[-1], "host"))
    assert await exported(world, tmp_path / "file") == ALL
    pieces = pieces_of(tmp_path / "file")
    replies = [await take_in(other, piece) for piece in pieces]
    assert [reply.status_code for reply in replies] == [200] * len(pieces)
    assert sum(reply.json()["tiers"]["host"]["blocks"] for reply in replies) == ALL
    assert await other.writer.fetch(names) == {name: content_of(name, BLOCK_BYTES) for name in names}
    await until(lambda: all(other.disk.find(name) for name in names))  # written down
    await until(lambda: other.is_known(names[-1], "host"))
    assert (await other.post("lookup", prompt=PROMPT))["tokens"]["host"] == ALL * BLOCK_SIZE
    again = (await take_in(other, pieces[0])).json()["tiers"]["host"]  # it is there already
    assert again["blocks"] == len(pieces[0].names) // 16


async def test_what_lies_in_pools_or_on_disk_alone_is_exported_too(world, tmp_path):
    assert await exported(world, tmp_path / "pool") == HELD // BLOCK_SIZE
    names = await world.write(PROMPT)
    await world.post("clear", prompt=PROMPT, tiers=["host"], dry_run=False)
    await until(lambda: world.is_known(names[-1], "disk") and not world.is_known(names[0], "host"))
    assert await exported(world, tmp_path / "both") == ALL
    for file, count in (("pool", HELD // BLOCK_SIZE), ("both", ALL)):
        table = pa.ipc.open_file(tmp_path / file).read_all()
        assert table["data"].to_pylist() == [content_of(name, BLOCK_BYTES) for name in names[:count]]


async def test_a_long_prefix_goes_in_pieces(world, other, tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.prefixes.PIECE_BYTES", 2 * BLOCK_BYTES)
    monkeypatch.setattr("cluster.prefix_file.PIECE_BYTES", 2 * BLOCK_BYTES)
    names = await world.write(PROMPT)
    await until(lambda: all(world.is_known(name, tier) for name in names for tier in ("host", "disk")))
    await exported(world, tmp_path / "file")
    pieces = pieces_of(tmp_path / "file")
    assert [piece.first_block for piece in pieces] == [0, 2, 3, 5]  # of runs with other holders
    for piece in pieces:
        assert (await take_in(other, piece)).status_code == 200
    assert other.held(names) == names


async def test_each_salt_has_names_of_its_own_for_what_came_without_one(world, other, tmp_path):
    names = await world.write(PROMPT, "mine")
    await until(lambda: world.is_known(names[-1], "host"))
    assert await exported(world, tmp_path / "file", cache_salt="mine") == ALL
    pieces = pieces_of(tmp_path / "file")  # one, or more where the router knows only of some that they are on disk
    assert b"".join(piece.names for piece in pieces) == block_names(FINGERPRINT, b"", pack_tokens(PROMPT), BLOCK_SIZE)
    for piece in pieces:
        assert (await take_in(other, piece, cache_salt="theirs")).status_code == 200
    theirs = names_of(PROMPT, b"theirs")
    assert other.held([*names, *names_of(PROMPT), *theirs]) == theirs
    pool = other.cache.cache.pool
    assert set(pool.records(pool.find(b"".join(theirs)))["tenant"].tolist()) == {tenant_of(b"theirs")}


async def test_a_block_that_goes_while_a_file_is_written_is_an_error_and_no_shorter_file(world):
    names = await world.write(PROMPT)
    await until(lambda: world.is_known(names[-1], "host"))
    prefixes = Prefixes(world.dispatcher, Caches(world.dispatcher))
    prefix = await prefixes.held(PromptTokens(pack_tokens(PROMPT), b""))
    assert prefix.num_blocks == ALL
    await world.post("clear", everything=True, dry_run=False)
    with pytest.raises(WorkerError, match="block 0 of the prompt does not come: nobody has it any more"):
        await anext(prefix.pieces)


async def test_a_prompt_that_nobody_holds_is_a_404_that_says_so(world):
    for prompt in ([7] * 50, [7] * 3):
        reply = await world.http.post("/v1/cache/export", json={"prompt": prompt})
        error = reply.json()["error"]
        assert (reply.status_code, error["code"], error["param"]) == (404, "not_cached", "prompt")
        assert f"got {len(prompt)} tokens of which nobody holds the first block" in error["message"]


# ------------------------------------------------------------------------------------------------------ what is refused


def good_piece() -> ImportRequest:
    names = names_of(PROMPT)
    return ImportRequest(
        fingerprint=FINGERPRINT,
        layout_version=1,
        kernel_path="",
        block_size=BLOCK_SIZE,
        block_bytes=BLOCK_BYTES,
        first_block=0,
        token_bytes=pack_tokens(PROMPT[: ALL * BLOCK_SIZE]),
        names=b"".join(names),
        checksums=np.array([checksum(memoryview(content_of(name, BLOCK_BYTES))) for name in names], "<u8").tobytes(),
        data=memoryview(b"".join(content_of(name, BLOCK_BYTES) for name in names)),
    )


REFUSED = [
    ({"fingerprint": b"other"}, "blocks of another model: fingerprint 6f74686572, wanted "),
    ({"kernel_path": "fma"}, "blocks of another model: kernel path fma, wanted "),
    ({"block_size": 8}, "tokens in a block 8, wanted 16"),
    ({"block_bytes": 77}, "bytes in a block 77, wanted 4096"),
    ({"layout_version": 9}, "layout version of the blocks: got 9, want 1"),
    ({"token_bytes": pack_tokens(range(96))}, "names: they are not those of the tokens"),
    ({"token_bytes": b"short"}, "token_bytes: got 5 bytes for the blocks 0 to 6, want 384"),
    ({"first_block": 1}, "token_bytes: got 384 bytes for the blocks 1 to 7"),
    ({"first_block": -1}, "token_bytes: got"),
    ({"names": b"x" * 17}, "token_bytes: got"),
    ({"names": b"x" * 96}, "names: they are not those of the tokens"),
    ({"checksums": b"12345678" * 6}, "its bytes do not have its checksum; nothing of this piece is kept"),
    ({"data": memoryview(b"y" * 6 * BLOCK_BYTES)}, "its bytes do not have its checksum"),
    ({"data": memoryview(b"y")}, "want 16, 8 and 4096 for each of 1 to"),
]


@pytest.mark.slow
async def test_what_is_altered_or_of_another_model_is_a_400_and_nothing_of_it_is_kept(other):
    for fields, words in REFUSED:
        reply = await take_in(other, msgspec.structs.replace(good_piece(), **fields))
        assert (reply.status_code, words in reply.text) == (400, True), reply.text
        assert other.cache.cache.pool.num_held == 0
    for content in (b"", b"no msgpack", msgspec.msgpack.encode({"fingerprint": 5})):
        reply = await other.http.post("/v1/cache/import", content=content, headers=MSGPACK)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_body")
    reply = await other.http.post("/v1/cache/import", content=msgspec.msgpack.encode({"data": []}), headers=MSGPACK)
    assert reply.json()["error"]["message"].startswith("data: want bytes, got")
    assert reply.json()["error"]["param"] == "data"
    reply = await other.http.post("/v1/cache/import", json={})
    assert (reply.status_code, reply.json()["error"]["code"]) == (415, "unsupported_media_type")
    assert (await take_in(other, good_piece())).status_code == 200


@pytest.fixture
async def small(tmp_path, tokenizer, served_model):
    """A deployment with an arena of four blocks."""
    async with managed(tmp_path / "small", tokenizer, served_model(tokenizer), num_held=0, num_blocks=4) as made:
        yield made


async def test_what_host_memory_has_no_room_for_lies_on_disk_and_the_answer_says_so(small, tmp_path):
    names = names_of(PROMPT)
    counts = (await take_in(small, good_piece())).json()["tiers"]["host"]
    assert (counts["blocks"], counts["below"], counts["without_room"]) == (ALL, {"disk": 2}, 0)
    assert small.held(names) == names[:4]
    await until(lambda: small.is_known(names[-1], "disk"))
    assert (await small.post("lookup", prompt=PROMPT))["tokens"] == {"host": 64, "disk": ALL * BLOCK_SIZE}
    await exported(small, tmp_path / "file")
    table = pa.ipc.open_file(tmp_path / "file").read_all()
    assert table["data"].to_pylist() == [content_of(name, BLOCK_BYTES) for name in names]


async def test_an_import_goes_into_the_tiers_that_it_names(small):
    refused = await take_in(small, good_piece(), tier="host")
    assert (refused.status_code, "no store below that may take them in" in refused.text) == (400, True)
    tiers = (await take_in(small, good_piece(), tier=["remote", "disk"])).json()["tiers"]
    assert (list(tiers), tiers["disk"]["blocks"], tiers["disk"]["below"]) == (["disk"], ALL, {})
    refused = await take_in(small, good_piece(), tier=["host", "device"])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tier")
    refused = await take_in(small, good_piece(), tier="remote")
    assert (refused.status_code, "want one of those that are here: host, disk" in refused.text) == (400, True)


async def test_a_disk_that_fails_is_told_beside_what_was_taken_in(small):
    small.files.failing = dict.fromkeys(("open", "write"), errno.ENOSPC)
    reply = (await take_in(small, good_piece())).json()
    counts = reply["tiers"]["host"]
    assert (counts["blocks"], counts["not_stored"], counts["below"]) == (4, 2, {})
    [failure] = reply["failures"]
    assert failure["worker_id"] == small.cache.worker_id
    assert "No space left on device" in failure["message"]


async def test_without_a_node_cache_there_is_nowhere_to_put_it(other):
    other.router._cache_stats.clear()
    await other.cache.close()
    other.dispatcher._stats_end_s = 0.0
    await until(lambda: not other.router._cache_stats)
    other.dispatcher._stats_end_s = 0.0
    reply = await take_in(other, good_piece())
    assert (reply.status_code, "no node cache" in reply.text or "no answer" in reply.text) == (503, True), reply.text


# ------------------------------------------------------------------------------------ moved, warmed, evicted, collected


async def test_a_prompt_is_moved_down_and_warmed_up_again_to_a_worker(world):
    names = await world.write(PROMPT)
    others = await world.write(list(range(100, 200)))
    *_, down = await world.lines("move", prompt=PROMPT, source="host", target="disk")
    assert (down["tiers"]["host"]["blocks"], down["failures"]) == (ALL, [])
    assert world.held([*names, *others]) == others
    *progress, up = await world.lines("warm", prompt=PROMPT, worker_id="decode-1")
    assert up["tiers"]["disk"]["blocks"] == ALL
    assert up["tiers"]["device"]["blocks"] == ALL - HELD // BLOCK_SIZE
    assert {line["tier"] for line in progress} == {"disk", "remote", "device"}
    assert world.held(names) == world.worker.held(names) == names
    assert all(world.disk.find(name) for name in names)
    [taken] = world.worker.taken
    assert (taken.address, taken.age_s) == (world.cache._server.address, None)
    assert split_names(taken.names) == names[::-1]  # tails go before heads


async def test_a_worker_that_ends_while_it_is_warmed_is_a_failure(world):
    names = await world.write(PROMPT)
    await until(lambda: world.is_known(names[-1], "host"))
    world.worker.close()
    *_, whole = await world.lines("warm", prompt=PROMPT, worker_id="decode-1")
    assert [failure["worker_id"] for failure in whole["failures"]] == ["decode-1"]
    assert whole["tiers"]["device"]["blocks"] == 0


async def test_where_the_target_is_not_there_the_node_says_so(world):
    await world.write(PROMPT)
    *_, whole = await world.lines("move", prompt=PROMPT, source="host", target="remote")
    assert [failure["message"] for failure in whole["failures"]] == ["host: there is no remote tier here"]


async def test_eviction_spares_what_is_pinned_and_clearing_does_not(world):
    names = await world.write(PROMPT)
    await world.post("pin", prompt=PROMPT[:32])
    would = await world.post("evict", prompt=PROMPT, tiers=["host"])
    did = await world.post("evict", prompt=PROMPT, tiers=["host"], dry_run=False)
    assert (did["tiers"], did["num_workers"]) == (would["tiers"], 0)
    assert (did["tiers"]["host"]["blocks"], did["tiers"]["host"]["in_use"]) == (4, 2)
    assert world.held(names) == names[:2]
    await world.post("clear", prompt=PROMPT, tiers=["host", "device"], dry_run=False)
    assert world.held(names) == world.worker.held(names) == []


async def test_garbage_is_collected(world):
    await world.write(PROMPT)
    await world.post("clear", prompt=PROMPT, tiers=["disk"], dry_run=False)
    *_, whole = await world.lines("gc")
    assert whole["failures"] == []
    assert whole["tiers"].keys() == {"disk", "remote"}


# ------------------------------------------------------------------------------------------------------ kvray cache ...


@pytest.mark.slow
async def test_the_command_line_says_what_was_taken_in_where_and_what_was_not(world, small, tmp_path):
    names = await world.write(PROMPT)
    await world.post("clear", everything=True, tiers=["device"], dry_run=False)  # what lies in one place is one piece
    await until(lambda: world.is_known(names[-1], "host") and not world.is_known(names[0], "device"))
    file = tmp_path / "prefix.arrow"
    await exported(world, file)
    did = await kvray(small, "import", file)
    assert did.stdout == "host: 6 blocks (96 tokens, 24 KiB) taken in, 2 of them to disk only\n"
    await kvray(small, "clear", "--everything", "--no-dry-run")
    did = await kvray(small, "import", file, "--tier", "disk")
    assert did.stdout == "disk: 6 blocks (96 tokens, 24 KiB) taken in\n"
    await kvray(small, "clear", "--everything", "--no-dry-run")
    small.files.failing = dict.fromkeys(("open", "write"), errno.ENOSPC)
    did = await kvray(small, "import", file, code=1)
    assert did.stdout == "host: 4 blocks (64 tokens, 16 KiB) taken in, 2 not stored\n"
    assert "No space left on device" in did.stderr


async def kvray(world: World, *arguments: object, code: int = 0):
    url, key = str(world.http.base_url), {"KVRAY_API_KEY": "a-key"}
    finished, _ = await asyncio.to_thread(run_kvray, "cache", *map(str, arguments), "--url", url, extra_environment=key)
    assert finished.returncode == code, finished.stderr
    return finished


@pytest.mark.slow
async def test_the_command_line_carries_a_prefix_from_one_to_the_other(world, other, tmp_path):
    names = await world.write(PROMPT)
    await until(lambda: world.is_known(names[-1], "host"))
    prompt, file = tmp_path / "prompt.json", tmp_path / "prefix.arrow"
    prompt.write_bytes(msgspec.json.encode({"prompt": PROMPT}))
    told = await kvray(world, "export", "--file", prompt, "-o", file)
    assert told.stderr == f"6 blocks (96 tokens) in {file}\n"
    did = await kvray(other, "import", file)
    assert did.stdout == "host: 6 blocks (96 tokens, 24 KiB) taken in\n"
    assert other.held(names) == names
    moved = await kvray(other, "move", "--file", prompt, "--from", "host", "--to", "disk")
    assert moved.stdout == "host: 6 blocks (96 tokens, 24 KiB) moved to disk\n"
    warmed = await kvray(other, "warm", "--file", prompt)
    assert warmed.stdout.splitlines()[0] == "disk: 6 blocks (96 tokens, 24 KiB) brought up"
    would = await kvray(other, "evict", "--file", prompt, "--tier", "host")
    assert would.stdout == "host: 6 blocks (96 tokens, 24 KiB) would be dropped\n"
    assert (await kvray(other, "gc")).stdout.splitlines()[0] == "disk: 0 files or objects (0 B) given back"

    altered = bytearray(file.read_bytes())
    altered[altered.index(content_of(names[4], BLOCK_BYTES))] ^= 1
    file.write_bytes(altered)
    await kvray(other, "clear", "--everything", "--no-dry-run")
    refused = await kvray(other, "import", file, code=2)
    assert "its bytes do not have its checksum" in refused.stderr
    file.write_bytes(altered[:-100])
    cut = await kvray(other, "import", file, code=2)
    assert "is no whole Arrow file with a prefix" in cut.stderr
    assert other.cache.cache.pool.num_held == 0
    nobody = await kvray(other, "export", "nobody ever asked this, " * 3, "-o", tmp_path / "none", code=1)
    assert "of which nobody holds the first block" in nobody.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "prefix.arrow", "prompt.json", "two"]
    assert [text.stderr.count("\n") for text in (refused, cut, nobody)] == [1, 1, 1]


async def test_what_is_exported_of_one_tenant_becomes_anothers(world, other, tmp_path):
    await world.write(PROMPT, None, ACME)
    assert await exported(world, tmp_path / "file", tenant="acme") == ALL
    for piece in pieces_of(tmp_path / "file"):
        assert (await take_in(other, piece, tenant="globex")).status_code == 200
    names = names_of(PROMPT, GLOBEX.salt(None))
    assert other.held(names) == names
    assert other.cache.cache.pool.accounts[GLOBEX.owner(None)] == ALL
    refused = await take_in(other, pieces_of(tmp_path / "file")[0], tenant="initech")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tenant")
