"""A client's requests from asked to ended: what is sent where, what is delivered, what has to be told."""

from __future__ import annotations

import msgspec
import pytest

from cluster.request_events import (
    ChunksArrived,
    Deliver,
    End,
    RequestAdded,
    RequestLeft,
    RouterFound,
    RouterLost,
    SendToRouter,
    SendToWorker,
    SequenceCancelled,
    Warn,
    WorkerLost,
)
from cluster.request_table import MAX_PLACEMENTS
from kvcache.names import pack_tokens, unpack_tokens
from messages.errors import CapacityError, InvariantError, RequestError, WorkerError
from messages.request import CancelRequest, Choice
from messages.route import RequestEnded, RouteFailed
from messages.stream import TokenLogprob
from tests.cluster.request_bench import PROMPT, SOURCES, Ingress, ask, chunk, failed, placed


@pytest.fixture
def ingress() -> Ingress:
    return Ingress("d1", "d2", "d3")


# ------------------------------------------------------------------------------------------------------ the plain way


def test_a_request_goes_to_the_router_then_to_the_worker_it_names_and_its_chunks_to_the_client(ingress):
    ingress.tell(RequestAdded((ask(),)))
    (route,) = ingress.asked()
    assert (route.request_id, route.num_prompt_tokens, route.max_tokens, route.exclude) == ("r", 40, 10, ())
    assert len(route.names) == 2 * 16
    ingress.now_s += 0.5
    ingress.tell(placed("r", "d2", prefill_worker="p1", prefill_address="tcp://p1:1"))
    ((worker_id, message),) = ingress.sent()
    assert (worker_id, message.request_id, message.token_ids) == ("d2", "r", pack_tokens(PROMPT))
    assert (message.prefill_worker, message.prefill_address) == ("p1", "tcp://p1:1")
    assert message.deadline_s == pytest.approx(599.5)
    chunks = [chunk("r", 1, sources=SOURCES), chunk("r", 2), chunk("r", 3, finish_reason="length")]
    chunks = [msgspec.structs.replace(one, position=index) for index, one in enumerate(chunks)]
    assert ingress.tell(ChunksArrived("d2", chunks[:2])) == [Deliver("r", chunks[0]), Deliver("r", chunks[1])]
    assert ingress.tell(ChunksArrived("d2", chunks[2:])) == [
        Deliver("r", chunks[2]),
        SendToRouter(RequestEnded(request_id="r")),
        End("r"),
    ]
    assert len(ingress.table) == 0


def test_that_it_was_accepted_is_delivered_once_however_often_it_moves_and_moves_nothing(ingress):
    ingress.tell(RequestAdded((ask(),)))
    ingress.tell(placed("r", "d1"))
    accepted = chunk("r", is_accepted=True)
    assert ingress.tell(ChunksArrived("d1", [accepted])) == [Deliver("r", accepted)]
    ingress.tell(WorkerLost("d1", "gone"))
    ingress.tell(placed("r#2", "d2"))
    assert ingress.tell(ChunksArrived("d2", [chunk("r#2", is_accepted=True)])) == []
    first = chunk("r#2", 1, sources=SOURCES)
    assert ingress.tell(ChunksArrived("d2", [first])) == [Deliver("r", msgspec.structs.replace(first, request_id="r"))]


def test_one_that_no_worker_accepted_before_it_was_lost_is_accepted_by_the_next(ingress):
    ingress.tell(RequestAdded((ask(),)))
    ingress.tell(placed("r", "d1"))
    ingress.tell(WorkerLost("d1", "gone"))
    ingress.tell(placed("r#2", "d2"))
    assert ingress.tell(ChunksArrived("d2", [chunk("r#2", is_accepted=True)])) == [
        Deliver("r", chunk("r", is_accepted=True))
    ]


