"""Which stages a request went through, from what the request table was told and said: no clock, no IO."""

from __future__ import annotations

import msgspec
import pytest

from cluster.request_events import ChunksArrived, RequestAdded, RequestLeft, RouterLost, SequenceCancelled, WorkerLost
from cluster.spans import FollowedRequest, SpanBook, TraceContext, trace_context
from kvcache.names import pack_tokens
from messages.errors import RequestError
from messages.request import GenerateRequest
from messages.stream import PlannedRun, PromptPlan, PromptSources
from tests.cluster.request_bench import Ingress, ask, chunk, failed, placed

PLAN = PromptPlan(queued_s=0.25, pulled_s=0.5, num_moved_bytes=99, load_s=0.4, compute_s=1.5)
SOURCES = PromptSources(device=16, host=16, computed=8)


class Watched(Ingress):
    """An ingress of which a book follows one request."""

    def __init__(self, *worker_ids: str, has_router: bool = True) -> None:
        self.book = SpanBook()
        super().__init__(*worker_ids, has_router=has_router)

    def follow(self, *asked: GenerateRequest) -> FollowedRequest:
        self.request = FollowedRequest(None, self.now_s)
        self.request.attributes |= {"http.request.method": "POST", "url.path": "/v1/completions"}
        self.book.follow(self.request, asked)
        self.tell(RequestAdded(asked))
        return self.request

    def tell(self, event: object) -> list[object]:
        said = super().tell(event)
        self.book.see(event, said, self.now_s)
        return said

    def after(self, seconds: float, event: object) -> None:
        self.now_s += seconds
        self.tell(event)

    def stages(self) -> list[tuple[str, float, float, str]]:
        """Names, times since the request began, errors."""
        return [
            (stage.name, round(stage.begin_s - 100.0, 6), round(stage.end_s - 100.0, 6), stage.error)
            for stage in self.book.end(self.request, 200, self.now_s).stages
        ]


def test_a_request_goes_through_route_queue_load_prefill_and_decode():
    ingress = Watched("d1", "d2")
    ingress.follow(ask())
    ingress.after(0.5, placed("r", "d2", reason="because", decode_match_tokens=16, predicted_ttft_s=1.0))
    ingress.after(2.0, ChunksArrived("d2", [chunk("r", 1, sources=SOURCES, plan=PLAN)]))
    ingress.after(1.0, ChunksArrived("d2", [chunk("r", 2, 3, finish_reason="stop")]))
    assert len(ingress.book) == 0
    whole = ingress.request.end(200, ingress.now_s)
    assert ingress.stages() == [
        ("route", 0.0, 0.5, ""),
        ("queue", 0.5, 0.75, ""),
        ("load", 0.75, 1.25, ""),
        ("prefill", 1.25, 2.5, ""),
        ("decode", 2.5, 3.5, ""),
    ]
    route, queue, load, prefill, decode = (stage.attributes for stage in whole.stages)
    assert route["kvray.placed_by"] == "router"
    assert route["kvray.reason"] == "because"
    assert (route["kvray.decode_worker"], route["kvray.prompt_blocks"]) == ("d2", 2)
    assert queue["kvray.device_blocks"] == 1
    assert (load["kvray.host_blocks"], load["kvray.peer_blocks"], load["kvray.moved_bytes"]) == (1, 0, 99)
    assert (prefill["kvray.computed_blocks"], prefill["kvray.computed_by"]) == (1, "d2")
    assert (decode["kvray.output_tokens"], decode["kvray.finish_reason"]) == (3, "stop")
    assert whole.whole.name == "POST /v1/completions"
    assert whole.whole.attributes["gen_ai.usage.input_tokens"] == 40
    assert whole.whole.attributes["gen_ai.usage.output_tokens"] == 3
    assert whole.whole.attributes["kvray.ttft_s"] == 2.5
    assert (whole.whole.begin_s, whole.whole.end_s, whole.whole.error) == (100.0, 103.5, "")


