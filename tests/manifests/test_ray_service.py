"""What KubeRay is given: an application that our configuration takes, and credentials on every node, from a Secret."""

from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from cluster.config import parse_config

MANIFESTS = Path(__file__).parent.parent.parent / "manifests"


@pytest.fixture(scope="module")
def spec():
    (document,) = yaml.safe_load_all((MANIFESTS / "ray-service.yaml").read_text())
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", "RayService")
    return document["spec"]


@pytest.fixture(scope="module")
def pods(spec):
    cluster = spec["rayClusterConfig"]
    return [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]


def test_the_application_is_one_that_serve_and_we_take(spec):
    document = yaml.safe_load(spec["serveConfigV2"])
    (application,) = ServeDeploySchema.model_validate(document).applications
    config = parse_config(application.args)
    assert application.import_path == "cluster.app:build"
    assert config.pools.prefill + config.pools.decode == spec["rayClusterConfig"]["workerGroupSpecs"][0]["replicas"]


def test_every_node_has_the_files_that_the_configuration_names_and_the_other_users_do_not(spec, pods):
    config = parse_config(yaml.safe_load(spec["serveConfigV2"])["applications"][0]["args"])
    for pod in pods:
        (container,) = pod["spec"]["containers"]
        mounted = {mount["name"]: Path(mount["mountPath"]) for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        assert set(mounted) == set(volumes)
        secret = volumes["credentials"]["secret"]
        assert secret["defaultMode"] & 0o007 == 0
        for path in (config.network.secret_file, config.http.api_key_file):
            assert Path(path).parent == mounted["credentials"]


def test_rays_token_comes_from_a_secret_and_workers_are_not_run_behind_all_else(pods):
    for pod in pods:
        env = {variable["name"]: variable for variable in pod["spec"]["containers"][0]["env"]}
        assert env["RAY_AUTH_MODE"]["value"] == "token"
        assert "secretKeyRef" in env["RAY_AUTH_TOKEN"]["valueFrom"]
        assert env["RAY_worker_niceness"]["value"] == "0"


def test_the_network_policy_selects_the_pods(pods):
    policy = yaml.safe_load((MANIFESTS / "network-policy.yaml").read_text())
    for pod in pods:
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
