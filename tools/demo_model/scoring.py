"""A demo model directory that answers, and what its answers are worth."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from tools.demo_model import corpus
from tools.demo_model.corpus import Segment
from tools.demo_model.rows import encoded

Message = dict[str, Any]

#: Room for the answer within `max_position_embeddings`, in tokens, and for a call.
ANSWER_ROOM = 32
CALL_ROOM = 128


@dataclasses.dataclass(frozen=True, slots=True)
class Score:
    """Right answers to one kind of question."""

    kind: str
    num_facts: int
    mean_prompt_tokens: float
    num_right: int
    num_asked: int

    @property
    def accuracy(self) -> float:
        """Share of the questions answered right, 0 to 1."""
        return self.num_right / self.num_asked


class Respondent:
    """A model directory, answering conversations greedily."""

    def __init__(self, directory: pathlib.Path) -> None:
        """Load the weights as bfloat16."""
        self.tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(directory)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
        self.model.eval()

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None) -> list[int]:
        """Encode the conversation as the chat template writes it, with the assistant's turn open."""
        text = self.tokenizer.apply_chat_template(
            list(messages), tools=list(tools) if tools else None, tokenize=False, add_generation_prompt=True
        )
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    @torch.inference_mode()
    def answer(self, prompt_ids: Sequence[int], *, max_new_tokens: int = ANSWER_ROOM) -> str:
        """Generate the greedy answer with its special tokens, so that a missing end of turn shows."""
        inputs = torch.tensor([prompt_ids])  # [1, num_tokens]
        output = self.model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=max_new_tokens, do_sample=False
        )
        answer: str = self.tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=False)
        return answer

    @torch.inference_mode()
    def gives(self, segments: Sequence[Segment]) -> bool:
        """Tell whether the model gives each of the arguments' tokens in `segments`, held to a grammar for the others.

        Where a string ends, what follows is the grammar's.
        """
        ids, weights = encoded(self.tokenizer.backend_tokenizer, segments)
        likeliest = self.model(input_ids=torch.tensor([ids])).logits[0].argmax(-1).tolist()
        pairs = zip(likeliest, ids[1:], weights[1:], strict=False)
        asked = [(guess, token) for guess, token, weight in pairs if weight == corpus.ARGUMENT_WEIGHT]
        guesses, tokens = (self.tokenizer.convert_ids_to_tokens(list(side)) for side in zip(*asked, strict=True))
        return all(
            guess.startswith('"') if token.startswith('"') else guess == token
            for guess, token in zip(guesses, tokens, strict=True)
        )
