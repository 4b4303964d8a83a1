"""What runs next, on which blocks: events in, instructions out. Pure: no clock, no IO, no torch.

    waiting ---> running (prefill, then decode) ---> ended, or kept until BlocksReleased
       |  ^          ^   |
       |  '-preempt--|---'
       '---> pulling-'        (remote: another worker computes the prompt; falls back to computing here)

Blocks belong to the table of a sequence, pinned once for each table that holds them. Those that a step or a pull in
progress touches are unpinned when it ends, whatever became of the sequence meanwhile.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

from engine.plan import (
    AskRemote,
    BlocksReleased,
    EmitTokens,
    Event,
    Instruction,
    KvOffered,
    KvRefused,
    OfferBlocks,
    PullBlocks,
    PullEnded,
    RunStep,
    Sampled,
    SequenceAdded,
    SequenceCancelled,
    SequenceSpec,
    SequenceStep,
    StepEnded,
    StepPlan,
    StepResult,
    StepWanted,
    TimePassed,
)
from engine.sequence import Phase, RemotePull, Sequence
from engine.step_cost import ChunkBudget, StepCost
from kvcache.names import BlockNamer
from kvcache.pool import BlockPool
from messages.errors import CapacityError, ConfigError, InvariantError, RequestError, ServeError, WorkerError
from messages.handoff import BlockLocation
from messages.stream import FinishReason, PromptSources

# A prefill that got nothing for so many steps goes before all others, whatever their priority.
_MAX_PASSED_OVER = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """The scheduler's numbers.

    Raises:
        ConfigError: one makes no sense.
    """

    max_model_len: int  #: tokens, prompt and output
    max_num_seqs: int = 256  #: running or pulling at once
    max_num_batched_tokens: int = 2048  #: in one step; a row for each decode and one chunk fit in any case
    chunk_quantum_tokens: int = 256  #: prefill chunks end at multiples of it
    itl_target_s: float = 0.1  #: steps with decodes take no more prefill than fits in it, but always one chunk
    #: a remote sequence that lacks fewer tokens than this computes them here
    remote_threshold_tokens: int | Callable[[], int] = 256
    remote_timeout_s: float = 30.0  #: from AskRemote to the end of the last pull
    watermark: float = 0.01  #: share of the pool left free at admission, for running sequences to grow into

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "chunk_quantum_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; at least 1 is wanted")
        if not 0 <= self.watermark < 1:
            raise ConfigError(f"watermark is {self.watermark}; a share from 0 up to 1 is wanted")


class Scheduler:
    """Decides for one worker. It is the only one who pins blocks of `pool`. One thread.

    `fingerprint` is the model's: root of all block names.
    """

    def __init__(self, config: SchedulerConfig, pool: BlockPool, fingerprint: bytes) -> None:
        self._config = config
        self._pool = pool
        self._fingerprint = fingerprint
        self._max_model_len = min(config.max_model_len, pool.num_blocks * pool.block_size)
        self._cost = StepCost()
        self._sequences: dict[str, Sequence] = {}  # all but the ended
        self._waiting: list[Sequence] = []  # by seniority
        self._pulling: dict[str, Sequence] = {}
        self._running: dict[str, Sequence] = {}
        self._step: list[tuple[SequenceStep, Sequence]] | None = None
        #: targets of pulls whose sequence went on or ended without them: seq id -> (index, block id, name)
        self._orphans: dict[str, list[tuple[int, int, bytes]]] = {}
        self._in_flight: dict[bytes, Sequence] = {}  # names of blocks that a running or pulling sequence will commit
        self._blocked: Sequence | None = None  # first in the queue, and there was no room for it
        self._deadlines: list[tuple[float, int, Sequence, RemotePull | None]] = []  # a heap
        self._num_arrivals = 0
        self._stats: dict[str, int] = {
            "num_preemptions": 0,
            "num_prompt_tokens_device": 0,
            "num_prompt_tokens_peer": 0,
            "num_prompt_tokens_computed": 0,
            "num_generated_tokens": 0,
            "num_rejected_blocks": 0,
            "num_remote_fallbacks": 0,
        }

    # --------------------------------------------------------------------------------------------------------- load

    def seq_ids(self) -> tuple[str, ...]:
        """All sequences that have not ended, kept ones included."""
        return tuple(self._sequences)

    def stats(self) -> dict[str, int]:
        """Counters since the start, by name."""
        return dict(self._stats)

    @property
    def num_waiting(self) -> int:
        """Not yet admitted, or preempted."""
        return len(self._waiting)

    @property
    def num_pulling(self) -> int:
        """Waiting for another worker's KV."""
        return len(self._pulling)

    @property
    def num_running(self) -> int:
        """In prefill or decode."""
        return len(self._running)

    @property
    def num_kept(self) -> int:
        """Finished, with their blocks pinned for others."""
        return len(self._sequences) - len(self._waiting) - len(self._pulling) - len(self._running)

    @property
    def queued_tokens(self) -> int:
        """Tokens that are to be computed here before all sequences decode."""
        waiting = sum(s.num_tokens - s.expected_match_tokens for s in self._waiting if not s.wants_remote)
        return waiting + sum(s.num_tokens - s.num_computed for s in self._running.values() if not s.is_decoding)

    @property
    def prefill_tokens_per_s(self) -> float:
        """Measured over recent steps; 0 before the first."""
        return self._cost.prefill_tokens_per_s

    @property
    def decode_step_s(self) -> float:
        """Measured median; 0 before the first."""
        return self._cost.decode_step_s

    # -------------------------------------------------------------------------------------------------------- events

    def on_event(self, event: Event, now_s: float) -> list[Instruction]:
        """What is to be done about `event`, in order. `now_s` never goes back.

        After every event, when the runner is idle, StepWanted may find something to run.

        Raises:
            RequestError: an added sequence's id is in use; nothing changed.
            InvariantError: a step is reported or wanted out of turn, or its result lacks a token.
        """
        out: list[Instruction] = []
        self._pool.release_quarantined(now_s)
        self._check_deadlines(now_s, out)
        if not isinstance(event, SequenceAdded):
            self._blocked = None
        match event:
            case SequenceAdded(spec):
                self._add(spec, now_s, out)
            case SequenceCancelled(seq_id) | BlocksReleased(seq_id):
                if seq_id in self._sequences:
                    self._end(self._sequences[seq_id])
            case KvOffered():
                self._take_offer(event, now_s, out)
            case KvRefused(seq_id):
                self._take_refusal(seq_id, out)
            case PullEnded():
                self._finish_pull(event, out)
            case StepEnded(result):
                self._finish_step(result, now_s, out)
            case StepWanted() | TimePassed():
                pass
            case _ as unreachable:
                assert_never(unreachable)
        self._admit(now_s, out)
        if isinstance(event, StepWanted):
            self._plan_step(out)
        return out

    def _add(self, spec: SequenceSpec, now_s: float, out: list[Instruction]) -> None:
        if spec.seq_id in self._sequences or spec.seq_id in self._orphans:
            raise RequestError(f"sequence id {spec.seq_id!r} is in use", param="request_id")
        error = self._refusal(spec, now_s)
        if error is not None:
            out.append(EmitTokens(spec.seq_id, finish_reason="error", error=error))
            return
        namer = BlockNamer(self._fingerprint, spec.salt, self._pool.block_size)
        seq = Sequence(spec, order=self._num_arrivals, namer=namer, block_size=self._pool.block_size)
        self._num_arrivals += 1
        reason = self._finish_reason(seq) if seq.num_output_tokens else None
        if reason is not None:  # it moved here with all its tokens
            out.append(EmitTokens(spec.seq_id, stop_token_id=_stop_token(seq, reason), finish_reason=reason))
            return
        self._sequences[seq.seq_id] = seq
        insort(self._waiting, seq, key=_seniority)
        if self._blocked is not None and seq.seniority < self._blocked.seniority:
            self._blocked = None
        if spec.deadline_s is not None:
            heapq.heappush(self._deadlines, (spec.deadline_s, seq.order, seq, None))

    def _refusal(self, spec: SequenceSpec, now_s: float) -> ServeError | None:
        """Why the sequence can never run."""
        num_tokens, pool = len(spec.token_ids), self._pool
        if not 1 <= spec.num_prompt_tokens <= num_tokens:
            return RequestError(
                f"num_prompt_tokens is {spec.num_prompt_tokens}; from 1 to the {num_tokens} tokens given is wanted",
                param="prompt",
            )
        if spec.num_prompt_tokens + 1 > self._config.max_model_len:
            return RequestError(
                f"the prompt has {spec.num_prompt_tokens} tokens; at most {self._config.max_model_len - 1} fit beside "
                f"one output token in the model's {self._config.max_model_len}",
                param="prompt",
                code="context_length_exceeded",
            )
        if spec.num_prompt_tokens + 1 > self._max_model_len:
            return CapacityError(
                f"the prompt has {spec.num_prompt_tokens} tokens; the KV pool of {pool.num_blocks} blocks of "
                f"{pool.block_size} holds {self._max_model_len}, one of them for output",
                code="context_length_exceeded",
                status=400,
            )
        if spec.deadline_s is not None and spec.deadline_s <= now_s:
            return _deadline_error(spec.seq_id, Phase.WAITING)
        return None

    def _check_deadlines(self, now_s: float, out: list[Instruction]) -> None:
        while self._deadlines and self._deadlines[0][0] <= now_s:
            _, _, seq, pull = heapq.heappop(self._deadlines)
            if pull is not None:
                if seq.pull is pull:
                    self._fall_back(seq)
            elif seq.phase not in (Phase.KEPT, Phase.ENDED):
                error = _deadline_error(seq.seq_id, seq.phase)
                out.append(EmitTokens(seq.seq_id, finish_reason="error", error=error))
                self._end(seq)

    # ----------------------------------------------------------------------------------------------------- admission

    def _admit(self, now_s: float, out: list[Instruction]) -> None:
        """Move sequences out of the queue, by seniority, until one finds no room."""
        if self._blocked is not None:
            return
        position = 0
        while position < len(self._waiting) and len(self._running) + len(self._pulling) < self._config.max_num_seqs:
            seq = self._waiting[position]
            if seq.held_for is not None and seq.held_for in self._in_flight:
                position += 1
                continue
            matched = self._pool.match(seq.names[: seq.max_match_blocks])
            if self._hold_back(seq, len(matched)):
                position += 1
                continue
            if not self._has_room(seq, matched):
                self._blocked = seq
                return
            del self._waiting[position]
            self._start(seq, matched, now_s, out)

    def _hold_back(self, seq: Sequence, num_matched: int) -> bool:
        """Whether the next block that `seq` lacks is about to be written by another: then it is computed only once.

        The wait ends: names are in flight only while their sequence runs or pulls, and both always end.
        """
        seq.held_for, seq.expected_match_tokens = None, 0
        if num_matched >= seq.max_match_blocks or seq.names[num_matched] not in self._in_flight:
            return False
        end = num_matched
        while end < seq.max_match_blocks and (seq.names[end] in self._in_flight or self._pool.holds(seq.names[end])):
            end += 1
        seq.held_for, seq.expected_match_tokens = seq.names[num_matched], end * seq.block_size
        return True

    def _has_room(self, seq: Sequence, matched: list[int]) -> bool:
        """Whether the pool has blocks for all known tokens of `seq` and of those that run already."""
        pool = self._pool
        available = pool.num_free - sum(pool.num_pins(block_id) == 0 for block_id in matched)
        wanted = seq.num_blocks_for(seq.num_tokens) - len(matched)
        if self._running or self._pulling:
            wanted += sum(other.num_lacking_blocks for other in self._running.values())
            wanted += max(1, int(self._config.watermark * pool.num_blocks))
        return wanted <= available

    def _start(self, seq: Sequence, matched: list[int], now_s: float, out: list[Instruction]) -> None:
        self._pool.pin(matched)
        seq.block_table = matched
        seq.num_computed = len(matched) * seq.block_size
        seq.num_passed_over = 0
        if not seq.has_emitted:
            seq.num_device_tokens = min(seq.num_computed, seq.num_prompt_tokens)
        if seq.wants_remote and seq.num_prompt_tokens - seq.num_computed >= self._remote_threshold_tokens():
            self._start_pulling(seq, now_s, out)
        else:
            seq.phase = Phase.RUNNING
            self._running[seq.seq_id] = seq
            if seq.spec.is_kept and seq.num_prompt_tokens - seq.num_computed > self._config.chunk_quantum_tokens:
                self._offer(seq, out, is_last=False)  # who waits for a long prompt can pull its head meanwhile
        seq.wants_remote = False
        for name in seq.names[len(matched) :]:
            self._in_flight.setdefault(name, seq)

    def _remote_threshold_tokens(self) -> int:
        threshold = self._config.remote_threshold_tokens
        return max(1, threshold() if callable(threshold) else threshold)

    # ------------------------------------------------------------------------------------------------------- planning

    def _plan_step(self, out: list[Instruction]) -> None:
        """Decodes first, one row each; then chunks of prefill and of replay, as the budget allows."""
        if self._step is not None:
            raise InvariantError("a step is wanted while one runs")
        parts: dict[str, SequenceStep] = {}
        chunked: list[Sequence] = []
        for seq in list(self._running.values()):
            if not seq.is_decoding:
                chunked.append(seq)
            elif seq.phase is Phase.RUNNING and self._reserve(seq, seq.num_tokens, parts):
                parts[seq.seq_id] = _part(seq, seq.num_tokens)
        if chunked:
            self._plan_chunks(chunked, parts)
        if not parts:
            return
        planned = sorted(parts.values(), key=_is_prefill)  # stable
        self._step = [(part, self._running[part.seq_id]) for part in planned]
        for _, seq in self._step:
            seq.is_in_step = True
        out.append(RunStep(StepPlan(planned)))

    def _plan_chunks(self, chunked: list[Sequence], parts: dict[str, SequenceStep]) -> None:
        """Short remainders first, which gives the lowest mean TTFT; who is passed over counts as ever shorter."""
        budget = ChunkBudget(
            self._cost,
            max_tokens=self._config.max_num_batched_tokens,
            quantum_tokens=self._config.chunk_quantum_tokens,
            decode_parts=list(parts.values()),
            target_s=self._config.itl_target_s,
        )
        for seq in sorted(chunked, key=_chunk_order):
            if seq.phase is not Phase.RUNNING:
                continue  # preempted by one before it
            self._extend_match(seq)
            start = seq.num_computed
            end = budget.end_of(start, seq.num_prompt_tokens, seq.num_tokens)
            if end > start and self._reserve(seq, end, parts):
                parts[seq.seq_id] = _part(seq, end)
                budget.spend(start, end, seq.num_prompt_tokens)
                seq.num_passed_over = 0
            else:
                seq.num_passed_over += 1

    def _extend_match(self, seq: Sequence) -> None:
        """Take blocks that came to be held since admission: others wrote them, or they follow a bad one of a pull."""
        begin = len(seq.block_table)
        if seq.num_computed != begin * seq.block_size or begin >= seq.max_match_blocks:
            return
        matched = self._pool.match(seq.names[i] for i in range(begin, seq.max_match_blocks))
        if not matched:
            return
        self._pool.pin(matched)
        self._forget_in_flight(seq, begin, begin + len(matched))
        seq.block_table += matched
        seq.num_computed += len(matched) * seq.block_size
        if not seq.has_emitted:
            seq.num_device_tokens += min(seq.num_computed, seq.num_prompt_tokens) - min(
                begin * seq.block_size, seq.num_prompt_tokens
            )

    def _reserve(self, seq: Sequence, end: int, parts: dict[str, SequenceStep]) -> bool:
        """Make the table of `seq` cover `end` tokens; preempt its juniors for that if need be.

        The most senior sequence can preempt all others, so one always goes on; who finds no room keeps its blocks and
        waits.
        """
        num_lacking = seq.num_blocks_for(end) - len(seq.block_table)
        if num_lacking <= 0:
            return True
        while self._pool.num_free < num_lacking:
            victim = max((s for s in self._running.values() if s.block_table), key=_seniority, default=seq)
            if victim.seniority <= seq.seniority:
                return False
            parts.pop(victim.seq_id, None)
            self._preempt(victim)
        seq.block_table += self._pool.allocate(num_lacking)
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Back to the queue. Its full blocks stay named, so that most of it comes back by reuse."""
        del self._running[seq.seq_id]
        seq.extend_names()
        self._forget_in_flight(seq, 0, len(seq.names))
        self._pool.unpin(seq.block_table)
        seq.block_table = []
        seq.num_computed = 0
        seq.num_offered_blocks = 0
        if not seq.has_emitted:
            seq.num_device_tokens = seq.num_peer_tokens = 0
            seq.prompt_logprobs = [None]
        seq.phase = Phase.WAITING
        insort(self._waiting, seq, key=_seniority)
        self._stats["num_preemptions"] += 1

    # --------------------------------------------------------------------------------------------------- after a step

    def _finish_step(self, result: StepResult, now_s: float, out: list[Instruction]) -> None:
        if self._step is None:
            raise InvariantError("a step ended that was not running")
        step, self._step = self._step, None
        self._cost.observe([part for part, _ in step], result.elapsed_s)
        for part, seq in step:
            seq.is_in_step = False
            if seq.phase is Phase.ENDED:
                self._give_back(seq)
            elif seq.seq_id in result.errors:
                out.append(EmitTokens(seq.seq_id, finish_reason="error", error=result.errors[seq.seq_id]))
                self._end(seq)
            else:
                self._advance(seq, part, result, out)

    def _advance(self, seq: Sequence, part: SequenceStep, result: StepResult, out: list[Instruction]) -> None:
        self._commit(seq, part.end)
        if part.wants_prompt_logprobs:
            seq.prompt_logprobs += result.prompt_logprobs.get(seq.seq_id, [])
        if part.is_sampled:
            sampled = result.sampled.get(seq.seq_id)
            if sampled is None:
                raise InvariantError(f"the step gave neither a token nor an error for sequence {seq.seq_id!r}")
            self._append(seq, sampled, out)
        elif seq.spec.is_kept:
            self._offer(seq, out, is_last=False)

    def _commit(self, seq: Sequence, end: int) -> None:
        """The KV of all tokens before `end` is written: name the blocks that became full."""
        begin_block, end_block = seq.num_computed // seq.block_size, end // seq.block_size
        seq.num_computed = end
        if end_block > len(seq.names):
            seq.extend_names()
        for index in range(begin_block, end_block):
            self._pool.commit(seq.block_table[index], seq.names[index])
        self._forget_in_flight(seq, begin_block, end_block)

    def _append(self, seq: Sequence, sampled: Sampled, out: list[Instruction]) -> None:
        """A new token, from a step or from the prefill worker: emit it, and end the sequence if it is the last."""
        seq.token_ids.append(sampled.token_id)
        self._stats["num_generated_tokens"] += 1
        reason = self._finish_reason(seq)
        if seq.spec.is_kept:
            self._offer(seq, out, is_last=True)
        is_first = not seq.has_emitted
        seq.has_emitted = True
        out.append(
            EmitTokens(
                seq.seq_id,
                [sampled.token_id],
                [] if sampled.logprob is None else [sampled.logprob],
                prompt_logprobs=seq.prompt_logprobs if is_first and seq.wants_prompt_logprobs else None,
                sources=self._sources(seq) if is_first else None,
                stop_token_id=_stop_token(seq, reason),
                finish_reason=reason,
            )
        )
        if is_first:
            seq.wants_prompt_logprobs = False
        if reason is None:
            return
        if seq.spec.is_kept:
            del self._running[seq.seq_id]
            self._forget_in_flight(seq, 0, len(seq.names))
            seq.phase = Phase.KEPT
        else:
            self._end(seq)

    def _finish_reason(self, seq: Sequence) -> FinishReason | None:
        """Whether the sequence's last token, a generated one, ends it."""
        params = seq.params
        if seq.token_ids[-1] in params.stop_token_ids and seq.num_output_tokens > params.min_tokens:
            return "stop"
        max_tokens = 1 if seq.spec.is_kept else params.max_tokens
        if seq.num_output_tokens >= max_tokens or seq.num_tokens >= self._max_model_len:
            return "length"
        return None

    def _sources(self, seq: Sequence) -> PromptSources:
        computed = seq.num_prompt_tokens - seq.num_device_tokens - seq.num_peer_tokens
        self._stats["num_prompt_tokens_device"] += seq.num_device_tokens
        self._stats["num_prompt_tokens_peer"] += seq.num_peer_tokens
        self._stats["num_prompt_tokens_computed"] += computed
        return PromptSources(device=seq.num_device_tokens, peer=seq.num_peer_tokens, computed=computed)

    def _offer(self, seq: Sequence, out: list[Instruction], *, is_last: bool) -> None:
        """Tell which prompt blocks of a kept sequence are written: full ones, and at last the partial one."""
        num_written = min(seq.num_computed, seq.num_prompt_tokens)
        end = seq.num_blocks_for(num_written) if is_last else num_written // seq.block_size
        blocks = []
        for index in range(seq.num_offered_blocks, end):
            block_id = seq.block_table[index]
            num_tokens = min(seq.block_size, num_written - index * seq.block_size)
            name = seq.names[index] if num_tokens == seq.block_size else b""
            blocks.append(BlockLocation(index, block_id, self._pool.generation(block_id), name, num_tokens))
        seq.num_offered_blocks = end
        if blocks or is_last:
            out.append(OfferBlocks(seq.seq_id, blocks, is_last, seq.num_device_tokens))

    # --------------------------------------------------------------------------------------------------------- remote

    def _start_pulling(self, seq: Sequence, now_s: float, out: list[Instruction]) -> None:
        num_held = len(seq.block_table)
        seq.block_table += self._pool.allocate(seq.num_blocks_for(seq.num_prompt_tokens) - num_held)
        seq.pull = RemotePull(first_index=num_held)
        seq.phase = Phase.PULLING
        self._pulling[seq.seq_id] = seq
        self._num_arrivals += 1  # no two entries of the heap compare equal up to the sequence
        heapq.heappush(self._deadlines, (now_s + self._config.remote_timeout_s, self._num_arrivals, seq, seq.pull))
        out.append(AskRemote(seq.seq_id, seq.num_computed))

    def _take_offer(self, event: KvOffered, now_s: float, out: list[Instruction]) -> None:
        seq = self._pulling.get(event.seq_id)
        if seq is None or seq.pull is None:
            return  # too late: cancelled, or being computed here
        pull = seq.pull
        pull.num_peer_cached_tokens = event.num_peer_cached_tokens
        for location in event.blocks:
            index = location.index
            if not pull.first_index <= index < len(seq.block_table) or index in pull.arrived or index in pull.open:
                continue
            if self._is_expected(seq, location):
                pull.offered[index] = location
            else:
                self._stats["num_rejected_blocks"] += 1
        self._pull_offered(seq, pull, out)
        if not event.is_last:
            return
        pull.has_last_offer = True
        if seq.num_output_tokens == 0:
            if event.first_token is None:
                self._fall_back(seq)
                return
            self._count_peer_tokens(seq, seq.num_prompt_tokens)
            self._append(seq, Sampled(event.first_token, event.first_logprob), out)
        if seq.phase is Phase.PULLING:
            self._finish_pulling(seq, pull)

    def _is_expected(self, seq: Sequence, location: BlockLocation) -> bool:
        """Whether an offered block is the one that this sequence has at that index."""
        num_tokens = min(seq.block_size, seq.num_prompt_tokens - location.index * seq.block_size)
        name = seq.names[location.index] if num_tokens == seq.block_size else b""
        return location.num_tokens == num_tokens and location.name == name

    def _pull_offered(self, seq: Sequence, pull: RemotePull, out: list[Instruction]) -> None:
        if pull.open or not pull.offered:
            return
        pull.open, pull.offered = pull.offered, {}
        pairs = [(location, seq.block_table[index]) for index, location in pull.open.items()]
        out.append(PullBlocks(seq.seq_id, pairs))

    def _finish_pull(self, event: PullEnded, out: list[Instruction]) -> None:
        if event.seq_id in self._orphans:
            self._free_orphans(event)
            return
        seq = self._pulling.get(event.seq_id)
        if seq is None or seq.pull is None or not seq.pull.open:
            raise InvariantError(f"a pull of sequence {event.seq_id!r} ended that was not running")
        pull = seq.pull
        for index in pull.open:
            if index in event.bad_indexes:
                self._stats["num_rejected_blocks"] += 1
                continue
            pull.arrived.add(index)
            if (index + 1) * seq.block_size <= seq.num_prompt_tokens:
                self._pool.commit(seq.block_table[index], seq.names[index])
                self._forget_in_flight(seq, index, index + 1)
        if event.quarantine_until_s is not None and event.bad_indexes:
            self._fall_back(seq)
            self._free_orphans(event)
            return
        pull.open = {}
        self._pull_offered(seq, pull, out)
        self._finish_pulling(seq, pull)

    def _finish_pulling(self, seq: Sequence, pull: RemotePull) -> None:
        """Go on with decode when everything was offered and pulled, or compute what did not arrive."""
        if not pull.has_last_offer or pull.open or pull.offered:
            return
        if pull.first_missing(len(seq.block_table)) < len(seq.block_table):
            self._fall_back(seq)
            return
        seq.pull = None
        seq.num_computed = seq.num_prompt_tokens
        self._run_pulled(seq)

    def _take_refusal(self, seq_id: str, out: list[Instruction]) -> None:
        seq = self._sequences.get(seq_id)
        if seq is None:
            return
        seq.wants_remote = False
        if seq.phase is Phase.PULLING:
            self._fall_back(seq)

    def _fall_back(self, seq: Sequence) -> None:
        """Keep what arrived before the first gap; the rest is computed here, tokens emitted already are replayed."""
        pull = seq.pull
        if pull is None:
            raise InvariantError(f"sequence {seq.seq_id!r} is {seq.phase.value}, not pulling")
        self._stats["num_remote_fallbacks"] += 1
        num_blocks = pull.first_missing(len(seq.block_table))
        if seq.num_output_tokens == 0:
            num_blocks = min(num_blocks, seq.max_match_blocks)  # the last token's logits are wanted
        self._drop_tail(seq, pull, num_blocks)
        seq.num_computed = min(num_blocks * seq.block_size, seq.num_prompt_tokens)
        if not seq.has_emitted:
            self._count_peer_tokens(seq, seq.num_computed)
        self._run_pulled(seq)

    def _drop_tail(self, seq: Sequence, pull: RemotePull, num_blocks: int) -> None:
        """Give back all blocks of a pulling sequence from index `num_blocks` on; targets of the open pull later."""
        targets = [i for i in pull.open if i not in pull.arrived]
        if targets:
            names = seq.names
            self._orphans[seq.seq_id] = [
                (i, seq.block_table[i], names[i] if (i + 1) * seq.block_size <= seq.num_prompt_tokens else b"")
                for i in targets
            ]
        tail = [seq.block_table[i] for i in range(num_blocks, len(seq.block_table)) if i not in targets]
        self._pool.unpin(tail)
        seq.block_table = seq.block_table[:num_blocks]
        seq.pull = None

    def _free_orphans(self, event: PullEnded) -> None:
        """The pull of a sequence that did not wait for it ended: keep what is good for others, free the rest."""
        for index, block_id, name in self._orphans.pop(event.seq_id, []):
            is_bad = index in event.bad_indexes
            if is_bad and event.quarantine_until_s is not None:
                self._pool.quarantine([block_id], event.quarantine_until_s)
                continue
            if name and not is_bad:
                self._pool.commit(block_id, name)
            self._pool.unpin([block_id])

    def _count_peer_tokens(self, seq: Sequence, num_pulled: int) -> None:
        """Of the first `num_pulled` prompt tokens, those not held here that the peer had cached."""
        if seq.pull is None:
            return
        cached = min(seq.pull.num_peer_cached_tokens, num_pulled)
        seq.num_peer_tokens = max(0, cached - seq.num_device_tokens)

    def _run_pulled(self, seq: Sequence) -> None:
        del self._pulling[seq.seq_id]
        seq.phase = Phase.RUNNING
        seq.num_passed_over = 0
        self._running[seq.seq_id] = seq

    # ------------------------------------------------------------------------------------------------------------ end

    def _end(self, seq: Sequence) -> None:
        """The sequence is gone; its blocks too, as soon as no step and no pull uses them."""
        del self._sequences[seq.seq_id]
        match seq.phase:
            case Phase.WAITING:
                self._waiting.remove(seq)
            case Phase.PULLING:
                del self._pulling[seq.seq_id]
            case Phase.RUNNING:
                del self._running[seq.seq_id]
            case Phase.KEPT:
                pass
            case Phase.ENDED:
                raise InvariantError(f"sequence {seq.seq_id!r} ended twice")
            case _ as unreachable:
                assert_never(unreachable)
        seq.phase = Phase.ENDED
        self._forget_in_flight(seq, 0, len(seq.names))
        if seq.pull is not None:
            self._drop_tail(seq, seq.pull, 0)
        elif not seq.is_in_step:
            self._give_back(seq)

    # ------------------------------------------------------------------------------------------------------ invariants

    def check_invariants(self) -> None:
        """Raises InvariantError where the books do not agree, those of the pool included."""
        self._pool.check_invariants()
        for seq in self._sequences.values():
            self._check_sequence(seq)
        lists = (self._waiting, self._pulling.values(), self._running.values())
        _require(
            sorted(s.order for group in lists for s in group)
            == sorted(s.order for s in self._sequences.values() if s.phase is not Phase.KEPT),
            "every sequence is in the one list of its phase",
        )
        _require(self._waiting == sorted(self._waiting, key=_seniority), "the queue is in order")
        pins = [0] * self._pool.num_blocks
        in_step = [seq for _, seq in self._step or [] if seq.phase is Phase.ENDED]
        for seq in [*self._sequences.values(), *in_step]:
            for block_id in seq.block_table:
                pins[block_id] += 1
        for targets in self._orphans.values():
            for _, block_id, _ in targets:
                pins[block_id] += 1
        _require(
            pins == [self._pool.num_pins(block_id) for block_id in range(self._pool.num_blocks)],
            "a block is pinned once for each table that holds it",
        )
        _require(
            all(seq.phase in (Phase.RUNNING, Phase.PULLING) for seq in self._in_flight.values()),
            "only who runs or pulls is waited for",
        )

    def _check_sequence(self, seq: Sequence) -> None:
        table, pool = seq.block_table, self._pool
        match seq.phase:
            case Phase.WAITING:
                _require(not table and not seq.num_computed and not seq.is_in_step, "who waits holds nothing")
            case Phase.PULLING:
                _require(len(table) == seq.num_blocks_for(seq.num_prompt_tokens), "a pull has all its targets")
            case Phase.RUNNING:
                _require(seq.num_computed < seq.num_tokens, "who runs has something to compute")
            case Phase.KEPT:
                _require(seq.num_computed >= seq.num_prompt_tokens, "what is kept is whole")
            case Phase.ENDED:
                _require(False, "who ended is forgotten")
            case _ as unreachable:
                assert_never(unreachable)
        _require((seq.pull is not None) == (seq.phase is Phase.PULLING), "who pulls, and nobody else, has a pull")
        _require(len(table) >= seq.num_blocks_for(seq.num_computed), "tables cover what is computed")
        _require(
            all(pool.name(table[i]) in (None, seq.names[i]) for i in range(seq.num_computed // seq.block_size)),
            "blocks have the names of their sequences",
        )
        partial = table[seq.num_computed // seq.block_size :] if seq.pull is None else []
        _require(
            all(pool.name(block_id) is None and pool.num_pins(block_id) == 1 for block_id in partial),
            "what is still to be written is nobody else's",
        )

    def _give_back(self, seq: Sequence) -> None:
        self._pool.unpin(seq.block_table)
        seq.block_table = []

    def _forget_in_flight(self, seq: Sequence, begin: int, end: int) -> None:
        for name in seq.names[begin:end]:
            if self._in_flight.get(name) is seq:
                del self._in_flight[name]


def _seniority(seq: Sequence) -> tuple[int, int]:
    return seq.seniority


def _chunk_order(seq: Sequence) -> tuple[bool, int, int, int]:
    is_patient = seq.num_passed_over < _MAX_PASSED_OVER
    remaining = (seq.num_tokens - seq.num_computed) >> seq.num_passed_over
    return (is_patient, seq.spec.priority if is_patient else 0, remaining, seq.order)


def _is_prefill(part: SequenceStep) -> bool:
    return part.kind == "prefill"


def _part(seq: Sequence, end: int) -> SequenceStep:
    """Compute `seq` up to `end`."""
    is_prefill = seq.num_computed < seq.num_prompt_tokens
    return SequenceStep(
        seq_id=seq.seq_id,
        kind="prefill" if is_prefill else "decode",
        token_ids=seq.token_ids,
        num_prompt_tokens=seq.num_prompt_tokens,
        start=seq.num_computed,
        num_tokens=end - seq.num_computed,
        block_table=seq.block_table,
        params=seq.params,
        is_sampled=end == seq.num_tokens,
        wants_prompt_logprobs=seq.wants_prompt_logprobs,
    )


def _stop_token(seq: Sequence, reason: FinishReason | None) -> int | None:
    return seq.token_ids[-1] if reason == "stop" else None


def _require(is_true: bool, what: str) -> None:
    if not is_true:
        raise InvariantError(f"scheduler: not true that {what}")


def _deadline_error(seq_id: str, phase: Phase) -> WorkerError:
    return WorkerError(
        f"sequence {seq_id!r} was {phase.value} when its deadline passed", code="deadline_exceeded", status=504
    )
