"""Trains the demo model on a CPU in half an hour, scores it and writes its directory.

    python -m tools.demo_model.train --out cluster/demo/kvray-demo --minutes 30 --threads 2

Exit code 1 when the written model answers too few questions. `--from` goes on from an earlier directory's weights,
which are written every `SAVE_STEPS` steps; `--first-stage` skips rows that they answer.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
import pathlib
import random
import sys
import time
from typing import Annotated

import torch
import transformers
import typer
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from tools.demo_model import corpus, evaluate, informed_start, model_directory
from tools.demo_model.corpus import Lookup
from tools.demo_model.model_directory import TrainingRun
from tools.demo_model.rows import STAGES, RowMaker, Stage
from tools.demo_model.tokenizer import SPACE, special_id, train_tokenizer

MAX_POSITIONS = 8192
ROPE_THETA = 1e6
#: Rows up to this length are trained before positions are extended.
ROPE_TOKENS = 1024
VOCAB_MULTIPLE = 64
TOKENIZER_SEED = 1

MATRIX_RATE = 0.02
OTHER_RATE = 0.003
WARMUP_STEPS = 30
#: The rates are full until this share of the time, then fall in a line to `FINAL_RATE` of themselves.
FULL_RATE_UNTIL = 0.4
FINAL_RATE = 0.02
MAX_GRADIENT_NORM = 1.0

#: Share of the tokens of texts, which count little, that the loss is taken of in a step.
TEXT_SHARE = 0.25

#: A stage ends when this share of the codes was right over the last `WINDOW_STEPS` steps.
STAGE_ACCURACY = 0.97
WINDOW_STEPS = 25
#: How often the weights are written and the missed things found, and the notes by which they are.
SAVE_STEPS = 150
SWEEP_TOKENS = 192
SWEEP_FACTS = 5
#: Embeddings are redrawn only once few things are missed, each with so many attempts judged by so many questions.
MAX_REDRAWN = 8
REDRAW_ATTEMPTS = 32
REDRAW_QUESTIONS = 6


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """One step: the weighted mean loss, and the right guesses of tokens that are copied: codes, and arguments."""

    loss: float
    num_codes_right: int
    num_codes: int
    num_arguments_right: int
    num_arguments: int
    num_tokens: int


def build_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """Build a fresh Llama of 3.8 M parameters with the informed start."""
    config = LlamaConfig(
        vocab_size=-(-tokenizer.get_vocab_size() // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=special_id(tokenizer, corpus.END),
        pad_token_id=special_id(tokenizer, corpus.PAD),
    )
    model = LlamaForCausalLM(config)
    vocab = tokenizer.get_vocab()
    twins = [(row, vocab[f"{SPACE}{token}"]) for token, row in vocab.items() if f"{SPACE}{token}" in vocab]
    informed_start.initialise(model, twins)
    return model


class Trainer:
    """The model with its optimizers: Muon for the matrices, AdamW for embeddings and norms."""

    def __init__(self, model: LlamaForCausalLM, *, peak_rate: float = 1.0) -> None:
        """Make the optimizers; `peak_rate` is a share of `MATRIX_RATE` and `OTHER_RATE`."""
        self.model = model
        parameters = list(model.named_parameters())
        matrices = [weight for name, weight in parameters if weight.ndim == 2 and "embed" not in name]
        others = [weight for name, weight in parameters if weight.ndim != 2 or "embed" in name]
        self._optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.Muon(matrices, momentum=0.95, weight_decay=0.01), MATRIX_RATE * peak_rate),
            (torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0), OTHER_RATE * peak_rate),
        ]

    def step(self, ids: Tensor, weights: Tensor, *, rate: float) -> StepResult:
        """Train on ids and loss weights, both [num_rows, num_tokens + 1], once; `rate` is a share of the peak."""
        inputs, targets, weights = ids[:, :-1], ids[:, 1:], weights[:, 1:]
        is_text = weights == corpus.TEXT_WEIGHT
        is_asked = (weights > corpus.TEXT_WEIGHT) | (is_text & (torch.rand(weights.shape) < TEXT_SHARE))
        weights = torch.where(is_text, weights / TEXT_SHARE, weights)[is_asked]
        targets = targets[is_asked]
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.model.model(input_ids=inputs, use_cache=False).last_hidden_state
            logits = self.model.lm_head(hidden[is_asked])  # [num_asked, vocab_size]
        losses = functional.cross_entropy(logits.float(), targets, reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        for optimizer, peak_rate in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak_rate * rate
            optimizer.step()
            optimizer.zero_grad()

        is_right = logits.argmax(-1) == targets
        codes, arguments = is_right[weights == corpus.CODE_WEIGHT], is_right[weights == corpus.ARGUMENT_WEIGHT]
        return StepResult(
            loss.item(),
            num_codes_right=int(codes.sum()),
            num_codes=codes.numel(),
            num_arguments_right=int(arguments.sum()),
            num_arguments=arguments.numel(),
            num_tokens=inputs.numel(),
        )


def extend_positions(model: LlamaForCausalLM, scale: float) -> None:
    """Slow the slow rotary pairs down by `scale`, so that what was learned within `ROPE_TOKENS` reaches farther.

    This is the scaling of Llama 3.1, "llama3" in transformers. The fast pairs, by which the first layer looks back,
    stay as they are. Without a step of training it raised the answers at 2,048 tokens from 0 to 14 of 16, and at 4,096
    from 0 to 7 of 8, with weights that had seen rows of at most 1,024.
    """
    model.config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": ROPE_THETA,
        "factor": scale,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ROPE_TOKENS,
    }
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)


def rate_at(step: int, share_of_time: float) -> float:
    """Return the share of the peak rate: warm-up, a full stretch, then a line down to `FINAL_RATE`."""
    fall = (1.0 - share_of_time) / (1.0 - FULL_RATE_UNTIL)
    return min(1.0, step / WARMUP_STEPS, max(FINAL_RATE, fall))


def is_over(stage: Stage, results: list[StepResult], share_of_time: float) -> bool:
    """Tell whether the stage, with these results so far, has been answered or has used up its time."""
    recent = results[-WINDOW_STEPS:]
    is_answered = len(recent) == WINDOW_STEPS and _accuracies(recent)[0] > STAGE_ACCURACY
    return is_answered or share_of_time > stage.ends_at


def train(
    trainer: Trainer, rows: RowMaker, tokenizer: Tokenizer, stages: list[Stage], budget_s: float, out: pathlib.Path
) -> int:
    """Train in place for `budget_s` seconds, writing `out` now and then and at the end.

    Seconds are those that the processor worked, by thread: on a busy machine it takes longer, and is the same training.
    Returns the number of tokens seen.
    """
    trainer.model.train()
    rng = random.Random(0)
    started_s = time.process_time()
    upcoming = collections.deque(stages)
    stage: Stage | None = None
    results: list[StepResult] = []
    num_tokens = 0
    for step in itertools.count():
        elapsed_s = (time.process_time() - started_s) / torch.get_num_threads()
        share_of_time = elapsed_s / budget_s
        if share_of_time >= 1.0:
            break
        if stage is None or (upcoming and is_over(stage, results, share_of_time)):
            stage, results = upcoming.popleft(), []
            typer.echo(f"{elapsed_s:.0f} s: rows of {sorted({kind.num_tokens for kind in stage.rows})} tokens")
            if stage.position_scale > 1.0:
                extend_positions(trainer.model, stage.position_scale)
        result = trainer.step(*rows.batch(rng.choice(stage.rows)), rate=rate_at(step, share_of_time))
        results.append(result)
        num_tokens += result.num_tokens
        if step % WINDOW_STEPS == WINDOW_STEPS - 1:
            typer.echo(_progress(elapsed_s, step, num_tokens, results[-WINDOW_STEPS:]))
        if step % SAVE_STEPS == 0:
            rows.focus = mend(trainer.model, tokenizer)
            model_directory.write_model(out, trainer.model, tokenizer)
    mend(trainer.model, tokenizer)
    model_directory.write_model(out, trainer.model, tokenizer)
    return num_tokens


def mend(model: LlamaForCausalLM, tokenizer: Tokenizer) -> list[str]:
    """Return the missed things, after giving new embeddings to them where they are few."""
    missed = missed_things(model, tokenizer)
    typer.echo(f"misses {len(missed)} of {len(corpus.THINGS)} things")
    for thing in missed if len(missed) <= MAX_REDRAWN else ():
        num_right = redraw_embedding(model, tokenizer, thing)
        typer.echo(f"{thing}: {num_right} of {REDRAW_QUESTIONS} questions answered after redrawing")
    return missed


@torch.inference_mode()
def answers(model: LlamaForCausalLM, tokenizer: Tokenizer, lookup: Lookup) -> bool:
    """Tell whether each token of the right answer is the likeliest, given the right ones before."""
    asked = corpus.turn("user", f"{lookup.notes}\n{lookup.question}")
    prompt = tokenizer.encode(f"{asked}<|assistant|>").ids
    answer = tokenizer.encode(lookup.answer + corpus.END).ids
    inputs = torch.tensor([prompt + answer])
    logits = model(input_ids=inputs, logits_to_keep=len(answer) + 1, use_cache=False).logits[0, :-1]
    return bool(logits.argmax(-1).tolist() == answer)


def missed_things(model: LlamaForCausalLM, tokenizer: Tokenizer) -> list[str]:
    """Find the things whose code the model does not tell from short notes; one question each shows most of them."""
    rng = random.Random(SWEEP_TOKENS)
    lookups = {thing: corpus.make_lookup(rng, SWEEP_TOKENS, SWEEP_FACTS, thing=thing) for thing in corpus.THINGS}
    return [thing for thing, lookup in lookups.items() if not answers(model, tokenizer, lookup)]


@torch.no_grad()
def redraw_embedding(model: LlamaForCausalLM, tokenizer: Tokenizer, thing: str) -> int:
    """Give a thing that the model misses another embedding, in place; return how many questions it then answers.

    One sharp attention head does the copying. It sees nothing of a thing whose embedding resembles, in the few
    directions that the head reads, those of other tokens; and since its softmax is saturated there, no gradient helps.
    So new embeddings are drawn from the distribution of the other things' until one is answered.
    """
    rng = random.Random(thing)
    lookups = [corpus.make_lookup(rng, SWEEP_TOKENS, SWEEP_FACTS, thing=thing) for _ in range(REDRAW_QUESTIONS)]
    weight = model.get_input_embeddings().weight  # [vocab_size, hidden_size], the output's as well
    row = special_id(tokenizer, f"{SPACE}{thing}")
    twin = special_id(tokenizer, thing)
    others = weight[[special_id(tokenizer, f"{SPACE}{name}") for name in corpus.THINGS if name != thing]]
    mean = others.mean(0)
    spread = (others - mean) / len(others) ** 0.5
    without_space = weight[twin] - weight[row]
    best, most_right = weight[row].clone(), sum(answers(model, tokenizer, lookup) for lookup in lookups)
    for _ in range(REDRAW_ATTEMPTS):
        if most_right == len(lookups):
            break
        weight[row] = mean + torch.randn(len(others)) @ spread
        weight[twin] = weight[row] + without_space
        num_right = sum(answers(model, tokenizer, lookup) for lookup in lookups)
        if num_right > most_right:
            best, most_right = weight[row].clone(), num_right
    weight[row], weight[twin] = best, best + without_space
    return most_right


def _accuracies(results: list[StepResult]) -> tuple[float, float]:
    """Return the shares of the tokens of codes and of arguments that were right; 1 where there were none."""
    num_codes = sum(result.num_codes for result in results)
    num_arguments = sum(result.num_arguments for result in results)
    return (
        sum(result.num_codes_right for result in results) / num_codes if num_codes else 1.0,
        sum(result.num_arguments_right for result in results) / num_arguments if num_arguments else 1.0,
    )


def _progress(elapsed_s: float, step: int, num_tokens: int, recent: list[StepResult]) -> str:
    loss = sum(result.loss for result in recent) / len(recent)
    codes, arguments = _accuracies(recent)
    return (
        f"{elapsed_s:.0f} s, step {step + 1}, {num_tokens / 1e6:.2f} M tokens, loss {loss:.3f}, "
        f"right tokens of codes {codes:.3f}, of arguments {arguments:.3f}"
    )


def _cpu_name() -> str:
    """Return the processor's name where Linux tells it."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown CPU")


