"""What is to be said of a node's facts: pure. One line of what was seen, one of what to do where there is something.

`fail`: kvray does not run as configured; `warn`: it runs, slower, or not as well protected.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from cluster.doctor.facts import (
    ClockFacts,
    ConfigFacts,
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
from engine.kernels.capability import OLDEST_DRIVERS

State = Literal["ok", "warn", "fail"]

_GIB = 2**30
_MIN_MEMORY_BYTES = 2 * _GIB  #: the demo model's processes, with Ray's, take about 1.5 GiB
#: Ray takes no smaller object store (`OBJECT_STORE_MINIMUM_MEMORY_BYTES` of 2.60), and leaves /dev/shm below it.
_MIN_OBJECT_STORE_BYTES = 75 * 2**20
_GOOD_SHARED_MEMORY_BYTES = _GIB
_OTHER_FILES = 1024  #: of an ingress, besides its connections: channels, Ray, libraries
_MIN_PORTS = 8  #: each process with a pool takes one for each road that listens
_MAX_OFFSET_S = 1.0
_MAX_DRIFT_S = 0.02
_MIN_KEY_CHARS = 16
_SLOW_REMOTE_S = 2.0


class Finding(NamedTuple):
    """What was found of one thing."""

    about: str
    state: State
    seen: str
    advice: str = ""  #: what to do; "": nothing


def of_config(facts: ConfigFacts) -> Finding:
    """Judge the configuration."""
    if facts.error:
        return Finding("config", "fail", facts.error, "mend it; `kvray config check FILE` reads it alone")
    return Finding("config", "ok", facts.source)


def of_cpu(facts: CpuFacts) -> Finding:
    """Judge cores and instruction sets."""
    tiles = ", AMX" if facts.has_tiles else ""
    seen = f"{facts.num_cores} of {facts.num_bound_cores} cores, {facts.machine} {facts.baseline or 'plain'}{tiles}"
    if not facts.baseline:
        return Finding(
            "cpu", "warn", seen, "torch's own operators compute on it, slowly: wanted a CPU with AVX2 or NEON"
        )
    if facts.wanted_threads is not None and facts.wanted_threads > facts.num_cores:
        advice = (
            f"engine.num_threads is {facts.wanted_threads}: wanted at most {facts.num_cores}, else they wait in turn"
        )
        return Finding("cpu", "warn", seen, advice)
    if facts.num_cores < 2:
        return Finding("cpu", "warn", seen, "one core computes, routes and answers by turns: give it two at least")
    return Finding("cpu", "ok", seen)


def of_libraries(facts: LibraryFacts) -> Finding:
    """Judge what was compiled."""
    missing = [name for name, path in facts.found.items() if not path]
    if not facts.is_wanted:
        return Finding("compiled", "warn", "engine.kernels is off", "set it to auto: plain torch is slower on a CPU")
    if not missing:
        kind = "this machine" if not any("prebuilt" in path for path in facts.found.values()) else facts.baseline
        return Finding("compiled", "ok", f"{', '.join(facts.found)} for {kind}")
    seen = f"no compiled {', '.join(missing)}"
    build = "`make kernels`, or python -m engine.kernels.cpu.build and python -m kvrouter.build"
    if facts.compiler is None:
        return Finding("compiled", "warn", f"{seen}, no c++ on the PATH", f"install g++, then {build}")
    return Finding("compiled", "warn", f"{seen}; compiler {facts.compiler}", build)


def of_ucx(facts: UcxFacts) -> Finding:
    """Judge UCX, which blocks go over between nodes."""
    if not facts.is_wanted:
        return Finding("ucx", "ok", "not wanted: network.roads leaves it out")
    if not facts.version:
        advice = "pip install 'kvray[ucx-cu12]' (or ucx-cu13): between nodes blocks go over a plain socket otherwise"
        return Finding("ucx", "warn", facts.error or "ucxx is not installed", advice)
    seen = f"UCX {facts.version}: {', '.join(facts.transports) or 'no transport'}"
    missing = sorted(set(facts.wanted_devices) - set(facts.devices))
    if missing:
        has = ", ".join(facts.devices) or "none"
        return Finding("ucx", "fail", f"{seen}; devices {has}", f"network.ucx_devices wants {', '.join(missing)}")
    if "tcp" not in facts.transports:
        return Finding("ucx", "fail", seen, "UCX_TLS, or a missing interface, keeps it from tcp, which it connects by")
    if facts.has_gpu and "cuda_copy" not in facts.transports:
        return Finding(
            "ucx", "warn", seen, "GPU memory cannot be moved: wanted the wheel of libucx for the driver's CUDA"
        )
    return Finding("ucx", "ok", seen)


def of_huge_pages(facts: HugePageFacts) -> Finding:
    """Judge transparent huge pages, which pools, arenas and weights ask for."""
    seen = f"anonymous {facts.anonymous or 'unknown'}, shared {facts.shared or 'unknown'}"
    path = "/sys/kernel/mm/transparent_hugepage"
    if facts.anonymous == "never":
        return Finding("huge pages", "warn", seen, f"echo madvise > {path}/enabled: weights and products want them")
    if facts.shared in ("", "never", "deny"):
        advice = f"echo advise > {path}/shmem_enabled: pools and the host tier are copied faster with them"
        return Finding("huge pages", "warn", seen, advice)
    return Finding("huge pages", "ok", seen)


def of_memory(facts: MemoryFacts) -> Finding:
    """Judge memory, within the limits of control groups."""
    limit = "no limit" if facts.limit_bytes is None else f"limit {_gib(facts.limit_bytes)}"
    seen = f"{_gib(facts.available_bytes)} of {_gib(facts.total_bytes)} available, {limit}"
    wanted = sum(facts.wanted_bytes.values())
    if wanted > facts.available_bytes:
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in facts.wanted_bytes.items())
        return Finding("memory", "fail", seen, f"the configuration wants {_gib(wanted)} ({parts}): lower it")
    if facts.available_bytes < _MIN_MEMORY_BYTES:
        advice = f"wanted {_gib(_MIN_MEMORY_BYTES)} at least: Ray ends workers where memory runs short"
        return Finding("memory", "warn", seen, advice)
    return Finding("memory", "ok", seen)


def of_shared_memory(facts: SharedMemoryFacts) -> Finding:
    """Judge /dev/shm, where Ray's object store lies; pools and arenas do not."""
    if facts.error:
        return Finding("/dev/shm", "fail", facts.error, "Ray wants it: mount a tmpfs there")
    seen = f"{_gib(facts.free_bytes)} of {_gib(facts.total_bytes)} free"
    advice = "in a pod: an emptyDir with medium Memory at /dev/shm; docker: --shm-size"
    if facts.free_bytes < _MIN_OBJECT_STORE_BYTES:
        return Finding("/dev/shm", "warn", seen, f"Ray puts its object store on the disk of /tmp; {advice}")
    if facts.uses_plasma and facts.free_bytes < _GOOD_SHARED_MEMORY_BYTES:
        return Finding("/dev/shm", "warn", seen, f"the road plasma wants {_gib(_GOOD_SHARED_MEMORY_BYTES)}; {advice}")
    return Finding("/dev/shm", "ok", seen)


