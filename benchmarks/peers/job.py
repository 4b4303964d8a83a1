"""The job that benchmarks/engine_cpu.py gives every contender, and its answer.

One JSON object comes in on standard input; the last line of standard output is the answer. Standard library only, as
peers live in environments of their own.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

Tokens = list[list[int]]


@dataclass(frozen=True)
class Job:
    """One cell of the table for one contender."""

    model_dir: str
    dtype: str  #: float32 or bfloat16
    method: str  #: for contenders with several ways
    num_threads: int
    vocab_size: int
    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    min_repeats: int
    max_repeats: int
    budget_s: float  #: repeat until so much time was measured

    def prompts(self, repeat: int) -> Tokens:
        """Draw random prompts, others at each repeat: no cache may help. Repeat -1 warms up."""
        draw = random.Random(repeat)
        return [
            [draw.randrange(self.vocab_size) for _ in range(self.num_prompt_tokens)] for _ in range(self.num_requests)
        ]


def read_job() -> Job:
    """Read the job on standard input."""
    return Job(**json.loads(sys.stdin.read()))


def answer(job: Job, generate: Callable[[Tokens, int], Tokens], facts: Callable[[], dict[str, float]] = dict) -> None:
    """Warm up, measure `generate(prompts, num_output_tokens)`, write the answer.

    Raises:
        AssertionError: an output is shorter or longer than was asked for.
    """
    generate(job.prompts(-1)[:2], 4)
    seconds: list[float] = []
    digest = ""
    while len(seconds) < job.min_repeats or (len(seconds) < job.max_repeats and sum(seconds) < job.budget_s):
        prompts = job.prompts(len(seconds))
        begin_s = time.perf_counter()
        outputs = generate(prompts, job.num_output_tokens)
        seconds.append(time.perf_counter() - begin_s)
        assert [len(output) for output in outputs] == [job.num_output_tokens] * job.num_requests
        digest = digest or hashlib.sha256(json.dumps(outputs).encode()).hexdigest()[:12]
    sys.stdout.flush()
    print("\n" + json.dumps({"seconds": seconds, "digest": digest, **facts()}))
