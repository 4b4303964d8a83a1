"""What runs next, on which blocks: events in, instructions out. Pure: no clock, no IO, no torch.

    waiting ---> running (prefill, then decode) ---> ended, or kept until BlocksReleased
       |  ^          ^   |
       |  '-preempt--|---'
       '---> pulling-'        (remote: another worker computes the prompt; falls back to computing here)

`ledger` keeps the books, `admission` says who starts, `room` who finds room, `step_planner` fills the steps,
`remote_pulls` leads pulls to their end, `prefetches` has made ready what those that wait will load.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from typing import assert_never

from engine.scheduling.admission import Admission
from engine.scheduling.backlog import Backlog
from engine.scheduling.config import SchedulerConfig
from engine.scheduling.lateness import Lateness
from engine.scheduling.ledger import SequenceLedger
from engine.scheduling.offers import Offers, prompt_plan, prompt_sources
from engine.scheduling.plan import (
    BlocksOffered,
    BlocksReleased,
    BlocksWanted,
    CompileGrammar,
    EmitTokens,
    Event,
    FoundAhead,
    GrammarCompiled,
    Instruction,
    KvOffered,
    KvRefused,
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
    StopRemote,
    TakeIn,
    TimePassed,
)
from engine.scheduling.prefetches import Prefetches
from engine.scheduling.prompt_names import PromptNames
from engine.scheduling.refusal import Bounds, deadline_error, refusal
from engine.scheduling.remote_pulls import take_peer_tokens
from engine.scheduling.room import Room
from engine.scheduling.running_steps import RunningSteps
from engine.scheduling.sequence import Phase, Sequence
from engine.scheduling.sourcing import Sourcing
from engine.scheduling.step_cost import StepCost
from engine.scheduling.step_planner import StepPlanner
from engine.scheduling.waits import QueueWaits
from kvcache.pool import BlockPool
from kvcache.price import SHORT_TOKENS
from messages.errors import InvariantError, KvrayError, RequestError, WorkerError
from messages.price import ComputePrice, MovePrice
from messages.request import Copy
from text.grammar import CompiledGrammar


class Scheduler:
    """Decides for one worker. It is the only one who pins blocks of `pool`. One thread.

    `fingerprint` is the model's: root of all block names. `price_of` tells what bringing blocks from a copy costs this
    worker, None where they cannot come from there.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        fingerprint: bytes,
        cost: StepCost | None = None,
        price_of: Callable[[Copy], MovePrice | None] = lambda _: None,
    ) -> None:
        self._config = config
        self._pool = pool
        self._max_model_len = min(config.max_model_len, pool.num_blocks * pool.block_size)
        self._bounds = Bounds(config.max_model_len, self._max_model_len, config.vocab_size)
        self.cost = cost or StepCost()  #: what steps were measured to cost; a successor may begin with it
        self.lateness = Lateness()
        self._prompt_names = PromptNames(fingerprint, pool.block_size)
        self._ledger = SequenceLedger(pool)
        self._backlog = Backlog(self._ledger, self.cost)
        self._room = Room(self._ledger, self._backlog, config.max_num_seqs, config.watermark)
        self._sourcing = Sourcing(
            self._ledger,
            self._backlog,
            price_of,
            block_bytes=config.block_bytes,
            chunk_tokens=min(config.chunk_quantum_tokens, config.max_num_batched_tokens),
            remote_timeout_s=config.remote_timeout_s,
        )
        self._remote = self._sourcing.pulls
        self._prefetches = Prefetches(self._ledger, self._sourcing.plan, self._room.num_ahead)
        self._offers = Offers(self._ledger)
        self._planner = StepPlanner(
            self._ledger,
            self.cost,
            max_tokens=config.max_num_batched_tokens,
            quantum_tokens=config.chunk_quantum_tokens,
            itl_target_s=config.itl_target_s,
        )
        self._steps = RunningSteps(2 if config.plans_ahead else 1)
        self._admission = Admission(self._ledger, self._backlog, self._room, config.max_num_seqs, self._start)
        self._deadlines: list[tuple[float, str]] = []  # a heap of times to look at a sequence, by its id
        self._now_s, self._num_arrivals = 0.0, count()  # the last event's time, and numbers of sequences
        self._num_generated_tokens = 0
        self.waits = QueueWaits()

    # ----------------------------------------------------------------------------------------------------------- load

    @property
    def num_blocks_taken_in(self) -> int:
        """Blocks taken in from others before a sequence that runs wanted them."""
        return self._ledger.intakes.num_blocks

    def set_prices(self, price_of: Callable[[Copy], MovePrice | None]) -> None:
        """Price loading by `price_of` from now on."""
        self._sourcing.price_of = price_of

    def set_node_cache(self, address: str) -> None:
        """Ask the node cache at `address` what it has of sequences of which nobody said it; "": there is none."""
        self._prefetches.cache_address = address

    def seq_ids(self) -> tuple[str, ...]:
        """Return the ids of all sequences that have not ended, kept ones included."""
        return tuple(self._ledger.sequences)

    def stats(self) -> dict[str, int]:
        """Return the counters since the start, by name."""
        return self._ledger.prompt_counts.stats() | {
            "num_preemptions": self._ledger.num_preemptions,
            "num_generated_tokens": self._num_generated_tokens,
            "num_rejected_blocks": self._remote.num_rejected_blocks,
            "num_remote_fallbacks": self._remote.num_fallbacks,
        }

    @property
    def num_waiting(self) -> int:
        """Sequences that were not admitted yet, or were preempted."""
        return len(self._ledger.waiting)

    @property
    def num_pulling(self) -> int:
        """Sequences that wait for another worker's KV."""
        return len(self._ledger.pulling)

    @property
    def num_running(self) -> int:
        """Sequences in prefill or decode."""
        return len(self._ledger.running)

    @property
    def num_steps(self) -> int:
        """Steps that run, one that is planned ahead included."""
        return len(self._steps)

    @property
    def num_kept(self) -> int:
        """Sequences that finished, with their blocks pinned for others."""
        return len(self._ledger.sequences) - self.num_waiting - self.num_pulling - self.num_running

    @property
    def queued_tokens(self) -> int:
        """Tokens that are to be computed here before all sequences decode."""
        waiting, running = self._ledger.waiting, self._ledger.running.values()
        tokens = sum(seq.num_tokens - seq.expected_match_tokens for seq in waiting if not seq.wants_remote)
        return tokens + sum(seq.num_tokens - seq.num_computed for seq in running if not seq.is_decoding)

    @property
    def compute_price(self) -> ComputePrice:
        """What computing here costs, as it was learned; assumed before the first step with prefill."""
        return self._backlog.price

    @property
    def queued_s(self) -> float:
        """Seconds of computing, by `compute_price`, before all sequences decode."""
        self._backlog.forget()  # the last event may have moved more than it noted
        return self._backlog.seconds()

    @property
    def queued_short_s(self) -> float:
        """Seconds of `queued_s` that are for prompts of which little is to be computed."""
        return self._backlog.seconds(SHORT_TOKENS)

    @property
    def num_short(self) -> int:
        """Sequences that wait or were admitted as short prompts, which long ones leave a share to."""
        return self._room.num_short

    def declined_ids(self) -> tuple[str, ...]:
        """Return the ids of sequences whose prompt is computed here though it was placed with a prefill worker."""
        return tuple(seq.seq_id for seq in self._ledger.sequences.values() if seq.has_declined)

    @property
    def prefill_tokens_per_s(self) -> float:
        """Rate of prefill, measured over recent steps; 0 before the first."""
        return self.cost.prefill_tokens_per_s

    @property
    def decode_step_s(self) -> float:
        """Median duration of recent steps with decode rows; 0 before the first."""
        return self.cost.decode_step_s

    # --------------------------------------------------------------------------------------------------------- events

    def on_event(self, event: Event, now_s: float) -> list[Instruction]:
        """Take in `event`; return what is to be done, in order. `now_s` never goes back.

        After every event StepWanted may find something to run, as long as no step runs, or one does and the next is
        planned ahead.

        Raises:
            RequestError: an added sequence's id is in use; nothing changed.
            InvariantError: a step or a pull is reported or wanted out of turn, or a step's result lacks a token.
        """
        if isinstance(event, SequenceAdded) and event.spec.seq_id in self._ledger.sequences:
            raise RequestError(f"sequence id {event.spec.seq_id!r} is in use", param="request_id")
        out: list[Instruction] = []
        self._now_s = self._pool.now_s = now_s
        self._pool.release_quarantined(now_s)
        self._ledger.begin_event()
        is_late = self._check_deadlines(now_s, out)
        new: Sequence | None = None
        if is_late or not isinstance(event, SequenceAdded):
            self._admission.look_at_all()  # there may be more room
            self._backlog.forget()
        match event:
            case SequenceAdded(spec):
                new = self._add(spec, now_s, out)
            case SequenceCancelled(seq_id) | BlocksReleased(seq_id):
                self._ledger.end_lending(seq_id)
                if seq_id in self._ledger.sequences:
                    self._ledger.end(self._ledger.sequences[seq_id])
            case KvOffered() | KvRefused() | BlocksOffered() | GrammarCompiled():
                self._take_answer(event, out)
            case BlocksWanted():
                self._offers.lend(event, out)
            case FoundAhead():
                self._prefetches.take_found(event)
            case TakeIn():
                self._ledger.intakes.begin(event, out)
            case PullEnded():
                self._finish_pull(event, out)
            case StepEnded(result):
                self._finish_step(result, out)
            case StepWanted() | TimePassed():
                pass
            case _ as unreachable:
                assert_never(unreachable)
        self._admission.admit(now_s, out, new)
        if isinstance(event, StepWanted):
            self._begin_step(out)
        out += self._ledger.take_abandoned()
        self._prefetches.go_on(out)
        return out

    def check_invariants(self) -> None:
        """Raise InvariantError where the books do not agree, those of the pool included."""
        self._ledger.check_invariants()
        for wrong in self._prefetches.check_invariants():
            raise InvariantError(f"scheduler: sequence {wrong}")
        if self._ledger.running or self._admission.is_blocked or self.num_pulling >= self._config.max_num_seqs:
            return
        for seq in self._ledger.ready:
            if seq.held_for not in self._ledger.in_flight or self._now_s >= seq.held_until_s:
                raise InvariantError(f"scheduler: sequence {seq.seq_id!r} waits beside an idle engine")

    def _add(self, spec: SequenceSpec, now_s: float, out: list[Instruction]) -> Sequence | None:
        """Take in a sequence; None where it ended at once."""
        error = self._refusal(spec, now_s)
        if error is not None:
            out.append(EmitTokens(spec.seq_id, finish_reason="error", error=error))
            return None
        (namer, names), order = self._prompt_names.of(spec), next(self._num_arrivals)
        seq = Sequence(spec, order=order, namer=namer, names=names, block_size=self._pool.block_size)
        seq.arrived_s = now_s
        reason = seq.finish_reason(self._max_model_len) if seq.num_output_tokens else None
        if reason is not None:  # it moved here with all its tokens
            stop_token_id = seq.token_ids[-1] if reason == "stop" else None
            out.append(EmitTokens(spec.seq_id, stop_token_id=stop_token_id, finish_reason=reason))
            return None
        self._prefetches.look_up(seq, out)
        self._ledger.enqueue(seq)
        self._backlog.note(seq)
        if not seq.wants_remote and not self._room.is_short(seq):
            self._backlog.remember()
            seq.expected_s = self._backlog.seconds()
        if spec.params.grammar is not None:
            out.append(CompileGrammar(spec.seq_id, spec.params.grammar))
        self._admission.take_arrival(seq)
        if spec.deadline_s is not None:
            heapq.heappush(self._deadlines, (spec.deadline_s, seq.seq_id))
        return seq

    def _take_answer(
        self, event: KvOffered | KvRefused | BlocksOffered | GrammarCompiled, out: list[Instruction]
    ) -> None:
        """Take in what a sequence waited for, unless it waits no more."""
        if isinstance(event, BlocksOffered):
            self._ledger.intakes.take_blocks(event, out)
        seq = self._ledger.sequences.get(event.seq_id)
        if seq is None:
            return
        match event:
            case KvOffered() if seq.phase is Phase.PULLING:
                self._take_offer(seq, event, out)
            case KvRefused():
                self._take_refusal(seq, event, out)
            case BlocksOffered():
                self._remote.take_blocks(seq, event, out)
                self._offers.publish(seq.seq_id, out)
            case GrammarCompiled(_, KvrayError() as error) if seq.lacks_grammar:
                out.append(EmitTokens(seq.seq_id, finish_reason="error", error=error))
                self._ledger.end(seq)
            case GrammarCompiled(_, CompiledGrammar() as grammar):
                seq.grammar = grammar
                self._ledger.note_ready(seq)

    def _refusal(self, spec: SequenceSpec, now_s: float) -> KvrayError | None:
        """Return why the sequence cannot run now; None where it can."""
        error = refusal(spec, self._bounds, knows_tokens=self._prompt_names.is_known(spec))
        if error is not None:
            return error
        if spec.seq_id in self._ledger.orphans:
            return WorkerError(f"a pull for an earlier sequence {spec.seq_id!r} still runs")
        if spec.deadline_s is not None and spec.deadline_s <= now_s:
            return deadline_error(spec.seq_id, Phase.WAITING.value)
        return None

    def _check_deadlines(self, now_s: float, out: list[Instruction]) -> bool:
        """End sequences and pulls whose time is over; tell whether anybody's was."""
        is_late = False
        while self._deadlines and self._deadlines[0][0] <= now_s:
            _, seq_id = heapq.heappop(self._deadlines)
            seq = self._ledger.sequences.get(seq_id)
            if seq is None or seq.phase is Phase.KEPT:
                continue
            is_late = True
            if seq.spec.deadline_s is not None and seq.spec.deadline_s <= now_s:
                error = deadline_error(seq.seq_id, seq.phase.value)
                out.append(EmitTokens(seq.seq_id, finish_reason="error", error=error))
                self._ledger.end(seq)
            elif seq.pull is not None and seq.pull.deadline_s <= now_s:
                self._remote.fall_back(seq, out)
                self._offers.publish(seq.seq_id, out)
                if seq.spec.remote_s is not None:
                    out.append(StopRemote(seq.seq_id))
        return is_late

    # ------------------------------------------------------------------------------------------------------ admission

    def _start(self, seq: Sequence, matched: list[int], now_s: float, out: list[Instruction]) -> None:
        """Have an admitted sequence run or pull; `matched`: its blocks that the pool has."""
        self._ledger.admit(seq, matched[: self._prefetches.end(seq.seq_id, out)])
        if seq.began_s is None:
            seq.began_s = now_s
            self.waits.observe(now_s - seq.arrived_s)
        self._backlog.note(seq)
        num_lacking = seq.num_prompt_tokens - seq.num_computed
        plan = self._sourcing.plan(seq)
        may_ask = seq.wants_remote and self._ledger.may_pull(seq)
        is_remote = may_ask and not self._sourcing.is_cheaper_here(seq, plan)
        seq.has_declined = seq.spec.remote_s is not None and not is_remote
        seq.wants_remote = False
        seq.plan, seq.is_handed_over = plan, is_remote
        if seq.spec.is_kept and num_lacking > self._config.chunk_quantum_tokens:
            self._offers.offer(seq, out, is_last=False)  # who waits for a long prompt can pull its head meanwhile
        if is_remote:
            deadline_s = self._sourcing.ask_prefill(seq, now_s, out)
        elif plan.loads:
            deadline_s = self._sourcing.load(seq, plan, now_s, out)
        else:
            self._ledger.end_intake(seq.seq_id, out)
            return
        self._backlog.note(seq)
        heapq.heappush(self._deadlines, (deadline_s, seq.seq_id))

    def _finish_pull(self, event: PullEnded, out: list[Instruction]) -> None:
        if self._ledger.intakes.find(event.seq_id) is not None:
            self._ledger.intakes.finish_pull(event, out)
            return
        self._remote.finish_pull(event, out)
        self._offers.publish(event.seq_id, out)

    # --------------------------------------------------------------------------------------------------------- remote

    def _take_offer(self, seq: Sequence, event: KvOffered, out: list[Instruction]) -> None:
        if seq.pull is not None:
            seq.pull.num_peer_cached_tokens = event.num_peer_cached_tokens
        if event.is_last and seq.num_output_tokens == 0:
            if event.first_token is None:  # then nobody has its logits
                self._remote.fall_back(seq, out)
                return
            take_peer_tokens(seq, seq.num_prompt_tokens)
            self._append(seq, Sampled(event.first_token, event.first_logprob), out)
        if seq.phase is Phase.PULLING:
            self._remote.take_offer(seq, event, out)

    def _take_refusal(self, seq: Sequence, event: KvRefused, out: list[Instruction]) -> None:
        seq.wants_remote = False
        if event.is_suspect:
            seq.suspect()
        if seq.phase is Phase.PULLING:
            self._remote.fall_back(seq, out)

    # ---------------------------------------------------------------------------------------------------------- steps

    def _begin_step(self, out: list[Instruction]) -> None:
        self._steps.check_wanted()
        num_preemptions = self._ledger.num_preemptions
        if not self._steps:
            step = self._planner.plan()
        elif self._steps.may_be_followed:
            step = self._planner.plan_ahead(self._max_model_len)
        else:
            step = []
        if self._ledger.num_preemptions > num_preemptions:
            self._admission.look_at_seniors()  # who were preempted wait again
            self._backlog.forget()
        if not step:
            return
        self._steps.begin(step)
        is_suspect = step[0][1].is_suspect
        if is_suspect:
            out.append(EmitTokens(step[0][0].seq_id, is_alone=True))
        out.append(RunStep(StepPlan(tuple(part for part, _ in step), self._ledger.slots.take_freed(), is_suspect)))

    def _finish_step(self, result: StepResult, out: list[Instruction]) -> None:
        step = self._steps.end()
        self.cost.observe([part for part, _ in step], result.elapsed_s)
        self._ledger.bury()
        for part, seq in step:
            if seq.phase is Phase.ENDED:
                continue
            if seq.is_suspect:
                out.append(EmitTokens(seq.seq_id))  # the step that it was alone in went well
            if seq.seq_id in result.errors:
                out.append(EmitTokens(seq.seq_id, finish_reason="error", error=result.errors[seq.seq_id]))
                self._ledger.end(seq)
            else:
                self._advance(seq, part, result, out)

    def _advance(self, seq: Sequence, part: SequenceStep, result: StepResult, out: list[Instruction]) -> None:
        self._ledger.commit_up_to(seq, part.end)
        if seq.pull is not None:
            self._remote.go_on(seq, out)
        if part.wants_prompt_logprobs:
            seq.prompt_logprobs += result.prompt_logprobs.get(seq.seq_id, [])
        if part.is_sampled:
            sampled = result.sampled.get(seq.seq_id)
            if sampled is None:
                raise InvariantError(f"the step gave neither a token nor an error for sequence {seq.seq_id!r}")
            self._num_generated_tokens += 1
            self._append(seq, sampled, out)
        else:
            self._offers.publish(seq.seq_id, out)

    def _append(self, seq: Sequence, sampled: Sampled, out: list[Instruction]) -> None:
        """Emit a new token, from a step or from the prefill worker, and end the sequence if it is the last."""
        if sampled.token_id >= self._config.vocab_size:  # logits may be wider than the embedding
            error = KvrayError(f"token {sampled.token_id} was generated, past the end of the vocabulary")
            out.append(EmitTokens(seq.seq_id, finish_reason="error", error=error))
            self._ledger.end(seq)
            return
        seq.token_ids.append(sampled.token_id)
        reason = seq.finish_reason(self._max_model_len)
        if seq.spec.is_kept:
            self._offers.offer(seq, out, is_last=True)
        is_first = not seq.has_emitted
        if is_first:
            self.lateness.observe(seq.expected_s, self._now_s - seq.arrived_s)
            if seq.phase is not Phase.PULLING:
                self._ledger.prompt_counts.take(seq)
        seq.has_emitted = True
        out.append(
            EmitTokens(
                seq.seq_id,
                [sampled.token_id],
                [] if sampled.logprob is None else [sampled.logprob],
                prompt_logprobs=seq.prompt_logprobs if seq.wants_prompt_logprobs else None,
                sources=prompt_sources(seq) if is_first else None,
                plan=prompt_plan(seq, self._config.block_bytes, self._now_s) if is_first else None,
                stop_token_id=seq.token_ids[-1] if reason == "stop" else None,
                finish_reason=reason,
            )
        )
        seq.wants_prompt_logprobs = False
        if self._config.has_lower_tiers and (is_first or reason is not None):
            self._offers.offload(seq, out)
        if reason is not None:
            if seq.spec.is_kept:
                self._ledger.keep(seq)
            else:
                self._ledger.end(seq)
