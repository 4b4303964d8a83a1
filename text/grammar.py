"""Output held to a grammar, by llguidance: which tokens may come next. No torch: the ingress checks grammars too."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import llguidance
import numpy as np
import tokenizers
from numpy.typing import NDArray

from messages.errors import ConfigError, RequestError
from messages.request import Grammar

#: What a client's grammar may cost. Lexer fuel is about 50,000 steps a millisecond when a grammar is built and 14,000
#: when a mask is computed (llguidance's own figures): some 20 ms to build, some 15 ms for the worst mask.
_LIMITS = llguidance.LLParserLimits(initial_lexer_fuel=1_000_000, step_lexer_fuel=200_000, verbose_errors=False)
#: Whitespace between JSON's tokens: enough to indent, too little for a small model to get lost in.
_JSON_OPTIONS: dict[str, Any] = {"whitespace_pattern": r"[ \n\r\t]{1,64}"}
_REGEX_SPECIAL = frozenset("\\.+*?()|[]{}^$#&-~/")
_NUM_KEPT = 64  #: compiled grammars that nobody holds, of some 100 KiB each as a rule
_NUM_WALKS, _WALK_TOKENS = 4, 8  #: beginnings of outputs that a check looks at


class GrammarTokenizer:
    """A vocabulary prepared for grammars: once per process (0.1 s for 32 k tokens, 0.6 s for 128 k). Any thread."""

    def __init__(self, backend: llguidance.LLTokenizer, vocab_size: int, eos_ids: tuple[int, ...]) -> None:
        self.backend = backend
        self.vocab_size = vocab_size  #: the model's: width of a mask
        self.eos_ids = eos_ids

    @classmethod
    def from_tokenizer_json(
        cls, tokenizer: str | Path | tokenizers.Tokenizer, vocab_size: int, eos_ids: Sequence[int]
    ) -> GrammarTokenizer:
        """Prepare the vocabulary of a tokenizer.json, or of the object made from it.

        Args:
            tokenizer: path of a tokenizer.json, or what `tokenizers` made of one.
            vocab_size: the model's vocabulary; ids that the tokenizer does not have are never allowed.
            eos_ids: tokens that end an output; allowed where the grammar is complete.

        Raises:
            ConfigError: there is no end token, or llguidance cannot use the tokenizer.
        """
        if not eos_ids:
            raise ConfigError("structured output needs an end token, but the model names none")
        text = tokenizer.to_str() if isinstance(tokenizer, tokenizers.Tokenizer) else Path(tokenizer).read_text("utf-8")
        parsed = json.loads(text)
        # Where the tokenizer has more tokens than the model, llguidance wants room for all; mask() cuts them off.
        size = max(vocab_size, _num_tokens(parsed))
        try:
            # llguidance encodes with it: truncation and padding would be in the way
            plain = json.dumps({**parsed, "truncation": None, "padding": None})
            backend = llguidance.LLTokenizer(plain, n_vocab=size, eos_token=list(eos_ids))
        except ValueError as error:
            raise ConfigError(f"structured output cannot use this tokenizer: {_one_line(str(error))}") from error
        return cls(backend, vocab_size, tuple(eos_ids))


class CompiledGrammar:
    """A grammar made ready for any number of sequences. Frozen; any thread."""

    __slots__ = ("__weakref__", "beginning", "tokenizer")

    def __init__(self, tokenizer: GrammarTokenizer, grammar: Grammar) -> None:
        """Compile `grammar`: some milliseconds as a rule, without the interpreter's lock; nothing can interrupt it.

        Raises:
            RequestError: it is not well formed, or larger than the limits allow.
        """
        self.tokenizer = tokenizer
        self.beginning = llguidance.LLMatcher(tokenizer.backend, _compiled(grammar), log_level=0, limits=_LIMITS)
        if self.beginning.is_error():
            raise _refused(grammar, self.beginning.get_error())


class GrammarCompiler:
    """Compiles each grammar once, and keeps those that somebody holds, or that were asked for last. Any thread."""

    def __init__(self, tokenizer: GrammarTokenizer) -> None:
        self._tokenizer = tokenizer
        self._held: WeakValueDictionary[Grammar, CompiledGrammar] = WeakValueDictionary()
        self._last: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, grammar: Grammar) -> CompiledGrammar | None:
        """Return the compiled grammar if it is kept."""
        with self._lock:
            found = self._held.get(grammar)
            if found is not None:
                self._keep(grammar, found)
            return found

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Return the compiled grammar, which may take as long as `CompiledGrammar` says.

        Raises:
            RequestError: `CompiledGrammar` refuses it.
        """
        found = self.find(grammar)
        if found is None:
            found = CompiledGrammar(self._tokenizer, grammar)
            with self._lock:
                self._held[grammar] = found
                self._keep(grammar, found)
        return found

    def _keep(self, grammar: Grammar, compiled: CompiledGrammar) -> None:
        self._last[grammar] = compiled
        self._last.move_to_end(grammar)
        if len(self._last) > _NUM_KEPT:
            self._last.popitem(last=False)