def test_a_request_of_several_prompts_is_accepted_once_all_of_them_are(ingress):
    other = msgspec.structs.replace(ask("s"), token_ids=pack_tokens([1, 2]), num_prompt_tokens=2)
    ingress.tell(RequestAdded((ask("r"), other)))
    ingress.tell(placed("r", "d1"))
    assert ingress.tell(ChunksArrived("d1", [chunk("r", is_accepted=True)])) == []
    ingress.tell(WorkerLost("d1", "gone"))
    ingress.tell(placed("r#2", "d2"))
    assert ingress.tell(ChunksArrived("d2", [chunk("r#2", is_accepted=True)])) == []
    assert ingress.tell(ChunksArrived("d2", [chunk("s#2", is_accepted=True)])) == [
        Deliver("r", chunk("s", is_accepted=True))
    ]


def test_the_router_is_told_of_every_prompt_of_a_request_and_of_each_once():
    ingress = Ingress("d")
    more = [msgspec.structs.replace(ask(f"r{n}"), token_ids=pack_tokens(range(n)), num_prompt_tokens=n) for n in (7, 9)]
    ingress.tell(RequestAdded((ask("a"), ask("b"), *more)))
    [route] = ingress.asked()
    assert (route.num_prompt_tokens, route.other_prompts, route.num_sequences) == (len(PROMPT), (7, 9), 4)


def test_all_choices_go_together_and_the_request_ends_with_the_last_of_them(ingress):
    ingress.tell(RequestAdded((ask("r"), ask("s", choice=1))))
    assert ingress.asked()[0].num_sequences == 2
    ingress.tell(placed("r", "d1"))
    assert [message.params.choice for _, message in ingress.sent()] == [0, 1]
    ingress.tell(ChunksArrived("d1", [chunk("r", 1, finish_reason="stop"), chunk("s", 2)]))
    assert not ingress.has_ended()
    ingress.tell(ChunksArrived("d1", [chunk("s", 3, finish_reason="stop")]))
    assert ingress.has_ended()


def test_without_a_router_prompts_are_placed_at_once_and_nobody_is_told():
    ingress = Ingress("d1", "d2", has_router=False)
    ingress.tell(RequestAdded((ask(),)))
    assert ingress.asked() == []
    ((worker_id, _),) = ingress.sent()
    ingress.tell(ChunksArrived(worker_id, [chunk("r", 1, finish_reason="stop")]))
    assert (ingress.told_ended(), ingress.has_ended()) == ([], True)


def test_without_a_router_workers_share_what_comes():
    ingress = Ingress("d1", "d2", has_router=False)
    for number in range(8):
        ingress.tell(RequestAdded((ask(f"r{number}"),)))
    counts = ingress.table._num_sequences
    assert counts.total() == 8
    assert max(counts.values()) <= 5  # a share and a quarter


def test_without_a_router_who_would_wait_too_long_for_those_before_is_refused_and_a_first_token_makes_room():
    ingress = Ingress("d1", has_router=False, max_ttft_s=0.19)  # 40 tokens at an assumed millisecond each
    for request_id in ("a", "b", "c", "d", "x"):
        ingress.tell(RequestAdded((ask(request_id),)))
    [refused, ended] = ingress.said
    assert (refused.chunk.error.status, refused.chunk.error.retry_after_s, ended) == (429, 1.0, End("x"))
    ingress.tell(ChunksArrived("d1", [chunk("a", 7)]))
    ingress.tell(RequestAdded((ask("e"),)))
    assert [worker_id for worker_id, _ in ingress.sent()] == ["d1"]
    ingress.tell(RequestLeft("b"))
    ingress.tell(RequestAdded((ask("f"),)))
    assert [worker_id for worker_id, _ in ingress.sent()] == ["d1"]


def test_without_a_router_a_request_that_moves_is_not_refused_for_its_wait():
    ingress = Ingress("d1", "d2", has_router=False, max_ttft_s=0.05)
    for request_id in ("a", "b"):
        ingress.tell(RequestAdded((ask(request_id),)))
        [(worker_id, _)] = ingress.sent()
    ingress.tell(WorkerLost(worker_id, "gone"))
    [(other_id, message)] = ingress.sent()
    assert other_id != worker_id
    assert message.request_id == "b#2"


def test_an_id_that_is_in_use_is_a_bug(ingress):
    ingress.run("d1")
    with pytest.raises(InvariantError, match="in use"):
        ingress.tell(RequestAdded((ask(),)))
    ingress.table.check_invariants()


