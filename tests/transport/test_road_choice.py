import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transport.road_choice import RoadChoice

ALL = [("shm", True, True), ("ucx", True, False), ("socket", True, False), ("plasma", False, True)]


def proven(choice: RoadChoice, **rates: float) -> None:
    for road, rate in rates.items():
        choice.on_pulled(road, 1 << 20, (1 << 20) / rate)


def test_at_first_the_direct_roads_are_probed_and_none_is_taken():
    choice = RoadChoice(ALL)
    assert choice.due_probes(0.0) == ["shm", "ucx", "socket"]
    assert choice.proven() == []


def test_the_faster_road_is_taken_whatever_the_order_given():
    choice = RoadChoice(ALL)
    proven(choice, shm=1e9, ucx=5e8, socket=2.1e9)
    assert choice.proven() == ["socket", "shm", "ucx"]


def test_a_one_sided_road_is_taken_unless_another_is_twice_as_fast():
    choice = RoadChoice(ALL)
    proven(choice, shm=1e9, socket=1.9e9)
    assert choice.proven() == ["shm", "socket"]


def test_a_road_through_others_is_probed_only_when_no_direct_one_works():
    choice = RoadChoice(ALL)
    for road in ("shm", "ucx"):
        choice.on_failed(road, 0.0)
    assert choice.due_probes(0.5) == ["socket"]
    choice.on_failed("socket", 0.5)
    assert choice.due_probes(0.6) == ["plasma"]


def test_a_direct_road_goes_before_a_faster_one_through_others():
    choice = RoadChoice(ALL)
    proven(choice, plasma=9e9, socket=1e9)
    assert choice.proven() == ["socket", "plasma"]


def test_a_failed_road_is_not_taken_until_a_probe_went_well():
    choice = RoadChoice(ALL)
    proven(choice, shm=2e9, socket=1e9, ucx=5e8)
    choice.on_failed("shm", 10.0)
    assert choice.proven() == ["socket", "ucx"]
    assert choice.due_probes(10.5) == []
    assert choice.next_probe_s() == 11.0
    assert choice.due_probes(11.0) == ["shm"]
    proven(choice, shm=2e9)
    assert choice.proven()[0] == "shm"


def test_pauses_double_up_to_a_minute_and_begin_anew_after_a_success():
    choice = RoadChoice([("ucx", True, False)])
    pauses = []
    now_s = 0.0
    for _ in range(9):
        choice.on_failed("ucx", now_s)
        at_s = choice.next_probe_s()
        assert at_s is not None
        pauses.append(at_s - now_s)
        now_s = at_s
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    proven(choice, ucx=1e9)
    assert choice.next_probe_s() is None
    choice.on_failed("ucx", now_s)
    assert choice.next_probe_s() == now_s + 1


def test_small_pulls_do_not_spoil_the_rate():
    choice = RoadChoice([("shm", True, True)])
    proven(choice, shm=1e9)
    choice.on_pulled("shm", 8, 1.0)
    assert choice.states["shm"].bytes_per_s == pytest.approx(1e9)
    choice.on_pulled("shm", 1 << 20, (1 << 20) / 2e9)
    assert 1e9 < choice.states["shm"].bytes_per_s < 2e9


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([road for road, _, _ in ALL]), st.booleans(), st.floats(0, 100)), max_size=40)
)
def test_whatever_happens_a_road_is_proven_or_will_be_probed(events):
    choice = RoadChoice(ALL)
    now_s = 0.0
    for road, is_well, pause_s in events:
        now_s += pause_s
        if is_well:
            choice.on_pulled(road, 1 << 20, 0.001)
        else:
            choice.on_failed(road, now_s)
        assert choice.proven() or choice.next_probe_s() is not None
        assert not set(choice.proven()) & set(choice.due_probes(now_s + 1000))
        at_s = choice.next_probe_s()
        if at_s is not None:
            assert choice.due_probes(max(at_s, now_s) + 61)
