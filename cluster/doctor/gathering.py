"""Gathers the facts of a node. Each function may take long, or hang: `examination` runs it within a limit of time.

Nothing is changed on the machine but for a small file in the directory of the disk tier and a small object in the
remote store, which are deleted again.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import platform
import re
import resource
import shutil
import socket
import stat
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

import psutil

from cluster.announcement import servers_here
from cluster.config import AUTO_SIZE, KvrayConfig, parse_size, ray_auth_mode, ray_token
from cluster.credentials import api_keys, callers, cluster_secret
from cluster.doctor.facts import (
    ClockFacts,
    CpuFacts,
    DiskFacts,
    FileLimitFacts,
    GpuFacts,
    HugePageFacts,
    LibraryFacts,
    MemoryFacts,
    PortFacts,
    RayFacts,
    RemoteFacts,
    SecretFacts,
    SharedMemoryFacts,
    SpanFacts,
    UcxFacts,
)
from cluster.joining import check_credentials, cluster_to_join
from cluster.listener import bound_socket
from cluster.span_export import missing_package
from engine.cores import num_cores
from engine.kernels.cpu.library import KERNELS
from kvrouter.index_library import INDEX
from messages.errors import ConfigError, KvrayError
from transport.checksum_library import CHECKSUM
from transport.compiled import baselines_of, cpu_flags
from transport.memory import available_bytes

_TOOL_TIMEOUT_S: Final = 10.0  #: of a program that is asked: a driver takes seconds to wake
_HUGE_PAGES: Final = Path("/sys/kernel/mm/transparent_hugepage")
_SHARED_MEMORY: Final = Path("/dev/shm")
_GPU_NODE: Final = Path("/dev/nvidiactl")
_PROBE: Final = "kvray-doctor"
_LOOK_S: Final = 0.1  #: for which two clocks are compared
_STA_UNSYNC: Final = 0x40  #: linux/timex.h
_STA_NANO: Final = 0x2000

#: Loads UCX as the road does, in a process of its own: it may print, and take signals over.
_UCX_PROBE: Final = """
import sys
from ucxx._lib import libucxx as ucx
print(".".join(map(str, ucx.get_ucx_version())))
print(ucx.UCXContext({"TLS": sys.argv[1]}, (ucx.Feature.TAG,)).info)
"""


def cpu_facts(config: KvrayConfig) -> CpuFacts:
    """Look at the cores."""
    flags = cpu_flags()
    return CpuFacts(
        machine=platform.machine(),
        baseline=_baseline(),
        has_tiles="amx_tile" in flags,
        num_bound_cores=len(os.sched_getaffinity(0)),
        num_cores=num_cores(),
        wanted_threads=config.engine.num_threads,
    )


def library_facts(config: KvrayConfig) -> LibraryFacts:
    """Look for the compiled libraries, and for a compiler."""
    libraries = {"kernels": KERNELS, "block index": INDEX, "checksum": CHECKSUM}
    return LibraryFacts(
        found={name: str(library.found() or "") for name, library in libraries.items()},
        compiler=shutil.which("c++"),
        baseline=_baseline(),
        is_wanted=config.engine.kernels != "off",
    )


def ucx_facts(config: KvrayConfig) -> UcxFacts:
    """Have another process load UCX."""
    if "ucx" not in config.network.roads:
        return UcxFacts(is_wanted=False)
    if find_spec("ucxx") is None:
        return UcxFacts(is_wanted=True)
    said, error = _said([sys.executable, "-c", _UCX_PROBE, config.network.ucx_transports or "all"])
    found = re.findall(r"resource \d+ .* (\S+)/(\S+)$", said, flags=re.MULTILINE)
    return UcxFacts(
        is_wanted=True,
        version="" if error else said.splitlines()[0],
        transports=tuple(dict.fromkeys(transport for transport, _ in found)),
        devices=tuple(dict.fromkeys(device for _, device in found)),
        wanted_devices=config.network.ucx_devices,
        has_gpu=_GPU_NODE.exists(),
        error=error and f"UCX does not load: {error}",
    )


def huge_page_facts(_config: KvrayConfig) -> HugePageFacts:
    """Read the kernel's settings."""
    return HugePageFacts(anonymous=_chosen(_HUGE_PAGES / "enabled"), shared=_chosen(_HUGE_PAGES / "shmem_enabled"))


