"""What the HTTP surface sees below it: somebody who generates, and facts about the model served."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cluster.openai.exposition import Family
from messages.request import GenerateRequest
from messages.stream import TokenChunk


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether requests can be answered now. `detail` goes to whoever asks /ready: JSON values only."""

    is_ready: bool
    detail: dict[str, object] = field(default_factory=dict)


class Backend(Protocol):
    """Routes sequences to workers and streams their tokens back. One event loop, any number of calls at once."""

    def start(self, requests: Sequence[GenerateRequest], take: Callable[[TokenChunk | None], None]) -> None:
        """Begin all sequences of one client request; the first one's id names them all. Returns at once.

        `take` gets their chunks, interleaved as they come, perhaps before this returns; it is quick and never raises.
        Each sequence ends with one chunk that has a finish_reason, unless it is cancelled; None follows the last of
        them. A sequence that fails or cannot be taken ends with finish_reason "error".

        Raises:
            InvariantError: a sequence's id is in use.
        """
        ...

    def leave(self, request_id: str) -> None:
        """Stop all that still runs of a client request, within a step: nobody takes its chunks any more.

        Returns at once and never fails; `take` is not called again. Requests that are unknown or ended are ignored.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Stop one sequence that is not wanted any more though its siblings are (its text met a stop string).

        Returns at once and never fails; unknown ids are ignored. Chunks that are on their way may still come; a last
        one does not.
        """
        ...

    async def ready(self) -> Readiness:
        """Tell whether a request could be answered now; quick, for it is asked often."""
        ...

    async def metrics(self) -> Sequence[Family]:
        """Return more families for /metrics. A family may come several times, with other labels."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What the model's generation_config.json asks for; None where it is silent. A request overrides it."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The model behind the HTTP surface. The first of `names` is the one that replies carry."""

    names: tuple[str, ...]
    max_model_len: int  #: tokens, prompt and output together
    max_prompt_tokens: int  #: the longest prompt that a pool can hold, at most max_model_len - 1
    vocab_size: int  #: token ids are below it
    eos_token_ids: tuple[int, ...]  #: all of the model's own end tokens
    created_s: int  #: when it began to be served, seconds since 1970
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)

    @property
    def name(self) -> str:
        """The name that replies carry."""
        return self.names[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """The most that one client may ask for."""

    max_body_bytes: int = 32 * 1024 * 1024
    max_tokenize_bytes: int = 768 * 1024  #: of a text that is only to be encoded, in UTF-8
    max_choices: int = 128  #: n
    max_sequences: int = 1024  #: prompts of one request times n
    max_stop_strings: int = 32
    max_stop_chars: int = 1024  #: of one stop string
    max_logprobs: int = 20  #: alternatives per token
    grammar_timeout_s: float = 2.0  #: of processor time, to compile a grammar
    max_grammar_bytes: int = 256 * 1024 * 1024  #: of memory, to compile a grammar
    uses_priority: bool = False  #: a client's own; else it is ignored
    json_whitespace: str = ""  #: what may stand between JSON's tokens in structured output, a regular expression
    takes_chat_template: bool = False  #: a client's own; else it is refused
