"""Two tenants on a served cluster: they share no block and see nothing of each other, and quotas and pins hold."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time

import httpx
import openai
import pytest

from tests.models import make_tiny_model
from tests.served import Served, serving

pytestmark = [pytest.mark.alone, pytest.mark.timeout(900), pytest.mark.usefixtures("one_thread")]

KEYS = {"acme": "acme-key-2", "globex": "globex-key", None: "operator-key"}
TOKEN_BYTES = 1536  #: of KV, by the model's sizes
BLOCK_BYTES = 16 * TOKEN_BYTES
HOST_QUOTA, DISK_QUOTA = 40 * BLOCK_BYTES, 60 * BLOCK_BYTES  #: acme's
CONFIG = """
http: {{api_key_file: {folder}/operators}}
engine: {{kv_cache_memory: 3MiB}}
pools: {{prefill: 1, decode: 1}}
tiers: {{host_memory: 4MiB, disk_dir: {folder}/disk, disk_capacity: 64MiB}}
tenants:
  salt_file: {folder}/salt
  members:
    - {{name: acme, api_key_file: {folder}/acme, host_quota: "{host}", disk_quota: "{disk}"}}
    - {{name: globex, api_key_file: {folder}/globex, cache_hints: use}}
observability: {{tenant_metrics: 1}}
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tenants")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "max_position_embeddings": 2048}
    model_dir = make_tiny_model(folder / "tiny", **sizes)
    files = {"operators": "operator-key", "salt": "ab" * 32, "acme": "acme-key-1\nacme-key-2", "globex": "globex-key"}
    for name, text in files.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o600)
    config = folder / "kvray.yaml"
    config.write_text(CONFIG.format(folder=folder, host=HOST_QUOTA, disk=DISK_QUOTA))
    with serving(str(model_dir), "--dtype", "float32", "--config", str(config), log_dir=folder) as served:
        yield served


def call(served: Served, path: str, tenant: str | None, body: dict | None = None) -> httpx.Response:
    headers = {"Authorization": f"Bearer {KEYS[tenant]}"}
    if body is None:
        return httpx.get(served.url + path, headers=headers, timeout=60)
    return httpx.post(served.url + path, headers=headers, json=body, timeout=60)


