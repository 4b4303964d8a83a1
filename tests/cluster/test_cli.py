"""The command line's small commands: quick, quiet, and right."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from rich.console import Console

from cluster import cli
from cluster.cli import app
from cluster.config import KvrayConfig, parse_config
from cluster.options import count, variable
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
            "--gpu-memory-utilization",
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
    finished, _ = run_kvray("--version")
    assert (finished.stdout, finished.stderr, finished.returncode) == (f"kvray {version('kvray')}\n", "", 0)
    finished, _ = run_kvray("version", "--json")
    assert json.loads(finished.stdout) == {"version": version("kvray")}


# -------------------------------------------------------------------------------------------------- options, in process


def commands(command: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All commands that do something, by what is written to call them."""
    command = typer.main.get_command(app) if command is None else command
    inner = getattr(command, "commands", None)
    if inner is None:
        yield path, command
    for name, each in (inner or {}).items():
        yield from commands(each, (*path, name))


@pytest.mark.parametrize("path", [path for path, _ in commands()], ids=" ".join)
def test_every_option_says_what_it_is_and_what_is_without_it(path):
    command = dict(commands())[path]
    assert command.help
    context = command.context_class(command, info_name="kvray")
    for parameter in command.params:
        assert parameter.help, parameter.name
        if parameter.param_type_name == "option":
            assert "default" in parameter.get_help_record(context)[1], parameter.name


def test_the_options_of_serve_stand_in_groups_and_each_has_a_variable_but_the_key():
    serve = dict(commands())[("serve",)]
    named = {parameter.opts[0]: parameter for parameter in serve.params if parameter.param_type_name == "option"}
    groups = {parameter.rich_help_panel for parameter in named.values()}
    assert groups >= {"Model", "Workers", "Engine", "Cache tiers", "HTTP", "Logs"}
    without = {flag for flag, parameter in named.items() if parameter.envvar != variable(flag)}
    assert without == {"--api-key"}  # KVRAY_API_KEY is never made a part of the configuration


def test_defaults_in_the_help_are_the_configurations():
    serve = dict(commands())[("serve",)]
    shown = {parameter.opts[0]: parameter.show_default for parameter in serve.params}
    config = KvrayConfig()
    assert shown["--port"] == str(config.http.port)
    assert shown["--max-num-seqs"] == str(config.engine.max_num_seqs)
    assert shown["--remote-compression"] == config.tiers.remote_compression


@pytest.mark.parametrize(("text", "tokens"), [("4096", 4096), ("32k", 32_000), ("32K", 32_768), ("1.5k", 1500)])
def test_numbers_of_tokens_may_be_short(text, tokens):
    assert count(text) == tokens


@pytest.mark.parametrize("text", ["", "k", "1.5", "32kb", "auto", "9" * 400, "9" * 5000])
def test_what_is_no_number_of_tokens_is_refused(text):
    with pytest.raises(typer.BadParameter):
        count(text)


