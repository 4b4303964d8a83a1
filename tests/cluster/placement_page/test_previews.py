from collections.abc import Sequence

import pytest

from cluster.placement_page.previews import PromptPreviews
from kvcache.names import NAME_BYTES, block_names, pack_tokens
from messages.request import GenerateRequest, SamplingParams
from messages.view import PrefixView

BLOCK_SIZE = 4


def asked(tokenizer, text: str, salt: bytes = b"") -> list[GenerateRequest]:
    ids = tokenizer.encode(text, add_special_tokens=False)
    params = SamplingParams(max_tokens=1)
    return [
        GenerateRequest(
            request_id="r",
            token_ids=pack_tokens([*ids, 1, 2]),  # and two that it generated before it moved
            num_prompt_tokens=len(ids),
            params=params,
            salt=salt,
        )
    ]


def prefix(tokenizer, text: str, salt: bytes = b"") -> PrefixView:
    """The prefix of as many whole blocks as the text has."""
    names = block_names(b"f", salt, pack_tokens(tokenizer.encode(text, add_special_tokens=False)), BLOCK_SIZE)
    num_blocks = len(names) // NAME_BYTES
    return PrefixView(
        name=names[-NAME_BYTES:],
        num_blocks=num_blocks,
        num_tokens=num_blocks * BLOCK_SIZE,
        num_requests=1.0,
        age_s=0.0,
        last_request="r",
        tenant=0,
        runs=(),
    )


async def shown(previews: PromptPreviews, *prefixes: PrefixView) -> Sequence[str | None]:
    texts = await previews.texts(prefixes, b"f", BLOCK_SIZE)
    return [texts.get(one.name) for one in prefixes]


async def test_a_prefix_is_shown_up_to_its_own_end(tokenizer):
    previews = PromptPreviews(tokenizer, 100)
    previews.note(asked(tokenizer, "You are a fox. Find the hare."))
    assert await shown(previews, prefix(tokenizer, "You are a fox. F")) == ["You are a fox. F"]


@pytest.mark.parametrize("length", [100, 400, 5000])
async def test_of_a_long_one_head_and_tail_are_shown_within_the_limit(tokenizer, length):
    text = "".join(chr(97 + i % 26) for i in range(length))
    previews = PromptPreviews(tokenizer, 20)
    previews.note(asked(tokenizer, text))
    [seen] = await shown(previews, prefix(tokenizer, text))
    assert seen == f"{text[:10]} … {text[length // BLOCK_SIZE * BLOCK_SIZE - 10 : length // BLOCK_SIZE * BLOCK_SIZE]}"


async def test_without_the_salt_nothing_is_found(tokenizer):
    previews = PromptPreviews(tokenizer, 100)
    previews.note(asked(tokenizer, "12345678", b"salt"))
    assert await shown(previews, prefix(tokenizer, "12345678"), prefix(tokenizer, "12345678", b"salt")) == [
        None,
        "12345678",
    ]


async def test_switched_off_nothing_is_kept(tokenizer):
    previews = PromptPreviews(tokenizer, 0)
    previews.note(asked(tokenizer, "12345678"))
    assert not previews._prompts
    assert await shown(previews, prefix(tokenizer, "12345678")) == [None]


@pytest.mark.slow
async def test_the_last_prompts_are_kept_within_limits(tokenizer):
    previews = PromptPreviews(tokenizer, 100)
    for number in range(1000):
        previews.note(asked(tokenizer, f"{number:04} is a prompt"))
        previews.note(asked(tokenizer, "prompt that comes always"))
    assert len(previews._prompts) == 256
    first, last, always = await shown(
        previews,
        *(prefix(tokenizer, text) for text in ("0000 is a prompt", "0999 is a prompt", "prompt that comes always")),
    )
    assert (first, last, always) == (None, "0999 is a prompt", "prompt that comes always")
    previews.note(asked(tokenizer, "x" * 400_000))
    previews.note(asked(tokenizer, "y" * 400_000))
    assert previews._num_bytes == 1_600_000
    previews.note(asked(tokenizer, "z" * 600_000))  # more than all of them may have
    assert previews._num_bytes == 1_600_000
