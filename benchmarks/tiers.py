"""Host, disk and remote tier beside LMCache's server, a plain memcpy, raw reads and writes, and raw pyarrow.fs.

    python benchmarks/tiers.py                  every part, about three minutes
    python benchmarks/tiers.py --quick          fewer rounds, host and disk only, within 60 s
    python benchmarks/tiers.py --with-lmcache   installs LMCache first, in an environment of its own
    python benchmarks/tiers.py --record         also append to benchmarks/results/tiers.jsonl

A request is 4,096 tokens, 32 MiB in 256 blocks of 128 KiB. The node cache is the real process; the worker's side is the
one that workers have (harness.tier_worker): a store ends when the node cache has committed, a retrieve when every
block's checksum was verified in the worker's pool. memcpy copies the same blocks between the same two mappings. Ours
take turns; medians count, and p50 is compared with LMCache's p50, of `lmcache bench server --mode cpu` before and after
(the better of the two).

Disk: pieces of 32 MiB of a store's segments, cold page cache, each piece read by one kind of reader only, all into the
same kind of memory: ours verifies. Raw is the best of preadv through the page cache, and past it with one and with four
threads; raw writes are pwritev of 4 MiB and fdatasync. Start: from the start of the process until it has told all names
that lie on disk, 100,000 blocks. Remote: OpenStack Swift's S3 server on this machine; raw is pyarrow.fs of the same
objects in eight threads, which verifies nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from harness.lmcache import Peer, lmcache_home, lmcache_server
from harness.report import ROOT, goal, hardware, parser, record
from harness.tier_worker import BLOCK_BYTES, BLOCK_SIZE, TierWorker, names_of

from kvcache.names import split_names
from messages.fleet import KvEvents, Subscribe
from messages.wire import Message
from nodecache.disk.files import Files
from nodecache.disk.layout import Geometry, Model, unpack_segment_header
from nodecache.disk.store import DiskStore
from nodecache.process import CacheOptions, CacheSettings, cache_options
from nodecache.store import StoredBlock
from nodecache.supervisor import Supervisor
from transport.channel import ChannelClient, ChannelConfig
from transport.checksum import checksum
from transport.memory import Memory
from transport.opening import RoadOptions
from transport.secret import ClusterSecret
from transport.shm import open_region

MIB = 1 << 20
NUM_TOKENS = 4096
NUM_BLOCKS = NUM_TOKENS // BLOCK_SIZE
REQUEST_BYTES = NUM_BLOCKS * BLOCK_BYTES
FINGERPRINT = b"benchmark"
LAYOUT_VERSION = 1
COLD_ROUNDS = 4  #: requests between a block's use and the next one
START_BLOCKS = 100_000
START_BLOCK_BYTES = 4096
DEADLINE_S = 60.0

Figures = dict[str, float]


def options_of(block_bytes: int, settings: CacheSettings) -> CacheOptions:
    """Describe a node cache on loopback."""
    return cache_options(
        settings,
        fingerprint=FINGERPRINT,
        layout_version=LAYOUT_VERSION,
        block_bytes=block_bytes,
        lease_s=15.0,
        block_size=BLOCK_SIZE,
        host="127.0.0.1",
        channel=ChannelConfig(),
        roads=RoadOptions(names=("shm",)),
        stall_s=10.0,
        log_level="error",
    )


# ---------------------------------------------------------------------------------------------------------- host tier


async def measure_host(num_rounds: int) -> Figures:
    """Store and retrieve requests, and copy the same blocks without any of it, taking turns. Milliseconds, medians."""
    secret = ClusterSecret.generate()
    supervisor = Supervisor(options_of(BLOCK_BYTES, CacheSettings(host_memory_bytes=2048 * MIB)), secret)
    info = await supervisor.start()
    worker = TierWorker(4 * NUM_BLOCKS, secret)
    taken: dict[str, list[float]] = {"store": [], "memcpy in": [], "retrieve": [], "memcpy out": []}
    try:
        await worker.use(info.address)
        region = worker.peers.region_of(info.address, "shm")
        layout = worker.peers.layout_of(info.address)
        assert region is not None
        assert layout is not None
        mapped = open_region(region, is_writable=True)
        await asyncio.to_thread(mapped.populate)  # as the worker does with its own mapping, at the same time
        arena = np.frombuffer(mapped.view, np.uint8)
        own = np.frombuffer(worker.memory.view, np.uint8)
        spans: deque[list[tuple[int, int]]] = deque()  # of requests that were retrieved: in the arena, in the pool
        for number in range(num_rounds + COLD_ROUNDS):
            names = names_of(number * NUM_BLOCKS, NUM_BLOCKS)
            worker.make(names)
            began_s = time.perf_counter()
            await worker.store(names)
            stored_s = time.perf_counter()
            pairs = await worker.retrieve(names_of(max(0, number - 1) * NUM_BLOCKS, NUM_BLOCKS))
            retrieved_s = time.perf_counter()
            spans.append([(layout.block_offset(location.block_id), worker.block_offset(b)) for location, b in pairs])
            if number < COLD_ROUNDS:
                continue
            # Blocks that nobody asks for again, and that are no longer in any cache of the processor.
            out, back = spans.popleft(), [(own, far) for far, own in spans[0]]
            taken["store"].append(stored_s - began_s)
            taken["retrieve"].append(retrieved_s - stored_s)
            taken["memcpy out"].append(_copy_all(arena, own, out))
            taken["memcpy in"].append(_copy_all(own, arena, back))
    finally:
        worker.close()
        await supervisor.close()
    return {name: 1e3 * median(values) for name, values in taken.items()}


def _copy_all(source: np.ndarray, target: np.ndarray, spans: list[tuple[int, int]]) -> float:
    began_s = time.perf_counter()
    for begin, to in spans:
        target[to : to + BLOCK_BYTES] = source[begin : begin + BLOCK_BYTES]
    return time.perf_counter() - began_s


def measure_lmcache(home: Path | None, num_requests: int, between: Callable[[], Figures]) -> tuple[Figures, Figures]:
    """Measure the peer before and after `between`, whose figures come first."""
    if home is None:
        return between(), {}
    figures: Figures = {}
    with lmcache_server(home) as server:
        before = server.measure(NUM_TOKENS, num_requests, "auto")
        ours = between()
        after = server.measure(NUM_TOKENS, num_requests, "auto")
        driven = server.measure(NUM_TOKENS, num_requests, "lmcache_driven")
    figures |= _best("lmcache", [before, after]) | _best("lmcache_driven", [driven])
    return ours, figures


def _best(name: str, runs: list[Peer]) -> Figures:
    return {
        f"{name} store": min(run.store_ms for run in runs),
        f"{name} retrieve": min(run.retrieve_ms for run in runs),
        f"{name} wrong": float(sum(run.num_wrong for run in runs)),
    }


# ---------------------------------------------------------------------------------------------------------- disk tier


def measure_disk(directory: Path, num_pieces: int) -> Figures:
    """Write and read pieces of 32 MiB through a store and without one, taking turns. MB/s, medians."""
    model = Model(FINGERPRINT, LAYOUT_VERSION, BLOCK_BYTES)
    store = DiskStore(directory, model, (num_pieces + 8) * 2 * REQUEST_BYTES, checksum)
    memory = Memory.allocate(REQUEST_BYTES)
    memory.populate()
    targets = [memory.slice(i * BLOCK_BYTES, BLOCK_BYTES) for i in range(NUM_BLOCKS)]
    data = np.random.default_rng(3).integers(0, 256, REQUEST_BYTES, np.uint8)
    sources = [memoryview(data)[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES] for i in range(NUM_BLOCKS)]
    taken: dict[str, list[float]] = {"write": [], "raw write": []}
    pieces: list[list[bytes]] = []
    for number in range(num_pieces):
        names = names_of(number * NUM_BLOCKS, NUM_BLOCKS)
        blocks = [StoredBlock(name, BLOCK_SIZE, checksum(source)) for name, source in zip(names, sources, strict=True)]
        pieces.append(names)
        began_s = time.perf_counter()
        store.write(blocks, sources, DEADLINE_S)
        store.sync(DEADLINE_S)
        written_s = time.perf_counter()
        taken["write"].append(written_s - began_s)
        taken["raw write"].append(_raw_write(directory / "raw", data))
    store.sync(DEADLINE_S)
    _drop_page_cache(directory)
    places = _places(store)
    kinds = {
        "raw, page cache": (1, os.O_RDONLY),
        "raw, direct": (1, os.O_DIRECT),
        "raw, direct, 4 threads": (4, os.O_DIRECT),
    }
    readers = ["read", *kinds]
    taken |= {name: [] for name in readers}
    for number, names in enumerate(pieces):
        reader = readers[number % len(readers)]
        if reader == "read":
            began_s = time.perf_counter()
            _require(all(store.read(names, targets, DEADLINE_S)))
            taken[reader].append(time.perf_counter() - began_s)
        else:
            taken[reader].append(_raw_read(places, directory, model, names, targets, *kinds[reader]))
    store.close()
    memory.close()
    return {name: REQUEST_BYTES / 1e6 / median(values) for name, values in taken.items()}


def _raw_write(path: Path, data: np.ndarray) -> float:
    """Write a new file, 4 MiB at a time past the page cache, and sync it."""
    aligned = Memory.allocate(len(data))
    np.frombuffer(aligned.view, np.uint8)[:] = data
    began_s = time.perf_counter()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o600)
    for begin in range(0, len(data), 4 * MIB):
        os.pwritev(fd, [aligned.slice(begin, 4 * MIB)], begin)
    os.fdatasync(fd)
    taken_s = time.perf_counter() - began_s
    os.close(fd)
    path.unlink()
    aligned.close()
    return taken_s


def _raw_read(
    places: dict[bytes, int],
    directory: Path,
    model: Model,
    names: list[bytes],
    targets: list[memoryview],
    num_threads: int,
    flags: int,
) -> float:
    """Read where the blocks lie, what lies together by one call of 4 MiB at most. Opening files does not count."""
    calls: list[tuple[int, int, list[memoryview]]] = []  # segment, row, targets
    for name, target in zip(names, targets, strict=True):
        segment, row = places[name] >> 24, places[name] & 0xFFFFFF
        last = calls[-1] if calls else None
        if last and last[0] == segment and row == last[1] + len(last[2]) and len(last[2]) * BLOCK_BYTES < 4 * MIB:
            last[2].append(target)
        else:
            calls.append((segment, row, [target]))
    fds: dict[int, int] = {}
    geometry: dict[int, Geometry] = {}
    for segment in {call[0] for call in calls}:
        path = directory / model.directory_name / f"{segment:08d}.segment"
        geometry[segment] = Geometry(BLOCK_BYTES, _num_rows(path))
        fds[segment] = os.open(path, os.O_RDONLY | flags)

    def read(call: tuple[int, int, list[memoryview]]) -> None:
        segment, row, into = call
        came = os.preadv(fds[segment], into, geometry[segment].offset_of(row))
        _require(came == len(into) * BLOCK_BYTES)

    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(int, range(num_threads)))  # they are started
        began_s = time.perf_counter()
        list(threads.map(read, calls))
        taken_s = time.perf_counter() - began_s
    for fd in fds.values():
        os.close(fd)
    return taken_s


def _places(store: DiskStore) -> dict[bytes, int]:
    """Return where each block lies: its segment's number times 2^24, and its row."""
    found: dict[bytes, int] = {}
    cursor: int | None = 0
    while cursor is not None:
        page = store.page(cursor, 4096)
        found.update(zip((block.name for block in page.blocks), page.places, strict=True))
        cursor = page.next_cursor
    return found