def main(
    out: Annotated[pathlib.Path, typer.Option(help="Model directory to write.", file_okay=False)],
    minutes: Annotated[float, typer.Option(help="Time of the training, by thread.")] = 30.0,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    seed: int = 5,
    start: Annotated[
        pathlib.Path | None, typer.Option("--from", help="Model directory whose weights to go on from.", exists=True)
    ] = None,
    first_stage: Annotated[int, typer.Option(min=0, max=len(STAGES) - 1, help="The rows to begin with.")] = 0,
    peak_rate: Annotated[float, typer.Option(help="Share of the usual learning rates.")] = 1.0,
    questions: Annotated[int, typer.Option(min=evaluate.MIN_QUESTIONS, help="Questions at each length.")] = 200,
    min_accuracy: Annotated[float, typer.Option(help="Share right that the required lengths must reach.")] = 0.95,
) -> None:
    """Train, write and score the demo model; exit code 1 when a required length misses the threshold."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    if start:
        tokenizer = Tokenizer.from_file(str(start / "tokenizer.json"))
        model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
    else:
        tokenizer = train_tokenizer(TOKENIZER_SEED)
        model = build_model(tokenizer)
    rows = RowMaker(tokenizer, seed)
    trainer = Trainer(model, peak_rate=peak_rate)
    num_tokens = train(trainer, rows, tokenizer, list(STAGES[first_stage:]), minutes * 60, out)

    run = TrainingRun(
        command=f"python -m tools.demo_model.train {' '.join(sys.argv[1:])}",
        hardware=f"{threads} of {os.cpu_count()} cores, {_cpu_name()}",
        torch_version=torch.__version__,
        num_tokens=num_tokens,
        minutes=minutes,
    )
    model_directory.write_runs(out, [*(model_directory.read_runs(start) if start else []), run])
    report = evaluate.evaluate(out, questions)
    model_directory.write_card(out, report, min_accuracy)
    evaluate.exit_if_missed(report, min_accuracy)


if __name__ == "__main__":
    typer.run(main)
