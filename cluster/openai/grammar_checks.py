"""Bad grammars are refused before a worker sees them: each is checked once, off the loop, within limits."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict
from typing import Final

import msgspec

from cluster.openai.backend import HttpLimits, ServedModel
from messages.errors import CapacityError, ConfigError, RequestError
from messages.request import Grammar
from text.grammar import GrammarTokenizer
from text.grammar_process import GrammarProcess
from text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_MAX_CHARS: Final = 256 * 1024
_MAX_PENDING: Final = 128  #: grammars that wait to be checked, most of them for milliseconds
_MAX_WAIT_S: Final = 20.0  #: for its turn, behind others that may each take as long as the limit
_MAX_KEPT_CHARS: Final = 2**24  #: of answers


_Answer = Grammar | str  # a written grammar, or why it is refused


class _Answers:
    """What was found out of grammars, by digest: what was asked for last, up to a limit."""

    def __init__(self) -> None:
        self._kept: OrderedDict[bytes, _Answer] = OrderedDict()
        self._num_chars = 0

    def find(self, digest: bytes) -> _Answer | None:
        answer = self._kept.get(digest)
        if answer is not None:
            self._kept.move_to_end(digest)
        return answer

    def keep(self, digest: bytes, answer: _Answer) -> None:
        self._kept[digest] = answer
        self._num_chars += _num_chars(answer)
        while self._num_chars > _MAX_KEPT_CHARS:
            self._num_chars -= _num_chars(self._kept.popitem(last=False)[1])


def _num_chars(answer: _Answer) -> int:
    return len(answer if isinstance(answer, str) else answer.spec)


def _checked(process: GrammarProcess, grammar: Grammar) -> _Answer:
    try:
        return process.check(grammar)
    except RequestError as error:
        return error.message


class GrammarChecks:
    """Checks what clients ask for in a process of its own (`text.grammar_process`). One event loop."""

    def __init__(self, model: ServedModel, tokenizer: Tokenizer, limits: HttpLimits) -> None:
        self._limits = limits
        self._process: GrammarProcess | None = None
        self._reason = ""  #: why this model can keep to no structure
        self._answers = _Answers()
        self._running: dict[bytes, asyncio.Task[_Answer]] = {}  #: by digest
        self._turn = asyncio.Lock()
        try:
            GrammarTokenizer(tokenizer, model.vocab_size, model.eos_token_ids)
        except ConfigError as error:
            logger.warning("structured output and forced tool calls are refused: %s", error)
            self._reason = str(error)
            return
        self._process = GrammarProcess(
            tokenizer.backend.to_str(),
            model.vocab_size,
            model.eos_token_ids,
            cpu_s=limits.grammar_timeout_s,
            memory_bytes=limits.max_grammar_bytes,
        )

    async def check(self, param: str, grammar: Grammar) -> Grammar:
        """Compile `grammar`, and return it as a written one; one that was checked before costs nothing.

        Raises:
            RequestError: the grammar is refused, or none can be compiled for this model; names `param`.
            CapacityError: too many others wait to be checked.
        """
        if self._process is None:
            raise RequestError(
                f"{param}: got a structure, want none with this model: {self._reason}", param=param, code="unsupported"
            )
        if len(grammar.spec) > _MAX_CHARS:
            raise RequestError(
                f"{param}: got {len(grammar.spec)} characters, want at most {_MAX_CHARS}",
                param=param,
                code="invalid_value",
            )
        digest = hashlib.blake2b(msgspec.json.encode(grammar)).digest()
        answer = self._answers.find(digest) or await self._asked(digest, grammar)
        if isinstance(answer, str):
            raise RequestError(f"{param}: {answer}", param=param, code="bad_grammar")
        return answer

    async def _asked(self, digest: bytes, grammar: Grammar) -> _Answer:
        """Have the process check a grammar, once for all who want it meanwhile."""
        task = self._running.get(digest)
        if task is None:
            if len(self._running) >= _MAX_PENDING:
                raise self._too_many()
            task = self._running[digest] = asyncio.create_task(self._run(digest, grammar))
        return await asyncio.shield(task)  # one who asks may leave, the others wait on

    async def _run(self, digest: bytes, grammar: Grammar) -> _Answer:
        assert self._process is not None
        try:
            async with asyncio.timeout(_MAX_WAIT_S):
                await self._turn.acquire()
            try:
                answer = await asyncio.to_thread(_checked, self._process, grammar)
            finally:
                self._turn.release()
        except TimeoutError:
            raise self._too_many() from None
        finally:
            del self._running[digest]
        self._answers.keep(digest, answer)
        return answer

    def _too_many(self) -> CapacityError:
        return CapacityError(f"{len(self._running)} grammars wait to be compiled, want this one later", retry_after_s=1)
