"""The request table, the real router and workers that come and go, in any order of events."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

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
from decode.streams import each_choice
from kvcache.names import unpack_tokens
from kvrouter.router import Reply, Router, WorkerJoined
from messages.errors import CapacityError, RequestError, WorkerError
from messages.fleet import KvEvents, LoadReport
from messages.price import ComputePrice
from messages.request import CancelRequest, GenerateRequest
from messages.route import Placement, RequestEnded, RouteFailed, RouteRequest
from messages.stream import TokenChunk
from tests.cluster.request_bench import SOURCES, ask, chunk, failed, info


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
                position=len(output) - 1,
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
        self.table = RequestTable(RequestLimits(request_timeout_s=50.0, lost_after_s=3.0, max_ttft_s=20.0))
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
                    choices = [*each_choice(message)] if isinstance(message, GenerateRequest) else [message]
                    for one in choices:
                        if isinstance(one, GenerateRequest):
                            self.count_placement(worker_id, one.request_id)
                        if worker_id in self.workers:  # else its loss is still to be told
                            self.workers[worker_id].take(one)
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


TestRequestTableMachine = pytest.mark.slow(RequestTableMachine.TestCase)
TestRequestTableMachine.settings = settings(max_examples=50, stateful_step_count=50, deadline=None)


@pytest.mark.long
class TestRequestTableMachineAtLength(RequestTableMachine.TestCase):
    settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
