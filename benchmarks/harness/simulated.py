"""Workers in simulated time: the real deciders and pools; steps, pulls and messages take what a price says.

What is not real: the bytes, the tokens, the channels, and the clock. So a run gives the same figures each time, takes
seconds, and rules of keeping and placing can be told apart that a busy machine's noise would hide.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

from decode.streams import AskPrefill, BeginSequence, CancelSequence, Reply, Requested, StreamBook, StreamEvent
from engine.lending import Lender
from engine.loans import (
    AskOwner,
    BeginPull,
    HandedOff,
    LearnHandoff,
    LoanBook,
    LoanEvent,
    PromptWanted,
    PullStopped,
    Refused,
    SchedulerTold,
    SequenceOver,
    TellOwner,
    TellScheduler,
)
from engine.scheduling.config import SchedulerConfig
from engine.scheduling.plan import (
    AskBlocks,
    AskRemote,
    BlocksReleased,
    EmitTokens,
    Event,
    Instruction,
    LendBlocks,
    OfferBlocks,
    OffloadBlocks,
    PullBlocks,
    RunStep,
    Sampled,
    SequenceAdded,
    SequenceCancelled,
    StepEnded,
    StepPlan,
    StepResult,
    StepWanted,
    StopAsking,
    StopRemote,
    TakeIn,
    TimePassed,
)
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.step_cost import StepCost, features
from kvcache.leases import FreeBlocks, LeaseEvent, Released, Renewed
from kvcache.leases import TimePassed as LeaseTimePassed
from kvcache.names import split_names
from kvcache.pool import BlockPool
from kvcache.price import ASSUMED_MOVES, MoveCost
from kvcache.subscribers import Subscribers
from kvcache.told_requests import ToldRequests, report_pause_s
from messages.fleet import LoadReport, Role, SpareBlocks, Subscribe, TakeBlocks, WorkerInfo
from messages.handoff import BlocksRequest, KvHandoff, PrefillFailed, PrefillRequest, ReleaseLease, RenewLease
from messages.price import ComputePrice, MovePrice
from messages.request import Copy, GenerateRequest
from prefill.publications import (
    BeginPrompt,
    BlocksFreed,
    PromptAsked,
    PublicationBook,
    PublicationEvent,
    Publish,
    TellFailed,
)

if TYPE_CHECKING:
    from harness.simulated_fleet import Fleet

FINGERPRINT = b"simulated"
BLOCK_SIZE = 16
LEASE_S = 10.0
ROUTER = b"router"
_MAX_MODEL_LEN = 6144
_NUM_LOOKED_AT = 512  #: as engine.worker


#: The demo model in bfloat16 on one thread of an EPYC (Zen 5), as an engine learned it on 2026-11-29.
_DEMO = ComputePrice(step_s=1e-3, row_s=6e-5, row_key_s=1.9e-7, token_s=2e-5, pair_s=2.5e-8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What things take on the machine that all processes share, in seconds of one core.

    So that one worker and four take about what they take where they are served (benchmarks/tiers_replay.py).
    """

    num_cores: float = 2.0
    compute: ComputePrice = field(default_factory=lambda: _DEMO)
    between_steps_s: float = 4e-3  #: deciding, telling
    pull_s: float = 2e-3  #: of any size
    pull_byte_s: float = 3e-10
    message_s: float = 2e-3  #: on the way
    request_s: float = 6e-3  #: of a request at its ingress and the router
    block_bytes: int = 16384


class Clock:
    """Simulated time: what is to be done when."""

    def __init__(self) -> None:
        """Begin at 0."""
        self.now_s = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def after(self, delay_s: float, do: Callable[[], None]) -> None:
        """Do something `delay_s` from now; what is due at one time is done in the order it was said."""
        heapq.heappush(self._due, (self.now_s + delay_s, next(self._numbers), do))

    def run(self, is_over: Callable[[], bool]) -> None:
        """Let time pass until it is over."""
        while not is_over():
            self.now_s, _, do = heapq.heappop(self._due)
            do()