def _num_rows(path: Path) -> int:
    with path.open("rb") as file:
        found = unpack_segment_header(file.read(4096), Model(FINGERPRINT, LAYOUT_VERSION, BLOCK_BYTES), int(path.stem))
    assert isinstance(found, Geometry), found
    return found.num_rows


def _drop_page_cache(directory: Path) -> None:
    for path in directory.rglob("*.segment"):
        fd = os.open(path, os.O_RDONLY)
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def _require(is_so: bool) -> None:
    if not is_so:
        raise RuntimeError("not all blocks came whole")


# -------------------------------------------------------------------------------------------------------------- start


async def measure_start(directory: Path) -> Figures:
    """Start a node cache over 100,000 blocks on disk. Seconds."""
    model = Model(FINGERPRINT, LAYOUT_VERSION, START_BLOCK_BYTES)
    store = DiskStore(directory, model, 4 * START_BLOCKS * START_BLOCK_BYTES, checksum, files=Files())
    block = memoryview(bytes(START_BLOCK_BYTES))
    value = checksum(block)
    for first in range(0, START_BLOCKS, 4096):
        names = names_of(first, min(4096, START_BLOCKS - first))
        store.write([StoredBlock(name, 16, value) for name in names], [block] * len(names), DEADLINE_S)
    store.sync(DEADLINE_S)
    store.close()
    _drop_page_cache(directory)
    secret = ClusterSecret.generate()
    settings = CacheSettings(
        host_memory_bytes=64 * MIB, disk_dir=str(directory), disk_capacity_bytes=4 * START_BLOCKS * START_BLOCK_BYTES
    )
    supervisor = Supervisor(options_of(START_BLOCK_BYTES, settings), secret)
    told: set[bytes] = set()
    has_all = asyncio.Event()

    def take(message: Message) -> None:
        if isinstance(message, KvEvents) and message.tier == "disk":
            told.update(split_names(message.stored))
            if len(told) == START_BLOCKS:
                has_all.set()

    began_s = time.perf_counter()
    info = await supervisor.start()
    client = ChannelClient(secret, info.address, take, lambda _: None, config=ChannelConfig())
    client.send(Subscribe())
    async with asyncio.timeout(60):
        await has_all.wait()
    taken_s = time.perf_counter() - began_s
    client.close()
    await supervisor.close()
    return {"start": taken_s}


