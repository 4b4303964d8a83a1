"""Carries out planned steps: one packed forward through the model each, then sampling.

    launch(n) --> launch(n + 1) --> finish(n) --> launch(n + 2) --> finish(n + 1) ...

A step that was launched is on its way, and is finished in the order of launching. The one behind it may be launched
before it is finished: then tokens that only the device knows yet go from the one to the other there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.kernels.protocol import PrefillSpan, PrefillSpans
from engine.memory.kv_pool import KvPool
from engine.model.attention import ATTENTION_NAME, LayerAttention, StepAttention, step_attention
from engine.model.load import LoadedModel
from engine.sampling.sampler import Sampler, SamplingRow, prompt_logprobs
from engine.scheduling.plan import Sampled, SequenceStep, StepPlan, StepResult
from engine.slot_tables import SlotSequence, SlotTables
from messages.errors import InvariantError, KvrayError
from messages.stream import TokenLogprob

#: Rows of logits made float32 at a time for prompt log-probabilities: a long chunk needs no second copy of all.
_LOGPROB_ROWS = 64


@dataclass(frozen=True, slots=True)
class _PackedStep:
    """One step on the token axis: decode rows first, then prefill chunks."""

    input_ids: torch.Tensor  #: [1, T] int64
    position_ids: torch.Tensor  #: [1, T] int64, each sequence's own
    attention: StepAttention
    sampled: list[SequenceStep]  #: parts whose last token is sampled after
    logprob_parts: list[tuple[SequenceStep, int]]  #: parts with how many of their rows give prompt logprobs
    kept_rows: torch.Tensor  #: [rows] int64: of `sampled` in order, then of `logprob_parts`; never empty


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step that is on its way. Whose rows these are was noted as it was launched: their slots may be others' by now.

    On a CPU all is computed by then.
    """

    parts: list[SequenceStep]  #: those that are sampled
    sequences: list[SlotSequence]  #: theirs, in that order
    outcomes: list[Sampled | KvrayError]  #: theirs, in that order
    prompt_logprobs: dict[str, list[TokenLogprob]]
    is_empty: bool
    begun_s: float  #: of the performance counter: when its launch began, and was over
    launched_s: float