def of_file_limit(facts: FileLimitFacts) -> Finding:
    """Judge how many files may be open; our processes raise the soft limit themselves."""
    wanted = facts.max_connections + _OTHER_FILES
    hard = "no limit" if facts.hard < 0 else f"{facts.hard:,}"
    seen = f"{facts.soft:,} soft, {hard} hard"
    if 0 <= facts.hard < wanted:
        advice = f"wanted {wanted:,} for {facts.max_connections:,} connections: ulimit -Hn, LimitNOFILE=, or fewer"
        return Finding("open files", "warn", seen, f"{advice} (connections.max_connections)")
    return Finding("open files", "ok", seen)


def of_ports(facts: PortFacts) -> Finding:
    """Judge the ports that kvray listens on."""
    span = f"{facts.num_free:,} of ports {facts.first}-{facts.last} free"
    if facts.served_here:
        return Finding("ports", "ok", f"{facts.served_here} is a kvray of yours; {span}")
    if facts.http_error:
        return Finding("ports", "fail", facts.http_error, "take another http.port, or end who listens there (ss -ltnp)")
    if facts.num_free < min(_MIN_PORTS, facts.last - facts.first + 1):
        return Finding("ports", "fail", f"{facts.http} free; {span}", f"network.port_range: wanted {_MIN_PORTS} free")
    return Finding("ports", "ok", f"{facts.http} free; {span}")