def test_what_a_prefill_worker_computes_and_what_is_computed_beside_a_pull_begins_with_the_admission():
    for plan in (
        msgspec.structs.replace(PLAN, handed_over_by="tcp://p1:1"),
        msgspec.structs.replace(PLAN, is_mixed=True, runs=(PlannedRun(0, 16, "host", "tcp://c:1"),)),
    ):
        ingress = Watched("d1", "p1")
        ingress.follow(ask())
        ingress.after(0.0, placed("r", "d1", prefill_worker="p1", prefill_address="tcp://p1:1"))
        ingress.after(1.0, ChunksArrived("d1", [chunk("r", 1, sources=SOURCES, plan=plan, finish_reason="length")]))
        stages = {stage.name: stage for stage in ingress.request.end(200, ingress.now_s).stages}
        assert (stages["prefill"].begin_s, stages["prefill"].end_s) == (100.25, 101.0)
        if plan.handed_over_by:
            assert stages["prefill"].attributes["kvray.computed_by"] == "tcp://p1:1"
            assert stages["load"].attributes["kvray.runs"] == ["rest device tcp://p1:1"]
            assert stages["route"].attributes["kvray.prefill_worker"] == "p1"
        else:
            assert stages["load"].attributes["kvray.runs"] == ["0-16 host tcp://c:1"]


def test_what_is_held_is_neither_loaded_nor_computed_and_no_stage_ends_after_the_first_token():
    ingress = Watched("d1")
    ingress.follow(ask())
    ingress.after(0.0, placed("r", "d1"))
    plan = PromptPlan(queued_s=9.0)
    ingress.after(1.0, ChunksArrived("d1", [chunk("r", 1, sources=PromptSources(device=40), plan=plan)]))
    ingress.after(1.0, RequestLeft("r"))
    assert ingress.stages() == [("route", 0.0, 0.0, ""), ("queue", 0.0, 1.0, ""), ("decode", 1.0, 2.0, "")]


@pytest.mark.parametrize("has_router", [True, False])
def test_a_request_that_moves_has_stages_at_both_workers(has_router):
    ingress = Watched("d1", "d2", has_router=has_router)
    ingress.follow(ask())
    first = ingress.sent()[0][0] if not has_router else "d1"
    second = "d2" if first == "d1" else "d1"
    if has_router:
        ingress.after(0.0, placed("r", first))
    ingress.after(1.0, ChunksArrived(first, [chunk("r", 1, sources=SOURCES, plan=PromptPlan())]))
    ingress.after(1.0, WorkerLost(first, "gone"))
    if has_router:
        ingress.after(0.5, placed("r#2", second))
    ingress.after(1.0, ChunksArrived(second, [chunk("r#2", 2, sources=SOURCES, plan=PLAN)]))
    ingress.after(1.0, ChunksArrived(second, [chunk("r#2", 3, finish_reason="length")]))
    stages = ingress.stages()
    moved_s = 2.5 if has_router else 2.0
    assert [stage for stage in stages if stage[0] != "prefill"] == [
        ("route", 0.0, 0.0, ""),
        ("queue", 0.0, 0.0, ""),
        ("decode", 1.0, 2.0, "placed anew"),
        ("route", 2.0, moved_s, ""),
        ("replay", moved_s, moved_s + 1.0, ""),
        ("decode", moved_s + 1.0, moved_s + 2.0, ""),
    ]
    by = {stage.attributes.get("kvray.placed_by") for stage in ingress.request.stages if stage.name == "route"}
    assert by == {"router" if has_router else "hashing"}
    assert ingress.request.attributes["gen_ai.usage.output_tokens"] == 3