class Runner:
    """Carries out steps over one pool. All calls from one thread."""

    def __init__(
        self, loaded: LoadedModel, pool: KvPool, sampler: Sampler, on_layer: Callable[[], None] | None = None
    ) -> None:
        """Bind the model's attention layers to the pool.

        Args:
            loaded: the model; its attention becomes ours.
            pool: blocks shaped for this model.
            sampler: turns logits into tokens.
            on_layer: called before the attention of each layer.

        Raises:
            InvariantError: the pool was laid out for another model.
        """
        if pool.layer_specs != tuple(loaded.layer_specs) or pool.dtype != loaded.dtype:
            raise InvariantError(f"the KV pool is not laid out for {loaded.family}")
        self._loaded = loaded
        model: Any = loaded.model
        model.set_attn_implementation(ATTENTION_NAME)
        self._model = model
        self._device = loaded.device
        self._block_size = pool.block_size
        self._sampler = sampler
        self._on_layer = on_layer
        self._tables = SlotTables(loaded.device)
        self._ended_s = 0.0  # of the performance counter: when the step that was finished last ended
        self._layers = [
            LayerAttention(k_view, v_view, kernels, layer.chunk)
            for k_view, v_view, kernels, layer in zip(pool.k, pool.v, loaded.kernels, loaded.layers, strict=True)
        ]

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
        for seq_id in self._tables.take_in(plan):
            self._sampler.forget(seq_id)
        outcomes: list[Sampled | KvrayError] = []
        parts: list[SequenceStep] = []
        of_prompts: dict[str, list[TokenLogprob]] = {}
        if plan.parts:
            with torch.inference_mode():
                step = self._pack(plan.parts)
                logits = self._forward(step)  # [rows, vocab_size]
                parts, num_sampled = step.sampled, len(step.sampled)
                outcomes = self._sample(parts, logits[:num_sampled].float())
                of_prompts = self._prompt_logprobs(step.logprob_parts, logits[num_sampled:])
        return LaunchedStep(
            parts=parts,
            sequences=[self._tables[part.slot] for part in parts],
            outcomes=outcomes,
            prompt_logprobs=of_prompts,
            is_empty=not plan.parts,
            begun_s=begun_s,
            launched_s=time.perf_counter(),
        )

    def finish(self, launched: LaunchedStep) -> StepResult:
        """Wait for the end of the step that was launched first of those that are on their way; read back what it gave.

        Returns:
            Tokens and log-probabilities; rows that could not be sampled come back in `errors`. The time that it took
            is without that for which it waited behind the step before it.
        """
        sampled: dict[str, Sampled] = {}
        errors: dict[str, KvrayError] = {}
        for part, sequence, outcome in zip(launched.parts, launched.sequences, launched.outcomes, strict=True):
            if isinstance(outcome, KvrayError):
                errors[part.seq_id] = outcome
            else:
                sampled[part.seq_id] = outcome
            sequence.take_sampled(0 if isinstance(outcome, KvrayError) else outcome.token_id)
        ended_s = launched.launched_s if self._device.type == "cpu" else time.perf_counter()
        elapsed_s = ended_s - max(launched.begun_s, self._ended_s)
        self._ended_s = ended_s
        return StepResult(
            sampled=sampled,
            prompt_logprobs=launched.prompt_logprobs,
            errors=errors,
            elapsed_s=0.0 if launched.is_empty else elapsed_s,
        )

    def _forward(self, step: _PackedStep) -> torch.Tensor:
        """Compute the logits of the kept rows, `[rows, vocab_size]` in the model's dtype."""
        with step_attention(step.attention):
            # always a tensor: an int makes gemma4 drop positions before its layers that share KV
            output = self._model(
                input_ids=step.input_ids,
                position_ids=step.position_ids,
                use_cache=False,
                logits_to_keep=step.kept_rows,
                kv_step=step.attention,
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _sample(self, parts: Sequence[SequenceStep], logits: torch.Tensor) -> list[Sampled | KvrayError]:
        """Choose the next token of each part, or say why it has none; leave the tokens in their slots."""
        if not parts:
            return []
        rows = []
        for part in parts:
            sequence = self._tables[part.slot]
            begins = sequence.begins
            rows.append(
                SamplingRow(
                    part.seq_id, begins.params, sequence.token_ids, begins.num_prompt_tokens, sequence.num_awaited
                )
            )
        outcomes = self._sampler.sample(logits, rows)
        token_ids = [0 if isinstance(outcome, KvrayError) else outcome.token_id for outcome in outcomes]
        # what logits wider than the embedding give ends its sequence: the step behind this one may still look it up
        known = torch.tensor(token_ids).clamp_(max=self._loaded.num_embeddings - 1)
        self._tables.leave_sampled([part.slot for part in parts], known.to(self._device))
        return outcomes

    def _prompt_logprobs(
        self, parts: Sequence[tuple[SequenceStep, int]], logits: torch.Tensor
    ) -> dict[str, list[TokenLogprob]]:
        """Return for each part, by sequence id, the logprobs of the prompt tokens after its rows.

        `logits` is `[rows of all parts, vocab_size]`.
        """
        found: dict[str, list[TokenLogprob]] = {}
        begin = 0
        for part, count in parts:
            sequence = self._tables[part.slot]
            k = sequence.begins.params.prompt_logprobs or 0
            entries: list[TokenLogprob] = []
            for first in range(0, count, _LOGPROB_ROWS):
                rows = min(_LOGPROB_ROWS, count - first)
                targets = sequence.token_ids[part.start + 1 + first :][:rows]
                entries += prompt_logprobs(logits[begin + first :][:rows].float(), targets, k)
            found[part.seq_id] = entries
            begin += count
        return found

    def _pack(self, parts: Sequence[SequenceStep]) -> _PackedStep:
        """Lay `parts` out on the token axis, their slots being up to date. Only what is computed takes time.

        parts       a replay | two that generate | a chunk
        positions   57 58 59 |        8 | 130    | 0 1 2 ...
        slots        4  4  4 |        1 |   2    | 0 0 0 ...
        """
        tables, block_size = self._tables, self._block_size
        counts = np.array([part.num_tokens for part in parts])
        ends = np.cumsum(counts)
        packed = np.empty((5, ends[-1]), np.int64)  # token ids, positions, block ids, offsets in them, slots
        packed[0] = [token_id for part in parts for token_id in tables[part.slot].tokens_of(part)]
        packed[1] = np.arange(ends[-1]) + np.repeat([part.end for part in parts] - ends, counts)
        packed[4] = np.repeat([part.slot for part in parts], counts)
        packed[2] = tables.host_tables[packed[4], packed[1] // block_size]
        packed[3] = packed[1] % block_size
        num_rows = sum(part.num_tokens for part in parts if part.kind == "decode")
        spans: list[PrefillSpan] = []
        kept: list[int] = []
        kept_for_logprobs: list[range] = []
        sampled: list[SequenceStep] = []
        logprob_parts: list[tuple[SequenceStep, int]] = []
        for part, end in zip(parts, ends.tolist(), strict=True):
            begin = end - part.num_tokens
            if part.kind == "prefill":
                spans.append(PrefillSpan(begin - num_rows, end - num_rows, part.end, part.slot))
            if part.is_sampled:
                kept.append(end - 1)
                sampled.append(part)
            if part.wants_prompt_logprobs:
                # a row tells of the token after it, as long as that is of the prompt
                count = max(0, min(part.end, tables[part.slot].begins.num_prompt_tokens - 1) - part.start)
                kept_for_logprobs.append(range(begin, begin + count))
                logprob_parts.append((part, count))
        for rows in kept_for_logprobs:
            kept.extend(rows)
        tokens = self._to_device(packed)
        awaiting = [(end - 1, part.slot) for part, end in zip(parts, ends.tolist(), strict=True) if part.awaits_token]
        if awaiting:
            places = self._to_device(np.array(awaiting).T)  # [2, parts that await a token]: rows, then slots
            tokens[0, places[0]] = tables.sampled_ids[places[1]]
        kept_rows = torch.tensor(kept or [0], dtype=torch.int64, device=self._device)
        return _PackedStep(
            input_ids=tokens[0:1],
            position_ids=tokens[1:2],
            attention=StepAttention(
                layers=self._layers,
                block_ids=tokens[2],
                offsets=tokens[3],
                num_decode_rows=num_rows,
                block_tables=tables.block_tables,
                slots=tokens[4, :num_rows],
                kv_lens=self._to_device((packed[1, :num_rows] + 1).astype(np.int32)),
                max_kv_len=max((part.end for part in parts if part.kind == "decode"), default=0),
                spans=PrefillSpans.of(spans, self._device) if spans else None,
                kept_rows=kept_rows,
                on_layer=self._on_layer,
            ),
            sampled=sampled,
            logprob_parts=logprob_parts,
            kept_rows=kept_rows,
        )

    def _to_device(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """Return `array` as a tensor: the same memory on a CPU, a copy elsewhere."""
        return torch.from_numpy(array).to(self._device)
