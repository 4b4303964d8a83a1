"""Output held to a grammar, by llguidance: which tokens may come next. No torch: the ingress checks grammars too."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Final
from weakref import WeakValueDictionary

import llguidance
import numpy as np
from numpy.typing import NDArray

from messages.errors import ConfigError, RequestError
from messages.request import Grammar
from text.grammar_writing import library_refusal, one_line, refused_grammar, whole_grammar, written
from text.tokenizer import Tokenizer
from text.vocabulary import Vocabulary, vocabulary_of

#: What a client's grammar may cost. Lexer fuel is about 50,000 steps a millisecond when a grammar is built and 14,000
#: when a mask is computed (llguidance's own figures): some 20 ms to build, some 15 ms for the worst mask.
_LIMITS = llguidance.LLParserLimits(initial_lexer_fuel=1_000_000, step_lexer_fuel=200_000, verbose_errors=False)
_NUM_KEPT = 64  #: compiled grammars that nobody holds, of some 100 KiB each as a rule
_NUM_WALKS, _WALK_TOKENS = 4, 8  #: beginnings of outputs that a check looks at
_SPACE: Final = b" "
_NO_TOKEN: Final = "NoExtensionBias"  #: llguidance's word for a mask without any token


class GrammarTokenizer:
    """A vocabulary prepared for grammars: once per process (0.2 s for 32 k tokens, 0.8 s for 128 k). Any thread.

    Tokens count as what they write into a text (`text.vocabulary`): a text is allowed in every way of writing it.
    Special tokens write nothing, for replies leave them out: their text is written with others.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> None:
        """Prepare the vocabulary of `tokenizer`.

        Args:
            tokenizer: the model's.
            vocab_size: the model's vocabulary; ids that the tokenizer does not have are never allowed.
            eos_ids: tokens that end an output; allowed where the grammar is complete.

        Raises:
            ConfigError: there is no end token, or grammars cannot use the tokenizer.
        """
        if not eos_ids:
            raise ConfigError("the model names no end token")
        self.vocab_size = vocab_size  #: the model's: width of a mask
        self.eos_ids = tuple(eos_ids)
        vocabulary = vocabulary_of(tokenizer)
        tokens = [*vocabulary.tokens, *[b""] * (vocab_size - len(vocabulary.tokens)), _SPACE]
        self.space_id = len(tokens) - 1  #: no token of the model: stands for the space that a decoder drops
        is_special = {*tokenizer.special_ids, *eos_ids}
        try:
            self.backend = llguidance.LLTokenizer(_Tokens(tokens, sorted(is_special)), eos_token=list(eos_ids))
        except ValueError as error:
            raise ConfigError(f"the grammar library cannot use this tokenizer: {error}") from error
        self.shortened = vocabulary.shortened
        self.is_first_alike = not (vocabulary.shortened or vocabulary.unlike)
        self._first_words = self._words_of_first(vocabulary)

    def _words_of_first(self, vocabulary: Vocabulary) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return which tokens begin a text as they are, and which without their space."""
        unlike = vocabulary.shortened | vocabulary.unlike
        plain = [token_id for token_id in range(self.vocab_size) if token_id not in unlike]
        shortened = [token_id for token_id in vocabulary.shortened if token_id < self.vocab_size]
        return _words(plain, self.vocab_size), _words(shortened, self.vocab_size)

    def first_mask(self, plain: NDArray[np.int32], spaced: NDArray[np.int32]) -> NDArray[np.int32]:
        """Join masks of the grammar and of a space before it into one of what may begin a text."""
        is_plain, is_shortened = self._first_words
        return (plain & is_plain) | (spaced & is_shortened)


class _Tokens:
    """A vocabulary, as llguidance asks for it. It never asks how a text is tokenized: no text is forced on a model."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], special_ids: list[int]) -> None:
        self.tokens = tokens
        self.special_token_ids = special_ids
        self.eos_token_id = special_ids[0]

    def __call__(self, text: str) -> list[int]:
        return []