# ----------------------------------------------------------------------------------------------- one ends its worker


def test_all_that_ran_on_a_crashed_worker_are_suspects_until_they_gave_some_tokens(ingress):
    ingress.run("d1")
    ingress.tell(ChunksArrived("d1", [chunk("r", 1, 2)]))
    ingress.tell(WorkerLost("d1", "disconnected"))
    ingress.tell(placed("r#2", "d2", prefill_worker="p1", prefill_address="tcp://p1:1"))
    ((_, message),) = ingress.sent()
    assert message.is_suspect
    ingress.tell(ChunksArrived("d2", [chunk("r#2", 3, 4, 5, 6)]))
    ingress.tell(WorkerLost("d2", "disconnected"))
    assert len(ingress.table._suspects) == 1  # once more, by another loss
    ingress.tell(placed("r#3", "d3"))
    ingress.tell(ChunksArrived("d3", [chunk("r#3", 7, finish_reason="length")]))
    assert ingress.has_ended()


def test_what_was_a_suspect_is_none_with_another_salt(ingress):
    ingress.run("d1")
    ingress.tell(WorkerLost("d1", "disconnected"))
    ingress.tell(placed("r#2", "d2"))
    ((_, message),) = ingress.sent()
    assert message.is_suspect
    for request_id, salt, is_suspect in (("s", b"another tenant's", False), ("t", b"", True)):
        ingress.tell(RequestAdded((msgspec.structs.replace(ask(request_id), salt=salt),)))
        ingress.tell(placed(request_id, "d3"))
        ((_, message),) = ingress.sent()
        assert (message.salt, message.is_suspect) == (salt, is_suspect)


def test_who_was_alone_in_the_step_of_the_second_crash_ends_and_the_others_move(ingress):
    ingress.run("d1", ask("bad"))
    ingress.run("d1", ask("good", seed=1))
    ingress.tell(WorkerLost("d1", "disconnected"))
    ingress.tell(placed("bad#2", "d2"))
    ingress.tell(placed("good#2", "d2"))
    assert ingress.tell(ChunksArrived("d2", [chunk("good#2", is_alone=True)])) == []
    ingress.tell(ChunksArrived("d2", [chunk("good#2"), chunk("good#2", 5), chunk("bad#2", is_alone=True)]))
    ingress.tell(WorkerLost("d2", "disconnected"))
    (last,) = ingress.delivered()
    assert (last.request_id, last.error.code, last.error.status) == ("bad", "worker_lost", 500)
    ingress.tell(placed("good#3", "d3"))
    ((worker_id, message),) = ingress.sent()
    assert (worker_id, message.token_ids) == ("d3", pack_tokens([*PROMPT, 5]))


def test_a_suspect_that_is_sent_again_within_ten_minutes_is_one_at_once(ingress):
    ingress.run("d1", ask("bad", seed=1))
    ingress.tell(WorkerLost("d1", "disconnected"))
    ingress.tell(placed("bad#2", "d2"))
    ingress.tell(ChunksArrived("d2", [chunk("bad#2", is_alone=True)]))
    ingress.tell(WorkerLost("d2", "disconnected"))
    for seed, waited_s, is_suspect in ((2, 0, True), (3, 590, True), (4, 20, False)):
        ingress.now_s += waited_s
        ingress.run("d3", ask(f"again{seed}", seed=seed))
        assert [message.is_suspect for _, message in ingress.sent()] == [is_suspect]
        ingress.tell(RequestLeft(f"again{seed}"))
    ingress.run("d3", ask("other", max_tokens=11))
    assert [message.is_suspect for _, message in ingress.sent()] == [False]


def test_a_suspect_that_went_well_is_none_when_it_is_sent_again(ingress):
    ingress.run("d1")
    ingress.tell(WorkerLost("d1", "disconnected"))
    ingress.tell(placed("r#2", "d2"))
    ingress.tell(ChunksArrived("d2", [chunk("r#2", 1, 2, 3, 4, finish_reason="length")]))
    ingress.run("d2", ask("again"))
    assert [message.is_suspect for _, message in ingress.sent()] == [False]