def of_clock(facts: ClockFacts) -> Finding:
    """Judge the clocks: leases and deadlines go by the monotonic one, logs, traces and buckets by the wall's."""
    told = "told by nobody" if facts.is_synchronized is None else "in step" if facts.is_synchronized else "not in step"
    offset = "" if facts.offset_s is None else f", {1000 * facts.offset_s:+.3g} ms off"
    seen = f"wall clock {told}{offset}"
    if facts.now_s < facts.installed_s - _MAX_OFFSET_S:
        days = (facts.installed_s - facts.now_s) / 86400
        return Finding("clock", "fail", f"wall clock {days:.3g} days before kvray's own files", "set it (chrony, ntp)")
    if abs(facts.wall_drift_s) > _MAX_DRIFT_S:
        advice = "it is being set, or the machine was stopped meanwhile: run chrony, which slews it"
        return Finding("clock", "warn", f"wall clock went {facts.wall_drift_s:+.3g} s beside the monotonic one", advice)
    if facts.offset_s is not None and abs(facts.offset_s) > _MAX_OFFSET_S:
        return Finding("clock", "warn", seen, "nodes' logs and traces do not fit; buckets refuse who is minutes off")
    if facts.is_synchronized is False:
        return Finding("clock", "warn", seen, "run chrony or another NTP client on the node")
    return Finding("clock", "ok", seen)


def of_ray(facts: RayFacts) -> Finding:
    """Judge Ray, its token, and the cluster that would be joined."""
    mode = f"RAY_AUTH_MODE {facts.auth_mode or 'not set'}"
    token = f"token from {facts.token_source}" if facts.token_source else "no token found"
    seen = f"Ray {facts.version or 'not installed'}, {facts.address or 'one of our own'}, {mode}, {token}"
    if not _is_within(facts.version, facts.wanted):
        return Finding("ray", "fail", seen, f"wanted ray[serve] {facts.wanted}, the same on all nodes")
    if facts.error:
        return Finding("ray", "fail", facts.error, "docs/SECURITY.md says what a cluster that is joined needs")
    if facts.address and (facts.auth_mode == "disabled" or not facts.token_source):
        advice = "whoever reaches Ray's ports runs code on every node: start its nodes with RAY_AUTH_MODE=token"
        return Finding("ray", "warn", seen, advice)
    return Finding("ray", "ok", seen)


def of_gpu(facts: GpuFacts) -> Finding:
    """Judge GPUs, their driver, and torch's wheel."""
    wheel = f"torch {facts.torch or 'not installed'}"
    if not facts.names:
        if facts.device == "cuda":
            return Finding(
                "gpu", "fail", facts.error or f"no GPU; {wheel}", "model.device is cuda: wanted a GPU, or cpu"
            )
        if facts.error:
            return Finding("gpu", "warn", facts.error, "look at `nvidia-smi` and the kernel's log; kvray uses the CPU")
        return Finding("gpu", "ok", f"none; {wheel}")
    seen = f"{len(facts.names)} x {facts.names[0]}, driver {facts.driver}; {wheel}"
    if not facts.torch_cuda:
        state: State = "fail" if facts.device == "cuda" else "warn"
        advice = "torch was built without CUDA: pip install torch from the index of the driver's CUDA"
        return Finding("gpu", state, seen, advice)
    major = int(facts.torch_cuda.partition(".")[0])
    oldest = OLDEST_DRIVERS.get(major)
    if oldest is not None and _version(facts.driver) < (oldest,):
        return Finding("gpu", "fail", seen, f"CUDA {facts.torch_cuda} of torch wants driver {oldest} or newer")
    return Finding("gpu", "ok", f"{seen}, CUDA {facts.torch_cuda}")