def _words(token_ids: Iterable[int], vocab_size: int) -> NDArray[np.int32]:
    """Write a set of tokens as a mask, [ceil(vocab_size / 32)] int32."""
    bits = np.zeros((vocab_size + 31) // 32 * 32, np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


class CompiledGrammar:
    """A grammar made ready for any number of sequences. Frozen; any thread."""

    __slots__ = ("__weakref__", "plain", "spaced", "tokenizer")

    def __init__(self, tokenizer: GrammarTokenizer, grammar: Grammar) -> None:
        """Compile `grammar`: some milliseconds as a rule, without the interpreter's lock; nothing can interrupt it.

        Raises:
            RequestError: it is not well formed, or larger than the limits allow.
        """
        self.tokenizer = tokenizer
        grammar = written(grammar)
        is_alike = grammar.follows_text or tokenizer.is_first_alike  # the first token and those after it
        source = whole_grammar(grammar, has_space=not is_alike)
        matcher = llguidance.LLMatcher(tokenizer.backend, source, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise library_refusal(grammar, matcher.get_error())
        self.plain = matcher
        self.spaced: llguidance.LLMatcher | None = None  #: before the space that stands before the text
        if not is_alike:
            self.spaced = matcher.deep_copy()
            matcher.consume_token(tokenizer.space_id)


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
        self._matcher = grammar.plain.deep_copy()
        #: until the first token tells whether the decoder drops its space
        self._spaced = None if grammar.spaced is None else grammar.spaced.deep_copy()

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
            if self._spaced is not None:
                if token_id in self._tokenizer.shortened:
                    self._matcher = self._spaced
                self._spaced = None
            if not self._matcher.consume_token(token_id):
                raise _failed(self._matcher.get_error() or f"token {token_id} comes after its end")

    def mask(self) -> NDArray[np.int32]:
        """Return which tokens may come next, [ceil(vocab_size / 32)] int32: bit i % 32 of word i // 32 is for token i.

        Where the grammar is complete the end tokens are allowed; where nothing can follow, they alone.

        Raises:
            RequestError: the grammar grew too complex to go on.
        """
        words = self._allowed_by(self._matcher)
        if self._spaced is not None:
            words = self._tokenizer.first_mask(words, self._allowed_by(self._spaced))
        if not words.any():
            raise _failed("this model has no token that writes what must come next")
        return words

    def _allowed_by(self, matcher: llguidance.LLMatcher) -> NDArray[np.int32]:
        vocab_size = self._tokenizer.vocab_size
        words = np.frombuffer(matcher.compute_bitmask(), np.int32)[: (vocab_size + 31) // 32].copy()
        if matcher.is_error():
            if _NO_TOKEN not in matcher.get_error():
                raise _failed(matcher.get_error())
            words[:] = 0
        if vocab_size % 32:
            words[-1] &= (1 << vocab_size % 32) - 1
        return words


def check_grammar(tokenizer: GrammarTokenizer, grammar: Grammar) -> Grammar:
    """Refuse a grammar that no output can satisfy, that is not well formed, or too complex for its first tokens.

    Returns it as a written one. Takes as long as compiling it and some masks: `text.grammar_process` bounds that.

    Raises:
        RequestError: the grammar is refused: what was seen and what is wanted.
    """
    checked = written(grammar)
    compiled = CompiledGrammar(tokenizer, checked)
    for seed in range(_NUM_WALKS):
        _walk(GrammarMatcher(compiled), np.random.default_rng(seed))
    return checked


def _walk(matcher: GrammarMatcher, rng: np.random.Generator) -> None:
    """Begin an output at random: what a row of the first tokens costs shows only there."""
    try:
        allowed = _allowed(matcher)
    except RequestError as error:
        reason = "no output satisfies it, or this model has no token that writes its beginning, or that takes too long"
        raise refused_grammar(reason) from error
    try:
        for _ in range(_WALK_TOKENS):
            matcher.accept([int(rng.choice(allowed))])
            if matcher.is_complete:
                return
            allowed = _allowed(matcher)
    except RequestError as error:
        raise refused_grammar(
            f"its first tokens lead to what is too complex, or cannot be written: {error.message}"
        ) from error


def _allowed(matcher: GrammarMatcher) -> NDArray[np.int64]:
    return np.flatnonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little"))


def _failed(reason: str) -> RequestError:
    return RequestError(f"the output cannot follow its grammar any further: {one_line(reason)}", code="grammar_failed")
