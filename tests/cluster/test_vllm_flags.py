"""Flags of vLLM's: what means the same is taken, what does not is answered by a line that says what to use."""

from __future__ import annotations

import pytest

from cluster.vllm_flags import Translation, translated

KNOWN = {"--port": True, "--dtype": True, "--max-model-len": True, "--served-model-name": True, "--api-key": True}
KNOWN |= {"--kv-cache-memory": True, "--access-log": False, "--no-access-log": False, "-h": False}


def said(line: str) -> Translation:
    return translated(line.split(), KNOWN)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("DIR --port 9000", "DIR --port 9000"),
        ("--model DIR", "DIR"),
        ("--model=DIR --port=9000", "DIR --port 9000"),
        ("DIR --max_model_len 32k", "DIR --max-model-len 32k"),
        ("DIR --kv-cache-memory-bytes=1000000", "DIR --kv-cache-memory 1000000"),
        ("DIR --dtype half", "DIR --dtype float16"),
        ("DIR --dtype=float", "DIR --dtype float32"),
        ("DIR --enable-prefix-caching --enable-chunked-prefill --enforce-eager", "DIR"),
        ("DIR --enable-auto-tool-choice --disable-log-stats", "DIR"),
        ("DIR --disable-uvicorn-access-log", "DIR --no-access-log"),
        ("DIR --tensor-parallel-size 1 -pp 1 --data-parallel-size=1", "DIR"),
        ("DIR --kv-cache-dtype auto --load-format safetensors --generation-config auto", "DIR"),
        ("DIR --served-model-name a b --port 1", "DIR --served-model-name a --served-model-name b --port 1"),
        ("--port 1 --served-model-name a DIR", "--port 1 --served-model-name a DIR"),
        ("DIR --api-key a b", "DIR --api-key a --api-key b"),
        ("DIR --unheard-of 3", "DIR --unheard-of 3"),
        ("DIR --max-model-len -1", "DIR --max-model-len -1"),
        ("-- --model", "-- --model"),
        ("-h", "-h"),
        ("DIR --port", "DIR --port"),
        ("--model", ""),
        ("--access-log=false", "--access-log=false"),
        ("--served-model-name a b --model DIR", "--served-model-name a --served-model-name b DIR"),
        ("DIR --no-trust-remote-code --no-enable-lora --no-enforce-eager", "DIR"),
        ("--enable-prefix-caching True --trust-remote-code=False DIR", "DIR"),
        ("DIR -n 1 -tp=1", "DIR"),
        ("DIR --unheard.of 3", "DIR --unheard.of 3"),
    ],
)
def test_what_means_the_same_is_taken(theirs, ours):
    assert said(theirs) == Translation(ours.split(), [])


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ("--tensor-parallel-size 2", "--decode N"),
        ("-tp 4", "--decode N"),
        ("--data-parallel-size=2", "--decode N"),
        ("--trust-remote-code", "never run"),
        ("--tokenizer other", "nothing is downloaded"),
        ("--quantization awq", "--dtype"),
        ("--swap-space 4", "--host-memory"),
        ("--kv-transfer-config {}", "--prefill"),
        ("--no-enable-prefix-caching", "cache_salt"),
        ("--kv-cache-dtype fp8", "--dtype"),
        ("--ssl-keyfile key.pem", "a proxy"),
        ("--max-logprobs 20", "logprobs"),
        ("--enable-lora", "none of it"),
        ("--uvicorn-log-level info", "--log-level"),
        ("--speculative-config.method ngram", "none of it"),
        ("--compilation_config.level=3", "none of it"),
        ("-cc.level 3", "none of it"),
        ("-O3", "none of it"),
        ("-O 3", "none of it"),
        ("--enable-chunked-prefill False", "always"),
        ("--enable-prefix-caching=false", "always"),
    ],
)
def test_what_means_something_else_or_is_not_there_is_one_line_that_says_what_to_use(theirs, words):
    found = said(f"DIR {theirs} --port 1")
    assert found.arguments == ["DIR", "--port", "1"]
    [line] = found.refusals
    assert words in line
    assert "\n" not in line


def test_all_of_them_are_answered_at_once():
    found = said("DIR -tp 2 --trust-remote-code --swap-space --seed 1")
    assert [line.partition(":")[0] for line in found.refusals] == [
        "--tensor-parallel-size",
        "--trust-remote-code",
        "--swap-space",
        "--seed",
    ]


def test_a_flag_that_is_kvrays_by_now_is_not_refused():
    assert translated(["--seed", "1"], {"--seed": True}) == Translation(["--seed", "1"], [])
