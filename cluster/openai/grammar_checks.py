"""Bad grammars are refused before a worker sees them: each is checked once, off the loop, within limits."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict
from typing import Final

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
_NUM_KEPT: Final = 4096  #: answers, of some 100 bytes each


class GrammarChecks:
    """Checks what clients ask for in a process of its own (`text.grammar_process`). One event loop."""

    def __init__(self, model: ServedModel, tokenizer: Tokenizer, limits: HttpLimits) -> None:
        self._limits = limits
        self._process: GrammarProcess | None = None
        self._answers: OrderedDict[bytes, str | None] = OrderedDict()  #: why it is refused, by digest
        self._running: dict[bytes, asyncio.Task[str | None]] = {}  #: by digest
        self._turn = asyncio.Lock()
        try:
            GrammarTokenizer.from_tokenizer_json(tokenizer.backend, model.vocab_size, model.eos_token_ids)
        except ConfigError as error:
            logger.warning("structured output and forced tool calls are refused: %s", error)
            return
        self._process = GrammarProcess(
            tokenizer.backend.to_str(),
            model.vocab_size,
            model.eos_token_ids,
            cpu_s=limits.grammar_timeout_s,
            memory_bytes=limits.max_grammar_bytes,
        )

    async def check(self, param: str, grammar: Grammar) -> None:
        """Compile `grammar` and throw the result away; one that was checked before costs nothing.

        Raises:
            RequestError: the grammar is refused, or none can be compiled for this model; names `param`.
            CapacityError: too many others wait to be checked.
        """
        if self._process is None:
            raise RequestError(
                f"{param}: this model has no end token, want no structure", param=param, code="unsupported"
            )
        if len(grammar.spec) > _MAX_CHARS:
            raise RequestError(
                f"{param}: got {len(grammar.spec)} characters, want at most {_MAX_CHARS}",
                param=param,
                code="invalid_value",
            )
        digest = hashlib.blake2b(grammar.spec.encode(), person=grammar.kind.encode()).digest()
        if digest in self._answers:
            self._answers.move_to_end(digest)
            answer = self._answers[digest]
        else:
            answer = await self._asked(digest, grammar)
        if answer is not None:
            raise RequestError(f"{param}: {answer}", param=param, code="bad_grammar")

    async def _asked(self, digest: bytes, grammar: Grammar) -> str | None:
        """Have the process check a grammar, once for all who want it meanwhile."""
        task = self._running.get(digest)
        if task is None:
            if len(self._running) >= _MAX_PENDING:
                raise self._too_many()
            task = self._running[digest] = asyncio.create_task(self._run(digest, grammar))
        return await asyncio.shield(task)  # one who asks may leave, the others wait on

    async def _run(self, digest: bytes, grammar: Grammar) -> str | None:
        assert self._process is not None
        try:
            async with asyncio.timeout(_MAX_WAIT_S):
                await self._turn.acquire()
            try:
                answer = await asyncio.to_thread(self._process.check, grammar)
            finally:
                self._turn.release()
        except TimeoutError:
            raise self._too_many() from None
        finally:
            del self._running[digest]
        self._answers[digest] = answer
        if len(self._answers) > _NUM_KEPT:
            self._answers.popitem(last=False)
        return answer

    def _too_many(self) -> CapacityError:
        return CapacityError(f"{len(self._running)} grammars wait to be compiled, want this one later", retry_after_s=1)
