"""The sampler beside its peers: CPU ms for a step of 16 rows, by vocabulary and sampling, one thread.

    python benchmarks/sampler.py              every cell, about 40 s
    python benchmarks/sampler.py --quick      the smaller vocabulary only
    python benchmarks/sampler.py --record     also append to benchmarks/results/sampler.jsonl

The token of rank r has a probability like r to the -1.5, as in text, with noise, rounded to bfloat16, which gives ties;
256 tokens hold 95 % of it. Seeds are fixed. Peers: transformers' own warpers with softmax and multinomial, and torch's
softmax with one multinomial for the batch, which cuts nothing. Best of several repeats.
A second table times grammars: mask and accept of a JSON schema, and what a row with one costs more.
A third times penalties after 131,072 tokens, a third of them the first of their kind, in a batch of 256 rows: what a
row costs more than without, beside transformers' processor of the repetition penalty alone.
Goals: ten times as fast as the warpers with top_p, and no slower than the plain multinomial; penalties under 0.1 ms a
row, whatever the number of tokens.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tokenizers
import torch
from harness.report import goal, parser, record
from tokenizers import decoders, models, pre_tokenizers
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.sampling.row import SamplingRow
from engine.sampling.sampler import Sampler
from messages.request import Grammar, SamplingParams
from text.grammar import CompiledGrammar, GrammarCompiler, GrammarMatcher, GrammarTokenizer
from text.tokenizer import Tokenizer

NUM_ROWS = 16
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {},
    "top_p 0.95": {"top_p": 0.95},
    "top_k 50, top_p 0.95": {"top_k": 50, "top_p": 0.95, "temperature": 0.8},
    "penalties, top_p 0.95": {"top_p": 0.95, "repetition_penalty": 1.1, "frequency_penalty": 0.2},
    "top_p 0.95, 5 logprobs": {"top_p": 0.95, "logprobs": 5},
}
PENALTIES: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.1},
    "frequency": {"frequency_penalty": 0.2},
    "all three": {"repetition_penalty": 1.1, "frequency_penalty": 0.2, "presence_penalty": 0.1},
}
LONG_TOKENS, LONG_OUTPUT_TOKENS, LONG_VOCAB_SIZE = 131_072, 16_384, 152_064
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age", "tags"],
}
TEXT = '{"name":"Ada Lovelace","age":36,"tags":["mathematics","poetry","engines"]}'


def best_ms(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times) * 1e3


def some_logits(vocab_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ranks = torch.stack([torch.randperm(vocab_size, generator=generator) + 1 for _ in range(NUM_ROWS)])
    noise = torch.randn(NUM_ROWS, vocab_size, generator=generator) / 4
    return (20 - 1.5 * ranks.float().log() + noise).bfloat16().float()


def flat_logits(vocab_size: int) -> torch.Tensor:
    """Make the sampler's worst case: thousands of candidates in every row."""
    return torch.randn(NUM_ROWS, vocab_size, generator=torch.Generator().manual_seed(0)) * 4


def sampler_ms(logits: torch.Tensor, values: dict[str, Any], repeats: int) -> float:
    """Time the sampler, in ms. Each repeat is a later token of the same sequences of 1,000, so that draws differ."""
    vocab_size = logits.shape[1]
    sampler, rng = Sampler(vocab_size, None), np.random.default_rng(0)
    histories = [rng.integers(0, vocab_size, 1_000).tolist() for _ in range(NUM_ROWS)]
    params = [SamplingParams(max_tokens=1_000, seed=seed, **values) for seed in range(NUM_ROWS)]

    def step() -> None:
        rows = [SamplingRow(str(i), params[i], histories[i], 500) for i in range(NUM_ROWS)]
        for row, outcome in zip(rows, sampler.sample(logits, rows), strict=True):
            row.token_ids.append(outcome.token_id)  # type: ignore[union-attr]

    return best_ms(step, repeats)


def warpers_ms(logits: torch.Tensor, values: dict[str, Any], repeats: int) -> float:
    steps = [TemperatureLogitsWarper(values.get("temperature", 1.0) or 1.0)]
    steps += [TopKLogitsWarper(values["top_k"])] if "top_k" in values else []
    steps += [TopPLogitsWarper(values["top_p"])] if "top_p" in values else []

    def step() -> torch.Tensor:
        scores = logits
        for warper in steps:
            scores = warper(None, scores)
        return torch.multinomial(scores.softmax(-1), 1)

    return best_ms(step, repeats)