def done(served: Served, path: str, tenant: str | None, body: dict | None = None) -> dict:
    reply = call(served, path, tenant, body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def ask(served: Served, tenant: str | None, prompt: list[int], **fields) -> dict[str, int]:
    """Where the prompt's tokens came from; those that were not computed are told as cached."""
    body = {"prompt": prompt, "max_tokens": 2, "temperature": 0, "ignore_eos": True, "return_prompt_sources": True}
    reply = done(served, "/v1/completions", tenant, body | fields)
    sources = reply["kvray"]["prompt_sources"]
    details = reply["usage"]["prompt_tokens_details"] or {"cached_tokens": 0}
    assert details["cached_tokens"] == len(prompt) - sources["computed"]
    return sources


def held(served: Served, who: str | None, prompt: list[int], **fields) -> dict[str, int]:
    return done(served, "/v1/cache/lookup", who, {"prompt": prompt, **fields})["tokens"]


def wait_until_held(served: Served, who: str | None, prompt: list[int], tier: str, **fields) -> None:
    ends_s = time.monotonic() + 30
    whole = len(prompt) // 16 * 16
    while held(served, who, prompt, **fields).get(tier, 0) < whole:
        assert time.monotonic() < ends_s, f"not in {tier}: {held(served, who, prompt, **fields)}"
        time.sleep(0.1)


def usage(served: Served, tenant: str) -> dict[str, dict]:
    [cache] = done(served, "/v1/cache/stats", None)["caches"]
    return cache["tenants"][tenant]


def prompt_of(seed: str, length: int = 400) -> list[int]:
    return [random.Random(seed + str(i)).randrange(5, 250) for i in range(length)]


def test_the_same_prompt_is_computed_for_each_tenant_and_found_by_its_own(served):
    prompt = prompt_of("shared")
    for tenant in KEYS:
        assert held(served, tenant, prompt) == {}
        assert ask(served, tenant, prompt)["computed"] == len(prompt), "nobody else's blocks are hit"
        wait_until_held(served, tenant, prompt, "host")
        assert ask(served, tenant, prompt)["computed"] < len(prompt)
        assert ask(served, tenant, prompt, cache_salt="mine")["computed"] == len(prompt)
    wait_until_held(served, None, prompt, "host", tenant="globex")
    whole = {"prompt": prompt, "dry_run": False}
    ends_s = time.monotonic() + 30
    while "host" not in (cleared := done(served, "/v1/cache/clear", "globex", whole)["tiers"]):
        assert time.monotonic() < ends_s, "the router does not hear the node cache"
        time.sleep(0.2)
    assert cleared["host"]["blocks"] > 0
    assert held(served, None, prompt).get("host", 0) > 0


def test_no_word_of_another_tenant_tells_anything(served):
    prompt = prompt_of("secret")
    ask(served, "acme", prompt)
    wait_until_held(served, "acme", prompt, "host")
    assert held(served, "globex", prompt) == {}
    for path, body in (
        ("/metrics", None),
        ("/status", None),
        ("/v1/cache/table?tenant=acme", None),
        ("/v1/cache/lookup", {"prompt": prompt, "tenant": "acme"}),
        ("/v1/cache/clear", {"tenant": "acme", "dry_run": False}),
    ):
        assert call(served, path, "globex", body).status_code == 403
    [cache] = done(served, "/v1/cache/stats", "globex")["caches"]
    assert (list(cache["tenants"]), cache["tiers"]) == (["globex"], {})
    rows = done(served, "/v1/cache/table?format=json", "globex")["blocks"]
    assert {row["tenant_name"] for row in rows} <= {"globex"}
    rows = done(served, "/v1/cache/table?format=json&tenant=acme", None)["blocks"]
    assert {row["tenant_name"] for row in rows} == {"acme"}
    scraped = call(served, "/metrics", None).text
    assert 'tenant="acme",tier="host"' in scraped
    assert re.search('kvray_tenant_prompt_tokens_total{ingress="[^"]*",tenant="acme",source="computed"}', scraped)
    assert 'tenant="globex",source' not in scraped, "the second is not counted by name"
    assert not any(key in scraped for key in (*KEYS.values(), "ab" * 32))


def on_devices(served: Served, tenant: str) -> int:
    """Bytes of a tenant's blocks in the pools of all workers."""
    workers = done(served, "/v1/cache/stats", tenant)["workers"]
    return sum(worker["tenants"][tenant]["device"]["bytes"] for worker in workers)


def test_a_tenants_blocks_are_cleared_from_the_pools_of_workers_and_nobody_elses(served):
    prompt = prompt_of("cleared")
    for tenant in ("acme", "globex", None):
        ask(served, tenant, prompt)
        wait_until_held(served, tenant, prompt, "device")
    for tenant in ("acme", "globex", None):
        wait_until_held(served, tenant, prompt, "host")  # nothing of it is read any more
    rows = done(served, "/v1/cache/table?format=json&tier=device", "acme")["blocks"]
    assert {row["tenant_name"] for row in rows} == {"acme"}
    ends_s = time.monotonic() + 30
    while on_devices(served, "acme") != len(rows) * BLOCK_BYTES:
        assert time.monotonic() < ends_s, f"counted {on_devices(served, 'acme')} bytes of {len(rows)} blocks"
        time.sleep(0.2)
    assert on_devices(served, "globex") > 0
    wanted = {"tenant": "acme", "tiers": ["device"]}
    would = done(served, "/v1/cache/clear", None, wanted)["tiers"]["device"]
    assert would["blocks"] + would["in_use"] == len(rows)
    did = done(served, "/v1/cache/clear", None, wanted | {"dry_run": False})["tiers"]["device"]
    assert did["blocks"] + did["in_use"] == len(rows)
    while done(served, "/v1/cache/table?format=json&tier=device", "acme")["blocks"]:  # what was in use then
        assert time.monotonic() < ends_s
        done(served, "/v1/cache/clear", None, wanted | {"dry_run": False})
    for tenant in ("globex", None):
        assert held(served, tenant, prompt)["device"] == len(prompt)
    ends_s = time.monotonic() + 30
    while "device" in held(served, "acme", prompt):
        assert time.monotonic() < ends_s, "the router does not hear that they are gone"
        time.sleep(0.2)
    assert ask(served, "acme", prompt)["device"] == 0


def test_a_quota_holds_in_every_tier_while_both_write(served):
    async def write(tenant: str, client: openai.AsyncOpenAI) -> None:
        for number in range(12):
            await client.completions.create(model="tiny", prompt=prompt_of(f"{tenant} {number}"), max_tokens=2)

    async def write_both() -> list[dict[str, dict]]:
        seen = []
        async with (
            openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEYS["acme"], timeout=120) as acme,
            openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEYS["globex"], timeout=120) as globex,
        ):
            writing = asyncio.gather(write("acme", acme), write("acme too", acme), write("globex", globex))
            while not writing.done():
                seen.append(await asyncio.to_thread(usage, served, "acme"))
                await asyncio.wait([writing], timeout=0.3)
            await writing
        return seen

    seen = asyncio.run(write_both())
    wait_until_held(served, "globex", prompt_of("globex 11"), "host")
    seen.append(usage(served, "acme"))
    assert max(one["host"]["bytes"] for one in seen) <= HOST_QUOTA == seen[0]["host"]["quota_bytes"]
    assert max(one["disk"]["bytes"] for one in seen) <= DISK_QUOTA == seen[0]["disk"]["quota_bytes"]
    assert seen[-1]["host"]["bytes"] > HOST_QUOTA // 2
    ends_s = time.monotonic() + 30
    while usage(served, "globex")["disk"]["bytes"] <= DISK_QUOTA:
        assert time.monotonic() < ends_s, "who has no quota is kept from writing"
        time.sleep(0.2)


def test_a_pin_survives_pressure_and_is_refused_where_it_is_not_allowed(served):
    pinned, plain = prompt_of("pinned"), prompt_of("plain")
    hints = {"pin": {"ttl_s": 600, "tokens": [0, 400]}}
    ask(served, "globex", plain)
    ask(served, "globex", pinned, kvray={"cache": hints})
    for prompt in (pinned, plain):
        wait_until_held(served, "globex", prompt, "host")
    for number in range(10):
        ask(served, None, prompt_of(f"pressure {number}", 600))
    ends_s = time.monotonic() + 60
    number = 10
    while held(served, "globex", plain).get("host", 0) == 400:
        assert time.monotonic() < ends_s, "there is no pressure"
        ask(served, None, prompt_of(f"pressure {number}", 600))
        number += 1
    assert held(served, "globex", pinned)["host"] == 400
    rows = done(served, "/v1/cache/table?format=json&tier=host", "globex")["blocks"]
    assert sum(row["kept_s"] != 0 for row in rows) == 25
    for tenant in ("acme", None):
        reply = call(served, "/v1/completions", tenant, {"prompt": "a", "kvray": {"cache": hints}})
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "cache_hints_not_allowed")
    headers = {"Authorization": f"Bearer {KEYS['globex']}", "X-Kvray-Cache": json.dumps({"demote": {}})}
    assert httpx.post(f"{served.url}/v1/completions", json={"prompt": "a"}, headers=headers, timeout=60).is_success