class Cores:
    """Shares cores among jobs, evenly: each gets at most one."""

    def __init__(self, clock: Clock, num_cores: float) -> None:
        self._clock, self._num_cores = clock, num_cores
        self._jobs: dict[int, list[Any]] = {}  # remaining seconds of a core, and what follows
        self._numbers = count()
        self._as_of_s = 0.0
        self._version = 0
        self.busy_s = 0.0

    def run(self, work_s: float, then: Callable[[], None]) -> None:
        """Work for so many seconds of one core."""
        self._settle()
        self._jobs[next(self._numbers)] = [work_s, then]
        self._plan()

    def _rate(self) -> float:
        return min(1.0, self._num_cores / len(self._jobs)) if self._jobs else 1.0

    def _settle(self) -> None:
        passed_s = (self._clock.now_s - self._as_of_s) * self._rate()
        for job in self._jobs.values():
            job[0] -= passed_s
        self.busy_s += passed_s * len(self._jobs)
        self._as_of_s = self._clock.now_s

    def _plan(self) -> None:
        self._version += 1
        if self._jobs:
            version = self._version
            least_s = min(job[0] for job in self._jobs.values())
            self._clock.after(max(0.0, least_s) / self._rate(), lambda: self._end(version))

    def _end(self, version: int) -> None:
        if version != self._version:
            return
        self._settle()
        ended = [number for number, job in self._jobs.items() if job[0] <= 1e-9]
        then = [self._jobs.pop(number)[1] for number in ended]
        self._plan()
        for do in then:
            do()


