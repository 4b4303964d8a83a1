"""A client's requests from asked to ended: what is sent where, what is delivered, what has to be told."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.request_events import (
    ChunksArrived,
    Deliver,
    End,
    FleetChanged,
    RequestAdded,
    RequestLeft,
    RouterFound,
    RouterLost,
    SendToRouter,
    SendToWorker,
    SequenceCancelled,
    TimePassed,
    Warn,
    WorkerLost,
)
from cluster.request_table import MAX_PLACEMENTS, RequestLimits, RequestTable
from kvcache.names import pack_tokens, unpack_tokens
from kvrouter.router import Reply, Router, WorkerJoined
from messages.errors import CapacityError, InvariantError, RequestError, WorkerError
from messages.fleet import KvEvents, LoadReport, WorkerInfo
from messages.price import ComputePrice
from messages.request import CancelRequest, GenerateRequest, SamplingParams
from messages.route import Placement, RequestEnded, RouteFailed, RouteRequest
from messages.stream import PromptSources, TokenChunk, TokenLogprob

PROMPT = list(range(5, 45))
SOURCES = PromptSources(computed=len(PROMPT))


def info(worker_id: str, role: str = "decode") -> WorkerInfo:
    return WorkerInfo(
        worker_id=worker_id,
        role=role,
        address=f"tcp://{worker_id}:1",
        node_id="n",
        fingerprint=b"f",
        block_size=16,
        num_blocks=1000,
        block_bytes=1000,
        max_model_len=1000,
        max_num_seqs=100,
        roads=("shm",),
    )


def ask(request_id: str = "r", **params: object) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id,
        token_ids=pack_tokens(PROMPT),
        num_prompt_tokens=len(PROMPT),
        params=SamplingParams(**{"max_tokens": 10, **params}),
    )


def chunk(request_id: str = "r", *token_ids: int, **fields: object) -> TokenChunk:
    return TokenChunk(request_id=request_id, token_ids=list(token_ids), **fields)


def failed(request_id: str, error: Exception) -> TokenChunk:
    return TokenChunk(request_id=request_id, finish_reason="error", error=error.info())


def placed(request_id: str, worker_id: str, **fields: object) -> Placement:
    return Placement(request_id=request_id, decode_worker=worker_id, decode_address=f"tcp://{worker_id}:1", **fields)


class Ingress:
    """A table that is checked after every event, and what it said last."""

    def __init__(self, *worker_ids: str, has_router: bool = True) -> None:
        self.table = RequestTable(RequestLimits(request_timeout_s=600.0, lost_after_s=3.0))
        self.now_s = 100.0
        self.said: list[object] = []
        self.set_fleet(*worker_ids)
        if has_router:
            self.tell(RouterFound())

    def set_fleet(self, *worker_ids: str) -> None:
        infos = [info(worker_id, "prefill" if worker_id.startswith("p") else "decode") for worker_id in worker_ids]
        self.tell(FleetChanged({one.worker_id: one for one in infos}))

    def tell(self, event: object) -> list[object]:
        self.said = self.table.on_event(event, self.now_s)
        self.table.check_invariants()
        return self.said

    def wait(self, seconds: float) -> list[object]:
        self.now_s += seconds
        return self.tell(TimePassed())

    def sent(self) -> list[tuple[str, GenerateRequest]]:
        """What workers were given to generate by the last event."""
        return [
            (one.worker_id, one.message)
            for one in self.said
            if isinstance(one, SendToWorker) and isinstance(one.message, GenerateRequest)
        ]

    def cancelled(self) -> list[tuple[str, str]]:
        return [
            (one.worker_id, one.message.request_id)
            for one in self.said
            if isinstance(one, SendToWorker) and isinstance(one.message, CancelRequest)
        ]

    def asked(self) -> list[RouteRequest]:
        return [o.message for o in self.said if isinstance(o, SendToRouter) and isinstance(o.message, RouteRequest)]

    def told_ended(self) -> list[str]:
        return [
            one.message.request_id
            for one in self.said
            if isinstance(one, SendToRouter) and isinstance(one.message, RequestEnded)
        ]

    def delivered(self) -> list[TokenChunk]:
        return [one.chunk for one in self.said if isinstance(one, Deliver)]

    def has_ended(self) -> bool:
        return any(isinstance(one, End) for one in self.said)

    def error(self) -> tuple[str, str | None, int]:
        """What the only chunk delivered says went wrong, and that nothing follows."""
        (last,) = self.delivered()
        assert last.finish_reason == "error"
        assert self.has_ended()
        assert len(self.table) == 0
        return last.error.kind, last.error.code, last.error.status

    def run(self, worker_id: str, *asks: GenerateRequest) -> None:
        """These run on that worker."""
        self.tell(RequestAdded(asks or (ask(),)))
        (route,) = self.asked()
        self.tell(placed(route.request_id, worker_id))


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
    assert ingress.tell(ChunksArrived("d2", chunks[:2])) == [Deliver("r", chunks[0]), Deliver("r", chunks[1])]
    assert ingress.tell(ChunksArrived("d2", chunks[2:])) == [
        Deliver("r", chunks[2]),
        SendToRouter(RequestEnded(request_id="r")),
        End("r"),
    ]
    assert len(ingress.table) == 0


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
    assert ingress.delivered() == [chunk("r", 3, logprobs=[logprob], finish_reason="stop", stop_token_id=3)]
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


# --------------------------------------------------------------------------------------------------- any order of all


def expected(request: GenerateRequest, position: int) -> int:
    """The token that any worker gives at this place of the output."""
    return (7 * request.params.choice + 3 * position + len(request.request_id.partition("#")[0])) % 97


@dataclass
class FakeWorker:
    """Generates what `expected` says, from the tokens it is given; what it says is on its way until it is read."""

    running: dict[str, GenerateRequest] = field(default_factory=dict)
    outputs: dict[str, list[int]] = field(default_factory=dict)
    on_its_way: deque[TokenChunk] = field(default_factory=deque)

    def take(self, message: GenerateRequest | CancelRequest) -> None:
        if isinstance(message, CancelRequest):
            self.running.pop(message.request_id, None)
            return
        assert message.request_id not in self.running
        assert message.deadline_s >= 0
        self.running[message.request_id] = message
        self.outputs[message.request_id] = unpack_tokens(message.token_ids)[message.num_prompt_tokens :]

    def step(self, request_id: str, error: Exception | None) -> None:
        request, output = self.running[request_id], self.outputs[request_id]
        if error is not None:
            del self.running[request_id]
            self.on_its_way.append(failed(request_id, error))
            return
        is_first = len(output) == len(unpack_tokens(request.token_ids)) - request.num_prompt_tokens
        output.append(expected(request, len(output)))
        is_last = len(output) >= request.params.max_tokens
        if is_last:
            del self.running[request_id]
        self.on_its_way.append(
            chunk(
                request_id,
                output[-1],
                sources=SOURCES if is_first else None,
                finish_reason="length" if is_last else None,
            )
        )


class RequestTableMachine(RuleBasedStateMachine):
    """Any order of events, with the real router's bookkeeping at the other end.

    Every request ends once, its tokens come in order, none twice, none left out; the router and the workers are left
    with nothing, and the table too.
    """

    pick = st.integers(0, 5)

    def __init__(self):
        super().__init__()
        self.table = RequestTable(RequestLimits(request_timeout_s=50.0, lost_after_s=3.0))
        self.now_s = 0.0
        self.workers: dict[str, FakeWorker] = {}  #: that can be reached
        self.router: Router | None = None
        self.to_router: deque[RouteRequest | RequestEnded] = deque()
        self.from_router: deque[Placement | RouteFailed] = deque()
        self.asked: dict[str, list[GenerateRequest]] = {}
        self.output: dict[str, list[int]] = {}
        self.sources: dict[str, int] = {}
        self.reasons: dict[str, str] = {}  #: how a sequence ended
        self.ended: set[str] = set()
        self.left: set[str] = set()
        self.cancelled: set[str] = set()
        self.num_placed: dict[str, set[str]] = {}
        self.num_requests = self.num_workers = 0

    # ------------------------------------------------------------------------------------------------ carrying out

    def tell(self, event):
        for instruction in self.table.on_event(event, self.now_s):
            match instruction:
                case SendToRouter(message):
                    assert self.router is not None
                    self.to_router.append(message)
                case SendToWorker(worker_id, _, message):
                    if isinstance(message, GenerateRequest):
                        self.count_placement(worker_id, message.request_id)
                    if worker_id in self.workers:  # else its loss is still to be told
                        self.workers[worker_id].take(message)
                case Deliver(request_id, one):
                    self.take(request_id, one)
                case End(request_id):
                    assert request_id not in self.ended
                    self.ended.add(request_id)
                    if request_id not in self.left:
                        for one in self.asked[request_id]:
                            assert one.request_id in self.reasons or one.request_id in self.cancelled
                case Warn():
                    pass

    def count_placement(self, worker_id, placed_id):
        tried = self.num_placed.setdefault(placed_id.partition("#")[0], set())
        assert worker_id not in tried, "it was lost with it, or failed it"
        tried.add(worker_id)
        assert len(tried) <= MAX_PLACEMENTS

    def take(self, request_id, one):
        assert request_id not in self.ended | self.left
        assert one.request_id not in self.reasons
        assert one.request_id not in self.cancelled
        (asked,) = (a for a in self.asked[request_id] if a.request_id == one.request_id)
        for token_id in one.token_ids:
            assert token_id == expected(asked, len(self.output[one.request_id]))
            self.output[one.request_id].append(token_id)
        self.sources[one.request_id] += one.sources is not None
        if one.finish_reason is not None:
            self.reasons[one.request_id] = one.finish_reason
            if one.finish_reason == "length":
                assert len(self.output[one.request_id]) == asked.params.max_tokens
                assert self.sources[one.request_id] == 1

    def open_ids(self):
        return [request_id for request_id in self.asked if request_id not in self.ended]

    def tell_fleet(self):
        self.tell(FleetChanged({worker_id: info(worker_id) for worker_id in self.workers}))

    # ------------------------------------------------------------------------------------------------------- events

    @initialize(num_workers=st.integers(0, 3), has_router=st.booleans())
    def begin(self, num_workers, has_router):
        for _ in range(num_workers):
            self.start_worker()
        if has_router:
            self.find_router()

    @rule(num_choices=st.integers(1, 3), max_tokens=st.integers(1, 5))
    def add(self, num_choices, max_tokens):
        self.num_requests += 1
        asks = [
            ask(f"r{self.num_requests}-{choice}", choice=choice, max_tokens=max_tokens) for choice in range(num_choices)
        ]
        self.asked[asks[0].request_id] = asks
        for one in asks:
            self.output[one.request_id] = []
            self.sources[one.request_id] = 0
        self.tell(RequestAdded(tuple(asks)))

    @rule(pick=pick)
    @precondition(lambda self: self.open_ids())
    def leave(self, pick):
        request_id = self.open_ids()[pick % len(self.open_ids())]
        self.left.add(request_id)
        self.tell(RequestLeft(request_id))
        assert request_id in self.ended

    @rule(pick=pick, choice=pick)
    @precondition(lambda self: self.asked)
    def cancel(self, pick, choice):
        asks = list(self.asked.values())[pick % len(self.asked)]
        request_id = asks[choice % len(asks)].request_id
        self.cancelled.add(request_id)
        self.tell(SequenceCancelled(request_id))

    @rule()
    def start_worker(self):
        self.num_workers += 1
        worker_id = f"d{self.num_workers}"
        self.workers[worker_id] = FakeWorker()
        self.join_router(worker_id)
        self.tell_fleet()

    @rule(pick=pick, is_fleet_told=st.booleans())
    @precondition(lambda self: self.workers)
    def lose_worker(self, pick, is_fleet_told):
        worker_id = list(self.workers)[pick % len(self.workers)]
        fleet = {one: info(one) for one in self.workers}
        del self.workers[worker_id]
        if is_fleet_told:
            self.tell_fleet()
        else:
            self.tell(FleetChanged(fleet))  # Serve notices later; the router never
        self.tell(WorkerLost(worker_id, "disconnected"))

    @rule()
    def tell_fleet_again(self):
        self.tell_fleet()

    @rule(pick=pick, which=pick, failure=st.sampled_from([None] * 8 + ["retryable", "final"]))
    @precondition(lambda self: any(worker.running for worker in self.workers.values()))
    def step(self, pick, which, failure):
        busy = [worker for worker in self.workers.values() if worker.running]
        worker = busy[pick % len(busy)]
        request_id = list(worker.running)[which % len(worker.running)]
        errors = {None: None, "retryable": WorkerError("bad numbers"), "final": RequestError("grammar")}
        worker.step(request_id, errors[failure])

    @rule(pick=pick, count=st.integers(1, 4))
    @precondition(lambda self: any(worker.on_its_way for worker in self.workers.values()))
    def arrive(self, pick, count):
        talking = [worker_id for worker_id, worker in self.workers.items() if worker.on_its_way]
        worker_id = talking[pick % len(talking)]
        queue = self.workers[worker_id].on_its_way
        self.tell(ChunksArrived(worker_id, [queue.popleft() for _ in range(min(count, len(queue)))]))

    @rule()
    @precondition(lambda self: self.router is None)
    def find_router(self):
        self.router = Router()
        for worker_id in self.workers:
            self.join_router(worker_id)
        self.tell(RouterFound())

    @rule()
    @precondition(lambda self: self.router is not None)
    def lose_router(self):
        self.router = None
        self.to_router.clear()
        self.from_router.clear()
        self.tell(RouterLost())

    def join_router(self, worker_id):
        if self.router is not None:
            self.router.on_event(WorkerJoined(info(worker_id)), self.now_s)
            self.router.on_event(KvEvents(worker_id=worker_id, seq=0, cleared=True), self.now_s)
            report = LoadReport(
                worker_id=worker_id,
                queued_s=0.0,
                num_waiting=0,
                num_running=0,
                free_blocks=1000,
                compute=ComputePrice(token_s=1e-3),
                decode_step_s=0.05,
            )
            self.router.on_event(report, self.now_s)

    @rule(refusal=st.sampled_from([None] * 6 + ["full", "unfit"]))
    @precondition(lambda self: self.to_router)
    def router_reads(self, refusal):
        message = self.to_router.popleft()
        if refusal is not None and isinstance(message, RouteRequest):
            error = CapacityError("full") if refusal == "full" else RequestError("too long")
            self.from_router.append(RouteFailed(request_id=message.request_id, error=error.info()))
            return
        for instruction in self.router.on_event(message, self.now_s):
            if isinstance(instruction, Reply):
                self.from_router.append(instruction.message)

    @rule(is_twice=st.booleans())
    @precondition(lambda self: self.from_router)
    def router_answers(self, is_twice):
        answer = self.from_router.popleft()
        for _ in range(1 + is_twice):
            self.tell(answer)

    @rule()
    def router_catches_up(self):
        while self.to_router:
            self.router_reads(refusal=None)
        while self.from_router:
            self.router_answers(is_twice=False)

    @rule()
    def workers_catch_up(self):
        for worker_id, worker in self.workers.items():
            for request_id in list(worker.running):
                worker.step(request_id, None)
            self.tell(ChunksArrived(worker_id, list(worker.on_its_way)))
            worker.on_its_way.clear()

    @rule(seconds=st.sampled_from([0.1, 0.1, 1.0, 4.0, 20.0]))
    def wait(self, seconds):
        self.now_s += seconds
        self.tell(TimePassed())

    # --------------------------------------------------------------------------------------------------- what holds

    @invariant()
    def parts_agree(self):
        self.table.check_invariants()
        assert len(self.table) == len(self.open_ids())

    @invariant()
    def workers_have_nothing_that_nobody_wants(self):
        wanted = set(self.table._placed)
        for worker in self.workers.values():
            assert set(worker.running) <= wanted

    def teardown(self):
        if not self.workers:
            self.start_worker()
        for _ in range(2000):
            if not self.open_ids():
                break
            self.router_catches_up()
            self.workers_catch_up()
            self.now_s += 0.1
            self.tell(TimePassed())
        assert not self.open_ids(), "a request did not end"
        while self.to_router:
            self.router_reads(refusal=None)
        self.table.check_invariants()
        assert len(self.table) == 0
        assert not self.table._sequences
        assert not self.table._placed
        assert not self.table._routes
        assert not self.table._num_sequences
        assert not any(worker.running for worker in self.workers.values())
        if self.router is not None:
            assert self.router.stats()["kvray_router_requests"] == 0
            assert self.router.stats()["kvray_router_reservations"] == 0


TestRequestTableMachine = RequestTableMachine.TestCase
TestRequestTableMachine.settings = settings(max_examples=50, stateful_step_count=50, deadline=None)


@pytest.mark.long
class TestRequestTableMachineAtLength(RequestTableMachine.TestCase):
    settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
