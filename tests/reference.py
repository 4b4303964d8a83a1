"""What plain transformers gives: eager attention, float32, one prompt at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from engine.sampler import Sampler, SamplingRow
from messages.request import SamplingParams


class Reference:
    """The oracle of all token-exactness tests."""

    def __init__(self, model_dir: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            model_dir, attn_implementation="eager", dtype=torch.float32
        ).eval()
        self._sampler = Sampler(self._model.config.vocab_size, None)

    @torch.inference_mode()
    def greedy(self, prompt: list[int], max_tokens: int) -> list[int]:
        """The tokens of `generate`, end tokens included and not stopped at."""
        return self.generate(prompt, SamplingParams(max_tokens=max_tokens, temperature=0.0))

    def sampled(self, prompt: list[int], max_tokens: int, **params: object) -> list[int]:
        """Transformers' logits, our seeded draw."""
        return self.generate(prompt, SamplingParams(max_tokens=max_tokens, **params))

    @torch.inference_mode()
    def generate(self, prompt: list[int], params: SamplingParams) -> list[int]:
        """One sequence alone with transformers' own cache; ends at a stop token or max_tokens."""
        tokens = list(prompt)
        inputs, past = torch.tensor([tokens]), None
        while len(tokens) - len(prompt) < params.max_tokens:
            out = self._model(input_ids=inputs, past_key_values=past, use_cache=True)
            past = out.past_key_values
            row = SamplingRow(seq_id="r", params=params, token_ids=tokens, num_prompt_tokens=len(prompt))
            (chosen,) = self._sampler.sample(out.logits[:, -1].float(), [row])
            tokens.append(chosen.token_id)
            inputs = torch.tensor([[chosen.token_id]])
            if chosen.token_id in params.stop_token_ids and len(tokens) - len(prompt) > params.min_tokens:
                break
        self._sampler.forget("r")
        return tokens[len(prompt) :]
