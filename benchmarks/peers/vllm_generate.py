"""vLLM on CPU, in the environment that `benchmarks/engine_cpu.py --with-vllm` makes, at its defaults."""

from __future__ import annotations

from statistics import fmean

from job import Tokens, answer, read_job
from vllm import LLM, SamplingParams


def main() -> None:
    job = read_job()
    llm = LLM(
        model=job.model_dir,
        dtype=job.dtype,
        skip_tokenizer_init=True,
        max_model_len=job.num_prompt_tokens + job.num_output_tokens,
        max_num_seqs=job.num_requests,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )

    def generate(prompts: Tokens, num_tokens: int) -> Tokens:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    # It does not tell how full its blocks are. All requests run in step: as full as their length leaves them.
    size = llm.llm_engine.vllm_config.cache_config.block_size
    lengths = range(job.num_prompt_tokens, job.num_prompt_tokens + job.num_output_tokens)
    waste = fmean(-length % size / (length + -length % size) for length in lengths)
    answer(job, generate, lambda: {"waste_percent": 100 * waste, "block_size": size})


if __name__ == "__main__":
    main()
