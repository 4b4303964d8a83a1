"""Transformers' own two ways: `generate` of the padded batch, and `generate_batch` (continuous batching)."""

from __future__ import annotations

import functools

import torch
from job import Tokens, answer, read_job
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.utils import WorkloadHints

job = read_job()
torch.set_num_threads(job.num_threads)
model = AutoModelForCausalLM.from_pretrained(
    job.model_dir, dtype=getattr(torch, job.dtype), attn_implementation="sdpa"
).eval()


def padded(prompts: Tokens, num_tokens: int) -> Tokens:
    """Generate by `generate`: all prompts have one length, so the padding costs nothing: this way's best case."""
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return out[:, ids.shape[1] :].tolist()


def continuous(manager: ContinuousBatchingManager, prompts: Tokens, num_tokens: int) -> Tokens:
    order = manager.add_requests(prompts, max_new_tokens=num_tokens)
    finished: dict[str, list[int]] = {}
    while len(finished) < len(order):
        result = manager.get_result(timeout=1)
        assert result is not None or manager.is_running()
        if result is not None and result.is_finished():
            finished[result.request_id] = list(result.generated_tokens)
    return [finished[request_id] for request_id in order]


if job.method == "padded":
    answer(job, padded)
else:
    # What generate_batch does, with the manager made (and its cache allocated) once, outside the measurement.
    hints = WorkloadHints(job.num_prompt_tokens, job.num_output_tokens, num_requests=job.num_requests)
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    with model.continuous_batching_context_manager(config, workload_hints=hints) as manager:
        answer(job, functools.partial(continuous, manager))
