"""`kvray explain` beside what replies say, on a real cluster with two ingresses, prefill, decode and a node cache."""

from __future__ import annotations

import json
import random
from collections import Counter

import httpx
import openai
import pytest

from tests.models import make_tiny_model
from tests.served import run_kvray, serving

pytestmark = [pytest.mark.alone, pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]

KEY = "a-key"
PROMPT = [random.Random(7).randrange(5, 250) for _ in range(500)]
NUM_LOOKS = 8  #: over a connection each, so that either ingress is asked, but for one time in 128


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    model = make_tiny_model(tmp_path_factory.mktemp("model"))
    directory = tmp_path_factory.mktemp("served")
    config = directory / "kvray.yaml"
    config.write_text("pools: {ingress: 2}\n")
    arguments = [
        *(str(model), "--config", str(config), "--dtype", "float32", "--prefill", "1", "--decode", "1"),
        *("--kv-cache-memory", "8MiB", "--host-memory", "16MiB"),
    ]
    with serving(*arguments, log_dir=directory, extra_environment={"KVRAY_API_KEY": KEY}) as process:
        yield process


def explain(served, request_id: str, *arguments: str) -> str:
    finished, _ = run_kvray(
        *("explain", request_id, "--url", served.url, *arguments), extra_environment={"KVRAY_API_KEY": KEY}
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_what_is_explained_is_what_the_reply_counts_whichever_ingress_is_asked(served):
    headers = {"Authorization": f"Bearer {KEY}"}
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0) as client:
        model = client.models.list().data[0].id
        replies = []
        for clears in (False, False, True):
            if clears:
                httpx.post(
                    f"{served.url}/v1/cache/clear",
                    json={"prompt": PROMPT, "tiers": ["device"], "dry_run": False},
                    headers=headers,
                ).raise_for_status()
            replies.append(
                client.completions.create(
                    model=model, prompt=PROMPT, max_tokens=4, extra_body={"return_prompt_sources": True}
                )
            )
    for reply in replies:
        looks = [
            httpx.get(f"{served.url}/v1/route/{reply.id}", headers=headers, timeout=20).raise_for_status().json()
            for _ in range(NUM_LOOKS)
        ]
        assert all(look["runs"] == looks[0]["runs"] for look in looks)
        told = Counter()
        for run in looks[0]["runs"]:
            told[run["source"]] += run["end"] - run["begin"]
        sources = reply.model_extra["kvray"]["prompt_sources"]
        assert told == {name: count for name, count in sources.items() if count}
        assert looks[0]["num_cached_tokens"] == reply.usage.prompt_tokens_details.cached_tokens
        assert any(one["is_chosen"] for one in looks[0]["predicted"]["candidates"])
    assert replies[0].usage.prompt_tokens_details.cached_tokens == 0
    assert replies[1].usage.prompt_tokens_details.cached_tokens > 400
    document = json.loads(explain(served, replies[0].id, "--json"))
    assert {run["why"] for run in document["runs"]} == {"never_seen", "prompt_end"}
    shown = explain(served, replies[1].id)
    assert "0-496" in shown
    assert "496 were in the pool of the decode worker" in " ".join(shown.split())
    finished, _ = run_kvray("explain", "nobody", "--url", served.url, extra_environment={"KVRAY_API_KEY": KEY})
    assert finished.returncode != 0
    assert finished.stderr.startswith('kvray: request_id: got "nobody", want one of the last 1000')
    metrics = httpx.get(f"{served.url}/metrics", headers=headers).text
    assert 'kvray_prompt_misses_total{ingress="' in metrics
    assert "kvray_canary_checked_blocks_total" in metrics
