"""A fleet in simulated time: the real router, simulated workers (harness.simulated), an ingress, and an onlooker.

The onlooker sees all pools at once, and tells where hits are lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from statistics import mean
from typing import Any

import msgspec

from harness.simulated import BLOCK_SIZE, FINGERPRINT, ROUTER, Clock, Cores, Machine, Worker
from harness.trace import Turn
from kvcache.names import block_names, pack_tokens, split_names
from kvrouter.router import AskSnapshot, Event, Reply, Router, TellWorker, TimePassed, WorkerJoined
from messages.fleet import Role, Subscribe
from messages.request import GenerateRequest, SamplingParams
from messages.route import Placement, RequestEnded, RouteRequest
from messages.stream import PromptSources, TokenChunk

_INGRESS = b"ingress"


@dataclass(slots=True)
class _Asked:
    """A request under way."""

    message: GenerateRequest
    names: list[bytes]
    num_seen: int  #: blocks at its head that were asked for before
    asked_s: float
    on_end: Callable[[], None]
    placed_s: float = 0.0
    num_held: int = 0  #: of those that were seen, blocks at its head that lay somewhere when it was placed
    lost_by: str = ""  #: the role of the worker that evicted the last copy of the block behind those


class Fleet:
    """Prefill and decode workers with pools of `num_blocks` each."""

    def __init__(self, machine: Machine, num_prefill: int, num_decode: int, num_blocks: int) -> None:
        self.machine, self.clock = machine, Clock()
        self.cores = Cores(self.clock, machine.num_cores)
        self.ttfts_s: list[float] = []
        self.sources: Counter[str] = Counter()  #: prompt tokens, by where their KV came from
        self.lost: Counter[str] = Counter()  #: prompt tokens that an endless cache would hit, by why they were not
        self._seen: set[bytes] = set()
        self._asked: dict[str, _Asked] = {}
        self._holders: dict[bytes, set[str]] = {}
        self._gone: dict[bytes, tuple[str, float]] = {}  # of what nobody holds any more: whose was the last copy, when
        self._numbers = count()
        self._router = Router()
        counts: dict[Role, int] = {"prefill": num_prefill, "decode": num_decode}
        roles = [role for role, number in counts.items() for _ in range(number)]
        self._workers = {
            worker_id: Worker(self, role, worker_id, num_blocks)
            for worker_id, role in ((f"{role} {number}", role) for number, role in enumerate(roles))
        }
        for worker in self._workers.values():
            self._route(WorkerJoined(worker.info))
        self._tick()

    @property
    def hit(self) -> float:
        """Share of the prompt tokens that nobody computed."""
        return 1 - self.sources["computed"] / self.sources.total()

    def send(self, sender: bytes, receiver: bytes, message: Any) -> None:
        """Deliver a message after a while."""
        if receiver == ROUTER:
            self._later(lambda: self._route(message))
        elif receiver == _INGRESS:
            self._later(lambda: self._take(message))
        else:
            self._later(lambda: self._workers[receiver.decode()].on_message(sender, message))

    def on_pool_changed(self, worker: Worker, stored: Iterable[bytes], removed: Iterable[bytes]) -> None:
        """Look at what changed in a pool."""
        for name in stored:
            self._holders.setdefault(name, set()).add(worker.info.worker_id)
        for name in removed:
            held = self._holders[name]
            held.discard(worker.info.worker_id)
            if not held:
                del self._holders[name]
                self._gone[name] = (worker.info.role, self.clock.now_s)

    def replay(self, sessions: Sequence[Sequence[Turn]], num_at_once: int) -> float:
        """Ask all turns, of `num_at_once` sessions at a time, each when the one before was answered.

        Returns:
            The seconds that this took.
        """
        waiting = list(reversed(sessions))
        open_sessions = num_at_once

        def go_on(turns: Iterator[Turn]) -> None:
            nonlocal open_sessions
            turn = next(turns, None)
            if turn is not None:
                self._ask(turn, lambda: go_on(turns))
            elif waiting:
                go_on(iter(waiting.pop()))
            else:
                open_sessions -= 1

        begin_s = 1.0  # by then all workers are known
        for _ in range(num_at_once):
            self.clock.after(begin_s, lambda: go_on(iter(())))
        self.clock.run(lambda: open_sessions == 0)
        return self.clock.now_s - begin_s

    def report(self) -> str:
        """Say in a line what came from where, and why what was computed though it had been there."""
        total, ttfts_s = self.sources.total(), sorted(self.ttfts_s)
        lost = ", ".join(f"{why} {number / total:.3f}" for why, number in self.lost.most_common() if number)
        return (
            f"hit {self.hit:.3f} (device {self.sources['device'] / total:.3f}, "
            f"peer {self.sources['peer'] / total:.3f})  "
            f"TTFT mean {1e3 * mean(ttfts_s):.0f} ms, p99 {1e3 * ttfts_s[int(0.99 * (len(ttfts_s) - 1))]:.0f} ms"
            f"{'  lost: ' + lost if lost else ''}"
        )

    # -------------------------------------------------------------------------------------------- router and ingress

    def _later(self, do: Callable[[], None]) -> None:
        self.clock.after(self.machine.message_s, do)

    def _tick(self) -> None:
        self.clock.after(1.0, self._tick)
        self._route(TimePassed())

    def _route(self, event: Event) -> None:
        for instruction in self._router.on_event(event, self.clock.now_s):
            match instruction:
                case Reply(Placement() as placement):
                    self._place(placement)
                case TellWorker(worker_id, message):
                    self.send(ROUTER, worker_id.encode(), message)
                case AskSnapshot(worker_id):
                    self.send(ROUTER, worker_id.encode(), Subscribe())
                case _:
                    raise AssertionError(instruction)

    def _ask(self, turn: Turn, on_end: Callable[[], None]) -> None:
        request_id, num_tokens, packed = f"r{next(self._numbers)}", len(turn.prompt), pack_tokens(turn.prompt)
        names = split_names(block_names(FINGERPRINT, b"", packed, BLOCK_SIZE))
        usable = names[: (num_tokens - 1) // BLOCK_SIZE]
        num_seen = next((i for i, name in enumerate(usable) if name not in self._seen), len(usable))
        self._seen.update(names)
        params = SamplingParams(max_tokens=turn.max_tokens, temperature=0.0)
        message = GenerateRequest(request_id=request_id, token_ids=packed, num_prompt_tokens=num_tokens, params=params)
        self._asked[request_id] = _Asked(message, names, num_seen, self.clock.now_s, on_end)
        route = RouteRequest(
            request_id=request_id, names=b"".join(names), num_prompt_tokens=num_tokens, max_tokens=turn.max_tokens
        )
        self.cores.run(self.machine.request_s, lambda: self.send(_INGRESS, ROUTER, route))

    def _place(self, placement: Placement) -> None:
        asked = self._asked[placement.request_id]
        seen = asked.names[: asked.num_seen]
        asked.placed_s = self.clock.now_s
        asked.num_held = next((i for i, name in enumerate(seen) if name not in self._holders), len(seen))
        if asked.num_held < asked.num_seen:
            asked.lost_by = self._gone.get(seen[asked.num_held], ("nobody", 0.0))[0]
        message = msgspec.structs.replace(
            asked.message,
            prefill_worker=placement.prefill_worker,
            prefill_address=placement.prefill_address,
            prefill_s=placement.prefill_s,
            held=placement.held,
        )
        self.send(_INGRESS, placement.decode_worker.encode(), message)

    def _take(self, chunk: TokenChunk) -> None:
        asked = self._asked[chunk.request_id]
        if chunk.sources is not None:
            self.ttfts_s.append(self.clock.now_s - asked.asked_s)
            self._count(asked, chunk.sources)
        if chunk.finish_reason is not None:
            assert chunk.error is None, chunk.error
            del self._asked[chunk.request_id]
            self.send(_INGRESS, ROUTER, RequestEnded(request_id=chunk.request_id))
            asked.on_end()

    def _count(self, asked: _Asked, sources: PromptSources) -> None:
        """Count where a prompt came from, and by what its hits fall short of those of an endless cache."""
        self.sources += Counter(device=sources.device, peer=sources.peer, computed=sources.computed)
        num_missed = asked.num_seen * BLOCK_SIZE - (asked.message.num_prompt_tokens - sources.computed)
        gone_at_s = (self._gone.get(name, ("", -1.0))[1] for name in asked.names[: asked.num_held])
        num_late = sum(at_s >= asked.placed_s for at_s in gone_at_s)
        for why, num_blocks in (
            (f"gone from {asked.lost_by} before it was placed", asked.num_seen - asked.num_held),
            ("gone before it began", num_late),
            ("computed though held", asked.num_held),
        ):
            num_tokens = max(0, min(num_missed, num_blocks * BLOCK_SIZE))
            self.lost[why] += num_tokens
            num_missed -= num_tokens
