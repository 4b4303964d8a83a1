"""What is cached by a whole cluster, looked at and steered over HTTP and by the command line."""

from __future__ import annotations

import io
import json
import random
import time

import httpx
import pyarrow as pa
import pytest

from tests.models import make_tiny_model
from tests.served import STATUS_AGE_S, run_kvray, serving

pytestmark = [pytest.mark.alone, pytest.mark.timeout(300), pytest.mark.usefixtures("one_thread")]

KEY = "a-key"
PROMPT = [random.Random(5).randrange(5, 250) for _ in range(800)]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    model = make_tiny_model(tmp_path_factory.mktemp("model"))
    directory = tmp_path_factory.mktemp("served")
    arguments = [
        *(str(model), "--dtype", "float32", "--prefill", "1", "--decode", "1", "--kv-cache-memory", "8MiB"),
        *("--host-memory", "16MiB", "--disk-dir", str(directory / "disk"), "--disk-capacity", "1GiB"),
    ]
    with serving(*arguments, log_dir=directory, extra_environment={"KVRAY_API_KEY": KEY}) as process:
        yield process


def test_a_prompt_is_found_listed_pinned_checked_and_cleared(served):
    with httpx.Client(base_url=served.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as http:

        def post(path: str, **body: object) -> dict:
            reply = http.post(path, json=body)
            assert reply.status_code == 200, reply.text
            return reply.json()

        def answer() -> list[int]:
            body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
            return post("/v1/completions", **body)["choices"][0]["token_ids"]

        cold = answer()
        ends_s = time.monotonic() + 30
        while not {"device", "host", "disk"} <= post("/v1/cache/lookup", prompt=PROMPT)["tokens"].keys():
            assert time.monotonic() < ends_s, post("/v1/cache/lookup", prompt=PROMPT)
            time.sleep(0.2)
        found = post("/v1/cache/lookup", prompt=PROMPT)
        num_tokens = found["tokens"]["host"]
        num_blocks = num_tokens // found["block_size"]
        assert found["held_tokens"] == 800 // found["block_size"] * found["block_size"] == num_tokens
        time.sleep(STATUS_AGE_S)  # what was asked for last is given again before
        stats = http.get("/v1/cache/stats").json()
        assert {tier for owner in [*stats["workers"], *stats["caches"]] for tier in owner["tiers"]} == {
            "device",
            "host",
            "disk",
        }
        reply = http.get("/v1/cache/table", params={"tier": "host"})
        table = pa.ipc.open_stream(io.BytesIO(reply.content)).read_all()
        table.validate(full=True)
        assert table.num_rows == int(reply.headers["x-num-rows"]) >= num_blocks
        assert post("/v1/cache/pin", prompt=PROMPT, ttl_s=60)["tiers"]["host"]["tokens"] == num_tokens
        assert post("/v1/cache/unpin", prompt=PROMPT)["failures"] == []

        for arguments in (["check"], ["clear", "--everything", "--no-dry-run"]):
            done, _ = run_kvray(
                *("cache", *arguments, "--json", "--url", served.url), extra_environment={"KVRAY_API_KEY": KEY}
            )
            assert done.returncode == 0, done.stderr
            tiers = json.loads(done.stdout)["tiers"]
            assert all(tiers[tier]["blocks"] >= num_blocks for tier in ("host", "disk"))
            assert arguments == ["check"] or tiers["device"]["blocks"] >= num_blocks
            assert not any(one["damaged"] for one in tiers.values())
        ends_s = time.monotonic() + 10
        while post("/v1/cache/lookup", prompt=PROMPT)["tokens"]:
            assert time.monotonic() < ends_s
            time.sleep(0.1)
        assert answer() == cold
    assert httpx.post(f"{served.url}/v1/cache/clear", json={"everything": True}, timeout=10).status_code == 401
