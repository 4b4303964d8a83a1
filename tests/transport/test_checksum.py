"""One checksum: the bits that its docstring defines from every implementation, and no damage that it does not find."""

from __future__ import annotations

import platform
import random
import shutil
import threading
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

import transport.checksum
from transport.checksum import (
    LEAF_BYTES,
    LINE_BYTES,
    MIX,
    CompiledChecksum,
    CopyWatch,
    PortableChecksum,
    checksum,
    checksum_path,
    copy_all_checked,
    copy_checked,
    keys,
)
from transport.checksum_library import CHECKSUM
from transport.compiled import BuildError, native_target
from transport.protocol import Copy

MASK = (1 << 64) - 1
LENGTHS = [0, 1, 7, 8, 9, 63, 64, 65, 200, 4095, 4096, 4097, 4160, 8192, 12288, 12295, 70000, 300001]
KNOWN = {
    b"": 0xC50DD9468318F0A0,
    b"kvray": 0xE296B5EDD7FB145F,
    bytes(64): 0x6B5EC6C429F18698,
    bytes(range(256)) * 33: 0xA0EC00240F840EA6,
}


def mix(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def key(n: int) -> int:
    return mix((n + 1) * 0x9E3779B97F4A7C15 & MASK)


def defined(data: bytes) -> int:
    """The definition, word for word."""
    filled = data + bytes(-len(data) % 64)
    words = [int.from_bytes(filled[i : i + 8], "little") for i in range(0, len(filled), 8)]
    totals = [0] * 8
    for leaf in range(0, len(words), 512):
        sums = [0] * 8
        for n, word in enumerate(words[leaf : leaf + 512]):
            upper, lower = divmod(word ^ key(n), 1 << 32)
            sums[n % 8] += (2**32 + lower) * (2**32 + upper)
        for lane in range(8):
            totals[lane] += mix(sums[lane] & MASK ^ key(512 + leaf // 512))
    value = key(len(data))
    for total in totals:
        value = mix(value ^ total & MASK)
    return value


def target_flags() -> list[str | None]:
    """The portable one, and the compiler's flags that this CPU can run."""
    if platform.machine() != "x86_64":
        return [None, native_target()]
    flags = Path("/proc/cpuinfo").read_text()
    return [None, native_target(), "-march=x86-64", *(["-march=x86-64-v3"] if "avx2" in flags else [])]


@pytest.fixture(scope="module", params=target_flags(), ids=lambda target: target or "numpy")
def implementation(request, tmp_path_factory):
    if request.param is None:
        return PortableChecksum()
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler")
    return CompiledChecksum(CHECKSUM.compile(tmp_path_factory.mktemp("build"), [request.param]))


@pytest.fixture
def used(implementation, monkeypatch):
    """The module's functions by this implementation."""
    monkeypatch.setattr(transport.checksum, "_implementation", lambda: implementation)
    return implementation


def random_bytes(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length)


# ---------------------------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("data", KNOWN, ids=[0, 5, 64, 8448])
def test_values_never_change(data):
    assert defined(data) == KNOWN[data]


@pytest.mark.parametrize("length", LENGTHS)
def test_each_implementation_gives_the_bits_of_the_definition(used, length):
    data = random_bytes(length, length)
    assert checksum(data) == defined(data)
    target = bytearray(length)
    assert copy_checked(target, data) == defined(data)
    assert target == data


def test_wherever_bytes_lie_and_whatever_holds_them(used):
    data = random_bytes(9000)
    wanted = checksum(data)
    for offset in (*range(1, 66), 4095):
        room = bytearray(offset) + data
        assert checksum(memoryview(room)[offset:]) == wanted
    assert checksum(np.frombuffer(data, np.uint8)) == wanted
    assert checksum(memoryview(data).cast("Q")) == wanted


def test_any_alignment_of_source_and_target_gives_the_same_bytes_and_nothing_beside(used):
    source = random_bytes(20000)
    chance = random.Random(1)
    for _ in range(200):
        begin, into = chance.randrange(130), chance.randrange(130)
        length = chance.choice([0, 1, 63, 64, 65, 4096, 4097, chance.randrange(19000)])
        target = bytearray(b"\xaa") * 20000
        (value,) = copy_all_checked(target, source, [Copy(begin, into, length)])
        assert value == checksum(source[begin : begin + length])
        assert target == b"\xaa" * into + source[begin : begin + length] + b"\xaa" * (20000 - into - length)


@pytest.mark.parametrize("block_bytes", [4096, 5000, 64 << 10])
def test_copies_so_large_that_they_pass_the_caches_by_are_the_same(used, block_bytes):
    num_blocks = (3 << 20) // block_bytes
    source = random_bytes(num_blocks * block_bytes)
    target = bytearray(len(source))
    places = random.Random(2).sample(range(num_blocks), num_blocks)
    copies = [Copy(i * block_bytes, j * block_bytes, block_bytes) for i, j in enumerate(places)]
    values = copy_all_checked(target, source, copies)
    for (begin, into, length), value in zip(copies, values, strict=True):
        block = source[begin : begin + length]
        assert target[into : into + length] == block
        assert value == checksum(block)


def test_no_copies_have_no_checksums(used):
    assert copy_all_checked(bytearray(1), b"1", []) == []


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("distance", [0, 1, -1, 63, -63])
def test_a_target_that_overlaps_its_source_is_refused_and_nothing_is_written(used, distance):
    room = bytearray(random_bytes(1000))
    before = bytes(room)
    with pytest.raises(ValueError, match="overlaps itself"):
        copy_all_checked(room, room, [Copy(0, 900, 10), Copy(200, 200 + distance, 64)])
    assert room == before
    assert copy_all_checked(room, room, [Copy(200, 264, 64), Copy(200, 136, 64), Copy(5, 5, 0)])
    assert room[264:328] == room[136:200] == before[200:264]


@pytest.mark.parametrize(
    "bad", [Copy(9, 0, 2), Copy(0, 19, 2), Copy(-1, 0, 1), Copy(0, -1, 1), Copy(0, 0, -1), Copy(0, 0, 2**62)]
)
def test_a_range_outside_is_refused_and_nothing_is_written(used, bad):
    target = bytearray(20)
    with pytest.raises(ValueError, match=r"out of bounds.*: source 10 bytes, target 20 bytes"):
        copy_all_checked(target, b"0123456789", [Copy(0, 0, 10), bad])
    assert target == bytes(20)


def test_a_target_that_cannot_be_written_or_has_another_length_is_refused(used):
    with pytest.raises(ValueError, match="read-only"):
        copy_checked(bytes(3), b"123")
    with pytest.raises(ValueError, match="4 bytes for 3"):
        copy_checked(bytearray(4), b"123")
    with pytest.raises((ValueError, BufferError), match="contiguous"):
        checksum(memoryview(bytearray(10))[::2])


# -------------------------------------------------------------------------------------------------------- being watched


def test_a_copy_that_was_stopped_before_writes_nothing(used):
    watch = CopyWatch()
    watch.stop()
    target = bytearray(8192)
    assert copy_all_checked(target, b"1" * 8192, [Copy(0, 0, 8192)], watch) == []
    assert target == bytes(8192)
    assert watch.num_bytes == 0


def test_progress_is_seen_and_stops_end_a_long_copy_with_what_is_whole(used):
    source, target, watch = random_bytes(8 << 20), bytearray(8 << 20), CopyWatch()
    copies = [Copy(0, 0, len(source))] * 1000  # seconds
    values: list[int] = []
    thread = threading.Thread(target=lambda: values.extend(copy_all_checked(target, source, copies, watch)))
    thread.start()
    while watch.num_bytes < len(source):
        assert thread.is_alive()
    watch.stop()
    thread.join()
    assert 1 <= len(values) < 1000
    assert set(values) == {checksum(source)}
    assert len(values) == watch.num_bytes // len(source)


@pytest.mark.slow
@pytest.mark.parametrize("block_bytes", [64 << 10, 2 << 20])  # through the caches, and past them
def test_of_a_source_that_is_written_meanwhile_the_checksum_is_that_of_what_lies_in_the_target(used, block_bytes):
    source, target = bytearray(random_bytes(block_bytes)), bytearray(block_bytes)
    words = np.frombuffer(source, np.uint64)
    is_over = threading.Event()

    def write():
        while not is_over.is_set():
            np.invert(words, out=words)  # without the interpreter's lock

    thread = threading.Thread(target=write)
    thread.start()
    for _ in range(200):
        value = copy_checked(target, source)
        assert value == checksum(target)
    is_over.set()
    thread.join()


# ---------------------------------------------------------------------------------------------------- what is noticed


def structured(kind: str, length: int) -> bytearray:
    if kind == "random":
        return bytearray(random_bytes(length, 5))
    pattern = {"zeros": bytes(8), "ones": b"\xff" * 8, "bfloat16": b"\x80\x3f" * 4, "ramp": bytes(range(256))}[kind]
    return bytearray(pattern * -(-length // len(pattern)))[:length]


KINDS = st.sampled_from(["zeros", "ones", "bfloat16", "ramp", "random"])
SIZES = st.sampled_from([30, 64, 512, 4096, 4100, 12288])


@st.composite
def damaged(draw) -> tuple[bytes, bytes]:
    """A block, and what an accident makes of it."""
    block = structured(draw(KINDS), draw(SIZES))
    found = bytearray(block)
    place = st.integers(0, len(block) - 1)
    match draw(st.sampled_from(["bits", "same bit", "words", "lines", "leaves", "run", "shift", "cut", "burst"])):
        case "bits":
            for at in draw(st.lists(place, min_size=1, max_size=6)):
                found[at] ^= 1 << draw(st.integers(0, 7))
        case "same bit":
            bit, at = draw(st.integers(0, 7)), draw(place)
            for distance in draw(st.sets(st.integers(0, 1 + len(block) // 64), min_size=2, max_size=2)):
                found[(at + 64 * distance) % len(block)] ^= 1 << bit  # of the same lane
        case "words" | "lines" | "leaves" as unit:
            size = {"words": 8, "lines": LINE_BYTES, "leaves": LEAF_BYTES}[unit]
            i, j = (size * draw(st.integers(0, (len(block) - 1) // size)) for _ in range(2))
            one, other = found[i : i + size], found[j : j + size]
            if len(one) == len(other):
                found[i : i + size], found[j : j + size] = other, one
        case "run":
            begin, length = draw(place), draw(st.integers(1, 5000))
            found[begin : begin + length] = bytes(len(found[begin : begin + length]))
        case "shift":
            found = found[1:] + found[:1]
        case "cut":
            found = found[: draw(place)]
        case "burst":
            begin = draw(place)
            burst = draw(st.binary(min_size=1, max_size=64))[: len(block) - begin]
            found[begin : begin + len(burst)] = burst
    return bytes(block), bytes(found)


@pytest.mark.slow
@given(damaged())
@settings(max_examples=2000, deadline=None)
def test_every_kind_of_damage_is_noticed(pair):
    block, found = pair
    assert (checksum(found) == checksum(block)) == (found == block)


@pytest.mark.parametrize("kind", ["zeros", "ones", "bfloat16", "random"])
@pytest.mark.parametrize("length", [30, 64, 200, 4160])
def test_each_single_bit_is_noticed_and_each_in_its_own_way(kind, length):
    block = structured(kind, length)
    bits = range(8 * length) if length <= 200 else random.Random(0).sample(range(8 * length), 2000)
    values = {checksum(block)}
    for bit in bits:
        block[bit // 8] ^= 1 << bit % 8
        values.add(checksum(block))
        block[bit // 8] ^= 1 << bit % 8
    assert len(values) == len(bits) + 1


def test_zeros_of_each_length_differ():
    assert len({checksum(bytes(length)) for length in range(5000)}) == 5000


def test_keys_are_such_that_no_word_is_blind_and_equal_words_do_not_hide_each_other():
    """What the docstring says of the keys, which are constants."""
    lines = keys(0, LEAF_BYTES // 8).reshape(-1, 8)
    assert lines.ravel().tolist() == [key(n) for n in range(LEAF_BYTES // 8)]
    for lane in range(8):
        assert len(set((lines[:, lane] >> np.uint64(32)).tolist())) == len(lines)
        assert len(set((lines[:, lane] & np.uint64(2**32 - 1)).tolist())) == len(lines)
    assert all(factor % 2 for _, factor in MIX)  # one to one


@pytest.mark.parametrize("kind", ["zeros", "bfloat16", "random"])
def test_a_flipped_bit_flips_each_bit_of_the_checksum_in_half_of_the_cases(kind):
    block = structured(kind, 4352)
    before = checksum(block)
    chance, num_flips = random.Random(6), 3000
    counts = np.zeros(64)
    for _ in range(num_flips):
        at, bit = chance.randrange(len(block)), 1 << chance.randrange(8)
        block[at] ^= bit
        change = checksum(block) ^ before
        block[at] ^= bit
        counts += [change >> i & 1 for i in range(64)]
    assert counts.sum() / (64 * num_flips) == pytest.approx(0.5, abs=0.01)
    assert np.abs(counts / num_flips - 0.5).max() < 0.05  # more than 5 standard deviations


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0, 20, 40])
def test_blocks_that_differ_in_two_bits_share_24_bits_as_seldom_as_random_numbers(shift):
    block = structured("zeros", 512)
    chance, num = random.Random(7), 20_000
    pairs = {tuple(sorted(chance.sample(range(8 * len(block)), 2))) for _ in range(num)}
    values = []
    for pair in pairs:
        for bit in pair:
            block[bit // 8] ^= 1 << bit % 8
        values.append(checksum(block))
        for bit in pair:
            block[bit // 8] ^= 1 << bit % 8
    assert len(set(values)) == len(values)
    num_shared = len(values) - len({value >> shift & 0xFFFFFF for value in values})
    assert num_shared < 35  # 12 are to be expected


# ------------------------------------------------------------------------------------------------ what is compiled


def test_without_a_build_numpy_serves_and_one_log_line_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    transport.checksum._implementation.cache_clear()
    try:
        assert checksum_path() == "numpy"
        assert checksum(b"kvray") == KNOWN[b"kvray"]
    finally:
        transport.checksum._implementation.cache_clear()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "engine.kernels.cpu.build" in caplog.text


def test_a_broken_library_is_a_log_line_and_not_an_error(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = CHECKSUM.path()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x7fELF, but no more")
    transport.checksum._implementation.cache_clear()
    try:
        assert checksum_path() == "numpy"
    finally:
        transport.checksum._implementation.cache_clear()
    assert "do not load" in caplog.text


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_a_compiler_that_refuses_is_told_with_its_words(tmp_path):
    with pytest.raises(BuildError, match=r"the compiler refused: (?s:.*)no-such-machine"):
        CHECKSUM.compile(tmp_path, ["-march=no-such-machine"])


def test_without_a_compiler_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"c\+\+ is not on the PATH: install g\+\+"):
        CHECKSUM.compile(tmp_path, [native_target()])
