"""Outputs drawn at random from what the masks allow, token by token, to their end: a model that knows nothing."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from messages.request import Grammar
from text.grammar import CompiledGrammar, GrammarMatcher, GrammarTokenizer, check_grammar
from text.tokenizer import Tokenizer

EOS = 256


def byte_tokenizer() -> Tokenizer:
    """A token for each byte, and some that a grammar's text may hold, added or not."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>", "<|call|>"])
    backend.add_tokens(["<think>", '{"', '":', '"}', '","', "true"])
    return Tokenizer(backend)


class MaskedWalk:
    """Walks through grammars with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, eos_id: int = EOS) -> None:
        self.tokenizer = tokenizer
        self.eos_id = eos_id
        self.grammars = GrammarTokenizer(tokenizer, tokenizer.vocab_size, [eos_id])
        self._closing = {
            token_id
            for token_id in range(tokenizer.vocab_size)
            if token_id != eos_id and set(tokenizer.token_text(token_id)) & set('"}]')
        }

    def compiled(self, grammar: Grammar) -> CompiledGrammar:
        """Check a grammar as the ingress does, and compile it."""
        return CompiledGrammar(self.grammars, check_grammar(self.grammars, grammar))

    def token_ids(self, compiled: CompiledGrammar, seed: int, max_tokens: int = 3000) -> list[int] | None:
        """Return a random output; None if it did not end. The longer it is, the likelier it closes what is open."""
        matcher, rng, output = GrammarMatcher(compiled), np.random.default_rng(seed), []
        for _ in range(max_tokens):
            allowed = np.flatnonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")).tolist()
            if self.eos_id in allowed and (len(allowed) == 1 or rng.random() < 0.6):
                return output
            allowed = [token_id for token_id in allowed if token_id != self.eos_id]
            closing = [token_id for token_id in allowed if token_id in self._closing]
            is_closing = closing and rng.random() < min(0.9, 0.15 + len(output) / 300)
            output.append(int(rng.choice(closing if is_closing else allowed)))
            matcher.accept(output[-1:])
        return None

    def text(self, compiled: CompiledGrammar, seed: int) -> str | None:
        """Return a random output's text; None if it did not end."""
        token_ids = self.token_ids(compiled, seed)
        return None if token_ids is None else self.tokenizer.decode(token_ids)

    def json_texts(self, schema: Any, num: int, whitespace: str = "") -> list[str]:
        """Return up to `num` random texts that a schema allows.

        Raises:
            RequestError: the schema is refused.
        """
        grammar = Grammar(kind="json_schema", spec=json.dumps(schema), whitespace=whitespace)
        compiled = self.compiled(grammar)
        return [text for seed in range(num) if (text := self.text(compiled, seed)) is not None]
