"""Carries out a planned step: one packed forward through the model, then sampling."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.memory.kv_pool import KvPool
from engine.model.attention import ATTENTION_NAME, LayerAttention, PrefillSpan, StepAttention, step_attention
from engine.model.load import LoadedModel
from engine.sampling.sampler import Sampler, SamplingRow, prompt_logprobs
from engine.scheduling.plan import Sampled, SequenceStep, StepPlan, StepResult
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


class _TokenBuffers:
    """Host arrays that every step is packed into; they only grow. Valid until the next step is packed."""

    def __init__(self) -> None:
        #: rows are: token id, position, block id, offset in the block
        self.tokens: npt.NDArray[np.int64] = np.empty((4, 0), np.int64)
        self.tables: npt.NDArray[np.int32] = np.empty((0, 0), np.int32)
        self.kv_lens: npt.NDArray[np.int32] = np.empty(0, np.int32)

    def reserve(self, num_tokens: int, num_rows: int, num_columns: int) -> None:
        """Make room for so many tokens, decode rows and blocks per decode row; zero the part of the tables used."""
        if self.tokens.shape[1] < num_tokens:
            self.tokens = np.empty((4, _grown(num_tokens)), np.int64)
        rows, columns = self.tables.shape
        if rows < num_rows or columns < num_columns:
            self.tables = np.empty((max(rows, _grown(num_rows)), max(columns, _grown(num_columns))), np.int32)
            self.kv_lens = np.empty(self.tables.shape[0], np.int32)
        self.tables[:num_rows, :num_columns] = 0


class Runner:
    """Executes steps over one pool. Blocking; all calls from one thread."""

    def __init__(self, loaded: LoadedModel, pool: KvPool, sampler: Sampler) -> None:
        """Bind the model's attention layers to the pool.

        Args:
            loaded: the model; its attention becomes ours.
            pool: blocks shaped for this model.
            sampler: turns logits into tokens.

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
        self._buffers = _TokenBuffers()
        self._layers = [
            LayerAttention(k_view, v_view, kernels, layer.chunk)
            for k_view, v_view, kernels, layer in zip(pool.k, pool.v, loaded.kernels, loaded.layers, strict=True)
        ]

    def forget(self, seq_id: str) -> None:
        """The sequence has ended: drop what was kept for sampling it."""
        self._sampler.forget(seq_id)

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute every part of `plan`, store its KV in the pool, sample where wanted.

        Returns:
            Tokens and log-probabilities; rows that could not be sampled come back in `errors`.
        """
        started = time.perf_counter()
        if not plan.parts:
            return StepResult(sampled={})
        with torch.inference_mode():
            step = self._pack(plan.parts)
            logits = self._forward(step)  # [rows, vocab_size]
            num_sampled = len(step.sampled)
            sampled, errors = self._sample(step.sampled, logits[:num_sampled].float())
            of_prompts = _prompt_logprobs(step.logprob_parts, logits[num_sampled:])
        return StepResult(
            sampled=sampled,
            prompt_logprobs=of_prompts,
            errors=errors,
            elapsed_s=time.perf_counter() - started,
        )

    def _forward(self, step: _PackedStep) -> torch.Tensor:
        """Logits of the kept rows, `[rows, vocab_size]` in the model's dtype."""
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

    def _sample(
        self, parts: Sequence[SequenceStep], logits: torch.Tensor
    ) -> tuple[dict[str, Sampled], dict[str, KvrayError]]:
        if not parts:
            return {}, {}
        rows = [
            SamplingRow(
                seq_id=part.seq_id,
                params=part.params,
                token_ids=part.token_ids,
                num_prompt_tokens=part.num_prompt_tokens,
            )
            for part in parts
        ]
        sampled: dict[str, Sampled] = {}
        errors: dict[str, KvrayError] = {}
        for part, outcome in zip(parts, self._sampler.sample(logits, rows), strict=True):
            if isinstance(outcome, KvrayError):
                errors[part.seq_id] = outcome
            else:
                sampled[part.seq_id] = outcome
        return sampled, errors

    def _pack(self, parts: Sequence[SequenceStep]) -> _PackedStep:
        block_size = self._block_size
        decodes = [part for part in parts if part.kind == "decode"]
        prefills = [part for part in parts if part.kind == "prefill"]
        num_rows = sum(part.num_tokens for part in decodes)
        num_tokens = num_rows + sum(part.num_tokens for part in prefills)
        max_kv_len = max((part.end for part in decodes), default=0)
        num_columns = -(-max_kv_len // block_size)
        buffers = self._buffers
        buffers.reserve(num_tokens, num_rows, num_columns)
        begin = 0
        spans: list[PrefillSpan] = []
        kept: list[int] = []
        kept_for_logprobs: list[range] = []
        sampled: list[SequenceStep] = []
        logprob_parts: list[tuple[SequenceStep, int]] = []
        for part in decodes + prefills:
            end = begin + part.num_tokens
            blocks = self._pack_tokens(part, begin, end)
            if part.kind == "decode":
                buffers.tables[begin:end, : len(blocks)] = blocks
                buffers.kv_lens[begin:end] = buffers.tokens[1, begin:end] + 1
            else:
                spans.append(PrefillSpan(begin, end, part.end, self._to_device(blocks)))
            if part.is_sampled:
                kept.append(end - 1)
                sampled.append(part)
            if part.wants_prompt_logprobs:
                # a row tells of the token after it, as long as that is of the prompt
                count = max(0, min(part.end, part.num_prompt_tokens - 1) - part.start)
                kept_for_logprobs.append(range(begin, begin + count))
                logprob_parts.append((part, count))
            begin = end
        for rows in kept_for_logprobs:
            kept.extend(rows)
        tokens = self._to_device(buffers.tokens[:, :num_tokens])
        kept_rows = torch.tensor(kept or [0], dtype=torch.int64, device=self._device)
        return _PackedStep(
            input_ids=tokens[0:1],
            position_ids=tokens[1:2],
            attention=StepAttention(
                layers=self._layers,
                block_ids=tokens[2],
                offsets=tokens[3],
                num_decode_rows=num_rows,
                block_tables=self._to_device(buffers.tables[:num_rows, :num_columns]),
                kv_lens=self._to_device(buffers.kv_lens[:num_rows]),
                max_kv_len=max_kv_len,
                spans=spans,
                kept_rows=kept_rows,
            ),
            sampled=sampled,
            logprob_parts=logprob_parts,
            kept_rows=kept_rows,
        )

    def _pack_tokens(self, part: SequenceStep, begin: int, end: int) -> npt.NDArray[np.int32]:
        """Fill columns `[begin, end)` of the token buffer; the ids of the part's blocks up to its end."""
        block_size, tokens = self._block_size, self._buffers.tokens
        blocks = np.array(part.block_table[: -(-part.end // block_size)], np.int32)
        if end - begin == 1:
            tokens[:, begin] = (
                part.token_ids[part.start],
                part.start,
                blocks[part.start // block_size],
                part.start % block_size,
            )
        else:
            tokens[0, begin:end] = part.token_ids[part.start : part.end]
            positions = np.arange(part.start, part.end)
            tokens[1, begin:end] = positions
            tokens[2, begin:end] = blocks[positions // block_size]
            tokens[3, begin:end] = positions % block_size
        return blocks

    def _to_device(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """`array` as a tensor: itself on a CPU, a copy elsewhere."""
        return torch.from_numpy(array).to(self._device)


def _prompt_logprobs(parts: Sequence[tuple[SequenceStep, int]], logits: torch.Tensor) -> dict[str, list[TokenLogprob]]:
    """For each part the log-probabilities of the prompt tokens after its rows; `logits [rows of all parts, vocab]`."""
    found: dict[str, list[TokenLogprob]] = {}
    begin = 0
    for part, count in parts:
        entries: list[TokenLogprob] = []
        for first in range(0, count, _LOGPROB_ROWS):
            rows = min(_LOGPROB_ROWS, count - first)
            targets = part.token_ids[part.start + 1 + first :][:rows]
            piece = logits[begin + first :][:rows].float()
            entries += prompt_logprobs(piece, targets, part.params.prompt_logprobs or 0)
        found[part.seq_id] = entries
        begin += count
    return found


def _grown(wanted: int) -> int:
    """The next power of two, so that buffers are seldom made anew."""
    return 1 << max(0, wanted - 1).bit_length()
