"""docs/DEPLOY.md: its commands run, make what the manifests want, and its tables say what is so."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from cluster.credentials import api_keys, cluster_secret
from tests.manifests.kustomizations import COMPONENTS, MANIFESTS, OVERLAYS, built
from tests.manifests.objects import Objects, walk
from tests.manifests.test_running import ON_EVERY_NODE, ON_THE_HEAD, ROADS, WORKER_PORTS

ROOT = MANIFESTS.parent
PAGE = (ROOT / "docs" / "DEPLOY.md").read_text()
#: Keeps what it is given, by the name of the Secret, and refuses a kustomization that is not there.
KUBECTL = """#!/bin/sh
case "$1 $2" in
"create secret")
    name=$4; shift 4; mkdir -p "$SECRETS/$name"
    for argument; do cp "${argument#--from-file=}" "$SECRETS/$name/" || exit 1; done;;
"apply --kustomize") test -f "$ROOT/$3/kustomization.yaml";;
"create namespace" | "config set-context" | "wait rayservice/kvray") ;;
"port-forward service/kvray-serve-svc" | "port-forward service/kvray-head-svc") ;;
*) echo "kubectl $*: not expected" >&2; exit 1;;
esac
"""


def commands() -> list[str]:
    """The blocks of the section on Kubernetes that are to be typed in, each a script."""
    section = PAGE[PAGE.index("## Kubernetes") : PAGE.index("## The image")]
    blocks = re.findall(r"(?:^    .*\n)+", section, re.MULTILINE)
    return [re.sub("^    ", "", block, flags=re.MULTILINE) for block in blocks]


@pytest.fixture(scope="module")
def secrets(tmp_path_factory) -> Path:
    """What the page's commands put into Secrets, a directory each."""
    directory = tmp_path_factory.mktemp("typed")
    (directory / "bin").mkdir()
    (directory / "bin" / "kubectl").write_text(KUBECTL)
    (directory / "bin" / "kubectl").chmod(0o755)
    environment = {
        "PATH": f"{directory / 'bin'}:/usr/bin:/bin",
        "SECRETS": str(directory / "secrets"),
        "ROOT": str(ROOT),
    }
    script = "set -e\n" + "".join(commands())
    done = subprocess.run(["bash", "-c", script], cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return directory / "secrets"


def wanted_secrets() -> set[tuple[str, str]]:
    """The Secrets that manifests refer to, each with a key that has to be in it."""
    wanted = set()
    for name in (*OVERLAYS, "monitoring"):
        for document in built(name):
            for path, value in walk(document):
                if path and path[-1] in ("secretKeyRef", "credentials") and not value.get("optional"):
                    wanted.add((value["name"], value["key"]))
    for name in OVERLAYS:
        objects = Objects(built(name))
        wanted.add((objects.service["rayClusterConfig"]["authOptions"]["secretName"], "auth_token"))
        volumes = {mount: volume for pod in objects.pods for mount, volume in mounted_secrets(pod).items()}
        config = objects.config
        files = [config.network.secret_file, config.http.api_key_file, config.tenants.salt_file]
        files += [member.api_key_file for member in config.tenants.members]
        variables = [v for worker in objects.workers.values() for v in worker.container["env"]]
        files += [variable["value"] for variable in variables if variable["name"] == "AWS_SHARED_CREDENTIALS_FILE"]
        wanted |= {(volumes[str(Path(file).parent)], Path(file).name) for file in files if file is not None}
    return wanted


def mounted_secrets(pod) -> dict[str, str]:
    names = {
        volume["name"]: volume["secret"]["secretName"] for volume in pod.spec.get("volumes", []) if "secret" in volume
    }
    return {path: names[name] for name, path in pod.mounts.items() if name in names}


def test_its_commands_make_every_secret_that_is_referred_to(secrets):
    made = {(path.parent.name, path.name) for path in secrets.rglob("*") if path.is_file()}
    assert made == wanted_secrets()


def test_what_its_commands_make_is_taken(secrets):
    assert cluster_secret(str(secrets / "kvray" / "secret")).key_id
    assert len(api_keys(str(secrets / "kvray" / "api-keys"))) == 1
    for name in ("kvray-ray-token/auth_token", "kvray-metrics/api-key", "kvray-redis/password"):
        assert re.fullmatch("[0-9a-f]{64}", (secrets / name).read_text())


def test_every_port_is_in_its_table():
    table = PAGE[PAGE.index("### Ports") : PAGE.index("### Secrets")]
    named = {int(number) for number in re.findall(r"\b\d{4,5}\b", table)}
    assert named >= ON_EVERY_NODE | ON_THE_HEAD
    assert f"{ROADS[0]}-{ROADS[-1] + 1}" in table
    assert f"{WORKER_PORTS[0]}-{WORKER_PORTS[-1]}" in table


def test_its_ports_for_a_cluster_by_hand_are_those_of_the_manifests():
    by_hand = dict(re.findall(r"--([a-z-]+-port)=(\d+)", PAGE))
    parameters = Objects(built("base")).groups[0]["rayStartParams"]
    assert by_hand == {name: value for name, value in parameters.items() if name.endswith("-port")}


def test_every_overlay_and_component_is_named():
    for name in (*OVERLAYS[1:], *COMPONENTS):
        assert name in PAGE
