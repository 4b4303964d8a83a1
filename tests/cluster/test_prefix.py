"""A prompt's KV leaves one deployment as a file, and another one that never saw the prompt answers from it."""

from __future__ import annotations

import contextlib
import json
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.models import make_tiny_model
from tests.served import STATUS_AGE_S, Served, run_kvray, serving

pytestmark = [pytest.mark.alone, pytest.mark.timeout(400), pytest.mark.usefixtures("one_thread")]

PROMPT = [random.Random(7).randrange(5, 250) for _ in range(800)]
KEY = {"KVRAY_API_KEY": "a-key"}


@contextlib.contextmanager
def deployment(model: Path, directory: Path, *arguments: str) -> Iterator[tuple[Served, httpx.Client]]:
    directory.mkdir()
    options = [
        *(str(model), "--dtype", "float32", "--prefill", "1", "--decode", "1", "--kv-cache-memory", "8MiB"),
        *("--host-memory", "16MiB", *arguments),
    ]
    headers = {"Authorization": "Bearer a-key"}
    with (
        serving(*options, log_dir=directory, extra_environment=KEY) as served,
        httpx.Client(base_url=served.url, headers=headers, timeout=60) as http,
    ):
        yield served, http


def post(http: httpx.Client, path: str, **body: object) -> dict:
    reply = http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def answer(http: httpx.Client) -> list[int]:
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
    return post(http, "/v1/completions", **body)["choices"][0]["token_ids"]


def held(http: httpx.Client) -> dict[str, int]:
    return post(http, "/v1/cache/lookup", prompt=PROMPT)["tokens"]


def wait_until_held(http: httpx.Client, *tiers: str) -> None:
    ends_s = time.monotonic() + 30
    while not set(tiers) <= held(http).keys():
        assert time.monotonic() < ends_s, held(http)
        time.sleep(0.2)


def tokens_from(http: httpx.Client, source: str) -> float:
    time.sleep(STATUS_AGE_S)  # numbers that were asked for last are given again before
    lines = re.findall(
        rf'^kvray_worker_prompt_tokens_total{{.*source="{source}".*}} (\S+)$', http.get("/metrics").text, re.M
    )
    return sum(map(float, lines))


def kvray(served: Served, *arguments: str, code: int = 0) -> str:
    done, _ = run_kvray("cache", *arguments, "--url", served.url, extra_environment=KEY)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_a_prefix_ships_with_a_deployment(tmp_path):
    # It takes so long to compute that loading is quicker.
    sizes = {"hidden_size": 768, "intermediate_size": 1536, "num_hidden_layers": 4, "max_position_embeddings": 1024}
    model = make_tiny_model(tmp_path / "model", **sizes)
    prompt, file, pooled = tmp_path / "prompt.json", tmp_path / "prefix.arrow", tmp_path / "pooled.arrow"
    prompt.write_text(json.dumps({"prompt": PROMPT}))
    with deployment(model, tmp_path / "one") as (served, http):
        cold = answer(http)
        wait_until_held(http, "device", "host")
        kvray(served, "export", "--file", str(prompt), "-o", str(file))
        kvray(served, "clear", "--file", str(prompt), "--tier", "host", "--no-dry-run")
        kvray(served, "export", "--file", str(prompt), "-o", str(pooled))  # from the pools of workers
        done = json.loads(kvray(served, "clear", "--everything", "--no-dry-run", "--json"))
        assert done["tiers"]["device"]["blocks"] > 0
        assert (done["num_workers"], done["num_caches"], done["failures"]) == (2, 1, [])
        ends_s = time.monotonic() + 10
        while held(http):
            assert time.monotonic() < ends_s, held(http)
            time.sleep(0.1)
    with deployment(model, tmp_path / "two", "--disk-dir", str(tmp_path / "disk")) as (served, http):
        assert held(http) == {}
        for path in (file, pooled):
            whole = path.read_bytes()
            for altered, words in (
                (whole[: len(whole) // 2], "no whole Arrow file"),
                (whole[:-3000] + bytes([whole[-3000] ^ 1]) + whole[-2999:], "prefix"),
            ):
                path.write_bytes(altered)
                assert words in kvray(served, "import", str(path), code=2)
            path.write_bytes(whole)
            assert held(http) == {}
            done = json.loads(kvray(served, "import", str(path), "--json"))
            assert done["tiers"]["host"]["tokens"] >= 768
            wait_until_held(http, "host", "disk")
            before = tokens_from(http, "host")
            assert answer(http) == cold
            assert tokens_from(http, "host") > before  # how many depends on what computing the head costs
            kvray(served, "clear", "--everything", "--no-dry-run")
            ends_s = time.monotonic() + 10
            while held(http):
                assert time.monotonic() < ends_s, held(http)
                time.sleep(0.1)
