"""The whole cluster over each road that is not the default on one node: configured, used, shown, and right."""

from __future__ import annotations

import asyncio
import random

import openai
import pytest
import yaml

from tests.models import make_tiny_model
from tests.reference import Reference
from tests.served import run_kvray, serving

pytestmark = [pytest.mark.alone, pytest.mark.timeout(300), pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize(
    ("road", "carriers"), [("ucx", "tcp"), pytest.param("plasma", "ray object store", marks=pytest.mark.long)]
)
async def test_a_cluster_that_may_use_one_road_only(road, carriers, tmp_path):
    if road == "ucx":
        pytest.importorskip("ucxx", reason="ucxx is not installed: no UCX road")
    model_dir = make_tiny_model(tmp_path / "model")
    reference = Reference(model_dir)
    config = tmp_path / "kvray.yaml"
    config.write_text(yaml.safe_dump({"network": {"roads": [road]}}))
    rng = random.Random(5)
    with serving(str(model_dir), "--config", str(config), "--dtype", "float32", log_dir=tmp_path) as served:
        client = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60)
        name = (await client.models.list()).data[0].id
        # At once: a lone prompt goes where it is a hair faster by measurement, of many some go to the prefill worker.
        prompts = [[rng.randrange(5, 250) for _ in range(1000)] for _ in range(12)]
        extra = {"return_token_ids": True, "ignore_eos": True}
        replies = await asyncio.gather(
            *(
                client.completions.create(model=name, prompt=prompt, max_tokens=8, temperature=0, extra_body=extra)
                for prompt in prompts
            )
        )
        for prompt, reply in zip(prompts, replies, strict=True):
            assert reply.choices[0].model_extra["token_ids"] == reference.greedy(prompt, 8)
        (decode,) = [worker for worker in served.status()["workers"] if worker["role"] == "decode"]
        assert decode["roads"] == [road]
        assert decode["values"][f'kvray_transfer_bytes_total{{road="{road}"}}'] > 0
        assert sum(value for key, value in decode["values"].items() if key.startswith("kvray_blocks_rejected")) == 0
        (pulls,) = decode["pulls_from"]
        assert (pulls["road"], pulls["carriers"]) == (road, carriers)
        assert pulls["bytes_per_s"] > 0
        shown, _ = run_kvray("status", "--url", served.url)
        assert f"{decode['worker_id']} <- {pulls['peer']}: {road} ({carriers})" in shown.stdout
        served.wait_until_idle()
        assert served.stop() < 10