# --------------------------------------------------------------------------------------------------- the router fails


def test_a_router_that_does_not_answer_is_told_the_end_and_not_listened_to_any_more(ingress):
    ingress.tell(RequestAdded((ask(),)))
    assert ingress.wait(0.9) == []
    ingress.wait(0.1)
    ((worker_id, _),) = ingress.sent()
    assert ingress.told_ended() == ["r"]
    assert ingress.tell(placed("r", "d1" if worker_id != "d1" else "d2")) == []


def test_an_answer_to_an_earlier_question_is_not_taken_for_one_to_the_next(ingress):
    ingress.tell(RequestAdded((ask(),)))
    ingress.wait(1.0)
    ((worker_id, _),) = ingress.sent()
    ingress.tell(WorkerLost(worker_id, "disconnected"))
    (route,) = ingress.asked()
    assert ingress.tell(placed("r", worker_id)) == []
    ingress.tell(placed(route.request_id, "d1" if worker_id != "d1" else "d2"))
    assert len(ingress.sent()) == 1


def test_a_router_that_is_lost_is_not_waited_for_and_told_nothing(ingress):
    ingress.run("d1", ask("running"))
    ingress.tell(RequestAdded((ask(),)))
    ingress.tell(RouterLost())
    assert len(ingress.sent()) == 1
    ingress.tell(ChunksArrived("d1", [chunk("running", 1, finish_reason="stop")]))
    assert (ingress.has_ended(), ingress.told_ended()) == (True, [])
    ingress.tell(RouterFound())
    ingress.tell(RequestAdded((ask("next"),)))
    assert len(ingress.asked()) == 1


def test_a_placement_on_a_worker_that_is_gone_is_not_followed(ingress):
    ingress.tell(RequestAdded((ask(),)))
    ingress.tell(placed("r", "gone"))
    ((worker_id, _),) = ingress.sent()
    assert worker_id in ("d1", "d2", "d3")
    assert ingress.told_ended() == ["r"]


@pytest.mark.parametrize(
    "error", [CapacityError("no worker that I know", status=503), WorkerError("all of them failed it")]
)
def test_a_router_that_knows_no_worker_is_passed_over(ingress, error):
    ingress.tell(RequestAdded((ask(),)))
    ingress.tell(RouteFailed(request_id="r", error=error.info()))
    assert len(ingress.sent()) == 1
    assert ingress.told_ended() == []


@pytest.mark.parametrize("error", [CapacityError("full", retry_after_s=3.0), RequestError("too long")])
def test_a_refusal_is_delivered_to_every_choice(ingress, error):
    ingress.tell(RequestAdded((ask("r"), ask("s"))))
    ingress.tell(RouteFailed(request_id="r", error=error.info()))
    assert [(one.request_id, one.error) for one in ingress.delivered()] == [("r", error.info()), ("s", error.info())]
    assert ingress.said[-1] == End("r")
    assert len(ingress.table) == 0


def test_answers_to_nobody_are_ignored(ingress):
    assert ingress.tell(placed("stranger", "d1")) == []
    assert ingress.tell(RouteFailed(request_id="stranger", error=CapacityError("full").info())) == []
    ingress.run("d1")
    assert ingress.tell(placed("r", "d2")) == []
    assert ingress.tell(RouteFailed(request_id="r", error=CapacityError("full").info())) == []


# ------------------------------------------------------------------------------------------------------- nobody there


def test_a_request_waits_a_moment_for_the_first_worker():
    ingress = Ingress()
    assert ingress.tell(RequestAdded((ask(),))) == []
    ingress.set_fleet("p1")
    assert ingress.said == []
    ingress.set_fleet("p1", "d1")
    assert len(ingress.asked()) == 1


def test_where_no_worker_comes_it_is_refused_with_a_time_to_come_back():
    ingress = Ingress("p1")
    ingress.tell(RequestAdded((ask(),)))
    assert ingress.wait(2.9) == []
    ingress.wait(0.1)
    assert ingress.error() == ("CapacityError", "no_worker", 503)


