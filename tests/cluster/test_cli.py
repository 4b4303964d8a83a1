"""The command line's small commands: quick, quiet, and right."""

from __future__ import annotations

import os
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from cluster.config import KvrayConfig, parse_config
from tests.served import kvray_command, run_kvray

pytestmark = pytest.mark.slow

CPU_S = 0.6  #: of a small command, all of it; a person waits as long on an idle machine


@pytest.mark.parametrize(
    "arguments", [["--help"], ["version"], ["config", "show"], ["serve", "--help"]], ids=lambda words: " ".join(words)
)
def test_small_commands_are_quick(arguments):
    seconds = []
    for _ in range(3):  # the best of three: other processes share the caches
        before = os.times()
        subprocess.run(kvray_command(*arguments), check=True, capture_output=True, cwd=_root())
        after = os.times()
        seconds.append(after.children_user - before.children_user + after.children_system - before.children_system)
    assert min(seconds) < CPU_S


def test_help_names_every_command():
    finished, _ = run_kvray("--help")
    assert finished.returncode == 0
    for command in ("serve", "demo", "status", "config", "version"):
        assert re.search(rf"\b{command}\b", finished.stdout)


def test_serve_takes_the_flags_of_vllm_serve_that_mean_the_same():
    finished, _ = run_kvray("serve", "--help")
    flags = (
        *("--host", "--port", "--dtype", "--max-model-len", "--served-model-name", "--api-key", "--block-size"),
        "--allowed-origins",
        *(
            "--max-num-seqs",
            "--max-num-batched-tokens",
            "--tool-call-parser",
            "--reasoning-parser",
            "--chat-template",
            "--prefill",
            "--decode",
            "--config",
        ),
    )
    for flag in flags:
        assert flag in finished.stdout


def test_version_is_the_packages():
    finished, _ = run_kvray("version")
    assert (finished.stdout, finished.stderr, finished.returncode) == (f"{version('kvray')}\n", "", 0)


def test_config_show_is_the_whole_configuration_without_its_secrets(tmp_path):
    path = tmp_path / "kvray.yaml"
    path.write_text("http: {port: 9000, api_keys: [key-one, key-two]}\n")
    finished, _ = run_kvray("config", "show", "--config", str(path))
    document = yaml.safe_load(finished.stdout)
    assert list(document) == list(KvrayConfig.__struct_fields__)
    assert document["http"] == {**document["http"], "port": 9000, "api_keys": ["***", "***"]}
    assert "key-one" not in finished.stdout


def test_config_show_of_nothing_is_a_configuration_file_of_the_defaults():
    finished, _ = run_kvray("config", "show")
    assert parse_config(yaml.safe_load(finished.stdout)) == KvrayConfig()


def test_config_check_tells_good_from_bad(tmp_path):
    path = tmp_path / "kvray.yaml"
    path.write_text("pools: {prefill: 2}")
    finished, _ = run_kvray("config", "check", str(path))
    assert (finished.stdout, finished.returncode) == (f"{path}: good\n", 0)
    path.write_text("pools: {prefil: 2}")
    finished, _ = run_kvray("config", "check", str(path))
    assert (finished.stdout, finished.returncode) == ("", 2)
    assert finished.stderr == "kvray: pools.prefil: no such key; did you mean prefill?\n"


def test_a_long_complaint_is_not_wrapped_or_coloured(tmp_path):
    path = tmp_path / ("[bold]x" * 20) / "kvray.yaml"
    finished, _ = run_kvray("config", "check", str(path), extra_environment={"COLUMNS": "40"})
    assert finished.stderr == f"kvray: configuration file {path}: No such file or directory\n"


def _root() -> Path:
    return Path(__file__).parent.parent.parent


def test_origins_are_named_one_by_one_or_as_vllm_has_them(tmp_path):
    for values in (["https://x.org"], ["https://x.org", "*"], ['["https://x.org", "http://[::1]:3000"]']):
        flags = [word for value in values for word in ("--allowed-origins", value)]
        finished, _ = run_kvray("serve", str(tmp_path), *flags)
        assert "is no transformers model directory" in finished.stderr, "it got past the flags"
    for value, words in (('["https://x.org"', "JSON list"), ("x.org", "scheme://host")):
        finished, _ = run_kvray("serve", str(tmp_path), "--allowed-origins", value)
        assert (finished.returncode, words in finished.stderr) == (2, True)
