"""Both sides, the connections between them, a clock, and every accident that may befall them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count

import msgspec

from engine.scheduling.config import SchedulerConfig
from engine.scheduling.plan import TimePassed
from kvcache.names import block_names, pack_tokens, split_names
from messages.request import Copy, GenerateRequest, HeldRun, SamplingParams
from messages.stream import TokenChunk
from messages.wire import Message
from tests.fake_kv import FINGERPRINT
from tests.prefill.fake_engine import (
    LATE,
    LONGER_THAN_ALL_S,
    REMOTE_TIMEOUT_S,
    SIZE,
    Connection,
    Holders,
    LateWrite,
    Manners,
    Request,
    expect,
)
from tests.prefill.sides import DecodeSide, PrefillSide


class World:
    """Both sides, what travels between them, the clients, and the clock."""

    def __init__(
        self,
        prefill_config: SchedulerConfig,
        decode_config: SchedulerConfig,
        num_prefill_blocks: int,
        num_decode_blocks: int,
        *,
        verifies: bool = True,
        prefill_s: float = 0.0,
    ) -> None:
        """`prefill_s`: what every placement predicts; the assumed price is a millisecond a token."""
        self.now_s = 100.0
        self.verifies = verifies
        self.prefill_s = prefill_s
        self.requests: dict[str, Request] = {}
        self.content_of: dict[bytes, list[int]] = {}  # by block name
        self.connections: list[Connection] = []
        self.late: list[LateWrite] = []
        self.seen: Counter[str] = Counter()
        self._askers = count()
        self._addresses = count()
        self._new_prefill = lambda: PrefillSide(self, prefill_config, num_prefill_blocks)
        self._new_decode = lambda: DecodeSide(self, decode_config, num_decode_blocks)
        self.prefill = self._new_prefill()
        self.address = self._new_address()
        self.decode = self._new_decode()
        self.max_len = min(decode_config.max_model_len, num_decode_blocks * SIZE)

    # -------------------------------------------------------------------------------------------------------- clients

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        salt: bytes = b"",
        priority: int = 0,
        is_remote: bool = True,
        manners: Manners = "polite",
        patience_s: float | None = None,
        holders: Holders = "nobody",
    ) -> str:
        request_id = f"r{len(self.requests)}"
        message = GenerateRequest(
            request_id=request_id,
            token_ids=pack_tokens(prompt),
            num_prompt_tokens=len(prompt),
            params=params,
            salt=salt,
            priority=priority,
            deadline_s=patience_s,
            prefill_address=self.address if is_remote else None,
            prefill_s=self.prefill_s,
            held=self._held(holders, len(prompt) // SIZE),
        )
        deadline_s = None if patience_s is None else self.now_s + patience_s
        request = self.requests[request_id] = expect(message, manners, deadline_s, self.max_len)
        names = split_names(block_names(FINGERPRINT, salt, pack_tokens(request.token_ids), SIZE))
        for index, name in enumerate(names):
            numbers = request.numbers[index * SIZE : (index + 1) * SIZE]
            assert self.content_of.setdefault(name, numbers) == numbers
        self.decode.accept(request)
        return request_id

    def _held(self, holders: Holders, num_blocks: int) -> tuple[HeldRun, ...]:
        """What a router would say; where it errs the holder has nothing, or is not there."""
        near, slow = Copy(self.address, "device"), Copy(self.address, "disk")
        copies = {
            "nobody": (),
            "near": (near,),
            "slow": (slow,),
            "gone": (Copy("nowhere", "device"), slow),  # then one owner is asked for blocks and for the rest
        }[holders]
        return (HeldRun(0, num_blocks, copies),) if num_blocks and copies else ()

    @staticmethod
    def request_id_of(loan_id: str) -> str:
        return loan_id.partition("#")[0]

    def alive(self) -> list[str]:
        return [request_id for request_id, request in self.requests.items() if not request.is_over]

    def cancel(self, request_id: str) -> None:
        self.requests[request_id].is_over = self.requests[request_id].is_cancelled = True
        self.decode.cancel(request_id)

    def take_tokens(self, emitted: TokenChunk) -> None:
        request = self.requests[emitted.request_id]
        assert not request.is_over, "nothing follows the end or a cancel"
        begin = request.num_given
        request.num_given += len(emitted.token_ids)
        assert emitted.token_ids == request.token_ids[begin : request.num_given]
        if emitted.finish_reason is None:
            return  # without tokens: a suspect's step began or ended
        request.is_over = True
        if emitted.finish_reason == "error":
            assert request.deadline_s is not None, emitted.error
            assert self.now_s >= request.deadline_s
            self.seen["too late"] += 1
        else:
            assert emitted.finish_reason == request.reason
            assert request.num_given == len(request.token_ids)
            self.seen["finished"] += 1

    # ------------------------------------------------------------------------------------------------------- messages

    def _new_address(self) -> str:
        return f"prefill {next(self._addresses)}"

    def connect(self, address: str) -> Connection:
        """To the prefill worker, or to where one was."""
        connection = Connection(address, b"decode %d" % next(self._askers), self.prefill.engine.kv)
        connection.is_prefill_dead = address != self.address
        self.connections.append(connection)
        return connection

    def send_to_decode(self, asker: bytes, message: Message) -> None:
        for connection in self.connections:
            if connection.asker == asker and not connection.is_decode_dead and not connection.is_prefill_dead:
                connection.to_decode.append(message)

    def deliverable(self) -> list[tuple[Connection, bool]]:
        """Where something is to be delivered, and whether to prefill; last of all that the other end is dead."""
        found = []
        for connection in self.connections:
            if not connection.is_prefill_dead and (connection.to_prefill or connection.is_decode_dead):
                found.append((connection, True))
            if not connection.is_decode_dead and (connection.to_decode or connection.is_prefill_dead):
                found.append((connection, False))
        return found

    def deliver(self, connection: Connection, to_prefill: bool) -> None:
        if to_prefill and connection.to_prefill:
            self.prefill.on_message(connection.asker, connection.to_prefill.popleft())
        elif to_prefill:
            self.connections.remove(connection)
            self.seen["asker lost"] += 1
            self.prefill.on_sender_lost(connection.asker)
        elif connection.to_decode:
            self.decode.on_message(connection.address, connection.to_decode.popleft())
        else:
            assert connection is self.decode.connections[connection.address]
            self.connections.remove(connection)
            self.decode.on_owner_lost(connection.address)

    # --------------------------------------------------------------------------------------------------- time and death

    def pass_time(self, seconds: float) -> None:
        """What is late lands in the last instant before its quarantine ends, if it did not before."""
        now_s = self.now_s + seconds
        for write in [write for write in self.late if write.until_s <= now_s]:
            self.land(write)
        self.now_s = now_s
        self.prefill.pass_time()
        self.prefill.post(TimePassed())
        self.decode.post(TimePassed())

    def land(self, write: LateWrite) -> None:
        """Into the block, whoever has it now."""
        self.late.remove(write)
        write.kv[write.target] = [LATE] * SIZE
        self.seen["late writes"] += write.kv is self.decode.engine.kv

    def kill_decode(self, *, loses_messages: bool, is_retried: Callable[[], bool]) -> None:
        """Its requests are lost or begin again at its successor, under their ids, with the tokens they have."""
        old, self.decode = self.decode, self._new_decode()
        for connection in old.connections.values():
            connection.is_decode_dead = True
            connection.to_decode.clear()
            if loses_messages:
                connection.to_prefill.clear()
            if connection.is_prefill_dead:
                self.connections.remove(connection)
        for request_id in self.alive():
            request = self.requests[request_id]
            if not is_retried():
                request.is_over = request.is_cancelled = True
                continue
            request.message = msgspec.structs.replace(
                request.message,
                token_ids=pack_tokens(request.token_ids[: request.num_given]),
                deadline_s=None if request.deadline_s is None else request.deadline_s - self.now_s,
                prefill_address=self.address,
            )
            self.seen["retried"] += 1
            self.decode.accept(request)

    def kill_prefill(self, *, loses_messages: bool) -> None:
        for connection in list(self.connections):
            connection.is_prefill_dead = True
            connection.to_prefill.clear()
            if loses_messages:
                connection.to_decode.clear()
            if connection.is_decode_dead:
                self.connections.remove(connection)
        self.prefill = self._new_prefill()
        self.address = self._new_address()

    # ---------------------------------------------------------------------------------------------------------- steps

    def step_prefill(self, failed: set[str] = frozenset()) -> None:
        self.prefill.on_instructions(self.prefill.engine.next_step(failed))

    def step_decode(self) -> None:
        self.decode.on_instructions(self.decode.engine.next_step())

    # --------------------------------------------------------------------------------------------------------- checks

    def check(self) -> None:
        self.prefill.check()
        self.decode.check()
        assert set(self.alive()) == set(self.decode.engine.scheduler.seq_ids())

    def settle(self) -> None:
        """Everything goes on and well until nothing more can without time."""
        for _ in range(5000):
            self.step_prefill()
            self.step_decode()
            deliverable = self.deliverable()
            if deliverable:
                self.deliver(*deliverable[0])
            elif self.decode.pulls:
                pull = self.decode.pulls[0]
                if pull.source is None:
                    self.decode.begin_pull(pull)
                else:
                    self.decode.end_pull(pull, "well")
            elif self.prefill.engine.step is None and self.decode.engine.step is None:
                self._check_rest()
                return
            self.check()
        raise AssertionError("it never comes to rest")

    def _check_rest(self) -> None:
        """Whoever still waits waits for room, or for the end of a lease that nobody releases."""
        held = [request_id for request_id, published in self.prefill.published.items() if published.is_whole]
        manners = {self.requests[request_id].manners for request_id in held}
        assert manners <= {"mute"}, "what was pulled, or is not wanted any more, is released"
        lent = [self.request_id_of(question.request_id) for _, question in self.prefill.lender._questions.values()]
        assert all(self.requests[request_id].manners == "mute" for request_id in lent)
        loans = self.decode.loans._loans.items()
        asked = [loan_id for loan_id, loan in loans if not (loan.is_offered_whole or loan.is_ahead)]
        assert set(asked) <= self.prefill.book._prompts.keys(), "who gets nothing is told"

    def is_clean(self) -> bool:
        pools = (self.prefill.engine.pool, self.decode.engine.pool)
        return not any(pool.num_used or pool.num_quarantined for pool in pools) and not self.alive()

    def drain(self) -> None:
        """Nobody dies or fails any more: all requests end, and then time alone frees what is still held."""
        self.settle()
        for _ in range(2 * len(self.requests) + 2):
            if self.is_clean():
                break
            self.pass_time(LONGER_THAN_ALL_S)
            self.settle()
        for side in (self.prefill, self.decode):
            side.engine.check()
            assert side.engine.scheduler.seq_ids() == ()
            assert (side.engine.pool.num_used, side.engine.pool.num_quarantined) == (0, 0)
            assert side.engine.pool.num_free == side.engine.pool.num_blocks
        books = (self.prefill.book.num_open, self.decode.book.num_open, self.decode.loans.num_pulls)
        assert (books, self.prefill.published) == ((0, 0, 0), {})
        assert (self.prefill.lender._questions, self.decode.loans._loans) == ({}, {})
        for request in self.requests.values():
            assert request.is_over
            if not request.is_cancelled and request.deadline_s is None:
                assert request.num_given == len(request.token_ids)


def config_of(quantum: int, budget: int, max_num_seqs: int) -> SchedulerConfig:
    return SchedulerConfig(
        max_model_len=44,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        chunk_quantum_tokens=quantum,
        remote_timeout_s=REMOTE_TIMEOUT_S,
        watermark=0.0,
        block_bytes=1,
    )