def test_a_router_that_is_lost_meanwhile_makes_it_a_placement_by_hashing():
    ingress = Watched("d1")
    ingress.follow(ask())
    ingress.after(0.5, RouterLost())
    ingress.after(0.5, RequestLeft("r"))
    assert [stage[:3] for stage in ingress.stages()] == [("route", 0.0, 0.5), ("queue", 0.5, 1.0)]
    assert ingress.request.stages[0].attributes["kvray.placed_by"] == "hashing"


def test_choices_and_prompts_each_have_their_stages_under_one_route():
    ingress = Watched("d1")
    other = msgspec.structs.replace(ask("t"), token_ids=pack_tokens([1, 2]), num_prompt_tokens=2)
    first = ask("r")
    ingress.follow(first, msgspec.structs.replace(first, request_id="s"), other)
    ingress.after(0.0, placed("r", "d1"))
    for name in "rst":
        ingress.after(1.0, ChunksArrived("d1", [chunk(name, 1, sources=SOURCES, plan=PLAN, finish_reason="stop")]))
    stages = ingress.request.end(200, ingress.now_s).stages
    assert [stage.name for stage in stages].count("route") == 1
    assert [stage.attributes["kvray.sequence_id"] for stage in stages if stage.name == "decode"] == ["r", "s", "t"]
    assert ingress.request.attributes["gen_ai.usage.input_tokens"] == 42


def test_an_error_of_a_sequence_is_that_of_its_stage_and_of_the_request():
    ingress = Watched("d1")
    ingress.follow(ask())
    ingress.after(0.0, placed("r", "d1"))
    ingress.after(1.0, ChunksArrived("d1", [failed("r", RequestError("a bad wish"))]))
    whole = ingress.request.end(400, ingress.now_s)
    assert ingress.stages()[-1] == ("queue", 0.0, 1.0, "a bad wish")
    assert whole.whole.error == "a bad wish"


def test_a_sequence_that_is_cancelled_alone_ends_with_the_request_without_an_error():
    ingress = Watched("d1")
    ingress.follow(ask("r"), ask("s", choice=1))
    ingress.after(0.0, placed("r", "d1"))
    ingress.after(1.0, SequenceCancelled("s"))
    ingress.after(1.0, ChunksArrived("d1", [chunk("r", 1, sources=SOURCES, plan=PLAN, finish_reason="stop")]))
    assert [error for *_, error in ingress.stages()] == [""] * len(ingress.stages())
    assert len(ingress.book) == 0


def test_only_the_clients_own_mistakes_are_no_errors_of_the_request():
    assert FollowedRequest(None, 0.0).end(404, 1.0).whole.error == ""
    assert FollowedRequest(None, 0.0).end(503, 1.0).whole.error == "HTTP 503"


def test_requests_that_nobody_follows_leave_nothing_behind():
    ingress = Watched("d1")
    ingress.run("d1")
    ingress.tell(ChunksArrived("d1", [chunk("r", 1, sources=SOURCES, plan=PLAN, finish_reason="stop")]))
    assert len(ingress.book) == 0


PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_clients_trace_is_read_with_its_state_and_whether_it_is_sampled():
    trace_id, parent_id = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331
    assert trace_context(PARENT, "a=b") == TraceContext(trace_id, parent_id, is_sampled=True, state="a=b")
    assert trace_context(f"{PARENT[:-2]}00") == TraceContext(trace_id, parent_id, is_sampled=False)
    assert trace_context(PARENT, "a" * 513) == TraceContext(trace_id, parent_id, is_sampled=True)


@pytest.mark.parametrize(
    "parent",
    [
        "",
        "00",
        PARENT.upper(),
        PARENT[:-1],
        f"{PARENT}-more",
        f"01{PARENT[2:]}",
        f"00-{'0' * 32}-b7ad6b7169203331-01",
        f"00-0af7651916cd43dd8448eb211c80319c-{'0' * 16}-01",
    ],
)
def test_a_header_that_is_no_trace_begins_one_of_our_own(parent):
    assert trace_context(parent) is None
