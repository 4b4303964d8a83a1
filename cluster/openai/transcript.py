"""The text of one choice, grown chunk by chunk: detokenized, its thoughts set apart, cut at stop strings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import msgspec

from cluster.openai.thoughts import Read, ThoughtPlan
from messages.errors import KvrayError, WorkerError, error_from_info
from messages.stream import PromptPlan, PromptSources, TokenChunk, TokenLogprob
from text.detokenizer import Context, Detokenizer
from text.stops import StopMatcher
from text.token_texts import TokenText, TokenTexts
from text.tokenizer import Tokenizer

EndReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """A request's wishes about its text."""

    stop: tuple[str, ...] = ()
    includes_stop: bool = False
    min_tokens: int = 0
    skips_special_tokens: bool = True
    hidden_ids: frozenset[int] = frozenset()  #: tokens without text, besides those that skips_special_tokens skips
    stop_token_ids: frozenset[int] = frozenset()  #: the client's own, which count as a stop_reason
    thought: ThoughtPlan | None = None  #: how thoughts are told from content; None: there are none


class LoggedToken(NamedTuple):
    """A token with its log-probability, and what it and its alternatives write where it stands."""

    entry: TokenLogprob
    text: TokenText  #: its offset is into the choice's text, what a stop string cuts counted as well


class Delta(msgspec.Struct, kw_only=True):
    """The text, tokens and end that one chunk adds to a choice."""

    reasoning: str = ""  #: of a thought; it comes before `text`
    text: str = ""
    token_ids: list[int] = []
    logprobs: list[LoggedToken] = []
    finish_reason: EndReason | None = None
    stop_reason: int | str | None = None


class Transcript:
    """The text of one choice. `take` gets its chunks in order until a delta has a finish_reason."""

    def __init__(self, tokenizer: Tokenizer, options: TextOptions, context: Context | None = None) -> None:
        """Begin a choice behind the prompt that `context` is the end of."""
        self._options = options
        detokenizer = Detokenizer(tokenizer, skip_special_tokens=options.skips_special_tokens, context=context)
        self._push, self._flush = detokenizer.push, detokenizer.flush
        self._token_texts = TokenTexts(tokenizer, context)
        self._special_ids = tokenizer.special_ids
        self._reader = None if options.thought is None else options.thought.reader()
        self._stops = StopMatcher(options.stop, include_stop_str=options.includes_stop, min_tokens=options.min_tokens)
        self.num_tokens = 0
        self.sources: PromptSources | None = None
        self.plan: PromptPlan | None = None
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        self.is_finished = False

    @property
    def num_reasoning_tokens(self) -> int | None:
        """Tokens that thoughts are made of, so far; None where thoughts are not told from content."""
        return None if self._reader is None else self._reader.num_tokens

    def take(self, chunk: TokenChunk) -> Delta:
        """Return what `chunk` adds.

        Raises:
            KvrayError: the sequence failed, or was cancelled by someone other than its client.
        """
        if chunk.finish_reason is not None:
            _check_end(chunk)
        if chunk.sources is not None:
            self.sources, self.plan = chunk.sources, chunk.plan
        if chunk.prompt_logprobs is not None:
            self.prompt_logprobs = chunk.prompt_logprobs
        token_ids = chunk.token_ids
        delta = Delta(token_ids=token_ids)
        if self._options.stop or chunk.logprobs or (self._reader is not None and not self._reader.is_done):
            self._take_singly(chunk, delta)
        elif chunk.stop_token_id is None and not self._options.hidden_ids:
            delta.text = self._push(token_ids)
        else:
            delta.text = self._push([token_id for visible in self._visible(chunk) for token_id in visible])
        if chunk.finish_reason is not None and delta.finish_reason is None:
            self._end(chunk, delta)
        self.num_tokens += len(delta.token_ids)
        self.is_finished = delta.finish_reason is not None
        return delta

    def _visible(self, chunk: TokenChunk) -> list[list[int]]:
        """Return for each of the chunk's tokens a list of itself, or an empty one where it has no text."""
        hidden_ids = self._options.hidden_ids
        visible = [[] if token_id in hidden_ids else [token_id] for token_id in chunk.token_ids]
        stop_id = chunk.stop_token_id
        is_shown = self._options.includes_stop and stop_id in self._options.stop_token_ids
        if stop_id is not None and visible and not is_shown:
            visible[-1] = []
        return visible

    def _take_singly(self, chunk: TokenChunk, delta: Delta) -> None:
        """Take a chunk token by token: thoughts count theirs, and the one that completes a stop string is the last."""
        logged: list[LoggedToken] = []
        thoughts: list[str] = []
        texts: list[str] = []
        for position, token_ids in enumerate(self._visible(chunk), start=1):
            text = self._push(token_ids)
            if chunk.logprobs:
                logged.append(self._logged(chunk.logprobs[position - 1], text if token_ids else None))
            if self._reader is not None:
                thought, text = self._reader.push(text)
                thoughts.append(thought)
            text, met = self._stops.push(text)
            texts.append(text)
            if met is not None:
                delta.finish_reason, delta.stop_reason = "stop", met
                delta.token_ids = chunk.token_ids[:position]
                break
        delta.logprobs = logged
        delta.reasoning = "".join(thoughts)
        delta.text = "".join(texts)

    def _logged(self, entry: TokenLogprob, text: str | None) -> LoggedToken:
        """Tell what a token writes. `text`: what was detokenized of it; None: it has none."""
        others = [token_id for token_id, _ in entry.top]
        if text is None or (self._options.skips_special_tokens and entry.token_id in self._special_ids):
            return LoggedToken(entry, self._token_texts.pass_by(entry.token_id, others))
        return LoggedToken(entry, self._token_texts.take(entry.token_id, text, others))

    def _end(self, chunk: TokenChunk, delta: Delta) -> None:
        last = self._flush()
        thought, last = Read("", last) if self._reader is None else self._reader.flush(last)
        text, met = self._stops.push(last, 0)
        delta.reasoning += thought
        delta.text += text
        if met is not None:
            delta.finish_reason, delta.stop_reason = "stop", met
            return
        delta.text += self._stops.flush()
        delta.finish_reason = "length" if chunk.finish_reason == "length" else "stop"
        if chunk.stop_token_id in self._options.stop_token_ids:
            delta.stop_reason = chunk.stop_token_id


def _check_end(chunk: TokenChunk) -> None:
    if chunk.finish_reason == "error":
        raise (error_from_info(chunk.error) if chunk.error else KvrayError("the sequence failed"))
    if chunk.finish_reason == "cancelled":
        raise WorkerError("the sequence was cancelled by the server", code="cancelled")
