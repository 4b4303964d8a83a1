"""Workload from traces: equal blocks become equal tokens, at any scale."""

from __future__ import annotations

import json
import math

import pytest

from cluster.bench.from_trace import Scale, sessions_of
from cluster.traces import read_trace
from messages.errors import ConfigError

MOONCAKE = [
    {"timestamp": 1000, "input_length": 1100, "output_length": 64, "hash_ids": [7, 8, 9]},
    {"timestamp": 4000, "input_length": 1030, "output_length": 640, "hash_ids": [7, 8, 10]},
]
AGENTS = [
    {
        "requests": [
            {"t": 0, "in": 200, "out": 64, "api_time": 1.0, "keep": 0, "runs": [[1, 3]]},
            {"t": 5, "in": 330, "out": 640, "api_time": 1.0, "keep": 2, "runs": [[9, 3]]},
        ]
    }
]
REQUESTS = [{"prompt": "hello there", "max_tokens": 5}]


def read(tmp_path, rows):
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_trace(path)


def common(one, other) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def test_prompts_of_a_trace_are_as_long_and_as_much_alike(tmp_path):
    one, other = sessions_of(read(tmp_path, MOONCAKE), Scale(), 0)
    assert [len(session.turns[0].tokens) for session in (one, other)] == [1100, 1030]
    assert common(one.turns[0].tokens, other.turns[0].tokens) == 1024
    assert [session.turns[0].max_tokens for session in (one, other)] == [64, 640]
    assert [session.begin_s for session in (one, other)] == [0.0, 3.0]


def test_a_scale_makes_blocks_outputs_and_times_smaller(tmp_path):
    scale = Scale(block_tokens=16, speed=2.0, max_prompt_tokens=33, max_output_tokens=10)
    one, other = sessions_of(read(tmp_path, MOONCAKE), scale, 0)
    assert [len(session.turns[0].tokens) for session in (one, other)] == [33, 32]
    assert common(one.turns[0].tokens, other.turns[0].tokens) == 32
    assert [session.turns[0].max_tokens for session in (one, other)] == [2, 10]
    assert other.begin_s == 1.5


def test_turns_of_a_session_have_what_they_kept_and_pause_as_they_did(tmp_path):
    [session] = sessions_of(read(tmp_path, AGENTS), Scale(block_tokens=1), 0)
    first, second = session.turns
    assert (len(first.tokens), len(second.tokens)) == (3, 5)
    assert common(first.tokens, second.tokens) == 2
    assert second.pause_s == 4.0
    [hurried] = sessions_of(read(tmp_path, AGENTS), Scale(block_tokens=1, speed=math.inf), 0)
    assert hurried.turns[1].pause_s == 0.0


def test_another_seed_gives_other_tokens_of_the_same_likeness(tmp_path):
    trace = read(tmp_path, MOONCAKE)
    one, other = sessions_of(trace, Scale(), 1)
    assert common(one.turns[0].tokens, other.turns[0].tokens) == 1024
    assert common(one.turns[0].tokens, sessions_of(trace, Scale(), 0)[0].turns[0].tokens) == 0


def test_a_request_of_a_file_is_posted_as_it_stands(tmp_path):
    [session] = sessions_of(read(tmp_path, REQUESTS), Scale(), 0)
    assert session.turns[0].body == {"prompt": "hello there", "max_tokens": 5}
    assert session.turns[0].path == "/v1/completions"
    with pytest.raises(ConfigError, match="--block-tokens: requests of a file are posted as they stand"):
        sessions_of(read(tmp_path, REQUESTS), Scale(block_tokens=1), 0)
