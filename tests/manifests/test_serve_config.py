"""A serveConfigV2 is walked beside Ray's models, which take misspelt keys at nearly every level."""

from __future__ import annotations

import copy

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from tests.manifests.misspelling import misspelt
from tests.manifests.serve_config import serve_config_problems

#: More of what may stand there than our manifests have.
FULL = {
    "proxy_location": "EveryNode",
    "http_options": {"host": "0.0.0.0", "port": 8000, "request_timeout_s": None, "keep_alive_timeout_s": 90},
    "grpc_options": {"port": 9000, "grpc_servicer_functions": []},
    "logging_config": {"encoding": "JSON", "log_level": "INFO"},
    "applications": [
        {
            "name": "kvray",
            "route_prefix": "/",
            "import_path": "cluster.app:build",
            "runtime_env": {"env_vars": {}},
            "args": {"pools": {"prefill": 1, "decode_labels": {}}, "tenants": {"members": []}},
            "deployments": [
                {
                    "name": "Decode",
                    "max_replicas_per_node": 1,
                    "logging_config": {"log_level": "DEBUG"},
                    "ray_actor_options": {"num_cpus": 1, "label_selector": {}},
                    "autoscaling_config": {
                        "min_replicas": 1,
                        "max_replicas": 2,
                        "policy": {"policy_function": "ray.serve.autoscaling_policy:default_autoscaling_policy"},
                    },
                    "request_router_config": {"initial_backoff_s": 0.1},
                }
            ],
            "autoscaling_policy": {"policy_function": "ray.serve.autoscaling_policy:default_autoscaling_policy"},
        }
    ],
}


def test_what_ray_takes_has_no_problems():
    assert serve_config_problems(yaml.safe_dump(FULL)) == []


@pytest.mark.parametrize(("place", "document"), list(misspelt(FULL)))
def test_a_misspelt_key_is_a_problem(place, document):
    assert serve_config_problems(yaml.safe_dump(document)) != []


def test_ray_itself_takes_a_misspelt_key():
    document = copy.deepcopy(FULL)
    document["applications"][0]["rout_prefix"] = document["applications"][0].pop("route_prefix")
    ServeDeploySchema.model_validate(document)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"import_path": "cluster.app:application"}, "import_path: wanted cluster.app:build"),
        ({"deployments": [{"name": "Decoder"}]}, "saw 'Decoder'"),
        (
            {"deployments": [{"name": "Decode", "autoscaling_config": {"min_replicas": 3, "max_replicas": 2}}]},
            "AutoscalingConfig",
        ),
        ({"autoscaling_policy": {"policy_function": 5}}, "AutoscalingPolicy"),
        ({"args": {"pools": {"decode": 0}}}, "args: pools.decode"),
        ({"deployments": [{"name": "Decode", "num_replicas": "many"}]}, "num_replicas"),
    ],
)
def test_a_wrong_value_is_a_problem(changes, wanted):
    document = copy.deepcopy(FULL)
    document["applications"][0].update(changes)
    problems = serve_config_problems(yaml.safe_dump(document))
    assert any(wanted in problem for problem in problems), problems