def penalties_ms(num_rows: int, repeats: int) -> dict[str, float]:
    """Time penalties of long sequences, in ms a row; all rows have one history, which grows by a token a step."""
    rng = np.random.default_rng(0)
    logits = torch.randn(num_rows, LONG_VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    history = rng.integers(0, LONG_VOCAB_SIZE, LONG_TOKENS).tolist()

    def row_ms(**values: float) -> float:
        sampler, params = Sampler(LONG_VOCAB_SIZE, None), SamplingParams(max_tokens=10**6, temperature=0.0, **values)

        def step() -> None:
            num_prompt_tokens = LONG_TOKENS - LONG_OUTPUT_TOKENS
            rows = [SamplingRow(str(i), params, history, num_prompt_tokens) for i in range(num_rows)]
            sampler.sample(logits, rows)
            history.append(int(rng.integers(LONG_VOCAB_SIZE)))

        step()  # takes in what came before
        return best_ms(step, repeats) / num_rows

    plain_ms = row_ms()
    found = {name: row_ms(**values) - plain_ms for name, values in PENALTIES.items()}
    processor, ids = RepetitionPenaltyLogitsProcessor(1.1), torch.tensor([history[:LONG_TOKENS]])
    found["transformers' repetition"] = best_ms(lambda: processor(ids, logits[:1]), repeats)
    return found


def grammar_us(vocab_size: int) -> dict[str, float]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = list(alphabet)
    rng = np.random.default_rng(0)
    letters = [c for c in alphabet if c.isascii() and (c.isalnum() or c in '":,{}[]')]
    seen = set(words)
    while len(words) < vocab_size - 1:
        word = "".join(rng.choice(letters, rng.integers(2, 7)))
        if word not in seen:
            seen.add(word)
            words.append(word)
    backend = tokenizers.Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    start = time.process_time()
    tokenizer = GrammarTokenizer(Tokenizer(backend), vocab_size, [vocab_size - 1])
    setup_s = time.process_time() - start
    grammar = Grammar(kind="json_schema", spec=json.dumps(SCHEMA))
    build = best_ms(lambda: CompiledGrammar(tokenizer, grammar), 5) * 1e3
    compiler = GrammarCompiler(tokenizer)
    matcher, masks, accepts = GrammarMatcher(compiler.compile(grammar)), [], []
    for token_id in backend.encode(TEXT).ids:
        masks.append(best_ms(matcher.mask, 1) * 1e3)
        start = time.process_time()
        matcher.accept([token_id])
        accepts.append((time.process_time() - start) * 1e6)
    sampler, logits = Sampler(vocab_size, compiler), some_logits(vocab_size)[:1]
    row_us = {}
    for name, value in (("without", None), ("with", grammar)):
        row = SamplingRow(name, SamplingParams(max_tokens=9, top_p=0.95, grammar=value), [1], 1)
        row_us[name] = best_ms(lambda row=row: sampler.sample(logits, [row]), 30) * 1e3  # type: ignore[misc]
    return {
        "set-up ms": setup_s * 1e3,
        "build us": build,
        "mask p50 us": float(np.median(masks)),
        "mask max us": max(masks),
        "accept p50 us": float(np.median(accepts)),
        "row more us": row_us["with"] - row_us["without"],
    }


def main() -> None:
    options = parser(__doc__, "sampler", quick="the smaller vocabulary only").parse_args()
    torch.set_num_threads(1)
    results: dict[str, dict[str, float]] = {}
    for vocab_size in (32_000,) if options.quick else (32_000, 152_064):
        logits = some_logits(vocab_size)
        multinomial = best_ms(lambda logits=logits: torch.multinomial(logits.softmax(-1), 1), 10)  # type: ignore[misc]
        print(f"\n{vocab_size} tokens, {NUM_ROWS} rows; softmax + multinomial {multinomial:.2f} ms")
        print(f"  {'CPU ms a step':38} {'kvray':>10} {'warpers':>9}")
        for name, values in KINDS.items():
            ours = sampler_ms(logits, values, 30)
            peer = warpers_ms(logits, values, 3) if values.get("temperature") != 0 else float("nan")
            print(f"  {name:38} {ours:10.2f} {peer:9.2f}")
            results[f"{vocab_size} {name}"] = {"kvray": ours, "warpers": peer, "multinomial": multinomial}
        print(
            "  flat, 4 x normal: " + f"{sampler_ms(flat_logits(vocab_size), {'top_p': 0.95}, 10):.2f} with top_p 0.95"
        )
        grammar = grammar_us(vocab_size)
        print("  grammar: " + ", ".join(f"{name} {value:.1f}" for name, value in grammar.items()))
        results[f"{vocab_size} grammar"] = grammar
    penalties = penalties_ms(32 if options.quick else 256, 10)
    print(f"\npenalties, {LONG_VOCAB_SIZE} tokens, {LONG_TOKENS} of them before: CPU ms more a row")
    print("  " + ", ".join(f"{name} {value:.3f}" for name, value in penalties.items()))
    results["penalties"] = penalties
    if options.record:
        record("sampler", results, cpu=torch.backends.cpu.get_cpu_capability(), threads=1, torch=torch.__version__)
    for size in sorted({name.split()[0] for name in results if name != "penalties"}, key=int):
        cut = results[f"{size} top_p 0.95"]
        over_warpers = cut["warpers"] / cut["kvray"]
        print(goal(f"top_p, {size} tokens: over transformers' warpers", over_warpers, at_least=10, unit="x"))
        free = results[f"{size} temperature 1"]
        over_multinomial = free["multinomial"] / free["kvray"]
        print(goal(f"no cut, {size} tokens: over softmax + multinomial", over_multinomial, at_least=1, unit="x"))
    for name in PENALTIES:
        what = f"penalties, {name}, at {LONG_TOKENS // 1024} k tokens: a row more"
        print(goal(what, penalties[name], under=0.1, unit=" ms"))


if __name__ == "__main__":
    main()