# ------------------------------------------------------------------------------------------------- a worker is lost


def test_a_request_whose_worker_is_lost_goes_on_elsewhere_after_the_tokens_that_were_delivered(ingress):
    ingress.run("d1")
    first = chunk("r", 1, sources=SOURCES, prompt_logprobs=[None])
    ingress.tell(ChunksArrived("d1", [first, chunk("r", 2)]))
    ingress.now_s += 10
    ingress.tell(WorkerLost("d1", "silent"))
    assert any(isinstance(one, Warn) for one in ingress.said)
    assert ingress.told_ended() == ["r"]
    (route,) = ingress.asked()
    assert (route.exclude, route.num_prompt_tokens, route.max_tokens) == (("d1",), 42, 8)
    ingress.tell(placed(route.request_id, "d2"))
    ((worker_id, message),) = ingress.sent()
    assert (worker_id, message.num_prompt_tokens, unpack_tokens(message.token_ids)) == ("d2", 40, [*PROMPT, 1, 2])
    assert message.deadline_s == pytest.approx(590.0)
    logprob = TokenLogprob(3, -1.0, 1)
    again = chunk(message.request_id, 3, sources=SOURCES, logprobs=[logprob], finish_reason="stop", stop_token_id=3)
    ingress.tell(ChunksArrived("d2", [again]))
    assert ingress.delivered() == [chunk("r", 3, position=2, logprobs=[logprob], finish_reason="stop", stop_token_id=3)]
    assert ingress.told_ended() == [route.request_id]
    assert ingress.has_ended()


def test_what_is_told_of_the_prompt_comes_from_the_worker_that_gave_the_first_token(ingress):
    ingress.run("d1")
    ingress.tell(WorkerLost("d1", "silent"))
    (route,) = ingress.asked()
    ingress.tell(placed(route.request_id, "d2"))
    ((_, message),) = ingress.sent()
    assert message.token_ids == pack_tokens(PROMPT)
    ingress.tell(ChunksArrived("d2", [chunk(message.request_id, 1, sources=SOURCES, prompt_logprobs=[None])]))
    assert ingress.delivered() == [chunk("r", 1, sources=SOURCES, prompt_logprobs=[None])]


def test_choices_that_have_ended_stay_ended_when_the_others_move(ingress):
    ingress.run("d1", ask("r"), ask("s", choice=1), ask("t", choice=2))
    ingress.tell(ChunksArrived("d1", [chunk("r", 1, finish_reason="stop"), chunk("s", 2), chunk("t", 3)]))
    ingress.tell(WorkerLost("d1", "silent"))
    (route,) = ingress.asked()
    assert route.num_sequences == 2
    ingress.tell(placed(route.request_id, "d2"))
    assert [(m.params.choice, unpack_tokens(m.token_ids)[len(PROMPT) :]) for _, m in ingress.sent()] == [
        (1, [2]),
        (2, [3]),
    ]
    assert ingress.sent()[0][1].request_id == route.request_id


def test_what_comes_late_from_a_worker_that_was_left_is_dropped(ingress):
    ingress.run("d1")
    ingress.tell(ChunksArrived("d1", [failed("r", WorkerError("bad numbers"))]))
    (route,) = ingress.asked()
    assert ingress.tell(ChunksArrived("d1", [chunk("r", 1), chunk(route.request_id, 1)])) == []
    ingress.tell(placed(route.request_id, "d2"))
    assert ingress.tell(ChunksArrived("d1", [chunk("r", 1), chunk(route.request_id, 1)])) == []
    assert ingress.tell(WorkerLost("d1", "silent")) == []


def test_a_token_that_comes_again_is_not_delivered_again(ingress):
    ingress.tell(RequestAdded((ask(),)))
    ingress.tell(placed("r", "d1"))
    ingress.tell(ChunksArrived("d1", [chunk("r", 5, 6, 7)]))
    ingress.tell(ChunksArrived("d1", [chunk("r", 6, position=1)]))
    assert [type(one) for one in ingress.said] == [Warn]
    ingress.tell(ChunksArrived("d1", [chunk("r", 8, position=3, finish_reason="length")]))
    assert ingress.said[0] == Deliver("r", chunk("r", 8, position=3, finish_reason="length"))


