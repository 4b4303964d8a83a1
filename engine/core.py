"""One engine: scheduler, block pool and runner put together, without threads, processes or a clock of its own.

Use it directly (tests, benchmarks, a notebook):

    engine = Engine.build(loaded, EngineOptions(kv_cache_bytes=2**30))
    engine.post(SequenceAdded(spec))
    while engine.has_work():
        for emitted in engine.step(): ...

A worker drives the same object from its event loop (engine.driver).
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine.cores import NodeCores, num_cores
from engine.memory.checksums import BlockChecksums
from engine.memory.copies import DeviceCopies
from engine.memory.device import device_of
from engine.memory.device_memory import DeviceMemory
from engine.memory.device_room import CudaReader
from engine.memory.kv_pool import KvPool, block_bytes, host_room, plan_num_blocks
from engine.model.load import LoadedModel
from engine.profiling import Limits, measured_room
from engine.runner import Accelerator, LaunchedStep, Runner
from engine.sampling.sampler import Sampler
from engine.scheduling.config import SchedulerConfig
from engine.scheduling.plan import (
    CompileGrammar,
    EmitTokens,
    Event,
    GrammarCompiled,
    Instruction,
    RunStep,
    SequenceAdded,
    SequenceSpec,
    StepEnded,
    StepPlan,
    StepResult,
    StepWanted,
)
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.step_cost import StepCost
from engine.split_steps import SplitStep, SplitSteps
from engine.step_threads import StepThreads
from engine.steps.cuda import CudaSteps
from kvcache.pool import BlockPool
from kvcache.region import GENERATION_BYTES, RegionLayout
from messages.errors import ConfigError, RequestError
from messages.request import Grammar, SamplingParams
from messages.scaling import WorkerScaling
from text.grammar import GrammarCompiler, GrammarTokenizer
from text.llama_tokenizer import TokenizerRules
from text.tokenizer import Tokenizer
from transport.memory import Memory

_WARM_UP_PROMPT_TOKENS = 512
_WARM_UP_OUTPUT_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """The settings of an engine."""

    block_size: int = 16  #: tokens
    kv_cache_bytes: int | None = None  #: None: by one of the next two
    kv_cache_share: float = 0.25  #: on a CPU: of the memory that is free at the start
    gpu_memory_utilization: float = 0.9  #: elsewhere: of the device's memory, what weights, steps and KV take in all
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    itl_target_s: float = 0.05
    remote_timeout_s: float = 120.0
    #: each step is planned, and launched, while the one before it runs. None: where that is not on a CPU, which is
    #: then busy with the one before
    plans_ahead: bool | None = None
    has_lower_tiers: bool = False
    tokenizer_rules: TokenizerRules = "transformers"


@dataclass(frozen=True, slots=True)
class EngineStep:
    """A step that is on its way."""

    plan: StepPlan
    launched: SplitStep[LaunchedStep]


@dataclass(slots=True)
class Engine:
    """Scheduler, pool and runner over one region of memory. Not thread-safe: one caller at a time."""

    loaded: LoadedModel
    options: EngineOptions
    layout: RegionLayout
    memory: Memory | DeviceMemory  #: the region that `layout` describes
    copies: DeviceCopies | None  #: moves the pool's blocks where it lies on a device; None: it does not
    checksums: BlockChecksums
    pool: BlockPool
    runner: Runner
    steps: SplitSteps[LaunchedStep]  #: the runner's, split where memory is short
    scheduler: Scheduler
    grammars: GrammarCompiler | None  #: None: no structured output
    threads: StepThreads | None  #: None: not computed on a CPU
    _config: SchedulerConfig
    _pending: list[Instruction] = field(default_factory=list)
    _launched: deque[EngineStep] = field(default_factory=deque)  # by `step`

    @classmethod
    def build(cls, loaded: LoadedModel, options: EngineOptions, *, model_dir: Path | None = None) -> Engine:
        """Build an engine with a pool of its own. `model_dir` gives the tokenizer that structured output needs.

        Raises:
            ConfigError: there is too little memory for one sequence of the model's length.
        """
        num_bytes_per_block = block_bytes(loaded.layer_specs, options.block_size, loaded.kv_dtype)
        num_blocks = plan_num_blocks(
            block_bytes=num_bytes_per_block,
            block_size=options.block_size,
            max_model_len=loaded.max_model_len,
            room_bytes=_pool_bytes(loaded, options),
            max_blocks=options.max_num_seqs * -(-loaded.max_model_len // options.block_size),
        )
        device = device_of(loaded.device)
        num_threads = torch.get_num_threads()
        is_computed_here = loaded.device.type == "cpu"
        threads = StepThreads(num_threads, NodeCores(max(num_threads, num_cores()))) if is_computed_here else None
        layout = RegionLayout(num_blocks=num_blocks, block_bytes=num_bytes_per_block, has_generations=device is None)
        shape = (loaded.layer_specs, options.block_size, loaded.kv_dtype, loaded.device)
        memory: Memory | DeviceMemory
        copies: DeviceCopies | None = None
        if device is None:
            memory = Memory.allocate(layout.num_bytes)
            pool = BlockPool(num_blocks, options.block_size, memory.view[: num_blocks * GENERATION_BYTES].cast("Q"))
            kv_pool = KvPool(*shape, memory.view[layout.data_offset :])
        else:
            rows = device.pool(layout.num_bytes)
            pool = BlockPool(num_blocks, options.block_size)
            kv_pool = KvPool(*shape, rows)
            copies = DeviceCopies(device, rows.view(num_blocks, num_bytes_per_block))
            memory = DeviceMemory(rows.view(num_blocks, num_bytes_per_block), copies)
        grammars = None if model_dir is None else _grammars(model_dir, loaded, options.tokenizer_rules)
        config = SchedulerConfig(
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_model_len=loaded.max_model_len,
            vocab_size=min(loaded.vocab_size, loaded.num_embeddings),
            itl_target_s=options.itl_target_s,
            remote_timeout_s=options.remote_timeout_s,
            block_bytes=num_bytes_per_block,
            plans_ahead=not is_computed_here if options.plans_ahead is None else options.plans_ahead,
            has_lower_tiers=options.has_lower_tiers,
        )
        sampler = Sampler(loaded.vocab_size, grammars)
        runner = Runner(loaded, kv_pool, sampler, threads.on_layer if threads else None, _accelerator(loaded, options))
        return cls(
            loaded=loaded,
            options=options,
            layout=layout,
            memory=memory,
            copies=copies,
            checksums=BlockChecksums(pool, kv_pool, copies),
            pool=pool,
            runner=runner,
            steps=SplitSteps(runner.launch, runner.finish, torch.cuda.empty_cache),
            grammars=grammars,
            threads=threads,
            scheduler=Scheduler(config, pool, loaded.fingerprint),
            _config=config,
        )

    def warm_up(self) -> None:
        """Run a made-up prompt and a few tokens, twice: what happens once happens now, then rates are measured.

        On a GPU steps are captured first. Leaves nothing behind but the measurements: a worker that has none would be
        guessed at by the router.
        """
        self.runner.capture()
        num_tokens = min(_WARM_UP_PROMPT_TOKENS, self.loaded.max_model_len - _WARM_UP_OUTPUT_TOKENS)
        if num_tokens < 1:
            return
        spec = SequenceSpec(
            seq_id="warm-up",
            token_ids=[(7919 * i) % self._config.vocab_size for i in range(num_tokens)],
            num_prompt_tokens=num_tokens,
            params=SamplingParams(max_tokens=_WARM_UP_OUTPUT_TOKENS, temperature=0.0),
        )
        for cost in (StepCost(), StepCost()):
            self.scheduler = Scheduler(self._config, self.pool, self.loaded.fingerprint, cost)
            self.post(SequenceAdded(spec))
            while self.has_work():
                self.step()
            self.pool.clear()
            self.pool.take_events()
        self.scheduler = Scheduler(self._config, self.pool, self.loaded.fingerprint, self.scheduler.cost)

    def decide(self, event: Event, now_s: float | None = None) -> list[Instruction]:
        """Give `event` to the scheduler; return its instructions. `now_s` defaults to the monotonic clock."""
        instructions = self.scheduler.on_event(event, time.monotonic() if now_s is None else now_s)
        if isinstance(event, StepWanted) and self.threads and not self.scheduler.num_steps:
            self.threads.rest()
        return instructions

    def bound_s(self, plan: StepPlan) -> float:
        """Return how many seconds the step of `plan` may take before it counts as one that will never end."""
        return self.scheduler.cost.bound_s(plan.parts)

    def is_compiled(self, grammar: Grammar) -> bool:
        """Tell whether `compile` would give this grammar at once."""
        return self.grammars is None or self.grammars.find(grammar) is not None

    def compile(self, wanted: CompileGrammar) -> GrammarCompiled:
        """Compile a sequence's grammar; may take a while, on any thread beside the steps."""
        if self.grammars is None:
            return GrammarCompiled(wanted.seq_id, RequestError("this model can keep to no structure, want free output"))
        try:
            return GrammarCompiled(wanted.seq_id, self.grammars.compile(wanted.grammar))
        except RequestError as error:
            return GrammarCompiled(wanted.seq_id, error)

    @property
    def max_steps(self) -> int:
        """Steps that may be on their way at once: a second one where steps are planned ahead."""
        return 2 if self._config.plans_ahead else 1

    def prepare_thread(self) -> None:
        """Have the calling thread, which will launch steps, ready for the device: make now what is a thread's own."""
        if self.loaded.device.type != "cuda":
            return
        torch.cuda.set_device(self.loaded.device)
        row = torch.zeros(1, 16, dtype=self.loaded.dtype, device=self.loaded.device)
        torch.nn.functional.linear(row, row)  # cuBLAS's handle
        torch.cuda.synchronize()

    def launch(self, plan: StepPlan) -> EngineStep:
        """Put a planned step on its way; on a CPU this blocks for as long as the forward pass takes.

        May run on a thread of its own beside `decide`: a plan is a value, and shares nothing with the scheduler.
        """
        with self.threads.step() if self.threads else contextlib.nullcontext():
            launched = self.steps.launch(plan)
            # which blocks they are is read now: a slot may be another's when the step has ended
            self.checksums.launched(self._kept_blocks(plan, launched.errors))
        return EngineStep(plan, launched)

    def finish(self, step: EngineStep) -> StepResult:
        """Wait for the end of the step that was launched first of those on their way; on the thread of `launch`."""
        result = self.steps.finish(step.launched)
        self.checksums.finished()
        return result

    def _kept_blocks(self, plan: StepPlan, left_out: Container[str]) -> list[int]:
        """Return the blocks that the step of `plan` fills and peers will read; of `left_out` nothing was computed."""
        kept: list[int] = []
        for part in plan.parts:
            if part.is_kept and part.seq_id not in left_out:
                size = self.options.block_size
                end = -(-part.end // size) if part.is_sampled else part.end // size
                kept += self.runner.block_ids(part.slot, part.start // size, end)
        return kept

    def scaling(self, busy_s: float) -> WorkerScaling:
        """Return what whoever scales the fleet wants to know; steps ran for `busy_s` since the start."""
        scheduler, price = self.scheduler, self.scheduler.cost.price
        return WorkerScaling(
            queued_s=scheduler.queued_s * scheduler.lateness.factor,
            busy_s_total=busy_s,
            num_waiting=scheduler.num_waiting,
            num_running=scheduler.num_running,
            max_num_seqs=self.options.max_num_seqs,
            used_share=1.0 - self.pool.num_free / self.pool.num_blocks,
            step_s=scheduler.decode_step_s,
            step_fixed_s=0.0 if price is None else price.step_s + price.row_s,
        )

    def scratch(self, num_bytes: int) -> Memory | DeviceMemory:
        """Allocate memory of the kind that the pool lies in, for the transfers of probes. The caller closes it."""
        if self.copies is None:
            return Memory.allocate(num_bytes)
        return DeviceMemory(torch.zeros(1, num_bytes, dtype=torch.uint8, device=self.loaded.device), self.copies)

    # -- for callers that have no loop of their own

    def post(self, event: Event) -> None:
        """Give `event` to the scheduler; what follows comes out of the next `step`."""
        for instruction in self.decide(event):
            if isinstance(instruction, CompileGrammar):
                self.post(self.compile(instruction))
            else:
                self._pending.append(instruction)

    def step(self) -> list[EmitTokens]:
        """Run one step if there is one to run; return all tokens emitted since the last call.

        Where steps are planned ahead the next one is launched before this one is waited for.
        """
        num_before = -1
        while num_before < len(self._launched) < self.max_steps:
            num_before = len(self._launched)
            self.post(StepWanted())
            plans = [item.plan for item in self._pending if isinstance(item, RunStep)]
            self._pending = [item for item in self._pending if not isinstance(item, RunStep)]
            self._launched += map(self.launch, plans)
        if self._launched:
            self.post(StepEnded(self.finish(self._launched.popleft())))
        emitted = [item for item in self._pending if isinstance(item, EmitTokens)]
        self._pending.clear()
        return emitted

    def has_work(self) -> bool:
        """Tell whether sequences are waiting or running, or a step of sequences that ended still is."""
        scheduler = self.scheduler
        return scheduler.num_waiting + scheduler.num_pulling + scheduler.num_running + scheduler.num_steps > 0

    def close(self) -> None:
        """Give the pool's memory back, and the cores."""
        if self.threads:
            self.threads.close()
        if self.copies:
            self.copies.close()
        self.memory.close()


def _pool_bytes(loaded: LoadedModel, options: EngineOptions) -> int:
    """Return the bytes that the pool gets; on an accelerator this takes a step."""
    if loaded.device.type == "cpu":
        return host_room(kv_cache_bytes=options.kv_cache_bytes, kv_cache_share=options.kv_cache_share)
    return measured_room(
        loaded,
        Limits(
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            block_size=options.block_size,
        ),
        lambda pool: Runner(loaded, pool, Sampler(loaded.vocab_size, None), accelerator=_accelerator(loaded, options)),
        CudaReader(loaded.device),
        kv_cache_bytes=options.kv_cache_bytes,
        utilization=options.gpu_memory_utilization,
    )


def _accelerator(loaded: LoadedModel, options: EngineOptions) -> Accelerator | None:
    if loaded.device.type == "cpu":
        return None
    return Accelerator(CudaSteps(loaded.device), options.max_num_seqs)


def _grammars(model_dir: Path, loaded: LoadedModel, rules: TokenizerRules) -> GrammarCompiler | None:
    """Make what compiles grammars; None where the model can keep to none, which ingresses say as they start."""
    try:
        tokenizer = Tokenizer.load(model_dir, rules=rules)
        return GrammarCompiler(GrammarTokenizer(tokenizer, loaded.vocab_size, tuple(loaded.eos_token_ids)))
    except ConfigError:
        return None
