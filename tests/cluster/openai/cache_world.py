"""A deployment for what manages caches: real HTTP, dispatcher, router and node cache; the worker is but a pool.

The worker answers about its pool as a real one does, and computes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import msgspec
import torch
from fastapi import FastAPI

from cluster.cache_api import add_cache
from cluster.caches import Caches
from cluster.dispatch import Dispatcher, DispatchOptions
from cluster.openai.app import create_app
from cluster.openai.backend import ServedModel
from cluster.openai.callers import NOBODY, Caller, Callers
from cluster.placement_page.endpoints import PlacementPage, add_placement_page
from cluster.prefixes import Prefixes
from engine.management import BlockKind, PoolManagement
from engine.memory.checksums import BlockChecksums
from engine.memory.kv_pool import KvPool, LayerSpec
from kvcache.names import block_names, pack_tokens, split_names, tenant_salt
from kvcache.pool import BlockPool
from kvcache.subscribers import Subscribers
from kvrouter.router import RouterConfig
from kvrouter.worker import RouterWorker
from messages.cache import CacheQuestion
from messages.fleet import GetStats, LoadReport, NodeCacheFound, Stats, Subscribe, TakeBlocks, WorkerInfo
from nodecache.disk.layout import Model
from nodecache.disk.store import DiskStore
from nodecache.process import CacheProcess, CacheSettings
from nodecache.quotas import Accounts, TenantQuota
from tests.cluster.openai.brief_server import BriefServer
from tests.nodecache.blocks import BLOCK_SIZE, FINGERPRINT, checksum, content_of
from tests.nodecache.client import CacheClient
from tests.nodecache.disk.faulty_files import FaultyFiles
from tests.nodecache.test_process import BLOCK_BYTES, options_of
from text.tokenizer import Tokenizer
from transport.channel import ChannelConfig, ChannelServer
from transport.secret import ClusterSecret

CHANNEL = ChannelConfig(heartbeat_s=0.1, lost_after_s=2.0)
ACME = Caller(name="acme", base_salt=tenant_salt("acme", bytes(32)), is_operator=False)
GLOBEX = Caller(name="globex", base_salt=tenant_salt("globex", bytes(32)), is_operator=False, may_hint=True)
OPS = Caller(name="ops", base_salt=tenant_salt("ops", bytes(32)))  #: a tenant, and an operator
PROMPT = list(range(5, 105))  # 6 full blocks and some
HELD = 3 * BLOCK_SIZE  #: of the prompt, in the pool of the worker
_NUM_POOL_BLOCKS = 100


class PoolWorker:
    """A decode worker as far as the router and an ingress hear it: its pool holds `names`, beside a node cache."""

    def __init__(self, secret: ClusterSecret, names: list[bytes], cache: WorkerInfo) -> None:
        self._cache = cache
        self._tasks: set[asyncio.Task[None]] = set()
        kv = KvPool([LayerSpec(1, 32, 32)], BLOCK_SIZE, torch.float32, "cpu", num_blocks=_NUM_POOL_BLOCKS)
        self.rows = kv.data.view(torch.uint8).numpy()
        self.pool = BlockPool(_NUM_POOL_BLOCKS, BLOCK_SIZE)
        self.checksums = BlockChecksums(self.pool, kv)
        self.hold(names)
        self._server = ChannelServer(secret, "127.0.0.1", self._on_message, lambda _: None, CHANNEL)
        self.close = self._server.close
        self._subscribers = Subscribers("decode-1", self._server.send)
        kind = BlockKind(BLOCK_BYTES, 1, "")
        self._management = PoolManagement(
            *(self.pool, self.checksums, kind, self._server.send, self._spawn, self._tell_changes),
            {ACME.owner(None): "acme", GLOBEX.owner(None): "globex"},
        )
        self.taken: list[TakeBlocks] = []
        self.info = WorkerInfo(
            worker_id="decode-1",
            role="decode",
            address=self._server.address,
            node_id="node-1",
            fingerprint=FINGERPRINT,
            block_size=BLOCK_SIZE,
            num_blocks=_NUM_POOL_BLOCKS,
            block_bytes=BLOCK_BYTES,
            max_model_len=512,
            max_num_seqs=8,
            roads=("shm",),
        )

    def hold(self, names: list[bytes], tenant: int = 0) -> None:
        """Have these blocks of a tenant in the pool, their bytes as is told by their names."""
        block_ids = self.pool.allocate(len(names))
        for block_id, name in zip(block_ids, names, strict=True):
            self.rows[block_id] = list(content_of(name, BLOCK_BYTES))
            self.pool.commit(block_id, name, tenant)
        self.pool.unpin(block_ids)

    def held(self, names: list[bytes]) -> list[bytes]:
        return [name for name in names if self.pool.holds(name)]

    def _on_message(self, peer: bytes, message: object) -> None:
        if isinstance(message, Subscribe):
            self._tell_changes()
            self._subscribers.add(peer, [("device", b"".join(self.pool.snapshot()))])
            report = LoadReport(
                worker_id="decode-1", queued_s=0.0, num_waiting=0, num_running=0, free_blocks=9, decode_step_s=0.0
            )
            self._server.send(peer, report)
            self._server.send(peer, NodeCacheFound(worker_id="decode-1", info=self._cache))
        if isinstance(message, GetStats):
            values = {name: value for name, value in self._management.stats().items() if "tenant" in name}
            values |= {"kvray_blocks_hit_total": 12.0, "kvray_blocks_evicted_total": 3.0}
            answer = Stats(query_id=message.query_id, worker_id="decode-1", role="decode", values=values)
            self._server.send(peer, answer)
        if isinstance(message, CacheQuestion):
            self._management.take(peer, message)
        if isinstance(message, TakeBlocks):
            self.taken.append(message)
            self.hold([name for name in split_names(message.names) if not self.pool.holds(name)])
            self._tell_changes()

    def _tell_changes(self) -> None:
        stored, removed = self.pool.take_events()
        self._subscribers.tell("device", b"".join(stored), b"".join(removed))

    def _spawn(self, coroutine) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class World:
    """One node with its cache, the router, an ingress, and a client."""

    cache: CacheProcess
    worker: PoolWorker
    writer: CacheClient
    router: RouterWorker
    dispatcher: Dispatcher
    app: FastAPI
    http: httpx.AsyncClient
    disk: DiskStore
    files: FaultyFiles  #: of the disk

    async def post(self, path: str, *, key: str = "a-key", **body: object) -> dict:
        reply = await self.http.post(f"/v1/cache/{path}", json=body, headers=bearer(key))
        assert reply.status_code == 200, reply.text
        return reply.json()

    async def lines(self, path: str, **body: object) -> list[dict]:
        async with self.http.stream("POST", f"/v1/cache/{path}", json=body) as reply:
            assert reply.status_code == 200, await reply.aread()
            return [json.loads(line) async for line in reply.aiter_lines()]

    async def write(self, token_ids: list[int], cache_salt: str | None = None, caller: Caller = NOBODY) -> list[bytes]:
        """Have a prompt's blocks in the arena, and on disk."""
        names = names_of(token_ids, caller.salt(cache_salt))
        assert await self.writer.write(names, tenant=caller.owner(cache_salt)) == names
        await until(lambda: all(self.disk.find(name) for name in names))
        return names

    def held(self, names: list[bytes]) -> list[bytes]:
        return [name for name in names if self.cache.cache.pool.find(name)[0] >= 0]

    def is_known(self, name: bytes, tier: str) -> bool:
        return tier in [holder.tier for holder in self.router.router._index.holders(name)]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def names_of(token_ids: list[int], salt: bytes = b"") -> list[bytes]:
    return split_names(block_names(FINGERPRINT, salt, pack_tokens(token_ids), BLOCK_SIZE))


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not is_so():  # noqa: ASYNC110 - the state has no event
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def serving(app):
    """The URL of a real HTTP server on this loop."""
    server = BriefServer(app)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        running = asyncio.create_task(server.serve(sockets=[listener]))
        await until(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.end()
            await running


@contextlib.asynccontextmanager
async def managed(
    root: Path,
    tokenizer: Tokenizer,
    model: ServedModel,
    *,
    num_blocks: int = 64,
    num_held: int = HELD,
    preview_chars: int = 0,
) -> AsyncIterator[World]:
    """A deployment whose node has a disk at `root`, and an arena of `num_blocks`, of which acme may have 8."""
    async with contextlib.AsyncExitStack() as stack:
        made = World()
        secret = ClusterSecret.generate()
        quotas = (
            TenantQuota(tenant=ACME.owner(None), name="acme", max_bytes={"host": 8 * BLOCK_BYTES}),
            TenantQuota(tenant=GLOBEX.owner(None), name="globex"),
        )
        accounts = Accounts.of(quotas, "disk", BLOCK_BYTES)
        made.files = FaultyFiles()
        model_on_disk = Model(FINGERPRINT, 1, BLOCK_BYTES)
        made.disk = DiskStore(root, model_on_disk, 64 << 20, checksum, accounts=accounts, files=made.files)
        options = msgspec.structs.replace(options_of(num_blocks), settings=CacheSettings(tenants=quotas))
        made.cache = CacheProcess(options, secret, options.layout.allocate(), {"disk": made.disk})
        info = await made.cache.start()
        stack.push_async_callback(made.cache.close)
        made.writer = CacheClient(secret, info.address, BLOCK_BYTES)
        stack.callback(made.writer.close)
        await made.writer.open()
        worker = made.worker = PoolWorker(secret, names_of(PROMPT)[: num_held // BLOCK_SIZE], info)
        stack.callback(worker.close)
        made.router = RouterWorker("router-1", secret, "127.0.0.1", CHANNEL, RouterConfig(is_observed=True))
        stack.callback(made.router.close)
        made.router.set_fleet([worker.info])
        made.dispatcher = Dispatcher(
            DispatchOptions(
                ingress_id="ingress-1", secret=secret, channel=CHANNEL, request_timeout_s=60.0, max_ttft_s=20.0
            )
        )
        stack.callback(made.dispatcher.close)
        made.dispatcher.set_workers("decode", [worker.info])
        made.dispatcher.set_routers([made.router.address])
        caches = Caches(made.dispatcher)

        def extend(app, surface) -> None:
            add_cache(app, surface, caches, Prefixes(made.dispatcher, caches))
            add_placement_page(app, PlacementPage(made.dispatcher, surface, preview_chars))

        app = create_app(
            made.dispatcher,
            model,
            tokenizer,
            version="1",
            callers=Callers([("a-key", NOBODY), ("acme-key", ACME), ("globex-key", GLOBEX), ("ops-key", OPS)]),
            extend=extend,
        )
        made.app = app
        url = await stack.enter_async_context(serving(app))
        # No TLS is spoken, and to read the system's certificates would take as long as some of the tests.
        client = httpx.AsyncClient(base_url=url, headers=bearer("a-key"), timeout=20, verify=False)
        made.http = await stack.enter_async_context(client)
        await until(lambda: bool(made.router._cache_stats))
        yield made
        made.cache.cache.check_invariants()