def test_where_tokens_are_missing_another_worker_goes_on_after_those_that_came(ingress):
    ingress.tell(RequestAdded((ask(),)))
    ingress.tell(placed("r", "d1"))
    ingress.tell(ChunksArrived("d1", [chunk("r", 5)]))
    ingress.tell(ChunksArrived("d1", [chunk("r", 7, position=2)]))
    assert ingress.cancelled() == [("d1", "r")]
    (route,) = ingress.asked()
    assert (route.request_id, route.exclude) == ("r#2", ("d1",))
    ingress.tell(placed("r#2", "d2"))
    ((_, message),) = ingress.sent()
    assert unpack_tokens(message.token_ids)[40:] == [5]


def test_when_a_worker_fails_one_choice_its_siblings_move_with_it(ingress):
    ingress.run("d1", ask("r"), ask("s"))
    ingress.tell(ChunksArrived("d1", [chunk("s", 1), failed("r", WorkerError("bad numbers")), chunk("s", 2)]))
    assert ingress.cancelled() == [("d1", "s")]
    assert ingress.delivered() == [chunk("s", 1)]
    assert ingress.asked()[0].exclude == ("d1",)


@pytest.mark.parametrize(
    "error", [RequestError("grammar"), WorkerError("deadline", status=504), CapacityError("pool", status=400)]
)
def test_what_no_other_worker_could_mend_is_delivered(ingress, error):
    ingress.run("d1")
    ingress.tell(ChunksArrived("d1", [failed("r", error)]))
    assert ingress.error() == (type(error).__name__, None, error.status)
    assert ingress.cancelled() == []


def test_a_prompt_that_kills_workers_is_given_to_no_more_than_three(ingress):
    assert MAX_PLACEMENTS == 3
    ingress.set_fleet("d1", "d2", "d3", "d4")
    ingress.run("d1")
    for worker_id in ("d1", "d2"):
        ingress.tell(WorkerLost(worker_id, "disconnected"))
        (route,) = ingress.asked()
        ingress.tell(placed(route.request_id, f"d{int(worker_id[1]) + 1}"))
    ingress.tell(WorkerLost("d3", "disconnected"))
    assert ingress.error() == ("WorkerError", "worker_lost", 503)
    assert "d3" in ingress.delivered()[0].error.message


def test_a_request_in_its_midst_is_not_turned_away_by_a_full_fleet(ingress):
    ingress.run("d1")
    ingress.tell(WorkerLost("d1", "disconnected"))
    (route,) = ingress.asked()
    ingress.tell(RouteFailed(request_id=route.request_id, error=CapacityError("full").info()))
    ((worker_id, _),) = ingress.sent()
    assert worker_id in ("d2", "d3")


def test_the_only_workers_successor_is_waited_for_while_it_loads():
    ingress = Ingress("d1")
    ingress.run("d1")
    ingress.tell(WorkerLost("d1", "disconnected"))
    assert (ingress.asked(), ingress.delivered()) == ([], [])
    ingress.wait(40)
    ingress.set_fleet()
    ingress.set_fleet("d2")
    (route,) = ingress.asked()
    assert route.exclude == ("d1",)


def test_a_successor_that_does_not_come_is_an_error_that_names_who_was_lost():
    ingress = Ingress("d1")
    ingress.run("d1")
    ingress.tell(WorkerLost("d1", "disconnected"))
    assert ingress.wait(59) == []
    ingress.wait(1)
    assert ingress.error() == ("WorkerError", "worker_lost", 503)


def test_nobody_is_waited_for_where_every_worker_failed_the_request():
    ingress = Ingress("d1")
    ingress.run("d1")
    ingress.tell(ChunksArrived("d1", [failed("r", WorkerError("bad numbers", code="non_finite_logits"))]))
    assert ingress.error() == ("WorkerError", "non_finite_logits", 503)


def test_loss_of_a_worker_is_no_matter_of_those_who_run_elsewhere(ingress):
    ingress.run("d2")
    assert ingress.tell(WorkerLost("d1", "disconnected")) == []


