"""Transformers' own two ways: `generate` of the padded batch, and `generate_batch` (continuous batching)."""

from __future__ import annotations

import torch
from job import Tokens, answer, read_job
from transformers import AutoModelForCausalLM, GenerationConfig

job = read_job()
torch.set_num_threads(job.num_threads)
model = AutoModelForCausalLM.from_pretrained(
    job.model_dir, dtype=getattr(torch, job.dtype), attn_implementation="sdpa"
).eval()


def padded(prompts: Tokens, num_tokens: int) -> Tokens:
    """All prompts have one length, so the padding costs nothing: this way's best case."""
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


def continuous(prompts: Tokens, num_tokens: int) -> Tokens:
    config = GenerationConfig(max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    results = model.generate_batch(prompts, generation_config=config)
    by_request = sorted(results.values(), key=lambda result: int(result.request_id.rsplit("_", 1)[1]))
    return [list(result.generated_tokens) for result in by_request]


answer(job, {"padded": padded, "continuous": continuous}[job.method])
