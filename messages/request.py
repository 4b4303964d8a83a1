"""A client's wish as it crosses from the ingress to a worker: one sequence, and how its tokens are chosen."""

from __future__ import annotations

from typing import Literal

import msgspec

from messages.tier import Tier

#: Tokens that a suspect gives, computed alone, before it is one among others again: the step that a worker crashed in
#: was at most that far on from the last token that had come.
SUSPECT_TOKENS = 4

#: A logit is divided by it: float32 holds what comes of 1e28 and less.
MIN_REPETITION_PENALTY = 1e-10

GrammarKind = Literal["json_schema", "regex", "choice", "json_object", "lark", "any_of", "written"]


class Grammar(msgspec.Struct, frozen=True, kw_only=True):
    """A constraint on the output.

    `spec` is a JSON text for json_schema, choice (a list of strings) and any_of (a list of grammars, one of which
    holds); for lark it is in Lark's language or in EBNF. Whoever checks a grammar writes it in the library's own
    language: a written one takes no interpreted code to compile.
    """

    kind: GrammarKind
    spec: str = ""
    whitespace: str = ""  #: a regular expression of what may stand between two tokens of JSON, beside nothing
    before: str = ""  #: rules in Lark's language, one of them named `before`: what stands before it
    follows_text: bool = False  #: behind a prompt with text: the decoder keeps a space that the output begins with


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How tokens are chosen, with every default filled in by the ingress.

    Order of application: penalties, logit_bias, grammar mask, temperature, top_k, top_p, min_p. Log-probabilities are
    of the distribution before all of them. Output token number i (from 0) of choice c is drawn with the uniform number
    that `seed`, c and i determine, so that a sequence gives the same tokens in any batch and on any worker.
    """

    max_tokens: int  #: output tokens at most, at least 1
    temperature: float = 1.0  #: 0 is greedy
    top_k: int = 0  #: 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  #: over prompt and output, multiplicative (Keskar et al. 2019)
    presence_penalty: float = 0.0  #: over output only
    frequency_penalty: float = 0.0  #: over output only
    logit_bias: dict[int, float] = {}
    seed: int = 0  #: unsigned 64 bits; the ingress draws one where the client gave none
    choice: int = 0  #: which of the n choices this sequence is
    min_tokens: int = 0  #: no stop token before this many output tokens
    stop_token_ids: tuple[int, ...] = ()  #: the model's own end tokens (unless ignore_eos) and the client's
    logprobs: int | None = None  #: None: none; k >= 0: the chosen token's and the k most likely ones'
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None


class Copy(msgspec.Struct, frozen=True, array_like=True):
    """An owner that was said to hold a run of blocks, and in which of its tiers."""

    address: str  #: the owner's channel endpoint
    tier: Tier


class HeldRun(msgspec.Struct, frozen=True, array_like=True):
    """Blocks [begin, end) of a prompt lie at each of `copies`, the cheapest to reach first. A hint, as a placement."""

    begin: int
    end: int
    copies: tuple[Copy, ...]


class CacheHint(msgspec.Struct, frozen=True, array_like=True):
    """What is wanted of the blocks of a sequence's tokens [begin, end) in node caches, once they are there."""

    begin: int
    end: int | None  #: None: to the sequence's end
    priority: int | None  #: -2 to 2, each step doubles or halves their worth; None: as it is
    ttl_s: float  #: not to be evicted for so long; 0: no longer than they are


class Choice(msgspec.Struct, frozen=True, array_like=True):
    """Another choice of a prompt: a sequence as the one that it comes with, but for these."""

    request_id: str
    choice: int  #: in its params
    token_ids: bytes = b""  #: generated so far if it moves; packed as those of the prompt


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One sequence to generate (one choice of a client's request), and `others` of the same prompt.

    `token_ids`: the prompt, then what was generated so far if the sequence moves: uint32, little endian, packed.
    """

    request_id: str  #: unique per sequence
    token_ids: bytes
    num_prompt_tokens: int
    params: SamplingParams
    salt: bytes = b""  #: of block names: the tenant's, then the client's own
    tenant: int = 0  #: whose blocks it writes, 64 bits; 0: nobody's in particular
    hints: tuple[CacheHint, ...] = ()  #: of several about one block the last counts
    priority: int = 0  #: smaller is sooner, as in vLLM
    deadline_s: float | None = None  #: seconds from arrival at the worker; None: no limit but the worker's own
    prefill_worker: str | None = None  #: where to prefill, by worker id; None: the decode worker's own choice
    prefill_address: str | None = None
    prefill_s: float = 0.0  #: predicted seconds until its KV lies here; computing it here is worth it below that
    predicted_ttft_s: float = 0.0  #: by whoever placed it
    #: where blocks of the prompt lie, head first, as the router saw it; None: nobody knows
    held: tuple[HeldRun, ...] | None = ()
    wants_word: bool = False  #: that it was accepted
    is_suspect: bool = False  #: it was there when a worker crashed: no other is computed in its step, at first
    others: tuple[Choice, ...] = ()  #: a prompt is sent, named and looked at once, however many choices it has


class CancelRequest(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The sequence is no longer wanted: stop within one step and free what it holds. Unknown ids are ignored."""

    request_id: str
