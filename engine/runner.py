"""Carries out planned steps: one packed forward through the model each, then sampling.

    launch(n) --> launch(n + 1) --> finish(n) --> launch(n + 2) --> finish(n + 1) ...

A step that was launched is on its way, and is finished in the order of launching. The one behind it may be launched
before it is finished: then tokens that only the device knows yet go from the one to the other there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from engine.kernels.protocol import PrefillSpans
from engine.memory.kv_pool import KvPool
from engine.model.attention import ATTENTION_NAME, LayerAttention, StepAttention, step_attention
from engine.model.load import LoadedModel
from engine.sampling.logprobs import launch_prompt_logprobs
from engine.sampling.row import LaunchedSamples, SamplingRow
from engine.sampling.sampler import Sampler
from engine.scheduling.plan import Sampled, SequenceStep, StepPlan, StepResult
from engine.slot_tables import SlotSequence, SlotTables, TableRoom
from engine.steps.buckets import bucket_of, buckets
from engine.steps.captured import CapturedSteps, TrialLimits
from engine.steps.device import DeviceEvent, StepDevice
from engine.steps.packing import PackedStep, StepInputs, pack
from engine.steps.staging import Staging
from messages.errors import InvariantError, KvrayError, first_line
from messages.stream import TokenLogprob

_log = logging.getLogger(__name__)

#: What waits for log-probabilities that are on their way, and returns them.
_LaunchedLogprobs: TypeAlias = Callable[[], list[TokenLogprob]]
#: Rows of logits made float32 at a time for prompt log-probabilities: a long chunk needs no second copy of all.
_LOGPROB_ROWS = 64


@dataclass(frozen=True, slots=True)
class Accelerator:
    """Where steps run that do not run on a CPU, and the most sequences that are in one."""

    device: StepDevice
    max_num_seqs: int


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step that is on its way. Whose rows these are was noted as it was launched: their slots may be others' by now.

    On a CPU all is computed by then.
    """

    parts: list[SequenceStep]  #: those that are sampled
    sequences: list[SlotSequence]  #: theirs, in that order
    samples: LaunchedSamples | None  #: theirs, in that order; None: nothing is sampled
    prompt_logprobs: dict[str, list[_LaunchedLogprobs]]  #: by sequence, some rows after the other
    is_empty: bool
    ended: DeviceEvent | None  #: behind all that it put on its way; None: on a CPU, where that is over
    begun_s: float  #: of the performance counter: when its launch began, and was over
    launched_s: float