class GrammarMatcher:
    """Follows one sequence's output through its grammar.

    A sequence that moves gets a new one, fed with the tokens generated so far. One thread at a time.
    """

    def __init__(self, grammar: CompiledGrammar) -> None:
        """Stand at the beginning of the output; takes no time worth mentioning."""
        self._tokenizer = grammar.tokenizer
        self._matcher = grammar.beginning.deep_copy()

    @property
    def is_complete(self) -> bool:
        """Whether the output so far satisfies the grammar, so that it may end here."""
        return bool(self._matcher.is_accepting())

    def accept(self, token_ids: Sequence[int]) -> None:
        """Take the next tokens of the output. An end token at a place where it is allowed changes nothing.

        Raises:
            RequestError: the mask did not allow a token; the sequence cannot go on.
        """
        for token_id in token_ids:
            if self._matcher.is_stopped() and not self._matcher.is_error() and token_id in self._tokenizer.eos_ids:
                continue  # ended before: llguidance takes no second end token, a sequence that ignores eos may
            if not self._matcher.consume_token(token_id):
                raise _failed(self._matcher.get_error() or f"token {token_id} comes after its end")

    def mask(self) -> NDArray[np.int32]:
        """Return which tokens may come next, [ceil(vocab_size / 32)] int32: bit i % 32 of word i // 32 is for token i.

        Where the grammar is complete the end tokens are allowed; where nothing can follow, they alone.

        Raises:
            RequestError: the grammar grew too complex to go on.
        """
        vocab_size = self._tokenizer.vocab_size
        words = np.frombuffer(self._matcher.compute_bitmask(), np.int32)[: (vocab_size + 31) // 32].copy()
        if self._matcher.is_error():
            raise _failed(self._matcher.get_error())
        if vocab_size % 32:
            words[-1] &= (1 << vocab_size % 32) - 1
        return words


def check_grammar(tokenizer: GrammarTokenizer, grammar: Grammar) -> None:
    """Refuse a grammar that no output can satisfy, that is not well formed, or too complex for its first tokens.

    Takes as long as compiling it and some masks: `text.grammar_process` bounds that.

    Raises:
        RequestError: the grammar is refused: what was seen and what is wanted.
    """
    compiled = CompiledGrammar(tokenizer, grammar)
    for seed in range(_NUM_WALKS):
        _walk(GrammarMatcher(compiled), grammar, np.random.default_rng(seed))


def _walk(matcher: GrammarMatcher, grammar: Grammar, rng: np.random.Generator) -> None:
    """Begin an output at random: what a row of the first tokens costs shows only there."""
    try:
        allowed = _allowed(matcher)
    except RequestError:
        allowed = np.empty(0, np.int64)
    if not len(allowed):
        raise _refused(grammar, "no output satisfies it, or finding its first token takes too long")
    try:
        for _ in range(_WALK_TOKENS):
            matcher.accept([int(rng.choice(allowed))])
            if matcher.is_complete:
                return
            allowed = _allowed(matcher)
    except RequestError as error:
        raise _refused(grammar, f"too complex for its first tokens: {error.message}") from error


def _allowed(matcher: GrammarMatcher) -> NDArray[np.int64]:
    return np.flatnonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little"))


def _compiled(grammar: Grammar) -> str:
    """Write the grammar in the form that llguidance reads."""
    matcher = llguidance.LLMatcher
    match grammar.kind:
        case "json_schema":
            schema = _parsed(grammar)
            if not isinstance(schema, dict):
                raise _refused(grammar, f"{_shown(schema)} is no JSON schema, wanted an object")
            try:
                return str(matcher.grammar_from_json_schema(schema, defaults=_JSON_OPTIONS))
            except ValueError as error:  # Python's JSON has numbers that llguidance's has not
                raise _refused(grammar, str(error)) from error
        case "json_object":
            return str(matcher.grammar_from_json_schema({"type": "object"}, defaults=_JSON_OPTIONS))
        case "choice":
            choices = _parsed(grammar)
            if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
                raise _refused(grammar, f"{_shown(choices)}, wanted a list of one or more strings")
            return str(matcher.grammar_from_regex("|".join(_escaped(choice) for choice in choices)))
        case "regex":
            return str(matcher.grammar_from_regex(grammar.spec))
        case "lark":
            return str(matcher.grammar_from_lark(grammar.spec))


def _parsed(grammar: Grammar) -> Any:
    try:
        return json.loads(grammar.spec)
    except ValueError as error:
        raise _refused(grammar, f"{_shown(grammar.spec)} is not JSON: {error}") from error
    except RecursionError as error:
        raise _refused(grammar, "it is nested too deep") from error


def _escaped(text: str) -> str:
    return "".join(f"\\{character}" if character in _REGEX_SPECIAL else character for character in text)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _num_tokens(parsed: dict[str, Any]) -> int:
    """Return one past the largest id of a parsed tokenizer.json."""
    vocab = parsed["model"]["vocab"]
    model_ids = range(len(vocab)) if isinstance(vocab, list) else vocab.values()
    return max([*model_ids, *(token["id"] for token in parsed["added_tokens"])], default=-1) + 1


def _one_line(message: str) -> str:
    line = " ".join(message.split())
    return line if len(line) <= 300 else line[:297] + "..."


def _refused(grammar: Grammar, reason: str) -> RequestError:
    return RequestError(f"{grammar.kind} grammar refused: {_one_line(reason)}", code="bad_grammar")


def _failed(reason: str) -> RequestError:
    return RequestError(f"the output cannot follow its grammar any further: {_one_line(reason)}", code="grammar_failed")