class _Lender(Lender):
    """A lender by the simulated clock."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(LEASE_S, worker.post, worker.send, lambda block_ids: [0] * len(block_ids))
        self._clock = worker.fleet.clock

    def _decide(self, event: LeaseEvent) -> None:
        for freed in self.leases.on_event(event, self._clock.now_s):
            self._questions.pop(freed.request_id, None)
            self._post(BlocksReleased(freed.request_id))


class Worker:
    """A worker of either role: what engine.worker, .driver, .borrower and .peers do, without bytes."""

    def __init__(self, fleet: Fleet, role: Role, worker_id: str, num_blocks: int) -> None:
        """Make an empty one, which learned its prices when it warmed up."""
        self.fleet, self.role, self.worker_id = fleet, role, worker_id
        self.pool = BlockPool(num_blocks, BLOCK_SIZE)
        config = SchedulerConfig(
            max_model_len=_MAX_MODEL_LEN,
            itl_target_s=0.05,
            remote_timeout_s=120.0,
            block_bytes=fleet.machine.block_bytes,
        )
        self.scheduler = Scheduler(config, self.pool, FINGERPRINT, warm(fleet.machine), self.price_of)
        self.loans, self.streams = LoanBook(), StreamBook()
        self.publications = PublicationBook(LEASE_S, BLOCK_SIZE)
        self.lender = _Lender(self)
        self.costs: dict[Copy, MoveCost] = {}
        self.told: dict[Copy, MovePrice] = {}
        self.pulled_from: dict[str, float] = {}
        self.subscribers = Subscribers(worker_id, self.send)
        self.told_requests = ToldRequests()
        self.num_intakes = count()
        self._is_stepping = self._is_wanted = self._is_report_due = False
        self._reported_s = -1.0
        self._tick()

    @property
    def info(self) -> WorkerInfo:
        """Describe this worker to the router."""
        return WorkerInfo(
            worker_id=self.worker_id,
            role=self.role,
            address=self.worker_id,
            node_id="node",
            fingerprint=FINGERPRINT,
            block_size=BLOCK_SIZE,
            num_blocks=self.pool.num_blocks,
            block_bytes=self.fleet.machine.block_bytes,
            max_model_len=_MAX_MODEL_LEN,
            max_num_seqs=256,
            roads=("shm",),
            compute=self.scheduler.cost.price,
        )

    def price_of(self, copy: Copy) -> MovePrice | None:
        """As engine.peers."""
        if copy.address == self.worker_id:
            return None
        cost = self.costs.get(copy)
        return (cost.price if cost else None) or ASSUMED_MOVES[copy.tier]

    # ---------------------------------------------------------------------------------------------------- the driver

    def post(self, event: Event) -> None:
        """As engine.worker."""
        self._carry_out(event)
        if isinstance(event, SequenceCancelled):
            self.borrow(SequenceOver(event.seq_id))
        self._want_step()
        self.want_report()

    def _want_step(self) -> None:
        if not self._is_stepping and not self._is_wanted:
            self._is_wanted = True
            self.fleet.clock.after(0.0, self._next_step)

    def _next_step(self) -> None:
        self._is_wanted = False
        if not self._is_stepping:
            self._carry_out(StepWanted())

    def _carry_out(self, *events: Event) -> None:
        others: list[Instruction] = []
        for event in events:
            for instruction in self.scheduler.on_event(event, self.fleet.clock.now_s):
                if isinstance(instruction, RunStep):
                    self._begin(instruction.plan)
                else:
                    others.append(instruction)
        if others:
            self.on_instructions(others)

    def _begin(self, plan: StepPlan) -> None:
        self._is_stepping = True
        machine, begun_s = self.fleet.machine, self.fleet.clock.now_s
        p = machine.compute
        prices = (p.step_s, p.row_s, p.row_key_s, p.token_s, p.pair_s)
        work_s = sum(price * x for price, x in zip(prices, features(plan.parts), strict=True))

        def computed() -> None:
            elapsed_s = self.fleet.clock.now_s - begun_s
            self.fleet.cores.run(machine.between_steps_s, lambda: ended(elapsed_s))

        def ended(elapsed_s: float) -> None:
            self._is_stepping = False
            sampled = {part.seq_id: Sampled(7) for part in plan.parts if part.is_sampled}
            self._carry_out(StepEnded(StepResult(sampled=sampled, elapsed_s=elapsed_s)), StepWanted())

        self.fleet.cores.run(work_s, computed)

    def _tick(self) -> None:
        self.fleet.clock.after(0.1, self._tick)
        self.lender.pass_time()
        self.publish(LeaseTimePassed())
        self.post(TimePassed())

    # ----------------------------------------------------------------------------------------------- the instructions

    def on_instructions(self, instructions: Sequence[Instruction]) -> None:
        """As engine.worker."""
        for instruction in instructions:
            match instruction:
                case EmitTokens() | AskRemote() if self.role == "decode":
                    self.stream(instruction)
                case EmitTokens() | OfferBlocks():
                    self.publish(instruction)
                case AskBlocks() | StopAsking() | StopRemote() | PullBlocks():
                    self.borrow(instruction)
                case LendBlocks():
                    self.lender.lend(instruction)
                case OffloadBlocks():
                    pass
                case _:
                    raise AssertionError(instruction)
        for emitted in instructions:
            if isinstance(emitted, EmitTokens) and emitted.finish_reason is not None:
                self.borrow(SequenceOver(emitted.seq_id))
        self.flush_events()
        self.want_report()

    def stream(self, event: StreamEvent) -> None:
        """As decode.worker."""
        for instruction in self.streams.on_event(event, self.fleet.clock.now_s):
            match instruction:
                case Reply(ingress, chunk):
                    self.send(ingress, chunk)
                case BeginSequence(spec):
                    self.post(SequenceAdded(spec))
                case CancelSequence(request_id):
                    self.post(SequenceCancelled(request_id))
                case AskPrefill(source, message):
                    self.borrow(PromptWanted(source, message))

    def publish(self, event: PublicationEvent) -> None:
        """As prefill.worker."""
        for instruction in self.publications.on_event(event, self.fleet.clock.now_s):
            match instruction:
                case BeginPrompt(spec):
                    self.post(SequenceAdded(spec))
                case FreeBlocks(request_id, _):
                    self.post(SequenceCancelled(request_id))
                    self.post(BlocksReleased(request_id))
                    self.publish(BlocksFreed(request_id))
                case Publish(asker, handoff):
                    self.send(asker, handoff)
                case TellFailed(asker, message):
                    self.send(asker, message)

    def borrow(self, event: LoanEvent) -> None:
        """As engine.borrower."""
        for instruction in self.loans.on_event(event, self.fleet.clock.now_s):
            match instruction:
                case TellScheduler(seq_id, told):
                    self.post(told)
                    self.borrow(SchedulerTold(seq_id))
                case AskOwner(source, message) | TellOwner(source, message):
                    self.send(source.encode(), message)
                case BeginPull(pull):
                    self._pull(pull)
                case LearnHandoff():
                    self._learn(instruction)

    def _pull(self, pull: PullBlocks) -> None:
        machine, begun_s = self.fleet.machine, self.fleet.clock.now_s
        num_bytes = len(pull.targets) * machine.block_bytes

        def ended() -> None:
            elapsed_s = self.fleet.clock.now_s - begun_s
            self.pulled_from.setdefault(pull.source, self.fleet.clock.now_s)
            self._cost(pull.source).observe_pull("shm", num_bytes, elapsed_s)
            self.borrow(PullStopped(pull.seq_id, frozenset()))

        self.fleet.cores.run(machine.pull_s + num_bytes * machine.pull_byte_s, ended)

    def _cost(self, source: str) -> MoveCost:
        return self.costs.setdefault(Copy(source, "device"), MoveCost(source, "device"))

    def _learn(self, learned: LearnHandoff) -> None:
        if self.fleet.clock.now_s - learned.elapsed_s < self.pulled_from.get(learned.source, 1e9):
            return
        num_bytes = learned.num_blocks * self.fleet.machine.block_bytes
        self._cost(learned.source).observe_handoff(learned.elapsed_s, learned.source_s, num_bytes)

    # ------------------------------------------------------------------------------------------------------ the channel

    def send(self, receiver: bytes, message: Any) -> bool:
        """Send a message to another process."""
        self.fleet.send(self.worker_id.encode(), receiver, message)
        return True

    def on_message(self, sender: bytes, message: Any) -> None:
        """As engine.worker, and the roles."""
        now_s = self.fleet.clock.now_s
        match message:
            case TakeBlocks(address=address, names=names, age_s=age_s):
                used_s = None if age_s is None else now_s - age_s
                self.post(TakeIn(f"intake {next(self.num_intakes)}", address, tuple(split_names(names)), used_s))
            case SpareBlocks(spare=spare, kept=kept):
                self.pool.mark(split_names(spare), is_spare=True)
                self.pool.mark(split_names(kept), is_spare=False)
            case Subscribe():
                self.flush_events()
                self._tell_load()
                self.subscribers.add(sender, [("device", b"".join(self.pool.snapshot()))])
                self.send(sender, self.told_requests.whole(self._report()))
            case GenerateRequest(prefill_address=address):
                self.stream(Requested(sender, message, address is not None))
            case BlocksRequest() | RenewLease() | ReleaseLease() if self.lender.take(sender, message):
                pass
            case PrefillRequest():
                self.publish(PromptAsked(sender, message))
            case RenewLease(request_id=request_id):
                self.publish(Renewed(request_id, sender))
            case ReleaseLease(request_id=request_id):
                self.publish(Released(request_id, sender))
            case KvHandoff():
                self.borrow(HandedOff(sender.decode(), message))
            case PrefillFailed(request_id=request_id):
                self.borrow(Refused(sender.decode(), request_id))
            case _:
                raise AssertionError(message)

    def flush_events(self) -> None:
        """As engine.worker; and the onlooker is told, too."""
        stored, removed = self.pool.take_events()
        if stored or removed:
            self.subscribers.tell("device", b"".join(stored), b"".join(removed))
            self.fleet.on_pool_changed(self, stored, removed)

    def want_report(self) -> None:
        """As engine.worker: soon, and not too often."""
        if self._is_report_due:
            return
        self._is_report_due = True
        pause_s = report_pause_s(self.scheduler.num_waiting + self.scheduler.num_running)
        wait_s = max(0.0, self._reported_s + pause_s - self.fleet.clock.now_s)
        self.fleet.clock.after(wait_s, self._send_report)

    def _send_report(self) -> None:
        self._is_report_due = False
        self._reported_s = self.fleet.clock.now_s
        self.flush_events()
        self._tell_load()

    def _tell_load(self) -> None:
        scheduler = self.scheduler
        self.send(ROUTER, self.told_requests.told(self._report(), scheduler.seq_ids(), scheduler.declined_ids()))

    def _report(self) -> LoadReport:
        scheduler, pool = self.scheduler, self.pool
        moves = []
        for copy, cost in self.costs.items():
            price = cost.price
            if price is not None and price != self.told.get(copy):
                self.told[copy] = price
                moves.append(price)
        return LoadReport(
            worker_id=self.worker_id,
            queued_s=scheduler.queued_s * scheduler.lateness.factor,
            queued_short_s=scheduler.queued_short_s,
            num_short=scheduler.num_short,
            num_waiting=scheduler.num_waiting,
            num_running=scheduler.num_running,
            free_blocks=pool.num_free,
            idle_blocks=pool.num_idle(pool.num_dispensable + _NUM_LOOKED_AT),
            reused_share=pool.reused_share,
            decode_step_s=scheduler.decode_step_s,
            compute=scheduler.cost.price,
            moves=tuple(moves),
        )


def warm(machine: Machine) -> StepCost:
    """What a worker learned when it warmed up."""
    cost = StepCost()
    p = machine.compute
    prices = (p.step_s, p.row_s, p.row_key_s, p.token_s, p.pair_s)
    for x in ([1, 0, 0, 256, 256 * 128], [1, 0, 0, 512, 512 * 256], [1, 1, 512, 0, 0]) * 4:
        cost._learned.observe(x, sum(a * b for a, b in zip(prices, x, strict=True)))
    cost._prefill_tokens, cost._prefill_s = 512.0, 512 * p.token_s
    return cost
