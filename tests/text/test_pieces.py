"""Long texts are encoded a piece at a time, to the same tokens as at once."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers, processors

import text.pieces
from messages.errors import RequestError
from tests.text.test_tokenizer import KINDS, byte_level, tokenizer_of
from text.tokenizer import Tokenizer

#: As published models divide text into words: digits by threes, a space or a mark before letters, ends of lines.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def words_by_pattern() -> Tokenizer:
    backend = byte_level()
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.add_special_tokens([AddedToken("<eos>", special=True, normalized=False)])
    return Tokenizer(backend, {"eos_token": "<eos>"})


PATTERN = words_by_pattern()


def of_kind(kind: str) -> Tokenizer:
    return PATTERN if kind == "pattern" else tokenizer_of(kind)


@pytest.fixture
def short_pieces(monkeypatch) -> None:
    monkeypatch.setattr("text.pieces.PIECE_CHARS", 32)
    monkeypatch.setattr("text.tokenizer.PIECE_CHARS", 32)
    monkeypatch.setattr("text.pieces._WINDOW_CHARS", 16)


parts = st.sampled_from(
    [
        "hello",
        " world",
        "  ",
        "\n\n",
        "你好",
        "。",
        "é",
        "e\u0301",
        "1234567",
        "'t",
        "don't",
        "<eos>",
        "a",
        " ",
        "==",
        "\t",
        "_x",
    ]
)


@pytest.mark.parametrize("kind", [*KINDS, "pattern"])
@pytest.mark.usefixtures("short_pieces")
@settings(max_examples=60, deadline=None)
@given(chosen=st.lists(parts, min_size=10, max_size=120))
def test_pieces_give_the_tokens_of_the_whole(kind, chosen):
    tokenizer, whole = of_kind(kind), "".join(chosen)
    assert tokenizer.encode(whole) == tokenizer.backend.encode(whole).ids


@pytest.mark.usefixtures("short_pieces")
def test_what_is_put_around_a_text_is_put_around_all_of_it():
    backend = words_by_pattern().backend
    backend.post_processor = processors.TemplateProcessing(
        single="<eos> $A <eos>", special_tokens=[("<eos>", backend.token_to_id("<eos>"))]
    )
    whole = "hello world, the cat sat. " * 20
    for adds_special in (True, False):
        ids = Tokenizer(backend).encode(whole, add_special_tokens=adds_special)
        assert ids == backend.encode(whole, add_special_tokens=adds_special).ids


def test_no_more_is_encoded_than_is_enough():
    asked: list[int] = []

    def encode(texts: list[str]) -> list[list[int]]:
        asked.append(sum(map(len, texts)))
        return [list(map(len, each.split())) for each in texts]

    found = [id_ for piece in text.pieces.encode_pieces("ab cd " * 2**20, encode, enough=20_000) for id_ in piece]
    assert 20_000 < len(found) < 20_000 + 2**15
    assert sum(asked) < 200_000


@pytest.mark.parametrize("kind", ["pattern", "byte_fallback"])
def test_a_mebibyte_that_cannot_be_cut_is_refused(kind):
    tokenizer = of_kind(kind)
    with pytest.raises(RequestError, match="want one that has the end of a word in every 1048576 bytes"):
        tokenizer.encode("=" * 2**21)


@pytest.mark.slow
def test_eight_mebibytes_are_encoded_within_the_memory_of_a_mebibyte():
    script = """
import resource
from tests.text.test_pieces import PATTERN
PATTERN.encode("hello world, the cat sat. " * 1000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ids = PATTERN.encode("hello world, the cat sat. " * 2**15 * 8 + "=" * 2**19, enough=2**17)
print(len(ids), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
ids = PATTERN.encode("=" * (2**20 - 2**16) + " hello", enough=2**21)
print(len(ids), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=250)
    (num_first, first_mib), (num_second, second_mib) = (map(int, line.split()) for line in answer.stdout.splitlines())
    assert 2**17 < num_first < 2**17 + 2**15
    assert first_mib < 50
    assert num_second > 2**19
    assert second_mib < 300
