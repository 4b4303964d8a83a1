"""What the documents say of the product is so: settings, commands, flags, links, words of vLLM's."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from cluster.cli import app
from cluster.vllm_flags import translated
from tests.served import run_kvray
from tools import config_docs

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Of the commands in the documents, those that need no server and end at once: they are run, and must end well.
RUN = ("kvray config show", "kvray serve -h")
_GAP = re.compile(r" {2,}")  #: between a command and what is said of it
_ALONE = re.compile(r" # | [|] |\\$")  #: what follows is no part of it, or on the next line
_PLACEHOLDER = re.compile(r"\.\.\.$|\.\.\. ")


def commands() -> Iterator[tuple[str, str]]:
    """Every command line of kvray in the documents, those in code and those in the text, with where it stands."""
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for line in code_lines(text):
            command = line.removeprefix("$ ").strip()
            if command.startswith("kvray "):
                yield path.name, _ALONE.split(_GAP.split(command)[0])[0].rstrip()
        for command in re.findall(r"(?<!`)`(kvray [^`]+)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
            yield path.name, " ".join(command.split())


def code_lines(text: str) -> Iterator[str]:
    """The lines of fenced blocks in a shell's language, and of indented ones."""
    fence = ""
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fence = "" if fence else line.strip().removeprefix("```") or "none"
        elif fence in ("sh", "bash", "console", "none") or (not fence and line.startswith("    ")):
            yield line


COMMANDS = sorted(set(commands()))


def test_there_are_commands_in_the_documents():
    assert len(COMMANDS) > 10
    assert {command for _, command in COMMANDS} >= {"kvray status", "kvray config show"}


def complaint(command: str) -> str:
    """Follow a command line through the real commands; say what is not there. Arguments may be placeholders."""
    words = shlex.split(_PLACEHOLDER.sub(" ", command))[1:]
    group = typer.main.get_command(app)
    while words and hasattr(group, "commands") and not words[0].startswith("-"):
        name = words.pop(0)
        if name not in group.commands:
            return f"there is no {name}"
        group = group.commands[name]
    known = {name: parameter for parameter in group.params for name in (*parameter.opts, *parameter.secondary_opts)}
    if group.name == "serve":
        said = translated(words, {name: not getattr(one, "is_flag", False) for name, one in known.items()})
        if said.refusals:
            return said.refusals[0]
        words = list(said.arguments)
    flags = [word.partition("=")[0] for word in words if word.startswith("-") and not re.fullmatch(r"-\d+", word)]
    missing = [flag for flag in flags if flag not in known and flag not in ("-h", "--help")]
    return f"there is no {missing[0]}" if missing else ""


@pytest.mark.slow
@pytest.mark.parametrize(("where", "command"), COMMANDS)
def test_a_command_and_its_flags_are_there(where, command):
    assert complaint(command) == "", where


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("kvray state", "there is no state"),
        ("kvray cache lookpu --file x", "there is no lookpu"),
        ("kvray status --watch --every 2", "there is no --every"),
        ("kvray serve MODEL --prot 1", "there is no --prot"),
    ],
)
def test_a_command_that_is_not_there_would_be_found(command, wrong):
    assert complaint(command) == wrong


def test_targets_of_make_that_the_documents_name_are_there():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = {
        target
        for path in DOCUMENTS
        for target in re.findall(r"(?:^ {4}|`)make ([a-z-]+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    }
    assert {"serve", "check"} <= named <= targets, named - targets


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN)
def test_a_command_that_needs_no_server_ends_well(command):
    finished, left = run_kvray(*command.split()[1:])
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout
    assert left == []


def test_the_list_of_settings_is_what_the_configuration_has():
    seen = config_docs.TARGET.read_text(encoding="utf-8")
    assert seen == config_docs.document(), "run `python -m tools.config_docs`"


def test_every_setting_says_what_it_is_in_the_list():
    rows = [line for line in config_docs.document().splitlines() if line.startswith("| `")]
    assert len(rows) > 70
    assert not [row for row in rows if row.endswith("|  |")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_a_document_names_are_there(path):
    """Words with a slash and an ending of ours, in backquotes: cluster/config.py, docs/SECURITY.md."""
    text = path.read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|md|cpp|h|yaml|sh))`", text))
    rooms = {each.name for each in ROOT.iterdir() if each.is_dir()}
    missing = {name for name in named if name.split("/")[0] in rooms and not (ROOT / name).exists()}
    assert not missing or path.name == "LOG.md", missing  # the log keeps the names of what lost
