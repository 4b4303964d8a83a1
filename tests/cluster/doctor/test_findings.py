"""What is said of a node's facts: each judgement, at its limits; nothing is gathered."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.doctor import findings
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

GIB = 2**30

CPU = CpuFacts(
    machine="x86_64", baseline="avx512", has_tiles=False, num_bound_cores=8, num_cores=4, wanted_threads=None
)
LIBRARIES = LibraryFacts(found={"kernels": "/c/k.so"}, compiler="/usr/bin/c++", baseline="avx512", is_wanted=True)
UCX = UcxFacts(is_wanted=True, version="1.21.0", transports=("self", "tcp"), devices=("eth0",))
PAGES = HugePageFacts(anonymous="madvise", shared="advise")
MEMORY = MemoryFacts(total_bytes=16 * GIB, available_bytes=8 * GIB, limit_bytes=None, wanted_bytes={})
SHARED = SharedMemoryFacts(total_bytes=8 * GIB, free_bytes=8 * GIB, uses_plasma=True)
FILES = FileLimitFacts(soft=1024, hard=1048576, max_connections=4096)
PORTS = PortFacts(http="127.0.0.1:8000", first=20000, last=20999, num_free=990)
CLOCK = ClockFacts(now_s=2e9, installed_s=1.9e9, wall_drift_s=1e-5, is_synchronized=True, offset_s=0.0004)
RAY = RayFacts(version="2.60.0", wanted=">=2.60,<2.61", auth_mode="", token_source="", address="")
GPU = GpuFacts(names=("NVIDIA H200",), driver="570.86.15", torch="2.13.0", torch_cuda="12.8", device="auto")
DISK = DiskFacts(
    path="/d", filesystem="ext4", free_bytes=200 * GIB, used_bytes=0, wanted_bytes=100 * GIB, takes_direct=True
)
REMOTE = RemoteFacts(uri="s3://b/p", seconds=0.1)
SECRETS = SecretFacts(has_secret=True, key_lengths=(64,))
SPANS = SpanFacts(endpoint="http://collector:4318")

GOOD = [
    (findings.of_config, ConfigFacts(source="kvray.yaml"), "kvray.yaml"),
    (findings.of_cpu, CPU, "4 of 8 cores, x86_64 avx512"),
    (findings.of_cpu, replace(CPU, has_tiles=True), "4 of 8 cores, x86_64 avx512, AMX"),
    (findings.of_libraries, LIBRARIES, "kernels for this machine"),
    (findings.of_libraries, replace(LIBRARIES, found={"kernels": "/p/prebuilt/avx512/k.so"}), "kernels for avx512"),
    (findings.of_ucx, UCX, "UCX 1.21.0: self, tcp"),
    (findings.of_ucx, UcxFacts(is_wanted=False), "not wanted: network.roads leaves it out"),
    (findings.of_huge_pages, PAGES, "anonymous madvise, shared advise"),
    (findings.of_memory, MEMORY, "8.0 GiB of 16.0 GiB available, no limit"),
    (findings.of_shared_memory, SHARED, "8.0 GiB of 8.0 GiB free"),
    (findings.of_file_limit, FILES, "1,024 soft, 1,048,576 hard"),
    (findings.of_file_limit, replace(FILES, hard=-1), "1,024 soft, no limit hard"),
    (findings.of_ports, PORTS, "127.0.0.1:8000 free; 990 of ports 20000-20999 free"),
    (
        findings.of_ports,
        replace(PORTS, http_error="taken", served_here="http://127.0.0.1:8000"),
        "http://127.0.0.1:8000 is a kvray of yours; 990 of ports 20000-20999 free",
    ),
    (findings.of_clock, CLOCK, "wall clock in step, +0.4 ms off"),
    (findings.of_clock, replace(CLOCK, is_synchronized=None, offset_s=None), "wall clock told by nobody"),
    (findings.of_ray, RAY, "Ray 2.60.0, one of our own, RAY_AUTH_MODE not set, no token found"),
    (
        findings.of_ray,
        replace(RAY, address="10.0.0.1:6379", auth_mode="token", token_source="RAY_AUTH_TOKEN"),
        "Ray 2.60.0, 10.0.0.1:6379, RAY_AUTH_MODE token, token from RAY_AUTH_TOKEN",
    ),
    (findings.of_gpu, GPU, "1 x NVIDIA H200, driver 570.86.15; torch 2.13.0, CUDA 12.8"),
    (findings.of_gpu, replace(GPU, names=(), torch_cuda=""), "none; torch 2.13.0"),
    (findings.of_disk, DISK, "/d (ext4): 200.0 GiB free, 0 MiB used"),
    (findings.of_disk, replace(DISK, free_bytes=GIB, used_bytes=99 * GIB), "/d (ext4): 1.0 GiB free, 99.0 GiB used"),
    (findings.of_disk, DiskFacts(path=""), "not set (tiers.disk_dir)"),
    (findings.of_remote, REMOTE, "s3://b/p: listed, written, read and deleted in 0.1 s"),
    (findings.of_remote, RemoteFacts(uri=""), "not set (tiers.remote)"),
    (findings.of_secrets, SECRETS, "cluster secret found, 1 API key"),
    (findings.of_secrets, SecretFacts(), "cluster secret drawn at start, no API keys"),
    (findings.of_spans, SPANS, "http://collector:4318"),
    (findings.of_spans, SpanFacts(endpoint=""), "off (observability.otlp_endpoint)"),
]


@pytest.mark.parametrize(("judge", "facts", "seen"), GOOD)
def test_what_is_good_is_told_in_one_line_without_advice(judge, facts, seen):
    finding = judge(facts)
    assert (finding.state, finding.seen, finding.advice) == ("ok", seen, "")


BAD = [
    (findings.of_config, ConfigFacts(source="f", error="htp: no such key"), "fail", "htp: no such key", "config check"),
    (findings.of_cpu, replace(CPU, baseline=""), "warn", "x86_64 plain", "AVX2 or NEON"),
    (findings.of_cpu, replace(CPU, wanted_threads=5), "warn", "4 of 8", "engine.num_threads is 5: wanted at most 4"),
    (findings.of_cpu, replace(CPU, num_cores=1), "warn", "1 of 8", "give it two"),
    (findings.of_libraries, replace(LIBRARIES, is_wanted=False), "warn", "engine.kernels is off", "auto"),
    (findings.of_libraries, replace(LIBRARIES, found={"kernels": ""}), "warn", "compiler /usr/bin/c++", "make kernels"),
    (
        findings.of_libraries,
        replace(LIBRARIES, found={"kernels": ""}, compiler=None),
        "warn",
        "no compiled kernels, no c++ on the PATH",
        "install g++",
    ),
    (findings.of_ucx, UcxFacts(is_wanted=True), "warn", "ucxx is not installed", "kvray[ucx-cu12]"),
    (findings.of_ucx, UcxFacts(is_wanted=True, error="UCX does not load: x"), "warn", "does not load: x", "ucx-cu13"),
    (findings.of_ucx, replace(UCX, wanted_devices=("mlx5_0:1",)), "fail", "devices eth0", "wants mlx5_0:1"),
    (findings.of_ucx, replace(UCX, transports=("self",)), "fail", "UCX 1.21.0: self", "tcp"),
    (findings.of_ucx, replace(UCX, has_gpu=True), "warn", "self, tcp", "GPU memory"),
    (findings.of_huge_pages, replace(PAGES, anonymous="never"), "warn", "never", "/enabled"),
    (findings.of_huge_pages, replace(PAGES, shared="never"), "warn", "never", "/shmem_enabled"),
    (findings.of_huge_pages, HugePageFacts(anonymous="always", shared=""), "warn", "unknown", "/shmem_enabled"),
    (
        findings.of_memory,
        replace(MEMORY, limit_bytes=12 * GIB, wanted_bytes={"tiers.host_memory": 9 * GIB}),
        "fail",
        "8.0 GiB of 16.0 GiB available, limit 12.0 GiB",
        "wants 9.0 GiB (tiers.host_memory 9.0 GiB)",
    ),
    (findings.of_memory, replace(MEMORY, available_bytes=GIB), "warn", "1.0 GiB of", "wanted 2.0 GiB"),
    (findings.of_shared_memory, replace(SHARED, free_bytes=64 * 2**20), "warn", "64 MiB of 8.0 GiB", "--shm-size"),
    (findings.of_shared_memory, replace(SHARED, free_bytes=GIB // 2), "warn", "512 MiB", "plasma wants 1.0 GiB"),
    (findings.of_shared_memory, replace(SHARED, error="/dev/shm: No such"), "fail", "No such", "tmpfs"),
    (findings.of_file_limit, replace(FILES, hard=4096), "warn", "4,096 hard", "wanted 5,120 for 4,096 connections"),
    (findings.of_ports, replace(PORTS, http_error="cannot listen"), "fail", "cannot listen", "http.port"),
    (findings.of_ports, replace(PORTS, num_free=7), "fail", "7 of ports", "wanted 8 free"),
    (findings.of_clock, replace(CLOCK, now_s=1.9e9 - 86400), "fail", "1 days before", "chrony"),
    (findings.of_clock, replace(CLOCK, wall_drift_s=-0.5), "warn", "went -0.5 s", "chrony"),
    (findings.of_clock, replace(CLOCK, offset_s=-3.0), "warn", "-3e+03 ms off", "buckets"),
    (findings.of_clock, replace(CLOCK, is_synchronized=False, offset_s=None), "warn", "not in step", "chrony"),
    (findings.of_ray, replace(RAY, version="2.61.0"), "fail", "Ray 2.61.0", "wanted ray[serve] >=2.60,<2.61"),
    (findings.of_ray, replace(RAY, version=""), "fail", "Ray not installed", "wanted ray[serve]"),
    (findings.of_ray, replace(RAY, address="h:1", error="wants a token"), "fail", "wants a token", "SECURITY"),
    (findings.of_ray, replace(RAY, address="h:1"), "warn", "no token found", "RAY_AUTH_MODE=token"),
    (findings.of_gpu, replace(GPU, torch_cuda=""), "warn", "H200", "without CUDA"),
    (findings.of_gpu, replace(GPU, torch_cuda="", device="cuda"), "fail", "H200", "without CUDA"),
    (findings.of_gpu, replace(GPU, torch_cuda="13.0"), "fail", "570", "wants driver 580 or newer"),
    (findings.of_gpu, replace(GPU, names=(), error="its driver is silent"), "warn", "silent", "nvidia-smi"),
    (findings.of_gpu, replace(GPU, names=(), device="cuda"), "fail", "no GPU", "model.device is cuda"),
    (findings.of_disk, replace(DISK, error="/d: Read-only file system"), "fail", "Read-only", "may write"),
    (findings.of_disk, replace(DISK, free_bytes=50 * GIB), "fail", "50.0 GiB free", "disk_capacity is 100.0 GiB"),
    (findings.of_disk, replace(DISK, takes_direct=False), "warn", "/d", "O_DIRECT"),
    (findings.of_remote, replace(REMOTE, error="s3://b: ACCESS_DENIED"), "fail", "ACCESS_DENIED", "credentials"),
    (findings.of_remote, replace(REMOTE, seconds=3.0), "warn", "in 3 s", "nearer"),
    (findings.of_secrets, SecretFacts(error="KVRAY_SECRET: wrong"), "fail", "KVRAY_SECRET: wrong", "SECURITY"),
    (findings.of_secrets, SecretFacts(needs_secret=True), "fail", "cluster secret missing", "openssl rand -hex 32"),
    (findings.of_secrets, replace(SECRETS, readable_by_all=("/k",)), "warn", "may read /k", "chmod 600 /k"),
    (findings.of_secrets, SecretFacts(is_open_to_all=True), "warn", "no API keys", "without a key"),
    (findings.of_secrets, replace(SECRETS, key_lengths=(64, 5)), "warn", "shortest of 5 characters", "16 at least"),
    (findings.of_spans, replace(SPANS, missing="the-package"), "fail", "the-package is not installed", "kvray[otel]"),
    (findings.of_spans, replace(SPANS, error="nobody there"), "warn", "nobody there", "collector"),
]


@pytest.mark.parametrize(("judge", "facts", "state", "seen", "advice"), BAD)
def test_what_is_lacking_is_told_with_what_to_do(judge, facts, state, seen, advice):
    finding = judge(facts)
    assert finding.state == state
    assert seen in finding.seen
    assert advice in finding.advice
    assert "\n" not in finding.seen + finding.advice


def test_a_driver_that_is_new_enough_for_the_wheel_is_good_and_an_unknown_cuda_is_not_judged():
    assert findings.of_gpu(replace(GPU, driver="580.65", torch_cuda="13.0")).state == "ok"
    assert findings.of_gpu(replace(GPU, driver="1.0", torch_cuda="99.0")).state == "ok"
