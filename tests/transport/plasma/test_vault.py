"""What a vault holds, for how long, and what it refuses to read: its limits, without roads and Ray."""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref

import msgspec
import numpy as np
import pytest

import transport.plasma.vault
from messages.handoff import RegionInfo
from transport.memory import Memory
from transport.plasma.vault import Vault, VaultLimits
from transport.protocol import RegionError, TransferError
from transport.shm import ShmTransport

SIZE = 1 << 18
SEGMENT = 64 << 10


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch):
    monkeypatch.setattr(transport.plasma.vault, "SEGMENT_BYTES", SEGMENT)


@pytest.fixture
def source():
    memory = Memory.allocate(SIZE)
    memory.view[:] = random.Random(1).randbytes(SIZE)
    yield memory
    memory.close()


@pytest.fixture
def shm():
    road = ShmTransport()
    yield road
    road.close()


@pytest.fixture
def region(shm, source) -> RegionInfo:
    return shm.register(source)


def copying(**limits: float) -> Vault:
    return Vault(lambda segment: segment.copy(), VaultLimits(**limits))  # type: ignore[arg-type]


def export(vault, export_id, *arguments):
    vault.expect(export_id)
    return vault.export(export_id, *arguments)


def test_a_full_vault_refuses_when_nobody_releases(shm, source):
    vault = Vault(lambda segment: segment.copy(), VaultLimits(max_bytes=2 * SEGMENT, max_wait_s=0.1))
    region = shm.register(source)
    export(vault, b"1", region, [[(0, SEGMENT)], [(0, SEGMENT - 1)]])
    export(vault, b"2", region, [[(0, 1)]])
    assert vault.num_held_bytes == 2 * SEGMENT
    began_s = time.monotonic()
    with pytest.raises(TransferError, match="the vault holds 131,072 of 131,072 bytes: no room for 1") as caught:
        export(vault, b"3", region, [[(0, 1)]])
    assert time.monotonic() - began_s >= 0.1
    assert caught.value.code == "vault_full"
    vault.release(b"1")
    vault.release(b"unknown")
    export(vault, b"3", region, [[(0, 1)]])
    assert vault.num_held_bytes == 2


def test_a_full_vault_waits_a_little_for_others_to_release(shm, source):
    vault = Vault(lambda segment: segment.copy(), VaultLimits(max_bytes=SEGMENT, max_wait_s=5))
    region = shm.register(source)
    export(vault, b"1", region, [[(0, SEGMENT)]])
    releasing = threading.Timer(0.1, vault.release, [b"1"])
    releasing.start()
    export(vault, b"2", region, [[(0, 1)]])
    releasing.join()
    assert vault.num_held_bytes == 1


def test_what_nobody_releases_is_let_go_of(shm, source):
    stored = []
    vault = Vault(lambda segment: stored.append(segment.copy()) or len(stored) - 1, VaultLimits(hold_s=10))
    assert export(vault, b"1", shm.register(source), [[(0, 10)], [(20, 5), (3, 2)]]) == [0, 1]
    assert bytes(stored[0]) == source.view[:10]
    assert bytes(stored[1]) == bytes(source.view[20:25]) + bytes(source.view[3:5])
    vault.expire(time.monotonic() + 9)
    assert vault.num_held_bytes == 17
    vault.expire(time.monotonic() + 11)
    assert vault.num_holds == vault.num_held_bytes == 0


def test_what_is_released_before_it_is_read_is_not_held(shm, source):
    vault = Vault(lambda segment: vault.release(b"1"), VaultLimits())
    export(vault, b"1", shm.register(source), [[(0, 10)]])
    assert vault.num_holds == vault.num_held_bytes == 0


def test_what_is_released_before_it_begins_is_not_read(shm, source):
    stored = []
    vault = Vault(stored.append, VaultLimits())
    vault.expect(b"1")
    assert vault.num_holds == 1
    vault.release(b"1")
    assert vault.export(b"1", shm.register(source), [[(0, 10)]]) == []
    assert stored == []
    assert vault.num_holds == 0


def test_a_failed_put_holds_nothing(shm, source):
    def full(segment):
        raise MemoryError

    vault = Vault(full, VaultLimits())
    with pytest.raises(MemoryError):
        export(vault, b"1", shm.register(source), [[(0, 10)]])
    assert vault.num_holds == vault.num_held_bytes == 0


# ----------------------------------------------------------------------------------------------------- what is too much


