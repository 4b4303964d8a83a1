"""A check that costs too much ends alone, by processor time or by memory; harmless grammars under tiny limits."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from messages.errors import RequestError
from messages.request import Grammar
from text.grammar_process import GrammarProcess

EOS = 256
HARMLESS = Grammar(kind="choice", spec='["yes", "no"]')


def plain(count: int) -> Grammar:
    """A schema of that many properties: some 20 ms for 500."""
    properties = {f"p{index}": {"type": "integer"} for index in range(count)}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return Grammar(kind="json_schema", spec=json.dumps(schema))


@pytest.fixture
def process() -> Callable[..., GrammarProcess]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])

    def make(cpu_s: float = 10.0, memory_bytes: int = 2**28) -> GrammarProcess:
        return GrammarProcess(backend.to_str(), 264, (EOS,), cpu_s=cpu_s, memory_bytes=memory_bytes)

    return make


@pytest.mark.slow
def test_good_and_bad_grammars_are_told_apart_by_one_process(process):
    checks = process()
    written = checks.check(HARMLESS)
    assert written.kind == "written"
    with pytest.raises(RequestError, match="unclosed character class"):
        checks.check(Grammar(kind="regex", spec="(["))
    assert checks.check(plain(20)).kind == "written"
    assert checks.check(written) == written


@pytest.mark.slow
def test_what_takes_too_long_is_refused_and_the_next_one_is_checked(process):
    checks = process(cpu_s=0.001)
    for _ in range(2):
        with pytest.raises(RequestError, match=r"^compiling it takes more than 0.001 s, want a simpler one$"):
            checks.check(plain(500))


@pytest.mark.slow
def test_what_takes_too_much_memory_is_refused(process):
    with pytest.raises(RequestError, match=r"^compiling it takes more than 0 MiB, want a simpler one$"):
        process(memory_bytes=0).check(plain(500))
