"""Trains the demo model on a CPU in under half an hour and writes its directory.

    python -m cluster.demo.train --out cluster/demo/model --minutes 25 --threads 2
"""

from __future__ import annotations

import argparse
import bisect
import dataclasses
import itertools
import pathlib
import random
import sys
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from cluster.demo import corpus, informed_start
from cluster.demo.corpus import Segment, Variety

MAX_POSITIONS = 8192
MAX_VOCAB_SIZE = 2048
TOKENS_PER_STEP = 4096
MATRIX_RATE = 0.02
OTHER_RATE = 0.003
WARMUP_STEPS = 30
#: The rate is full until this share of the time, then falls in a line to `FINAL_RATE` of itself.
FULL_RATE_UNTIL = 0.4
FINAL_RATE = 0.02
#: Share of rows that are stories, facts and small talk.
CHAT_SHARE = 0.10
#: A stage ends once this share of the codes was right over the last `WINDOW` steps.
STAGE_ACCURACY = 0.97
WINDOW = 25
REPORT_STEPS = 25
SAVE_STEPS = 200


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """Rows of one length, until the model answers them or a share of the time is used."""

    num_tokens: int
    num_facts: tuple[int, int]
    #: Ends at the latest at this share of the time budget.
    ends_at: float
    #: Shares of rows that are drills: random tokens repeated, notes restated.
    repeated: float = 0.0
    restated: float = 0.0
    notes_share: tuple[float, float] = (0.35, 0.35)
    variety: Variety = corpus.PLAIN


STAGES = (
    Stage(128, (2, 6), 0.15, repeated=0.03, restated=0.37),
    Stage(256, (3, 14), 0.38, repeated=0.05, restated=0.10, notes_share=(0.3, 0.5), variety=Variety(wording=0.05)),
    Stage(512, (6, 28), 0.52, notes_share=(0.4, 0.7), variety=Variety(0.15, 0.0, 0.1, 0.1, 0.05)),
    Stage(1024, (10, 45), 0.70, notes_share=(0.5, 0.8), variety=Variety(0.25, 0.0, 0.15, 0.2, 0.05)),
    Stage(2048, (15, 75), 1.0, notes_share=(0.6, 0.9), variety=Variety(0.25, 0.0, 0.15, 0.2, 0.05)),
)


