"""A compiled library is found again as long as nothing changes that its bits depend on."""

from __future__ import annotations

import ctypes
import platform
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import transport.compiled
from transport.compiled import BASELINES, BuildError, CompiledLibrary, baselines_of, cache_directory

V3 = ["fpu", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"]
V4 = [*V3, *["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"]]

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")


@pytest.fixture
def library(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(transport.compiled, "PREBUILT", tmp_path / "prebuilt")
    source, header = tmp_path / "source.cpp", tmp_path / "number.h"
    source.write_text('#include "number.h"\nextern "C" int number() { return NUMBER; }')
    header.write_text("#define NUMBER 1")
    return CompiledLibrary("number", (source, header), ("-O1",))


def answer(path) -> int:
    return ctypes.CDLL(str(path)).number()


@needs_compiler
def test_a_library_is_compiled_once(library):
    assert library.found() is None
    path = library.build()
    assert path == library.path() == library.found()
    written = path.stat().st_mtime_ns
    assert library.build() == path
    assert path.stat().st_mtime_ns == written
    assert answer(path) == 1


@pytest.mark.slow
@needs_compiler
def test_other_sources_and_other_flags_are_another_library(library):
    first = library.build()
    assert not replace(library, flags=("-O2",)).path().exists()
    library.sources[1].write_text("#define NUMBER 2")
    assert library.found() is None
    second = library.build()
    assert second != first
    assert (answer(first), answer(second)) == (1, 2)


@needs_compiler
def test_what_could_not_be_compiled_leaves_nothing_behind(library):
    library.sources[0].write_text("no C++")
    with pytest.raises(BuildError, match="the compiler refused"):
        library.build()
    assert library.found() is None
    assert list(library.path().parent.parent.iterdir()) == []


@needs_compiler
def test_a_library_that_was_damaged_is_not_loaded_and_built_again(library, caplog):
    path = library.build()
    whole = path.read_bytes()
    wheel_with(library, *baselines_of(platform.machine(), transport.compiled.cpu_flags()))
    for damaged in (b"", whole[:-1], whole[: len(whole) // 2], whole.replace(b"number", b"NUMBER")):
        path.write_bytes(damaged)
        assert library.found() != path
        assert "does not load: it is not as it was written" in caplog.text
    assert library.build() == path
    assert path.read_bytes() == whole
    assert answer(path) == 1


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names kinds of x86-64's CPUs")
def test_where_the_best_does_not_load_the_next_is_taken(library, monkeypatch, caplog):
    wheel_with(library, "avx512", "avx2")
    monkeypatch.setattr(transport.compiled, "cpu_flags", lambda: V4)

    def open_path(path):
        if "avx512" in str(path):
            raise OSError("version `GLIBC_2.99' not found")
        return path

    assert library.opened(open_path) == library.prebuilt("avx2")
    assert "GLIBC_2.99" in caplog.text


@pytest.mark.parametrize("home", ["none", "closed"])
def test_without_a_home_of_ones_own_a_wheels_library_serves_and_nothing_is_built(library, home, tmp_path, monkeypatch):
    wheel_with(library, *baselines_of(platform.machine(), transport.compiled.cpu_flags()))
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    def closed(path, *_arguments, **_options):
        raise PermissionError(13, "Permission denied", str(path))

    if home == "none":
        monkeypatch.setattr(Path, "home", no_home)
    else:
        monkeypatch.setenv("HOME", str(tmp_path / "closed"))
        monkeypatch.setattr(transport.compiled, "_is_whole", closed)
    assert library.found() is None or "prebuilt" in str(library.found())
    with pytest.raises(BuildError, match="XDG_CACHE_HOME"):
        library.build()


def test_a_cache_that_is_relative_is_none(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert cache_directory("models") == Path.home() / ".cache" / "kvray" / "models"


@pytest.mark.parametrize(
    ("machine", "flags", "baselines"),
    [
        ("x86_64", [*V4, "avx512_bf16", "amx_tile"], ["avx512-bf16", "avx512", "avx2"]),
        ("x86_64", V4, ["avx512", "avx2"]),
        ("x86_64", [flag for flag in V4 if flag != "avx512vl"], ["avx2"]),
        ("x86_64", V3, ["avx2"]),
        ("x86_64", ["sse4_2", "avx"], []),
        ("aarch64", ["asimd"], ["neon"]),
        ("riscv64", [], []),
    ],
)
def test_the_baselines_of_a_cpu_are_those_that_it_has_all_of_the_best_first(machine, flags, baselines):
    assert baselines_of(machine, flags) == baselines


def wheel_with(library: CompiledLibrary, *baselines: str) -> None:
    for baseline in baselines:
        library.prebuilt(baseline).parent.mkdir(parents=True)
        library.prebuilt(baseline).write_text(baseline)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names kinds of x86-64's CPUs")
@pytest.mark.parametrize(
    ("flags", "baseline"), [([*V4, "avx512_bf16"], "avx512-bf16"), (V4, "avx512"), (V3, "avx2"), (["sse4_2"], None)]
)
def test_a_wheels_library_is_chosen_by_what_the_cpu_has(library, monkeypatch, flags, baseline):
    wheel_with(library, *BASELINES["x86_64"])
    monkeypatch.setattr(transport.compiled, "cpu_flags", lambda: flags)
    found = library.found()
    assert (None if found is None else found.read_text()) == baseline


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names kinds of x86-64's CPUs")
def test_a_wheel_that_lacks_the_best_baseline_serves_with_the_next(library, monkeypatch):
    wheel_with(library, "avx2")
    monkeypatch.setattr(transport.compiled, "cpu_flags", lambda: V4)
    assert library.found() == library.prebuilt("avx2")


@needs_compiler
def test_what_was_compiled_for_this_machine_comes_before_a_wheels(library):
    wheel_with(library, *baselines_of(platform.machine(), transport.compiled.cpu_flags()))
    library.build()
    assert library.found() == library.path()


@pytest.mark.skipif(
    not baselines_of(platform.machine(), transport.compiled.cpu_flags()), reason="a wheel has none for it"
)
def test_a_wheels_library_of_other_sources_is_not_used(library):
    wheel_with(library, *baselines_of(platform.machine(), transport.compiled.cpu_flags()))
    assert library.found() is not None
    library.sources[1].write_text("#define NUMBER 2")
    assert library.found() is None