def of_disk(facts: DiskFacts) -> Finding:
    """Judge the directory of the disk tier."""
    if not facts.path:
        return Finding("disk tier", "ok", "not set (tiers.disk_dir)")
    if facts.error:
        return Finding(
            "disk tier", "fail", facts.error, "wanted a directory that kvray's user may write (tiers.disk_dir)"
        )
    seen = f"{facts.path} ({facts.filesystem}): {_gib(facts.free_bytes)} free, {_gib(facts.used_bytes)} used"
    if facts.free_bytes + facts.used_bytes < facts.wanted_bytes:
        advice = f"tiers.disk_capacity is {_gib(facts.wanted_bytes)}: lower it, or the disk is full before the tier is"
        return Finding("disk tier", "fail", seen, advice)
    if not facts.takes_direct:
        advice = "O_DIRECT is refused, so that blocks go through the page cache: wanted ext4 or xfs on a local disk"
        return Finding("disk tier", "warn", seen, advice)
    return Finding("disk tier", "ok", seen)


def of_remote(facts: RemoteFacts) -> Finding:
    """Judge the remote store."""
    if not facts.uri:
        return Finding("remote tier", "ok", "not set (tiers.remote)")
    if facts.error:
        return Finding("remote tier", "fail", facts.error, "look at its URI, credentials and network (docs/REMOTE.md)")
    seen = f"{facts.uri}: listed, written, read and deleted in {facts.seconds:.3g} s"
    if facts.seconds > _SLOW_REMOTE_S:
        return Finding(
            "remote tier", "warn", seen, "computing is cheaper than what comes so slowly: a nearer store helps"
        )
    return Finding("remote tier", "ok", seen)


def of_secrets(facts: SecretFacts) -> Finding:
    """Judge the cluster secret and the keys."""
    if facts.error:
        return Finding("secrets", "fail", facts.error, "docs/SECURITY.md says what each file has to hold")
    secret = "found" if facts.has_secret else "missing" if facts.needs_secret else "drawn at start"
    num = len(facts.key_lengths)
    seen = f"cluster secret {secret}, {num or 'no'} API key{'' if num == 1 else 's'}"
    if facts.needs_secret and not facts.has_secret:
        advice = "set KVRAY_SECRET or KVRAY_SECRET_FILE on every node, the same (openssl rand -hex 32)"
        return Finding("secrets", "fail", seen, advice)
    if facts.readable_by_all:
        advice = f"chmod 600 {' '.join(facts.readable_by_all)}"
        return Finding("secrets", "warn", f"{seen}; everybody may read {', '.join(facts.readable_by_all)}", advice)
    if facts.is_open_to_all and not num:
        return Finding(
            "secrets", "warn", seen, "http.host is reached from elsewhere: everybody is served without a key"
        )
    if num and min(facts.key_lengths) < _MIN_KEY_CHARS:
        seen = f"{seen}, the shortest of {min(facts.key_lengths)} characters"
        return Finding("secrets", "warn", seen, f"wanted {_MIN_KEY_CHARS} at least (openssl rand -hex 32)")
    return Finding("secrets", "ok", seen)


def of_spans(facts: SpanFacts) -> Finding:
    """Judge where spans go."""
    if not facts.endpoint:
        return Finding("spans", "ok", "off (observability.otlp_endpoint)")
    if facts.missing:
        return Finding("spans", "fail", f"{facts.missing} is not installed", "pip install 'kvray[otel]'")
    if facts.error:
        advice = "requests are served all the same, and their spans are lost; start the collector"
        return Finding("spans", "warn", facts.error, advice)
    return Finding("spans", "ok", facts.endpoint)


def late(about: str, limit_s: float) -> Finding:
    """Say that facts did not come in time."""
    return Finding(
        about, "fail", f"no answer within {limit_s:g} s", "something hangs: a mount, a driver, a name server?"
    )


def broken(about: str, error: str) -> Finding:
    """Say that facts could not be gathered, for a reason that nobody thought of."""
    return Finding(about, "warn", f"could not be looked at: {error}", "a fault of `kvray doctor`, not of the node")


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / _GIB:.1f} GiB" if num_bytes >= _GIB else f"{num_bytes / 2**20:.0f} MiB"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def _is_within(version: str, wanted: str) -> bool:
    """Tell whether a version is between the bounds of a requirement: `>=2.60,<2.61`, in any order."""
    low, high = (re.search(rf"{sign}\s*([\d.]+)", wanted) for sign in (">=", "<"))
    seen = _version(version)
    return bool(seen) and (low is None or seen >= _version(low[1])) and (high is None or seen < _version(high[1]))