# --------------------------------------------------------------------------------------------- the client, the clock


def test_a_client_that_leaves_while_its_placement_is_on_its_way_leaves_nothing_with_the_router(ingress):
    ingress.tell(RequestAdded((ask(),)))
    ingress.tell(RequestLeft("r"))
    assert (ingress.told_ended(), ingress.has_ended()) == (["r"], True)
    assert ingress.tell(placed("r", "d1")) == []
    assert len(ingress.table) == 0


def test_a_client_that_leaves_stops_what_runs(ingress):
    ingress.run("d1", ask("r"), ask("s"))
    ingress.tell(ChunksArrived("d1", [chunk("r", 1, finish_reason="stop")]))
    ingress.tell(RequestLeft("r"))
    assert ingress.cancelled() == [("d1", "s")]
    assert (ingress.told_ended(), ingress.has_ended()) == (["r"], True)
    assert ingress.tell(RequestLeft("r")) == []


def test_a_choice_that_is_cancelled_ends_without_a_chunk_and_the_last_one_ends_the_request(ingress):
    ingress.run("d1", ask("r"), ask("s"))
    assert ingress.tell(SequenceCancelled("r")) == [
        SendToWorker("d1", "tcp://d1:1", CancelRequest(request_id="r")),
    ]
    assert ingress.tell(SequenceCancelled("r")) == []
    assert ingress.tell(ChunksArrived("d1", [chunk("r", 1)])) == []
    ingress.tell(SequenceCancelled("s"))
    assert ingress.has_ended()


def test_a_choice_that_is_cancelled_before_it_is_placed_is_not_sent(ingress):
    ingress.tell(RequestAdded((ask("r"), ask("s"))))
    assert ingress.tell(SequenceCancelled("r")) == []
    ingress.tell(placed("r", "d1"))
    assert [message.request_id for _, message in ingress.sent()] == ["s"]
    ingress.tell(RequestLeft("r"))
    assert ingress.told_ended() == ["r"]


def test_a_worker_that_does_not_even_end_a_request_at_its_deadline_is_not_waited_for(ingress):
    ingress.run("d1", msgspec.structs.replace(ask(), deadline_s=20.0))
    assert ingress.wait(25.9) == []
    ingress.wait(0.1)
    assert ingress.cancelled() == [("d1", "r")]
    assert ingress.error() == ("WorkerError", "timeout", 504)


def test_a_deadline_ends_a_request_that_nobody_has():
    ingress = Ingress("d1")
    ingress.run("d1", msgspec.structs.replace(ask(), deadline_s=20.0))
    ingress.tell(WorkerLost("d1", "disconnected"))
    assert ingress.wait(19.9) == []
    ingress.wait(0.1)
    assert ingress.error() == ("WorkerError", "timeout", 504)


def test_the_choices_of_a_prompt_go_to_their_worker_in_one_message(ingress):
    asks = [ask(f"r-{choice}", choice=choice) for choice in range(3)]
    other = msgspec.structs.replace(ask("r-3"), token_ids=pack_tokens(PROMPT[:30]), num_prompt_tokens=30)
    ingress.tell(RequestAdded((*asks, other)))
    ingress.tell(placed("r-0", "d1"))
    first, second = (one.message for one in ingress.said)
    assert (first.request_id, first.others) == ("r-0", (Choice("r-1", 1), Choice("r-2", 2)))
    assert (second.request_id, second.others) == ("r-3", ())
    ingress.tell(ChunksArrived("d1", [chunk("r-0", 5, finish_reason="length"), chunk("r-2", 6, 7)]))
    ingress.tell(WorkerLost("d1", "silent"))
    (route,) = ingress.asked()
    ingress.tell(placed(route.request_id, "d2"))
    first, second = (one.message for one in ingress.said)
    assert (first.request_id, first.others) == ("r-1#2", (Choice("r-2#2", 2, pack_tokens([6, 7])),))
    assert first.token_ids == pack_tokens(PROMPT)
    assert second.request_id == "r-3#2"
