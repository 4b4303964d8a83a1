from engine.scheduling.prompt_origins import PromptOrigins
from messages.request import Copy
from messages.stream import GotRun


def test_what_nobody_noted_was_computed_and_neighbours_are_one_run():
    origins = PromptOrigins()
    origins.note(0, 4, "device")
    origins.note(4, 8, "device")
    origins.note_copy(12, 16, Copy("c", "host"))
    origins.note_copy(16, 20, Copy("c", "host"))
    assert origins.told(22, 4) == (
        GotRun(0, 8, "device"),
        GotRun(8, 12, "computed"),
        GotRun(12, 20, "host", "c"),
        GotRun(20, 22, "computed"),
    )


def test_a_pools_copy_elsewhere_is_a_peers():
    origins = PromptOrigins()
    origins.note_copy(0, 4, Copy("p", "device"))
    assert origins.told(4, 4) == (GotRun(0, 4, "peer", "p"),)


def test_a_token_has_one_origin_the_first_that_was_noted():
    origins = PromptOrigins()
    origins.note(0, 8, "device")
    origins.note(4, 12, "peer", "p")
    assert origins.told(12, 4) == (GotRun(0, 8, "device"), GotRun(8, 12, "peer", "p"))


def test_blocks_that_did_not_come_say_why_where_they_were_computed_and_only_there():
    origins = PromptOrigins()
    origins.note_copy(0, 4, Copy("b", "disk"))
    origins.miss((0, 1, 2), "evicted", "a")
    origins.miss((2,), "damaged", "z")
    origins.miss((3,), "damaged", "z")
    assert origins.told(20, 4) == (
        GotRun(0, 4, "disk", "b"),
        GotRun(4, 12, "computed", "a", "evicted"),
        GotRun(12, 16, "computed", "z", "damaged"),
        GotRun(16, 20, "computed"),
    )


def test_filling_leaves_what_was_noted():
    origins = PromptOrigins()
    origins.note(4, 8, "device")
    origins.fill(0, 10, "peer", "p")
    origins.fill(0, 14, "computed", "p")
    assert origins.told(16, 4) == (
        GotRun(0, 4, "peer", "p"),
        GotRun(4, 8, "device"),
        GotRun(8, 10, "peer", "p"),
        GotRun(10, 14, "computed", "p"),
        GotRun(14, 16, "computed"),
    )


def test_begun_anew_nothing_is_known():
    origins = PromptOrigins()
    origins.note(0, 4, "device")
    origins.miss((1,), "damaged", "a")
    origins.clear()
    assert origins.told(8, 4) == (GotRun(0, 8, "computed"),)
