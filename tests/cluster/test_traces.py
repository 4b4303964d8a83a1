"""What is read from files of traces, and how each broken line is told."""

import gzip
import json
import lzma
from pathlib import Path

import pytest

from cluster.traces import UNSAID_OUTPUT_TOKENS, read_trace
from messages.errors import ConfigError
from tests.shared_traces import agent_sessions, mooncake


def written(tmp_path: Path, *lines: object, name: str = "trace.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def row(**changes: object) -> dict[str, object]:
    """A line of a Mooncake trace."""
    return {"timestamp": 0, "input_length": 1000, "output_length": 7, "hash_ids": [0, 1], **changes}


def asked(**changes: object) -> dict[str, object]:
    """A request of an agent's session."""
    return {"t": 0.0, "in": 130, "out": 7, "keep": 0, "runs": [[5, 2]], **changes}


def session(*requests: object, **changes: object) -> dict[str, object]:
    return {"id": "one", "block_size": 64, "requests": list(requests), **changes}


def test_mooncake_requests_are_spread_within_their_ticks(tmp_path):
    lines = [row(timestamp=ms, hash_ids=[0, n + 1]) for n, ms in enumerate([0, 0, 0, 3000, 3000, 9000])]
    trace = read_trace(written(tmp_path, *lines))
    assert (trace.kind, trace.block_tokens, trace.is_timed) == ("mooncake", 512, True)
    assert [one.begin_s for one in trace.sessions] == [0.0, 1.0, 2.0, 3.0, 6.0, 9.0]
    assert list(trace.sessions[2].requests[0].block_ids()) == [0, 3]


def test_agent_requests_keep_the_head_of_the_one_before(tmp_path):
    first, second = asked(), asked(t=9.0, keep=1, runs=[[9, 2]], **{"in": 192})
    sub_agent = {"t": 1.0, "type": "subagent", "requests": [asked()]}
    path = written(tmp_path, session({**first, "api_time": 2.5}, sub_agent, second), session(first))
    trace = read_trace(path)
    assert (trace.kind, trace.block_tokens, trace.is_timed, trace.num_requests) == ("agents", 64, False, 3)
    one, other = trace.sessions
    assert [list(request.block_ids()) for request in one.requests] == [[5, 6], [5, 9, 10]]
    assert (one.requests[1].at_s, one.requests[1].pause_s) == (9.0, 6.5)
    assert not set(one.requests[0].block_ids()) & set(other.requests[0].block_ids()), "ids are a session's own"


def test_requests_that_begin_alike_share_the_ids_of_whole_blocks(tmp_path):
    text = "x" * 600
    lines = [
        {"prompt": text + "a", "max_tokens": 3, "model": "m"},
        {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": text + "b"}},
        {"prompt": "y" + text, "output_tokens": 9, "timestamp": 5},
        {"messages": [{"role": "user", "content": text}]},
        {"prompt": list(range(130))},
        {"input": "short", "max_output_tokens": 4},
    ]
    trace = read_trace(written(tmp_path, *lines))
    asked = [one.requests[0] for one in trace.sessions]
    assert list(asked[0].block_ids()) == list(asked[1].block_ids()) == [0, 1]
    assert not set(asked[2].block_ids()) & {0, 1}
    assert [request.num_prompt_tokens for request in asked] == [150, 150, 150, 158, 130, 1]
    assert [request.num_output_tokens for request in asked] == [
        3,
        UNSAID_OUTPUT_TOKENS,
        9,
        UNSAID_OUTPUT_TOKENS,
        UNSAID_OUTPUT_TOKENS,
        4,
    ]
    assert [request.path for request in asked][3:] == ["/v1/chat/completions", "/v1/completions", "/v1/responses"]
    assert asked[0].body == {"prompt": text + "a", "max_tokens": 3, "model": "m"}
    assert asked[2].body == {"prompt": "y" + text, "max_tokens": 9}
    assert [one.begin_s for one in trace.sessions][1:3] == [None, 0.005]
    assert not trace.is_timed


def test_what_a_line_says_of_its_output_is_what_is_asked_for(tmp_path):
    lines = [
        {"prompt": "a", "max_tokens": 100, "output_tokens": 5},
        {"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 3, "output_tokens": 5},
        {"input": "a", "max_output_tokens": 7},
    ]
    asked = [one.requests[0] for one in read_trace(written(tmp_path, *lines)).sessions]
    assert [request.num_output_tokens for request in asked] == [5, 5, 7]
    assert asked[0].body == {"prompt": "a", "max_tokens": 5}
    assert asked[1].body == {"messages": lines[1]["messages"], "max_tokens": 5}
    assert asked[2].body == lines[2]


def test_only_as_many_sessions_are_read_as_are_wanted(tmp_path):
    path = written(tmp_path, row(), row(), "no JSON")
    assert read_trace(path, max_sessions=2).num_requests == 2
    with pytest.raises(ConfigError, match="line 3: wanted a JSON object"):
        read_trace(path)


@pytest.mark.parametrize(("name", "pack"), [("t.jsonl.xz", lzma.compress), ("t.jsonl.gz", gzip.compress)])
def test_a_compressed_file_is_read_and_one_cut_short_is_told(tmp_path, name, pack):
    data = pack(b"".join(json.dumps(row(timestamp=n)).encode() + b"\n" for n in range(2000)))
    path = tmp_path / name
    path.write_bytes(data)
    assert read_trace(path).num_requests == 2000
    path.write_bytes(data[:-30])
    with pytest.raises(ConfigError, match="damaged or cut short after line"):
        read_trace(path)


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([], "is empty"),
        (["", "  "], "is empty"),
        (["{", ""], "line 1: wanted a JSON object, saw what is no JSON"),
        ([[1]], r"line 1: wanted a JSON object, saw list \[1\]"),
        ([{"foo": 1}], "line 1: no line of a trace; wanted hash_ids"),
        ([row(), "", row(input_length="x")], "line 3: input_length: wanted int, saw str 'x'"),
        ([row(input_length=0)], "line 1: input_length: wanted 1 to 2147483648, saw 0"),
        ([row(timestamp=-1)], "timestamp: wanted 0 to"),
        ([row(output_length=2.5)], "output_length: wanted int, saw float 2.5"),
        ([{"hash_ids": []}], "timestamp: missing"),
        ([row(hash_ids=[1])], "hash_ids: wanted 2, one for each 512 of 1000 tokens, saw 1"),
        ([row(hash_ids=[1, -1])], "hash_ids: wanted 0 to"),
        ([row(timestamp=9), row(timestamp=8)], "line 2: timestamp: wanted 9, the line before it, or later, saw 8"),
        ([row(), {"prompt": "x"}], "line 2: timestamp: missing"),
        ([session()], "requests: wanted at least one"),
        ([session(asked(), block_size="x")], "block_size: wanted 1 to"),
        ([session(3)], r"requests\[0\]: wanted a JSON object, saw int 3"),
        ([session(asked(t="x"))], r"requests\[0\]: t: wanted float, saw str 'x'"),
        ([session(asked(keep=3))], r"requests\[0\]: keep: wanted at most 0"),
        ([session(asked(runs=[[1]]))], r"requests\[0\]: runs: wanted \[first id, count\] each, saw list \[1\]"),
        ([session(asked(runs=[[1, 1]]))], "runs: wanted ids of 2 blocks, of 64 of 130 tokens, saw 1"),
        ([session(asked(t=2), asked(t=1))], r"requests\[1\]: t: wanted 2, of the one before, or later, saw 1"),
        ([{"prompt": ""}], "prompt: wanted a text or a list, saw str ''"),
        ([{"messages": [1]}, {"messages": 1}], "line 2: messages: wanted a text or a list, saw int 1"),
        ([{"body": {"x": 1}}], r"wanted messages, prompt or input, saw list \['x'\]"),
        ([{"prompt": "x", "max_tokens": 0}], "max_tokens: wanted 1 to"),
    ],
)
def test_a_broken_line_is_told_with_its_number(tmp_path, lines, told):
    with pytest.raises(ConfigError, match=told) as error:
        read_trace(written(tmp_path, *lines))
    assert "\n" not in error.value.message


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_trace(tmp_path / "none")


@pytest.mark.slow
def test_the_real_traces_are_what_their_makers_say():
    talks = read_trace(mooncake())
    asked = [one.requests[0] for one in talks.sessions]
    assert len(asked) == 12_031
    assert round(sum(request.num_prompt_tokens for request in asked) / len(asked)) == 12_035
    ids = [block for request in asked for block in request.block_ids()]
    assert (len(ids), len(set(ids))) == (288_500, 182_790)
    agents = read_trace(agent_sessions())
    assert (len(agents.sessions), agents.num_requests) == (474, 33_752)
    pauses = sorted(request.pause_s for one in agents.sessions for request in one.requests[1:])
    assert 9.5 < pauses[len(pauses) // 2] < 9.7