class Runner:
    """Carries out steps over one pool. All calls from one thread."""

    def __init__(
        self,
        loaded: LoadedModel,
        pool: KvPool,
        sampler: Sampler,
        on_layer: Callable[[], None] | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        """Bind the model's attention layers to the pool.

        Args:
            loaded: the model; its attention becomes ours.
            pool: blocks shaped for this model.
            sampler: turns logits into tokens.
            on_layer: called before the attention of each layer.
            accelerator: how what a step brings reaches the model's device; None: that is a CPU, nothing is copied.

        Raises:
            InvariantError: the pool was laid out for another model, or the model is not where steps run.
        """
        if pool.layer_specs != tuple(loaded.layer_specs) or pool.dtype != loaded.kv_dtype:
            raise InvariantError(f"the KV pool is not laid out for {loaded.family}")
        device = torch.device("cpu") if accelerator is None else accelerator.device.device
        if device.type != loaded.device.type:
            raise InvariantError(f"{loaded.family} is on {loaded.device}, and its steps are to run on {device}")
        self._loaded = loaded
        model: Any = loaded.model
        model.set_attn_implementation(ATTENTION_NAME)
        self._model = model
        self._block_size = pool.block_size
        self._sampler = sampler
        self._on_layer = on_layer
        self._accelerator = accelerator
        self._staging: Staging | None = None
        self._captured: CapturedSteps | None = None
        room = None
        if accelerator is not None:
            self._staging = Staging(accelerator.device)
            max_blocks = -(-loaded.max_model_len // pool.block_size)
            room = TableRoom(device, accelerator.max_num_seqs, max_blocks, Staging(accelerator.device).bring)
        self._tables = SlotTables(room)
        self._ended_s = 0.0  # of the performance counter: when the step that was finished last ended
        self._layers = [
            LayerAttention(k_view, v_view, kernels, layer.chunk, layer.scales)
            for k_view, v_view, kernels, layer in zip(pool.k, pool.v, loaded.kernels, loaded.layers, strict=True)
        ]

    def capture(self, *, is_trial: bool = False) -> None:
        """Capture decode steps where they run on an accelerator; where they cannot be, say so in the log: they run on.

        To be called before the first step: what is in block 0 is lost.

        Args:
            is_trial: capture the largest alone, whose memory the others share, and say nothing.

        Raises:
            RuntimeError: the device failed, and cannot go on.
        """
        if self._accelerator is None:
            return
        family = self._loaded.family
        slow = sorted({layer.kernels.name for layer in self._layers if not layer.kernels.is_capturable})
        if slow:
            failure = f"attention of some layers is by {', '.join(slow)}, which reads lengths on the host"
        else:
            sizes = buckets(self._accelerator.max_num_seqs)
            failure = self._try_to_capture(self._accelerator.device, sizes[-1:] if is_trial else sizes)
        if is_trial:
            return
        if failure:
            _log.warning("%s: no decode step is captured, all take longer than they could: %s", family, failure)
        elif self._captured:
            _log.info("%s: %s", family, self._captured.summary)

    def _try_to_capture(self, device: StepDevice, sizes: Sequence[int]) -> str:
        """Return why it failed; "": it did not."""
        limits = TrialLimits(min(self._block_size, self._loaded.max_model_len), self._loaded.num_embeddings)
        try:
            with torch.inference_mode():
                self._captured = CapturedSteps(device, sizes, self._compute_rows, self._loaded.vocab_size, limits)
        except RuntimeError as error:
            device.synchronize()  # a device that failed raises once more
            return first_line(error)
        return ""

    def block_ids(self, slot: int, begin: int, end: int) -> list[int]:
        """Return entries `[begin, end)` of the block table of the sequence in `slot`."""
        found: list[int] = self._tables.host_tables[slot, begin:end].tolist()
        return found

    def execute(self, plan: StepPlan) -> StepResult:
        """Launch `plan` and wait for its end; raises as `launch` does."""
        return self.finish(self.launch(plan))

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Put every part of `plan` on its way: compute it, store its KV in the pool, sample where wanted.

        Each plan goes on from those before it, so every one is to be launched once, in order. The one before it may
        still be on its way, those before that are finished.

        Raises:
            InvariantError: the plan goes on with a sequence that is not in its slot.
        """
        begun_s = time.perf_counter()
        samples: LaunchedSamples | None = None
        parts: list[SequenceStep] = []
        of_prompts: dict[str, list[_LaunchedLogprobs]] = {}
        with torch.inference_mode():
            for seq_id in self._tables.take_in(plan):
                self._sampler.forget(seq_id)
            self._tables.bring()
            if plan.parts:
                step = pack(plan.parts, self._tables)
                inputs, logits = self._compute(step)  # of the kept rows, [rows, vocab_size]
                parts, num_sampled = step.sampled, len(step.sampled)
                if parts:
                    samples = self._sample(parts, logits[:num_sampled].float(), inputs)
                of_prompts = self._prompt_logprobs(step.logprob_parts, logits[num_sampled:])
            ended: DeviceEvent | None = None
            if self._accelerator is not None:
                ended = self._accelerator.device.event()
                ended.record()
        return LaunchedStep(
            parts=parts,
            sequences=[self._tables[part.slot] for part in parts],
            samples=samples,
            prompt_logprobs=of_prompts,
            is_empty=not plan.parts,
            ended=ended,
            begun_s=begun_s,
            launched_s=time.perf_counter(),
        )

    def finish(self, launched: LaunchedStep) -> StepResult:
        """Wait for the end of the step that was launched first of those that are on their way; read back what it gave.

        Returns:
            Tokens and log-probabilities; rows that could not be sampled come back in `errors`. The time that it took
            is without that for which it waited behind the step before it.
        """
        if launched.ended is not None:  # nothing else waits where nothing is sampled
            launched.ended.synchronize()
        sampled: dict[str, Sampled] = {}
        errors: dict[str, KvrayError] = {}
        outcomes = launched.samples.finish() if launched.samples else []
        prompt_logprobs = {
            seq_id: [entry for finish in some for entry in finish()]
            for seq_id, some in launched.prompt_logprobs.items()
        }
        for part, sequence, outcome in zip(launched.parts, launched.sequences, outcomes, strict=True):
            if isinstance(outcome, KvrayError):
                errors[part.seq_id] = outcome
            else:
                sampled[part.seq_id] = outcome
            sequence.take_sampled(0 if isinstance(outcome, KvrayError) else outcome.token_id)
        ended_s = launched.launched_s if self._accelerator is None else time.perf_counter()
        elapsed_s = ended_s - max(launched.begun_s, self._ended_s)
        self._ended_s = ended_s
        return StepResult(
            sampled=sampled,
            prompt_logprobs=prompt_logprobs,
            errors=errors,
            elapsed_s=0.0 if launched.is_empty else elapsed_s,
        )

    def _compute(self, step: PackedStep) -> tuple[StepInputs, torch.Tensor]:
        """Put a step on its way; return its inputs there, and the logits `[rows, vocab_size]` of its kept rows first.

        Both are valid until the next step.
        """
        captured = self._captured
        size = bucket_of(step.parts, captured.sizes) if captured else None
        if captured and size:
            logits = captured.launch(size, lambda inputs: step.write(inputs, self._tables, self._block_size))
            return captured.inputs(size), logits
        inputs = self._bring(step)
        if step.awaiting:
            inputs.take_awaited(self._tables.sampled_ids)
        spans = PrefillSpans(tuple(step.spans), inputs.spans.view(len(step.spans), -1)) if step.spans else None
        return inputs, self._forward(inputs, step.max_kv_len, spans)

    def _bring(self, step: PackedStep) -> StepInputs:
        """Put a step's inputs where it runs: on a CPU into the memory that they are computed with."""
        shape = step.shape

        def write(words: npt.NDArray[np.int64]) -> None:
            step.write(shape.cut_host(words), self._tables, self._block_size)

        if self._staging is not None:
            return shape.cut(self._staging.bring(shape.num_words, write))
        words = np.empty(shape.num_words, np.int64)
        write(words)
        return shape.cut(torch.from_numpy(words))

    def _compute_rows(self, inputs: StepInputs) -> torch.Tensor:
        """Compute a step of decode rows so that it can be captured: by nothing that the host knows of it."""
        inputs.take_awaited(self._tables.sampled_ids)
        return self._forward(inputs, self._loaded.max_model_len, None)

    def _forward(self, inputs: StepInputs, max_kv_len: int, spans: PrefillSpans | None) -> torch.Tensor:
        """Compute the logits of the kept rows, `[rows, vocab_size]` in the model's dtype."""
        num_rows = len(inputs.kv_lens)
        attention = StepAttention(
            layers=self._layers,
            block_ids=inputs.block_ids,
            offsets=inputs.offsets,
            num_decode_rows=num_rows,
            block_tables=self._tables.block_tables,
            slots=inputs.slots[:num_rows],
            kv_lens=inputs.kv_lens,
            max_kv_len=max_kv_len,
            spans=spans,
            kept_rows=inputs.kept,
            on_layer=self._on_layer,
        )
        with step_attention(attention):
            # always a tensor: an int makes gemma4 drop positions before its layers that share KV
            output = self._model(
                input_ids=inputs.token_ids[None],
                position_ids=inputs.positions[None],
                use_cache=False,
                logits_to_keep=inputs.kept,
                kv_step=attention,
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _sample(self, parts: Sequence[SequenceStep], logits: torch.Tensor, inputs: StepInputs) -> LaunchedSamples:
        """Put the choice of each part's next token on its way; leave the tokens in their slots."""
        rows = []
        for part in parts:
            sequence = self._tables[part.slot]
            begins = sequence.begins
            rows.append(
                SamplingRow(
                    part.seq_id, begins.params, sequence.token_ids, begins.num_prompt_tokens, sequence.num_awaited
                )
            )
        samples = self._sampler.launch(logits, rows)
        # what logits wider than the embedding give ends its sequence, as an error does: the step behind this one may
        # still look it up
        known = samples.token_ids.clamp(0, self._loaded.num_embeddings - 1)
        self._tables.leave_sampled(inputs.slots[inputs.kept[: len(parts)]], known)
        return samples

    def _prompt_logprobs(
        self, parts: Sequence[tuple[SequenceStep, int]], logits: torch.Tensor
    ) -> dict[str, list[_LaunchedLogprobs]]:
        """Put for each part, by sequence id, the logprobs of the prompt tokens after its rows on their way.

        `logits` is `[rows of all parts, vocab_size]`.
        """
        found: dict[str, list[_LaunchedLogprobs]] = {}
        begin = 0
        for part, count in parts:
            sequence = self._tables[part.slot]
            k = sequence.begins.params.prompt_logprobs or 0
            entries: list[_LaunchedLogprobs] = []
            for first in range(0, count, _LOGPROB_ROWS):
                rows = min(_LOGPROB_ROWS, count - first)
                targets = sequence.token_ids[part.start + 1 + first :][:rows]
                entries.append(launch_prompt_logprobs(logits[begin + first :][:rows].float(), targets, k))
            found[part.seq_id] = entries
            begin += count
        return found