# -------------------------------------------------------------------------------------------------------- remote tier


@contextlib.contextmanager
def swift() -> Iterator[Any]:
    """Run Swift's S3 server; None where it cannot be had."""
    root = Path(tempfile.mkdtemp(prefix="kvray-swift-"))
    try:
        from tests.nodecache.remote.swift import Swift

        (root / "devices").mkdir()
        os.setxattr(root / "devices", "user.kvray", b"1")
    except (ImportError, OSError):
        shutil.rmtree(root, ignore_errors=True)
        yield None
        return
    server = Swift(root, root / "devices")
    try:
        yield server
    finally:
        server.close()
        shutil.rmtree(root, ignore_errors=True)


def measure_remote(num_rounds: int) -> Figures:
    """Read 32 MiB through a store and without one, taking turns. MB/s, medians."""
    from nodecache.remote.layout import Model as RemoteModel
    from nodecache.remote.store import RemoteStore

    taken: dict[str, list[float]] = {"read": [], "raw": []}
    with swift() as server:
        if server is None:
            return {}
        raw = server.raw()
        raw.create_dir("bench")
        store = RemoteStore(server.uri("bench"), RemoteModel(FINGERPRINT, LAYOUT_VERSION, BLOCK_BYTES, "bench"))
        rng = np.random.default_rng(5)
        names = names_of(0, NUM_BLOCKS)
        sources = [memoryview(rng.integers(0, 256, BLOCK_BYTES, np.uint8)) for _ in names]
        blocks = [StoredBlock(name, BLOCK_SIZE, checksum(s)) for name, s in zip(names, sources, strict=True)]
        for first in range(0, NUM_BLOCKS, 64):
            store.write(blocks[first : first + 64], sources[first : first + 64], DEADLINE_S)
        store.sync(DEADLINE_S)
        from pyarrow.fs import FileSelector

        found = raw.get_file_info(FileSelector("bench/cache", recursive=True))
        paths = [info.path for info in found if info.is_file and "/objects/" in info.path]
        memory = Memory.allocate(REQUEST_BYTES)
        targets = [memory.slice(i * BLOCK_BYTES, BLOCK_BYTES) for i in range(NUM_BLOCKS)]

        def read_raw(path: str) -> int:
            with raw.open_input_file(path) as file:
                return len(file.read_buffer())

        with ThreadPoolExecutor(8) as threads:
            for number in range(num_rounds + 1):
                began_s = time.perf_counter()
                _require(all(store.read(names, targets, DEADLINE_S)))
                read_s = time.perf_counter()
                _require(sum(threads.map(read_raw, paths)) >= REQUEST_BYTES)
                if number:
                    taken["read"].append(read_s - began_s)
                    taken["raw"].append(time.perf_counter() - read_s)
        store.close()
    return {name: REQUEST_BYTES / 1e6 / median(values) for name, values in taken.items()}


