"""What plain transformers gives: float32, its own attention, one prompt at a time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from engine.sampling.row import SamplingRow
from engine.sampling.sampler import Sampler
from messages.request import SamplingParams

#: By how much another order of float32 sums moves a logit, at most: logits here are about 1.
ROUNDING = 2e-6


class Reference:
    """The oracle of all token-exactness tests."""

    def __init__(self, model_dir: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        self._sampler = Sampler(self._model.config.vocab_size, None)
        self._prompt: list[int] = []  #: the last one, with its logits and cache: choices of a request share it
        self._prefilled: tuple[torch.Tensor, Any] | None = None

    @torch.inference_mode()
    def greedy(self, prompt: list[int], max_tokens: int) -> list[int]:
        """The tokens of `generate`, end tokens included and not stopped at."""
        return self.generate(prompt, SamplingParams(max_tokens=max_tokens, temperature=0.0))

    def sampled(self, prompt: list[int], max_tokens: int, **params: object) -> list[int]:
        """Transformers' logits, our seeded draw."""
        return self.generate(prompt, SamplingParams(max_tokens=max_tokens, **params))

    @torch.inference_mode()
    def generate(self, prompt: list[int], params: SamplingParams, like: Sequence[int] = ()) -> list[int]:
        """One sequence alone with transformers' own cache; ends at a stop token or max_tokens.

        A draw at temperature takes the candidates by logit, and two of some hundred are so near to each other once in
        some ten thousand draws that summation in another order swaps them. There the choice is that of `like`.
        """
        tokens = list(prompt)
        logits, past = self._prefill(prompt)
        while True:
            row = SamplingRow(seq_id="r", params=params, token_ids=tokens, num_prompt_tokens=len(prompt))
            token_id = self._choose(logits, row, like)
            tokens.append(token_id)
            if len(tokens) - len(prompt) >= params.max_tokens:
                break
            if token_id in params.stop_token_ids and len(tokens) - len(prompt) > params.min_tokens:
                break
            logits, past = self._step([token_id], past)
        self._sampler.forget("r")
        return tokens[len(prompt) :]

    def _choose(self, logits: torch.Tensor, row: SamplingRow, like: Sequence[int]) -> int:
        """The next token; that of `like` where it is drawn and rounding alone keeps it from being so here."""
        (chosen,) = self._sampler.sample(logits, [row])
        wanted = like[row.num_output_tokens] if row.num_output_tokens < len(like) else chosen.token_id
        if wanted != chosen.token_id and not row.is_greedy:
            for nudge in (-ROUNDING, ROUNDING):
                nudged = logits.clone()
                nudged[0, wanted] += nudge
                if self._sampler.sample(nudged, [row])[0].token_id == wanted:
                    return wanted
        return chosen.token_id

    def _prefill(self, prompt: list[int]) -> tuple[torch.Tensor, Any]:
        if self._prefilled is None or self._prompt != prompt:
            self._prompt, self._prefilled = list(prompt), self._step(prompt, None)
        logits, past = self._prefilled
        return logits.clone(), copy.deepcopy(past)

    def _step(self, token_ids: list[int], past: Any) -> tuple[torch.Tensor, Any]:
        """The last token's logits `[1, vocab_size]`, and the cache."""
        out = self._model(input_ids=torch.tensor([token_ids]), past_key_values=past, use_cache=True)
        return out.logits[:, -1].float(), out.past_key_values