def train_tokenizer(seed: int) -> Tokenizer:
    """Byte-level BPE on the corpus; digits split in pairs, the space before a number belonging to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\d{1,2}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(seed)
    variety = Variety(wording=0.5, sentence=0.3, system=0.2, apart=0.3, chatter=0.1)

    def texts() -> Iterator[str]:
        for _ in range(2000):
            yield _joined(corpus.lookup_text(rng, 500, 12, notes_share=0.6, variety=variety))
        for _ in range(1000):
            yield _joined(corpus.chat_text(rng, 500, variety))

    tokenizer.train_from_iterator(
        texts(),
        trainers.BpeTrainer(
            vocab_size=MAX_VOCAB_SIZE,
            special_tokens=list(corpus.SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def build_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """A fresh Llama of 3.3 M parameters with the informed start."""
    vocab_size = -(-tokenizer.get_vocab_size() // 64) * 64
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(corpus.END),
        pad_token_id=tokenizer.token_to_id(corpus.SPECIAL_TOKENS[0]),
    )
    model = LlamaForCausalLM(config)
    informed_start.initialise(model)
    return model


class RowMaker:
    """Draws training rows of token ids and their loss weights."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        self.first_plain_id = len(corpus.SPECIAL_TOKENS) + 256

    def batch(self, stage: Stage) -> tuple[Tensor, Tensor]:
        """`TOKENS_PER_STEP` tokens: ids and weights, both [num_rows, stage.num_tokens + 1]."""
        rows = [self.row(stage) for _ in range(max(1, TOKENS_PER_STEP // stage.num_tokens))]
        ids, weights = zip(*rows, strict=True)
        return torch.tensor(ids), torch.tensor(weights)

    def row(self, stage: Stage) -> tuple[list[int], list[float]]:
        rng, length = self.rng, stage.num_tokens + 1
        draw = rng.random()
        if draw < stage.repeated:
            return self.repeated(length)
        num_facts = rng.randint(*stage.num_facts)
        asked = round(length * 1.1)
        if draw < stage.repeated + stage.restated:
            return self.encode(corpus.restated_text(rng, asked, num_facts), length)
        if rng.random() < CHAT_SHARE:
            return self.encode(corpus.chat_text(rng, asked, stage.variety), length)
        notes_share = rng.uniform(*stage.notes_share)
        segments = corpus.lookup_text(rng, asked, num_facts, notes_share=notes_share, variety=stage.variety)
        return self.encode(segments, length)

    def repeated(self, length: int) -> tuple[list[int], list[float]]:
        """Random tokens over and over; all but the first round count."""
        period = self.rng.randint(6, min(40, length // 3))
        tokens = [self.rng.randrange(self.first_plain_id, self.tokenizer.get_vocab_size()) for _ in range(period)]
        ids = list(itertools.islice(itertools.cycle(tokens), length))
        return ids, [0.0] * period + [corpus.ANSWER_WEIGHT] * (length - period)

    def encode(self, segments: list[Segment], length: int) -> tuple[list[int], list[float]]:
        """The text's first `length` tokens, each with the weight of the segment it begins in; short rows are padded."""
        encoding = self.tokenizer.encode(_joined(segments))
        ends = list(itertools.accumulate(len(segment.text) for segment in segments))
        ids = encoding.ids[:length]
        weights = [segments[bisect.bisect_right(ends, start)].weight for start, _ in encoding.offsets[:length]]
        padding = length - len(ids)
        return ids + [0] * padding, weights + [0.0] * padding


def rate_factor(step: int, share_of_time: float) -> float:
    """Warm-up, a full stretch, then a line down to `FINAL_RATE`."""
    fall = (1.0 - share_of_time) / (1.0 - FULL_RATE_UNTIL)
    return min(1.0, step / WARMUP_STEPS, max(FINAL_RATE, fall))


def train(
    model: LlamaForCausalLM, rows: RowMaker, budget_s: float, checkpoint: pathlib.Path, first_stage: int = 0,
    rate: float = 1.0,
) -> int:
    """Trains in place for `budget_s` seconds and returns the number of tokens seen."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = (
        (torch.optim.Muon(matrices, lr=MATRIX_RATE, momentum=0.95, weight_decay=0.01), MATRIX_RATE * rate),
        (torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0), OTHER_RATE * rate),
    )
    model.train()
    started_s = time.monotonic()
    num_tokens, stage_index = 0, first_stage
    window: list[tuple[float, float, float]] = []  # loss, loss on codes, accuracy on codes
    print(f"stage {STAGES[stage_index]}", flush=True)
    for step in itertools.count():
        elapsed_s = time.monotonic() - started_s
        share = elapsed_s / budget_s
        if share >= 1.0:
            return num_tokens
        answered = len(window) >= WINDOW and sum(w[2] for w in window[-WINDOW:]) / WINDOW > STAGE_ACCURACY
        if stage_index + 1 < len(STAGES) and (answered or share > STAGES[stage_index].ends_at):
            stage_index += 1
            window.clear()
            print(f"{elapsed_s:.0f} s: stage {STAGES[stage_index]}", flush=True)
        for optimizer, base in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = base * rate_factor(step, share)

        ids, weights = rows.batch(STAGES[stage_index])
        inputs, targets, weights = ids[:, :-1], ids[:, 1:], weights[:, 1:]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=inputs, use_cache=False).logits
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(weights)
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad()

        num_tokens += inputs.numel()
        is_code = weights == corpus.VALUE_WEIGHT
        hits = (logits.argmax(-1) == targets)[is_code]
        window.append((loss.item(), losses[is_code].mean().item(), hits.float().mean().item()))
        if step % REPORT_STEPS == REPORT_STEPS - 1:
            recent = window[-WINDOW:]
            mean = [sum(column) / len(recent) for column in zip(*recent, strict=True)]
            print(
                f"{elapsed_s:.0f} s step {step + 1} {num_tokens / 1e6:.2f} M tokens {num_tokens / elapsed_s:.0f}/s "
                f"loss {mean[0]:.3f} code loss {mean[1]:.3f} code accuracy {mean[2]:.3f}",
                flush=True,
            )
        if step % SAVE_STEPS == SAVE_STEPS - 1:
            print("quick", quick_check(model, rows.tokenizer), flush=True)
            torch.save(model.state_dict(), checkpoint)
    raise AssertionError("unreachable")


@torch.no_grad()
def quick_check(model: LlamaForCausalLM, tokenizer: Tokenizer, num_questions: int = 16) -> dict[int, str]:
    model.eval()
    rng = random.Random(99)
    result = {}
    for length in (256, 1024, 2048):
        right = 0
        for _ in range(num_questions):
            lookup = corpus.make_lookup(rng, length, min(40, length // 40))
            prompt = f"<|user|>{lookup.notes}\n{lookup.question}<|end|><|assistant|>"
            ids = tokenizer.encode(prompt + lookup.answer + "<|end|>").ids
            n = len(tokenizer.encode(lookup.answer + "<|end|>").ids)
            logits = model(input_ids=torch.tensor([ids]), logits_to_keep=n + 1, use_cache=False).logits[0]
            right += logits[:-1].argmax(-1).tolist() == ids[-n:]
        result[length] = f"{right}/{num_questions}"
    model.train()
    return result


def _joined(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--init", type=pathlib.Path)
    parser.add_argument("--first-stage", type=int, default=0)
    parser.add_argument("--rate", type=float, default=1.0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(1)
    tokenizer.save(str(args.out / "tokenizer.json"))
    model = build_model(tokenizer)
    if args.init:
        model.load_state_dict(torch.load(args.init))
    print("parameters", sum(p.numel() for p in model.parameters()), "vocab", tokenizer.get_vocab_size(), flush=True)
    rows = RowMaker(tokenizer, args.seed)
    n = train(model, rows, args.minutes * 60, args.out / "checkpoint.pt", args.first_stage, args.rate)
    print("tokens", n)
    torch.save(model.state_dict(), args.out / "checkpoint.pt")
    print("final", quick_check(model, tokenizer, 50), flush=True)


if __name__ == "__main__":
    sys.exit(main())