# ----------------------------------------------------------------------------------------------------------- the run


def ratio(figures: Figures, above: str, below: str) -> float | None:
    """Return the ratio of two figures; None where one was not measured."""
    return figures[above] / figures[below] if figures.get(above) and figures.get(below) else None


def main() -> None:
    options = parser(__doc__, "tiers", quick="fewer rounds, host and disk only")
    options.add_argument("--with-lmcache", action="store_true", help="install LMCache on first use")
    options.add_argument("--disk-dir", type=Path, default=ROOT, help="a directory on the disk to be measured")
    args = options.parse_args()
    print(hardware())
    num_rounds = 6 if args.quick else 20
    home = lmcache_home(is_wanted=args.with_lmcache)
    ours, peer = measure_lmcache(home, 6 if args.quick else 20, lambda: asyncio.run(measure_host(num_rounds)))
    host = ours | peer
    print(f"host tier, {REQUEST_BYTES // MIB} MiB, ms: " + _row(host))
    directory = Path(tempfile.mkdtemp(prefix="kvray-disk-", dir=args.disk_dir))
    try:
        disk = measure_disk(directory / "blocks", 12 if args.quick else 32)
        print("disk tier, MB/s: " + _row(disk))
        shutil.rmtree(directory / "blocks")
        start = {} if args.quick else asyncio.run(measure_start(directory / "start"))
        print("start with 100,000 blocks, s: " + (_row(start) or "not measured"))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    remote = {} if args.quick else measure_remote(num_rounds)
    print("remote tier, MB/s: " + (_row(remote) or "not measured: there is no Swift"))
    if args.record:
        record("tiers", {"host_ms": host, "disk_mb_s": disk, "start_s": start, "remote_mb_s": remote})
    raw = max(value for name, value in disk.items() if name.startswith("raw, "))
    lines = [
        goal("retrieve 32 MiB, times LMCache's rate", ratio(host, "lmcache retrieve", "retrieve"), at_least=3),
        goal("store 32 MiB, times LMCache's rate", ratio(host, "lmcache store", "store"), at_least=10),
        goal("retrieve, of memcpy's rate", ratio(host, "memcpy out", "retrieve"), at_least=0.8),
        goal("store, of memcpy's rate", ratio(host, "memcpy in", "store"), at_least=0.8),
        goal("disk reads, of the best raw ones", disk["read"] / raw, at_least=0.85),
        goal("start with 100,000 blocks", start.get("start"), under=3.0, unit=" s"),
        goal("remote reads, of raw ones", ratio(remote, "read", "raw"), at_least=0.8),
    ]
    print("\n" + "\n".join(lines))


def _row(figures: Figures) -> str:
    return ", ".join(f"{name} {value:,.4g}" for name, value in figures.items())


if __name__ == "__main__":
    main()
