import dataclasses
import os

import numpy as np
import pytest

import transport.memory
from messages.errors import ConfigError
from nodecache.arena import RECORD, Arena, RecordState, as_ids
from tests.nodecache.blocks import layout_of


@pytest.fixture
def layout():
    return layout_of(8)


@pytest.fixture
def memory(layout):
    memory = layout.allocate()
    yield memory
    memory.close()


def successor(memory, layout):
    """The arena as the next process finds it."""
    return Arena(layout.adopt(os.dup(memory.fd)), layout)


def test_a_record_has_72_bytes():
    assert RECORD.itemsize == 72


def test_blocks_lie_where_peers_look_for_them(memory, layout):
    arena = Arena(memory, layout)
    arena.block(3)[:] = b"x" * layout.block_bytes
    offset = layout.region.block_offset(3)
    assert memory.view[offset : offset + layout.block_bytes] == b"x" * layout.block_bytes
    arena.generations[3] = 77
    assert int.from_bytes(memory.slice(layout.region.generation_offset(3), 8), "little") == 77


def test_what_was_committed_is_there_for_the_successor_and_nothing_else(memory, layout):
    arena = Arena(memory, layout)
    arena.renew(as_ids([0, 1, 2]))
    arena.records["name"][[0, 1]] = 5
    arena.commit(as_ids([0, 1]))
    arena.renew(as_ids([1]))
    found = successor(memory, layout)
    assert found.epoch == 2
    assert np.flatnonzero(found.committed()).tolist() == [0]
    assert (found.generations == arena.generations).all()
    assert found.records["state"].tolist() == [RecordState.COMMITTED, *[RecordState.WRITING] * 2, *[0] * 5]


def test_a_record_without_its_blocks_generation_does_not_count(memory, layout):
    """As it is when its process was killed between the two: fields and state are written, the generation is not."""
    arena = Arena(memory, layout)
    arena.renew(as_ids([0]))
    arena.records["state"][0] = RecordState.COMMITTED
    assert not successor(memory, layout).committed().any()


def test_generations_go_on_after_the_owner_and_differ_from_another_arenas(memory, layout):
    arena = Arena(memory, layout)
    assert (arena.generations == arena.generations[0]).all()
    arena.renew(as_ids([0]))
    assert successor(memory, layout).generations[0] == arena.generations[0]
    other = layout.allocate()
    assert Arena(other, layout).generations[0] != arena.generations[1]
    other.close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "layout version 1 seen, 2 wanted"),
        ({"fingerprint": b"another"}, f"fingerprint {b'a model'.hex()} seen, {b'another'.hex()} wanted"),
    ],
)
def test_an_arena_of_another_layout_is_made_empty_with_a_clear_line(memory, layout, caplog, change, words):
    arena = Arena(memory, layout)
    arena.renew(as_ids([0]))
    arena.commit(as_ids([0]))
    generation = int(arena.generations[0])
    found = successor(memory, dataclasses.replace(layout, **change))
    assert not found.committed().any()
    assert found.epoch == 1
    assert int(found.generations[0]) != generation
    assert [record.getMessage() for record in caplog.records] == [
        f"the arena has another layout, its blocks are dropped: {words}"
    ]


def test_a_new_arena_is_no_news(memory, layout, caplog):
    assert Arena(memory, layout).epoch == 1
    assert caplog.records == []


@pytest.mark.parametrize("change", [{"num_blocks": 9}, {"block_bytes": 1 << 16}])
def test_memory_of_another_size_is_refused(memory, layout, change):
    with pytest.raises(ConfigError, match="bytes wanted"):
        dataclasses.replace(layout, **change).adopt(memory.fd)


def test_an_arena_larger_than_what_is_available_is_refused_before_a_page_is_touched(layout, monkeypatch):
    monkeypatch.setattr(transport.memory, "available_bytes", lambda: layout.region.num_bytes)
    with pytest.raises(ConfigError, match="bytes are available"):
        layout.allocate()


@pytest.mark.parametrize("change", [{"num_blocks": 0}, {"block_bytes": 0}, {"fingerprint": bytes(65)}])
def test_impossible_layouts_are_refused(layout, change):
    with pytest.raises(ConfigError, match="wanted"):
        dataclasses.replace(layout, **change)