def memory_facts(config: KvrayConfig) -> MemoryFacts:
    """Look at memory, and at the limits of the control groups of either version."""
    total = psutil.virtual_memory().total
    wanted: dict[str, int] = {}
    pools = config.pools
    has_gpus = config.model.device == "cuda" or pools.gpus_per_worker > 0  # whose own memory it is
    if config.engine.kv_cache_memory is not None and not has_gpus:
        # On a node of its own all workers there are; where they are placed on several, one of them at least.
        is_spread = bool(pools.prefill_labels or pools.decode_labels or pools.cpus_per_worker)
        num_workers = 1 if is_spread else max(1, pools.prefill + pools.decode)
        wanted[f"engine.kv_cache_memory, {num_workers} workers"] = num_workers * parse_size(
            config.engine.kv_cache_memory
        )
    if config.tiers.host_memory not in (None, AUTO_SIZE):
        wanted["tiers.host_memory"] = parse_size(str(config.tiers.host_memory))
    return MemoryFacts(
        total_bytes=total, available_bytes=available_bytes(), limit_bytes=memory_limit(total), wanted_bytes=wanted
    )


def memory_limit(
    total: int, cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> int | None:
    """Return the lowest limit of memory of the control groups that this process is in; None where none is below total.

    `cgroups` is where the kernel shows them, of either version.
    """
    limits = []
    with contextlib.suppress(OSError, ValueError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            root = cgroups / "memory" if controllers else cgroups
            name = "memory.limit_in_bytes" if controllers else "memory.max"
            group = root / path.lstrip("/")
            for each in (group, *group.parents, root):  # in a container the path may not be there: the root is its own
                with contextlib.suppress(OSError, ValueError):  # "max" is no limit
                    limits.append(int((each / name).read_text()))
                if each == root:
                    break
    return min((limit for limit in limits if limit < total), default=None)


def shared_memory_facts(config: KvrayConfig) -> SharedMemoryFacts:
    """Look at /dev/shm."""
    uses_plasma = "plasma" in config.network.roads
    try:
        found = os.statvfs(_SHARED_MEMORY)
    except OSError as error:
        return SharedMemoryFacts(
            total_bytes=0, free_bytes=0, uses_plasma=uses_plasma, error=f"{_SHARED_MEMORY}: {error.strerror}"
        )
    return SharedMemoryFacts(
        total_bytes=found.f_blocks * found.f_frsize,
        free_bytes=found.f_bavail * found.f_frsize,
        uses_plasma=uses_plasma,
    )


def file_limit_facts(config: KvrayConfig) -> FileLimitFacts:
    """Look at the limits of this process, which what it starts inherits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return FileLimitFacts(soft=soft, hard=hard, max_connections=config.connections.max_connections)


def port_facts(config: KvrayConfig) -> PortFacts:
    """Try to bind the ports."""
    host, port = config.http.host, config.http.port
    first, last = config.network.port_range
    http_error = ""
    try:
        bound_socket(host, port).close()
    except (ConfigError, OSError) as error:
        http_error = getattr(error, "message", str(error))
    served = [server.url for server in servers_here() if urlsplit(server.url).port == port] if http_error else []
    return PortFacts(
        http=f"{host}:{port}",
        http_error=http_error,
        served_here=served[0] if served else "",
        first=first,
        last=last,
        num_free=sum(_is_free(config.network.host or "", number) for number in range(first, last + 1)),
    )


def clock_facts(_config: KvrayConfig) -> ClockFacts:
    """Compare the clocks, and ask the kernel and chrony."""
    wall_s, began_s = time.time(), time.monotonic()
    time.sleep(_LOOK_S)
    drift_s = (time.time() - wall_s) - (time.monotonic() - began_s)
    is_synchronized, offset_s = _kernel_clock()
    said, error = _said(["chronyc", "-c", "tracking"])
    with contextlib.suppress(ValueError, IndexError):
        if not error:
            offset_s = float(said.split(",")[4])  # of the system's time from NTP's, seconds
    return ClockFacts(
        now_s=wall_s,
        installed_s=Path(__file__).stat().st_mtime,
        wall_drift_s=drift_s,
        is_synchronized=is_synchronized,
        offset_s=offset_s,
    )


def ray_facts(_config: KvrayConfig) -> RayFacts:
    """Look for Ray, its token, and a cluster, which is asked whether it lets us in."""
    address = token_source = error = ""
    try:
        address = cluster_to_join() or ""
        found = ray_token()
        token_source = found[0] if found else ""
        if address:
            check_credentials(address)
    except KvrayError as failure:
        error = failure.message
    wanted = [text for text in requires("kvray") or () if re.match(r"ray\b", text)]
    return RayFacts(
        version=_version_of("ray"),
        wanted=wanted[0].partition("]")[2] if wanted else "",
        auth_mode=ray_auth_mode(),
        token_source=token_source,
        address=address,
        error=error,
    )


def gpu_facts(config: KvrayConfig) -> GpuFacts:
    """Ask the driver, and read what torch was built for without importing it."""
    names: tuple[str, ...] = ()
    driver = error = ""
    if _GPU_NODE.exists():
        said, error = _said(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
        rows = [line.rpartition(", ") for line in said.splitlines()] if not error else []
        names, driver = tuple(row[0] for row in rows), rows[0][2] if rows else ""
        error = error and f"a GPU's device is there, and its driver does not answer: {error}"
    spec = find_spec("torch")
    built = ""
    for place in (spec and spec.submodule_search_locations) or ():
        with contextlib.suppress(OSError):
            text = (Path(place) / "version.py").read_text()
            match = re.search(r"^cuda\b.*= *'([\d.]+)'", text, flags=re.MULTILINE)
            built = match[1] if match else ""
    return GpuFacts(
        names=names,
        driver=driver,
        torch=_version_of("torch"),
        torch_cuda=built,
        device=config.model.device,
        error=error,
    )


def disk_facts(config: KvrayConfig) -> DiskFacts:
    """Write a file into the directory of the disk tier, past the page cache if it can be, and delete it."""
    if config.tiers.disk_dir is None:
        return DiskFacts(path="")
    directory = Path(config.tiers.disk_dir)
    there = _nearest(directory)
    probe = there / f".{_PROBE}-{os.getpid()}"
    try:
        takes_direct = _writes(probe, os.O_DIRECT) or not _writes(probe, 0)
        usage = os.statvfs(there)
        used = sum(file.stat().st_blocks * 512 for file in directory.rglob("*") if file.is_file())
    except OSError as error:
        return DiskFacts(path=str(directory), error=f"{error.filename or there}: {error.strerror}")
    return DiskFacts(
        path=str(directory),
        filesystem=_filesystem_of(there),
        free_bytes=usage.f_bavail * usage.f_frsize,
        used_bytes=used,
        wanted_bytes=parse_size(config.tiers.disk_capacity),
        takes_direct=takes_direct,
    )


def remote_facts(config: KvrayConfig) -> RemoteFacts:
    """List the remote store; write, read and delete a small object in it."""
    if config.tiers.remote is None:
        return RemoteFacts(uri="")
    from nodecache.remote.filesystem import RemoteFilesystem  # pyarrow takes 0.3 s: only who has such a store waits

    uri = "the remote store"
    name, data = f"{_PROBE}-{os.uname().nodename}-{os.getpid()}", _PROBE.encode()
    began_s = time.monotonic()
    try:
        store = RemoteFilesystem(config.tiers.remote)
        uri = store.uri
        store.folders("")
        directory = _local_directory(config.tiers.remote)
        if directory is not None:
            _writes(_nearest(directory) / f".{name}", 0)
        else:
            store.write(f"{_PROBE}/{name}", memoryview(data))
            seen = store.read(f"{_PROBE}/{name}", 0, len(data))
            store.delete(f"{_PROBE}/{name}")
            if seen != data:
                return RemoteFacts(uri=uri, error=f"{uri}: {len(data)} bytes were written, and others read")
    except KvrayError as error:
        return RemoteFacts(uri=uri, error=error.message)
    except OSError as error:
        return RemoteFacts(uri=uri, error=f"{uri}: {error.strerror}")
    return RemoteFacts(uri=uri, seconds=time.monotonic() - began_s)


def secret_facts(config: KvrayConfig) -> SecretFacts:
    """Read the secret and the keys as a process of kvray's does."""
    lengths: tuple[int, ...] = ()
    needs_secret = has_secret = False
    error = ""
    with contextlib.suppress(KvrayError):  # of_ray tells
        needs_secret = cluster_to_join() is not None
    try:
        callers(config)
        files = [config.http.api_key_file, *(member.api_key_file for member in config.tenants.members)]
        lengths = tuple(len(key) for file in files for key in api_keys(file)) + tuple(map(len, config.http.api_keys))
        cluster_secret(config.network.secret_file)
        has_secret = True
    except ConfigError as failure:
        error = "" if failure.message.startswith("no cluster secret") else failure.message
    named = [config.network.secret_file, config.http.api_key_file, config.tenants.salt_file]
    named += [member.api_key_file for member in config.tenants.members]
    return SecretFacts(
        error=error,
        has_secret=has_secret,
        needs_secret=needs_secret,
        key_lengths=lengths,
        is_open_to_all=config.http.host not in ("127.0.0.1", "::1", "localhost"),
        readable_by_all=tuple(path for path in named if path is not None and _may_all_read(path)),
    )


def span_facts(config: KvrayConfig) -> SpanFacts:
    """Connect to where spans go."""
    endpoint = config.observability.otlp_endpoint or ""
    if not endpoint:
        return SpanFacts(endpoint="")
    parts = urlsplit(endpoint)
    error = ""
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=_TOOL_TIMEOUT_S).close()
    except (OSError, ValueError) as failure:
        error = f"nobody takes spans at {endpoint}: {getattr(failure, 'strerror', None) or failure}"
    return SpanFacts(endpoint=endpoint, missing=missing_package() or "", error=error)


def _baseline() -> str:
    return next(iter(baselines_of(platform.machine(), cpu_flags())), "")


def _said(command: list[str]) -> tuple[str, str]:
    """Return what a program prints, and why it did not do so, of which one is empty."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TOOL_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return "", f"{command[0]} did not end within {_TOOL_TIMEOUT_S:g} s"
    except OSError as error:
        return "", f"{command[0]}: {error.strerror}"
    words = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return (done.stdout, "") if done.returncode == 0 and done.stdout.strip() else ("", words[-1] if words else "silent")


def _chosen(path: Path) -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"\[(\w+)\]", path.read_text())
        return found[1] if found else ""
    return ""


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.bind((host, port))
        return True
    return False


def _kernel_clock() -> tuple[bool | None, float | None]:
    """Return whether the kernel's clock is in step with somebody's, and its offset in seconds: adjtimex(2)."""
    fields = ctypes.create_string_buffer(256)  # struct timex is 208 bytes; modes 0: only read
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(fields)
    except (OSError, AttributeError):
        return None, None
    if state < 0:  # in a container that may not
        return None, None
    offset, status = ctypes.c_long.from_buffer(fields, 8).value, ctypes.c_int.from_buffer(fields, 40).value
    if status & _STA_UNSYNC:
        return False, None
    return True, offset / (1e9 if status & _STA_NANO else 1e6)


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _writes(path: Path, flags: int) -> bool:
    """Tell whether a page can be written to a new file with these flags, which is deleted again.

    Raises:
        OSError: it cannot be made at all.
    """
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | flags, stat.S_IRUSR | stat.S_IWUSR)
    except OSError as error:
        if flags and error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return False
        raise
    try:
        with mmap.mmap(-1, mmap.PAGESIZE) as page:  # aligned, as O_DIRECT wants it
            return os.write(descriptor, page) == mmap.PAGESIZE
    finally:
        os.close(descriptor)
        path.unlink()


def _nearest(path: Path) -> Path:
    """Return the path, or the nearest directory above it that is there, in which it would be made."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())


def _local_directory(uri: str) -> Path | None:
    parts = urlsplit(uri)
    return Path(unquote(parts.path)) if parts.scheme in ("", "file") else None


def _filesystem_of(path: Path) -> str:
    mounts = {each.mountpoint: each.fstype for each in psutil.disk_partitions(all=True)}
    return next((mounts[str(each)] for each in (path, *path.parents) if str(each) in mounts), "unknown")


def _may_all_read(path: str) -> bool:
    with contextlib.suppress(OSError):
        return bool(Path(path).stat().st_mode & stat.S_IROTH)
    return False
