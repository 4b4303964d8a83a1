"""Checks of grammars in a process of their own, which ends when one costs too much: a compiler cannot be interrupted.

    client                              process
    _Setup ------------------------->   prepares the vocabulary, then bounds its own memory
           <------------------------    an answer without anything: it is ready
    Grammar ------------------------>   bounds its own time, and checks
           <------------------------    the Grammar as a written one, or ErrorInfo; the end, where it was too dear

One JSON document a line, either way. The kernel ends the process, so that nothing runs on, whoever else is gone.
"""

from __future__ import annotations

import contextlib
import resource
import selectors
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Final

import msgspec
import tokenizers

from messages.errors import CapacityError, ErrorInfo, RequestError
from messages.request import Grammar
from text.grammar import GrammarTokenizer, check_grammar
from text.tokenizer import Tokenizer

_WAIT_FACTOR: Final = 10  #: who gets less than this share of a processor is not waited for
_LEAST_WAIT_S: Final = 1.0  #: a kernel tells of spent time some milliseconds late, on a busy machine much later
_START_S: Final = 30.0  #: for the vocabulary, on a busy machine
_END_S: Final = 0.5  #: from closing its pipe to the end


class _Setup(msgspec.Struct, frozen=True, kw_only=True):
    tokenizer_json: str
    vocab_size: int
    eos_ids: tuple[int, ...]
    cpu_s: float
    memory_bytes: int


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    grammar: Grammar | None = None
    error: ErrorInfo | None = None


class GrammarProcess:
    """Checks grammars, one at a time, each within `cpu_s` of processor time and `memory_bytes` of memory."""

    def __init__(
        self, tokenizer_json: str, vocab_size: int, eos_ids: tuple[int, ...], *, cpu_s: float, memory_bytes: int
    ) -> None:
        """Make it ready to start with the first check. The model's facts are those of a `GrammarTokenizer`."""
        self._setup = _Setup(
            tokenizer_json=tokenizer_json,
            vocab_size=vocab_size,
            eos_ids=eos_ids,
            cpu_s=cpu_s,
            memory_bytes=memory_bytes,
        )
        self._process: subprocess.Popen[bytes] | None = None

    def check(self, grammar: Grammar) -> Grammar:
        """Return the grammar as a written one. Blocks; one caller at a time.

        Raises:
            RequestError: the grammar is refused.
            CapacityError: the machine is too busy to tell.
        """
        if self._process is None:
            self._process = self._started()
        wait_s = max(_WAIT_FACTOR * self._setup.cpu_s, _LEAST_WAIT_S)
        line = _asked(self._process, grammar, wait_s)
        if line.endswith(b"\n"):
            answer = msgspec.json.decode(line, type=_Answer)
            if answer.grammar is None:
                assert answer.error is not None
                raise RequestError(answer.error.message, code="bad_grammar")
            return answer.grammar
        process, self._process = self._process, None
        status: int | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(_END_S)
        _end(process)
        if status is None:
            raise CapacityError(f"the grammar was not compiled within {wait_s:g} s, want it later", retry_after_s=5)
        spent = f"{self._setup.cpu_s:g} s" if status == -signal.SIGPROF else f"{self._setup.memory_bytes / 2**20:g} MiB"
        raise RequestError(f"compiling it takes more than {spent}, want a simpler one", code="bad_grammar")

    def _started(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "text.grammar_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        weakref.finalize(self, _end, process)
        if not _asked(process, self._setup, _START_S):
            _end(process)
            raise CapacityError(f"the grammar compiler did not start within {_START_S:g} s", retry_after_s=5)
        return process


def _asked(process: subprocess.Popen[bytes], message: _Setup | Grammar, wait_s: float) -> bytes:
    """Send `message`; return the answer's line, b"" where the process ended or does not answer in time."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended, which its answer tells
        process.stdin.write(msgspec.json.encode(message) + b"\n")
        process.stdin.flush()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        return process.stdout.readline() if selector.select(wait_s) else b""


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with contextlib.suppress(BrokenPipeError), process:  # closes the pipes, and waits
        pass


def _bound_memory(num_bytes: int) -> None:
    """Let the process have `num_bytes` more than it has now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + num_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> None:
    """Answer what comes on standard input, until it ends."""
    lines = sys.stdin.buffer
    setup = msgspec.json.decode(lines.readline(), type=_Setup)
    tokenizer = GrammarTokenizer(
        Tokenizer(tokenizers.Tokenizer.from_str(setup.tokenizer_json)), setup.vocab_size, setup.eos_ids
    )
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _bound_memory(setup.memory_bytes)
    _answer(_Answer())
    for line in lines:
        grammar = msgspec.json.decode(line, type=Grammar)
        signal.setitimer(signal.ITIMER_PROF, setup.cpu_s)  # SIGPROF ends the process, wherever it is
        try:
            answer = _Answer(grammar=check_grammar(tokenizer, grammar))
        except RequestError as error:
            answer = _Answer(error=error.info())
        signal.setitimer(signal.ITIMER_PROF, 0)
        _answer(answer)


def _answer(answer: _Answer) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
