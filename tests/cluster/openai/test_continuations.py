"""What replies say behind their prompts, by a tokenizer whose decoder drops the space that a text begins with."""

from __future__ import annotations

import msgspec
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, processors

from tests.cluster.openai.conftest import Server, prompt_ids
from text.chat_template import ChatTemplate
from text.tokenizer import Tokenizer

WORDS = ["▁Once", "▁upon", "▁a", "▁time", "▁ended", "▁hi", "▁", "."]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }} {{ m.content }}{% if not loop.last %} {% endif %}{% endfor %}"
)


def llama() -> Tokenizer:
    """Words, letters and bytes, as Llama 2's: a space in front of every text, which the decoder drops again."""
    letters = [chr(code) for code in range(97, 123)]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *byte_tokens, *WORDS, *letters, "O"])}
    merges = []
    for word in WORDS:
        for size in range(1, len(word)):
            vocab.setdefault(word[: size + 1], len(vocab))
            merges.append((word[:size], word[size]))
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, list(dict.fromkeys(merges)), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(backend, special, {"default": ChatTemplate(TEMPLATE, special)})


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return llama()


@pytest.fixture
def server(serve, tokenizer, served_model) -> Server:
    server = serve(tokenizer=tokenizer, model=served_model(tokenizer, vocab_size=tokenizer.vocab_size))
    server.backend.says("time ended")
    return server


def streamed(server: Server, **fields) -> str:
    chunks = server.client().completions.create(model="tiny", stream=True, **fields)
    return "".join(chunk.choices[0].text for chunk in chunks)


def completed(server: Server, **fields) -> list[str]:
    reply = server.client().completions.create(model="tiny", **fields)
    return [choice.text for choice in reply.choices]


def test_an_echo_goes_on_as_both_decode(server, tokenizer):
    for prompt in ("Once upon a", tokenizer.encode("Once upon a"), [1, *tokenizer.encode("Once upon a")]):
        assert completed(server, prompt=prompt, echo=True, n=2) == ["Once upon a time ended"] * 2
        assert streamed(server, prompt=prompt, echo=True) == "Once upon a time ended"
        assert completed(server, prompt=prompt) == [streamed(server, prompt=prompt)] == [" time ended"]


def test_an_output_behind_special_tokens_alone_begins_a_text(server):
    assert completed(server, prompt=[1], echo=True) == ["time ended"]


@pytest.mark.parametrize("stop", [" ended", " time", " t"])
def test_a_stop_string_may_begin_with_a_space(server, stop):
    text = " time ended".partition(stop)[0]
    reply = server.client().completions.create(model="tiny", prompt="Once upon a", stop=stop)
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == (text, "stop")
    assert streamed(server, prompt="Once upon a", stop=stop) == text


def test_a_message_is_continued_where_it_ends(server):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Once upon a"}]
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    reply = server.client().chat.completions.create(model="tiny", messages=messages, extra_body=extra)
    assert reply.choices[0].message.content == " time ended"
    reply = server.client().chat.completions.create(model="tiny", messages=messages, extra_body=extra, stop=" ended")
    assert reply.choices[0].message.content == " time"


def test_offsets_and_texts_of_tokens_are_of_the_choices_text(server, tokenizer):
    prompt = [1, *tokenizer.encode("Once upon é a")]
    server.backend.says("é time. hié")
    for echo in (True, False):
        choice = server.client().completions.create(model="tiny", prompt=prompt, echo=echo, logprobs=1).choices[0]
        told = choice.logprobs
        hidden = ["<s>", "</s>"] if echo else ["</s>"]
        assert [token for token in told.tokens if token in ("<s>", "</s>")] == hidden
        assert "".join(token for token in told.tokens if token not in hidden) == choice.text
        assert choice.text == "Once upon é a"[: 99 * echo] + " é time. hié"
        for token, offset in zip(told.tokens, told.text_offset, strict=True):
            assert token in hidden or choice.text[offset:].startswith(token)
        chunks = server.client().completions.create(model="tiny", prompt=prompt, echo=echo, logprobs=1, stream=True)
        assert [o for chunk in chunks for o in chunk.choices[0].logprobs.text_offset] == told.text_offset


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("prompt", ["Once upon a", "Once upon</s>", [1, 3 + 256]])
def test_special_tokens_that_an_echoed_text_has_not_count_no_characters(serve, served_model, prompt, skip):
    tokenizer = llama()
    tokenizer.backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    server = serve(tokenizer=tokenizer, model=served_model(tokenizer, vocab_size=tokenizer.vocab_size))
    server.backend.says("time")
    extra = {"skip_special_tokens": skip}
    asked = {"model": "tiny", "echo": True, "logprobs": 1, "extra_body": extra}
    choice = server.client().completions.create(prompt=prompt, **asked).choices[0]
    told = list(zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True))
    assert told[0] == ("<s>", 0)
    assert all(choice.text[offset:].startswith(token) for token, offset in told if token not in ("<s>", "</s>"))


@pytest.mark.slow
@pytest.mark.parametrize(("prompt", "follows"), [("Once", True), ([1], False)])
def test_workers_are_told_whether_an_output_that_is_held_to_a_grammar_begins_a_text(server, prompt, follows):
    body = {"prompt": prompt, "structured_outputs": {"choice": ["time"]}}
    assert server.post("/v1/completions", body).status_code == 200
    request = server.backend.requests[-1]
    assert request.params.grammar.follows_text is follows
    assert prompt_ids(request)[-1] == 1 or follows
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=type(request)) == request


def test_tokens_may_be_told_by_their_ids(server, tokenizer):
    ids = [f"token_id:{token_id}" for token_id in (*tokenizer.encode("time ended"), tokenizer.eos_token_id)]
    asked = {"logprobs": True, "top_logprobs": 1, "extra_body": {"return_tokens_as_token_ids": True}}
    messages = [{"role": "user", "content": "hi"}]
    reply = server.client().chat.completions.create(model="tiny", messages=messages, **asked)
    assert [entry.token for entry in reply.choices[0].logprobs.content] == ids
    assert bytes(reply.choices[0].logprobs.content[0].bytes) == b" time"
    asked = {"logprobs": 1, "extra_body": {"return_tokens_as_token_ids": True}}
    told = server.client().completions.create(model="tiny", prompt="a", **asked).choices[0].logprobs
    assert told.tokens == ids
    assert all(name in top for name, top in zip(ids, told.top_logprobs, strict=True))
    assert told.text_offset == [0, 5, 11]