@pytest.mark.parametrize("num_bytes", [SEGMENT, SEGMENT + 1])
def test_a_segment_is_at_most_so_large(region, num_bytes):
    vault = copying()
    if num_bytes == SEGMENT:
        assert len(export(vault, b"1", region, [[(0, 10), (10, num_bytes - 10)]])) == 1
        return
    with pytest.raises(RegionError, match=rf"segments of \[{num_bytes}\] bytes, 1 to {SEGMENT} wanted"):
        export(vault, b"1", region, [[(0, 10), (10, num_bytes - 10)]])
    assert vault.num_holds == 0


def test_an_export_has_at_most_so_many_ranges_over_all_its_segments(region):
    half = [(0, 1)] * 32768
    assert len(export(copying(), b"1", region, [half, half])) == 2
    with pytest.raises(RegionError, match="65537 ranges in one export, at most 65536 wanted"):
        export(copying(), b"1", region, [half, half, [(0, 1)]])


def test_the_last_byte_of_a_region_can_be_read_and_the_next_cannot(region, source):
    [segment] = export(copying(), b"1", region, [[(SIZE - 1, 1)]])
    assert bytes(segment) == bytes(source.view[-1:])
    with pytest.raises(RegionError, match="out of bounds"):
        export(copying(), b"1", region, [[(SIZE, 1)]])


def test_what_cannot_be_read_is_refused_before_there_is_room_for_it(region):
    vault = copying(max_bytes=1, max_wait_s=60)
    export(vault, b"1", region, [[(0, 1)]])
    for described in (
        msgspec.structs.replace(region, nonce=bytes(16)),
        msgspec.structs.replace(region, handle=b"junk"),
    ):
        with pytest.raises(RegionError):
            export(vault, b"2", described, [[(0, 1)]])
    assert vault.num_holds == 1


# ----------------------------------------------------------------------------------------------------------- who waits


def test_an_export_that_was_only_announced_takes_no_room(region):
    vault = copying(max_bytes=SEGMENT, max_wait_s=0)
    vault.expect(b"1")
    export(vault, b"2", region, [[(0, SEGMENT)]])
    assert (vault.num_holds, vault.num_held_bytes) == (2, SEGMENT)


def test_who_found_no_room_holds_none(region):
    vault = copying(max_bytes=SEGMENT, max_wait_s=0)
    export(vault, b"1", region, [[(0, SEGMENT)]])
    with pytest.raises(TransferError) as caught:
        export(vault, b"2", region, [[(0, 1)]])
    assert not isinstance(caught.value, RegionError), "another time it may be read"
    assert (vault.num_holds, vault.num_held_bytes) == (1, SEGMENT)


def test_what_expires_makes_room_for_who_waits(region):
    vault = copying(max_bytes=SEGMENT, max_wait_s=30)
    export(vault, b"1", region, [[(0, SEGMENT)]])
    vault.expect(b"2")
    waiting = threading.Thread(target=vault.export, args=(b"2", region, [[(0, SEGMENT)]]))
    waiting.start()
    vault.expire(time.monotonic() + 59)
    assert vault.num_holds == 2
    waiting.join(0.05)
    assert waiting.is_alive()
    with vault._changed:
        vault._holds[b"2"].ends_s += 60  # it was announced later than the one that holds the room
    vault.expire(time.monotonic() + 61)
    waiting.join(5)
    assert not waiting.is_alive()
    assert (vault.num_holds, vault.num_held_bytes) == (1, SEGMENT)


def test_time_counts_from_the_announcement_and_an_export_that_comes_after_it_is_not_read(region):
    stored: list[object] = []
    vault = Vault(stored.append, VaultLimits(hold_s=10))
    vault.expect(b"1")
    vault.expire(time.monotonic() + 11)
    assert vault.export(b"1", region, [[(0, 10)]]) == []
    assert (stored, vault.num_holds) == ([], 0)


# ------------------------------------------------------------------------------------------------------------ how long


@pytest.mark.slow
def test_segments_live_as_long_as_their_hold_and_no_longer(region):
    class Stored:
        """What Ray's reference is: the segment lives while it does."""

    vault = Vault(lambda segment: Stored(), VaultLimits())
    references = [weakref.ref(stored) for stored in export(vault, b"1", region, [[(0, 1)], [(1, 1)]])]
    gc.collect()
    assert all(reference() is not None for reference in references)
    vault.release(b"1")
    gc.collect()
    assert all(reference() is None for reference in references)


def test_a_segment_of_one_range_is_stored_from_where_it_lies_and_of_several_put_together(region, source):
    segments: list[np.ndarray] = []
    export(Vault(segments.append, VaultLimits()), b"1", region, [[(5, 20)], [(3, 2), (0, 1)]])
    alone, together = segments
    assert not alone.flags.owndata
    assert bytes(alone) == bytes(source.view[5:25])
    assert bytes(together) == bytes(source.view[3:5]) + bytes(source.view[0:1])
