"""What is known of a node: values without behaviour, gathered by `gathering`, judged by `findings`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFacts:
    """The configuration that the others are judged by."""

    source: str  #: a file, or "defaults"
    error: str = ""  #: what is wrong with it


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuFacts:
    """Cores and instruction sets."""

    machine: str  #: x86_64, aarch64
    baseline: str  #: of compiled libraries, the best that this CPU meets; "": none
    has_tiles: bool  #: AMX
    num_bound_cores: int  #: that this process may run on
    num_cores: int  #: at a time, by the quotas of its control groups too
    wanted_threads: int | None  #: engine.num_threads


@dataclass(frozen=True, slots=True, kw_only=True)
class LibraryFacts:
    """The compiled libraries, by name."""

    found: dict[str, str]  #: the file of each; "": it was never built, or not for such a CPU
    compiler: str | None  #: c++, if it is on the PATH
    baseline: str  #: as CpuFacts has it
    is_wanted: bool  #: engine.kernels is not off


@dataclass(frozen=True, slots=True, kw_only=True)
class UcxFacts:
    """UCX, as a process of its own saw it."""

    is_wanted: bool  #: network.roads has ucx
    version: str = ""  #: "": ucxx is not installed, or does not load
    transports: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    wanted_devices: tuple[str, ...] = ()  #: network.ucx_devices
    has_gpu: bool = False
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class HugePageFacts:
    """Transparent huge pages, as the kernel writes them; "": it does not."""

    anonymous: str  #: always, madvise, never
    shared: str  #: always, within_size, advise, never, deny, force


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFacts:
    """Memory, in bytes."""

    total_bytes: int
    available_bytes: int  #: within the limits of the control groups
    limit_bytes: int | None  #: of the control groups; None: none below the total
    wanted_bytes: dict[str, int]  #: what settings name on this node


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedMemoryFacts:
    """Where Ray keeps its object store."""

    total_bytes: int
    free_bytes: int
    uses_plasma: bool  #: network.roads has plasma
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLimitFacts:
    """How many files a process may have open."""

    soft: int
    hard: int
    max_connections: int  #: connections.max_connections, each a file of an ingress


@dataclass(frozen=True, slots=True, kw_only=True)
class PortFacts:
    """Ports that kvray would listen on."""

    http: str  #: host:port
    http_error: str = ""  #: why it cannot be had
    served_here: str = ""  #: the URL of the kvray of this user that has it
    first: int  #: of network.port_range
    last: int
    num_free: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockFacts:
    """The clocks of this machine."""

    now_s: float  #: since 1970, by the wall clock
    installed_s: float  #: when kvray's files were written, by the same
    wall_drift_s: float  #: how much further the wall clock went than the monotonic one, while that was looked at
    is_synchronized: bool | None  #: the kernel's word; None: it gives none
    offset_s: float | None  #: from the time of who tells it, as chrony or the kernel says


@dataclass(frozen=True, slots=True, kw_only=True)
class RayFacts:
    """Ray, and the cluster that `kvray serve` would join."""

    version: str  #: "": not installed
    wanted: str  #: by kvray's own requirements, ">=2.60,<2.61"
    auth_mode: str  #: RAY_AUTH_MODE, "" where nothing is said
    token_source: str  #: where a token was found; "": nowhere
    address: str  #: of the cluster to join; "": one of our own is started
    error: str = ""  #: why it cannot be joined


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFacts:
    """GPUs, and whether torch can use them."""

    names: tuple[str, ...]
    driver: str  #: "": no driver is loaded
    torch: str  #: its version
    torch_cuda: str  #: of CUDA, that it was built with; "": none
    device: str  #: model.device
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFacts:
    """The directory of the disk tier."""

    path: str  #: "": there is no such tier
    filesystem: str = ""
    free_bytes: int = 0
    used_bytes: int = 0  #: by what lies in it
    wanted_bytes: int = 0  #: tiers.disk_capacity
    takes_direct: bool = False  #: writes that pass the page cache by (O_DIRECT)
    error: str = ""  #: why it cannot be written


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFacts:
    """The remote store."""

    uri: str  #: without credentials; "": there is none
    seconds: float = 0.0  #: that listing, writing, reading and deleting a small object took
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretFacts:
    """The cluster secret, the API keys and the tenants' salt; nothing of what they are."""

    error: str = ""  #: one of them is wrong
    has_secret: bool = False
    needs_secret: bool = False  #: there is a cluster to join, where none is drawn
    key_lengths: tuple[int, ...] = ()
    is_open_to_all: bool = False  #: HTTP listens beyond loopback
    readable_by_all: tuple[str, ...] = ()  #: files


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanFacts:
    """Where spans of requests go."""

    endpoint: str  #: "": nowhere
    missing: str = ""  #: what is not installed
    error: str = ""  #: why it cannot be reached
