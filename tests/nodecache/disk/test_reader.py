from __future__ import annotations

from pathlib import Path

from nodecache.disk.index import Place
from nodecache.disk.reader import Run, runs
from nodecache.disk.segment import Segment
from tests.nodecache.disk.blocks import GEOMETRY

ONE, OTHER = (Segment(Path("none"), number, GEOMETRY, -1) for number in (1, 2))


def test_blocks_that_lie_together_are_one_run_in_any_order():
    places = [Place(ONE, 2), None, Place(OTHER, 0), Place(ONE, 0), Place(ONE, 1), Place(OTHER, 3)]
    assert list(runs(places, 10)) == [Run(ONE, 0, [3, 4, 0]), Run(OTHER, 0, [2]), Run(OTHER, 3, [5])]


def test_a_run_is_no_longer_than_asked():
    places = [Place(ONE, row) for row in range(4)]
    assert [run.positions for run in runs(places, 3)] == [[0, 1, 2], [3]]
    assert [run.positions for run in runs(places, 1)] == [[0], [1], [2], [3]]


def test_a_block_asked_for_twice_is_read_twice():
    assert [run.positions for run in runs([Place(ONE, 0), Place(ONE, 0)], 9)] == [[0], [1]]


def test_nothing_is_no_run():
    assert list(runs([None, None], 3)) == []
