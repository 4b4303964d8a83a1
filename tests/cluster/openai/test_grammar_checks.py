"""What is refused before a worker sees it, under which name; and that each grammar is checked once, off the loop."""

from __future__ import annotations

import asyncio

import pytest
import tokenizers
from tokenizers import decoders

from cluster.openai.backend import HttpLimits
from cluster.openai.grammar_checks import GrammarChecks
from messages.errors import CapacityError, RequestError
from messages.request import Grammar
from text.tokenizer import Tokenizer

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "Hi"}]
#: 20 ms to compile
WIDE = {
    "type": "object",
    "properties": {f"p{index}": {"type": "integer"} for index in range(500)},
    "required": [f"p{index}" for index in range(500)],
}


@pytest.fixture
def checks(served_model, tokenizer) -> GrammarChecks:
    return GrammarChecks(served_model(tokenizer), tokenizer, HttpLimits())


@pytest.mark.slow
async def test_good_grammars_pass_and_bad_ones_are_refused_under_their_name(checks):
    await checks.check("p", Grammar(kind="regex", spec="a+"))
    bad = [
        Grammar(kind="regex", spec="(["),
        Grammar(kind="lark", spec="start: ("),
        Grammar(kind="json_schema", spec="1"),
    ]
    for grammar in [*bad, bad[0]]:
        with pytest.raises(RequestError) as caught:
            await checks.check("the_field", grammar)
        assert (caught.value.param, caught.value.code, caught.value.status) == ("the_field", "bad_grammar", 400)
        assert caught.value.message.startswith("the_field: ")


@pytest.mark.slow
async def test_a_grammar_is_measured_before_it_is_compiled(checks):
    longest = 256 * 1024
    with pytest.raises(RequestError, match=f"got {longest + 1} characters, want at most {longest}"):
        await checks.check("p", Grammar(kind="regex", spec="(" * (longest + 1)))
    with pytest.raises(RequestError) as caught:
        await checks.check("p", Grammar(kind="regex", spec="(" * longest))
    assert "characters" not in caught.value.message.partition("(")[0]


async def test_a_model_without_an_end_token_can_keep_to_no_structure(served_model, tokenizer):
    checks = GrammarChecks(served_model(tokenizer, eos_token_ids=()), tokenizer, HttpLimits())
    with pytest.raises(RequestError) as caught:
        await checks.check("the_field", Grammar(kind="json_object"))
    assert (caught.value.param, caught.value.code) == ("the_field", "unsupported")


async def test_a_tokenizer_that_grammars_cannot_use_is_said_once_and_in_each_refusal(served_model, tokenizer, caplog):
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.decoder = decoders.CTC()
    other = Tokenizer(backend, {"eos_token": "<|end|>"})
    with caplog.at_level("WARNING"):
        checks = GrammarChecks(served_model(other), other, HttpLimits())
    assert len(caplog.messages) == 1
    assert "\n" not in caplog.messages[0]
    with pytest.raises(RequestError, match=r"the_field: .*by the tokenizer's decoder \(CTC\)") as caught:
        await checks.check("the_field", Grammar(kind="json_object"))
    assert (caught.value.param, caught.value.code, caught.value.status) == ("the_field", "unsupported", 400)


@pytest.mark.slow
async def test_who_leaves_does_not_take_the_answer_from_the_others(checks):
    grammar = Grammar(kind="choice", spec='["a"]')
    leaving = asyncio.create_task(checks.check("p", grammar))
    staying = asyncio.create_task(checks.check("p", grammar))
    await asyncio.sleep(0)
    leaving.cancel()
    await staying
    assert leaving.cancelled()


async def ask_for(checks: GrammarChecks, num: int) -> list[Grammar | BaseException]:
    asked = [checks.check("p", Grammar(kind="regex", spec=f"a{{{n}}}")) for n in range(1, num + 1)]
    return await asyncio.gather(*asked, return_exceptions=True)


@pytest.mark.slow
async def test_as_many_grammars_as_clients_send_at_once_are_checked_up_to_a_limit(checks):
    outcomes = await ask_for(checks, 129)
    assert [outcome.kind for outcome in outcomes[:128]] == ["written"] * 128
    assert isinstance(outcomes[128], CapacityError)
    assert (outcomes[128].status, outcomes[128].retry_after_s) == (429, 1)


@pytest.mark.slow
async def test_who_would_wait_too_long_behind_grammars_that_are_dear_is_told_to_come_again(checks, monkeypatch):
    monkeypatch.setattr("cluster.openai.grammar_checks._MAX_WAIT_S", 0.0)
    async with checks._turn:
        outcomes = await ask_for(checks, 2)
    assert [(outcome.status, outcome.retry_after_s) for outcome in outcomes] == [(429, 1)] * 2
    assert checks._running == {}
    assert [outcome.kind for outcome in await ask_for(checks, 1)] == ["written"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": WIDE}}},
            "response_format.json_schema.schema",
        ),
        ({"guided_json": WIDE}, "guided_json"),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "other"}},
                    {"type": "function", "function": {"name": "f", "parameters": WIDE}},
                ],
                "tool_choice": {"type": "function", "function": {"name": "f"}},
            },
            "tools[1].function.parameters",
        ),
    ],
)
def test_a_grammar_that_is_dear_to_compile_is_refused_and_its_field_named(serve, fields, param):
    server = serve("{{ messages[0].content }}", limits=HttpLimits(grammar_timeout_s=0.001))  # shows no tools
    reply = server.post(CHAT, {"messages": USER, **fields})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param
    assert "takes more than 0.001 s" in reply.json()["error"]["message"]
    assert server.backend.requests == []
    assert server.post(CHAT, {"messages": USER}).status_code == 200