def test_a_processs_line_is_shown_as_it_is_and_a_terminal_that_went_ends_nothing(monkeypatch):
    terminal = io.StringIO()
    is_emoji = cli._err._emoji
    console = Console(file=terminal, emoji=is_emoji, highlight=False, soft_wrap=True, force_terminal=True)
    monkeypatch.setattr(cli, "_err", console)
    with cli._Progress("text") as progress:
        progress.show_line("decode-a1", "field a:key:b [red]lost[/red]")
    assert "decode-a1 | field a:key:b [red]lost[/red]" in terminal.getvalue()

    class Gone(io.StringIO):
        def write(self, _text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(cli, "_err", Console(file=io.StringIO()))
    monkeypatch.setattr(sys, "stderr", Gone())
    cli._Progress("text").show_line("decode-a1", "x")


# ------------------------------------------------------------------------------------------------------ as it is called


@pytest.mark.parametrize("words", [(), ("serve",), ("cache", "clear"), ("config",)], ids=" ".join)
def test_h_is_help(words):
    finished, _ = run_kvray(*words, "-h")
    assert finished.returncode == 0
    assert f"Usage: kvray {' '.join(words)}".strip() in finished.stdout


def test_shells_complete_commands_and_flags():
    found = []
    for words in ("kvray se", "kvray serve --max-n", "kvray cache ex"):
        finished, _ = run_kvray(
            extra_environment={
                "_KVRAY_COMPLETE": "complete_bash",
                "COMP_WORDS": words,
                "COMP_CWORD": str(len(words.split()) - 1),
            }
        )
        found.append(finished.stdout.split())
    assert found == [["serve"], ["--max-num-seqs", "--max-num-batched-tokens"], ["export"]]


def test_flags_come_before_variables_and_these_before_the_file(tmp_path):
    path = tmp_path / "kvray.yaml"
    path.write_text("http: {port: 70001}\npools: {decode: 70002}\nlog: {level: file}\n")
    refused = []
    for flags, variables in (
        (("--port", "70003"), {"KVRAY_PORT": "70004"}),
        ((), {"KVRAY_PORT": "70004"}),
        ((), {}),
        (("--port", "1", "--decode", "70005"), {"KVRAY_DECODE": "70006"}),
        (("--port", "1"), {"KVRAY_DECODE": "70006"}),
        (("--port", "1"), {"KVRAY_DECODE": "1", "KVRAY_LOG_LEVEL": "variable"}),
        (("--port", "1", "--decode", "1"), {"KVRAY_LOG_LEVEL": ""}),
    ):
        finished, _ = run_kvray("serve", *flags, extra_environment={"KVRAY_CONFIG": str(path)} | variables)
        assert finished.returncode == 2
        refused.append(re.sub(r".*saw (str )?", "", finished.stderr.strip()))
    assert refused == ["70003", "70004", "70001", "70005", "70006", "'variable'", "'file'"]


def test_what_kubernetes_says_of_a_service_named_kvray_is_no_setting(tmp_path):
    links = {"KVRAY_PORT": "tcp://10.0.0.1:8000", "KVRAY_PORT_8000_TCP": "tcp://10.0.0.1:8000"}
    finished, _ = run_kvray("serve", str(tmp_path / "none"), extra_environment=links)
    assert re.fullmatch(rf"kvray: no model directory .*{tmp_path}/none.*\n", finished.stderr)


def test_flags_of_vllms_are_taken_or_answered_in_a_line_each(tmp_path):
    taken = ("--dtype", "half", "--enable-prefix-caching", "--tensor-parallel-size", "1", "--max_model_len", "2k")
    finished, _ = run_kvray("serve", "--model", str(tmp_path / "none"), *taken)
    assert re.fullmatch(rf"kvray: no model directory .*{tmp_path}/none.*\n", finished.stderr)
    finished, _ = run_kvray("serve", "x", "--tensor-parallel-size", "2", "--swap-space=4")
    assert (finished.returncode, finished.stdout) == (2, "")
    lines = finished.stderr.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["--tensor-parallel-size", "--swap-space"]


def test_a_switch_with_a_value_is_never_taken_for_a_model():
    finished, _ = run_kvray("serve", "--access-log=false")
    assert finished.returncode == 2
    assert "--access-log" in finished.stderr
    assert "false here" not in finished.stderr


def test_config_is_printed_as_json_too(tmp_path):
    finished, _ = run_kvray("config", "show", "--json")
    assert parse_config(json.loads(finished.stdout)) == KvrayConfig()
    path = tmp_path / "kvray.yaml"
    path.write_text("{}")
    finished, _ = run_kvray("config", "check", str(path), "--json")
    assert json.loads(finished.stdout) == {"file": str(path), "is_good": True}


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
    variable = {"KVRAY_ALLOWED_ORIGINS": '["https://x.org", "http://[::1]:3000"]'}
    finished, _ = run_kvray("serve", str(tmp_path), extra_environment=variable)
    assert "is no transformers model directory" in finished.stderr, "though it was taken apart at its spaces"
    for value, words in (('["https://x.org"', "JSON list"), ("x.org", "scheme://host")):
        finished, _ = run_kvray("serve", str(tmp_path), "--allowed-origins", value)
        assert (finished.returncode, words in finished.stderr) == (2, True)
