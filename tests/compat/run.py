"""`make compat`: other people's clients against a real `kvray serve`, and the page that says what ran.

Agents run to their end with a model that follows a script, said in the format of each of some models, so that what the
libraries are given comes through the whole path: engine, detokenizer, reader of calls, HTTP stream, and back through
the chat template. All else is asked of a model that guesses: what it says follows a structure's masks and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.openai.call_templates import TEMPLATES, spoken
from tests.compat.peer_commands import PEERS, Peer, commands
from tests.compat.table import Ran, Row, is_wrong, page, ran_from_junit
from tests.scripted_model import make_guessing_model, make_scripted_model
from tests.served import Served, serving

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PAGE = ROOT / "docs" / "COMPATIBILITY.md"
FORMATS = ("hermes", "qwen3_xml", "llama3_json", "kimi_k2")
CLIENT_TIMEOUT_S = 600
MAX_MODEL_LEN = "8192"
TURNS = {
    0: [("get_weather", {"city": "Oslo", "days": 2}), ("get_weather", {"city": "Rome", "days": 1})],
    2: [("add", {"numbers": [3, 20.5]})],
}
ANSWER = "It is 23.5 in all."
FEATURES = {
    "chat": "a conversation's next turn, with its usage",
    "stream": "the same, streamed",
    "completions": "a text to go on from",
    "tools": "a forced call of a tool, read as its types want it",
    "tool stream": "the same, streamed",
    "agent loop": f"two tools, called in parallel and again, to the last answer, in the formats {', '.join(FORMATS)}",
    "structured output": "an answer read as a type",
    "structured stream": "the same, streamed",
    "json object": "any object at all, by `response_format`",
    "schemas": "structured output, or a forced call, of models with fields of all kinds",
    "responses": "`/v1/responses`",
    "logprobs": "log-probabilities",
    "too long": "a prompt beyond the context is the client's own exception for that",
    "embeddings refused": "what is not served is a 404 that says so",
    "benchmark": "a run of the tool, to its end, without a failed request",
}


@dataclass(frozen=True, slots=True)
class Client:
    """Somebody else's library."""

    name: str
    package: str  #: whose version is told
    suite: str  #: its tests, below clients/
    agents: tuple[tuple[str, ...], ...] = ()  #: scripts with their first arguments, below clients/
    environment: str = "python"  #: where Python's packages are: some want older releases of openai

    @property
    def is_node(self) -> bool:
        """Whether it is a package of Node's."""
        return self.suite.endswith(".mjs")


CLIENTS = (
    Client("openai (Python)", "openai", "openai_client.py"),
    Client("openai (Node)", "openai", "node_client.test.mjs"),
    Client("LangChain", "langchain-openai", "langchain_client.py", (("langchain_agent.py",),)),
    Client("litellm", "litellm", "litellm_client.py"),
    Client("llama-index", "llama-index-llms-openai-like", "llama_index_client.py", environment="older"),
    Client("instructor", "instructor", "instructor_client.py", environment="older"),
    Client("pydantic-ai", "pydantic-ai-slim", "pydantic_ai_client.py"),
    Client(
        "openai-agents",
        "openai-agents",
        "openai_agents_client.py",
        tuple(("openai_agents_agent.py", api) for api in ("chat", "responses", "kept")),
    ),
    Client("Vercel ai", "ai", "vercel_client.test.mjs", (("vercel_agent.mjs",),)),
)


def version(client: Client, environments: Path) -> str:
    """The release of a client that is installed."""
    if client.is_node:
        return str(json.loads((environments / "node_modules" / client.package / "package.json").read_text())["version"])
    return version_of(client.package, environments / client.environment)


def command_of(client: Client, environments: Path, script: str) -> list[str]:
    """The command that runs a script of clients/."""
    if client.is_node:  # node looks for packages beside the script
        return ["node", str(environments / script)]
    return [str(environments / client.environment / "bin" / "python"), str(HERE / "clients" / script)]


def complaint(command: list[str]) -> str | None:
    """What is wrong with a run of an agent; None where nothing is."""
    finished = subprocess.run(command, capture_output=True, text=True, timeout=CLIENT_TIMEOUT_S, check=False)
    if finished.returncode:
        return finished.stderr.strip()[-2000:]
    found = json.loads(finished.stdout.splitlines()[-1])
    wanted = {"answer": ANSWER, "calls": [list(call) for turn in TURNS.values() for call in turn]}
    # calls of one message may run in any order
    found["calls"][:2], wanted["calls"][:2] = sorted(found["calls"][:2], key=str), sorted(wanted["calls"][:2], key=str)
    return None if found == wanted else f"saw {found}, wanted {wanted}"


def run_agents(clients: tuple[Client, ...], environments: Path, kind: str, note: Callable[[Client, Ran], None]) -> None:
    """Run each agent, whole and streamed, with a model that writes calls in the format of `kind`."""
    with tempfile.TemporaryDirectory() as directory:
        template = TEMPLATES[kind]
        replies = {count: spoken(template, turn) for count, turn in TURNS.items()}
        model = make_scripted_model(Path(directory) / "scripted", template, {**replies, 3: ANSWER})
        with serving(str(model), "--dtype", "float32", log_dir=Path(directory)) as served:
            for client in clients:
                for script, *first in client.agents:
                    for mode in ("whole", "stream"):
                        command = [
                            *command_of(client, environments, script),
                            *first,
                            f"{served.url}/v1",
                            "scripted",
                            mode,
                        ]
                        note(client, Ran("agent loop", " ".join([kind, *first, mode]), complaint(command) or "ok"))


@contextlib.contextmanager
def serving_a_guess(folder: Path) -> Iterator[Served]:
    """A server whose model guesses, by the name of its directory."""
    model = make_guessing_model(folder / "guessing", TEMPLATES["hermes"])
    with serving(str(model), "--dtype", "float32", "--max-model-len", MAX_MODEL_LEN, log_dir=folder) as served:
        yield served


def version_of(package: str, environment: Path) -> str:
    """The release of a package of Python's that is installed."""
    code = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    return subprocess.check_output([environment / "bin" / "python", "-c", code], text=True).strip()


def run_peer(peer: Peer, environment: Path, url: str, folder: Path) -> Iterator[Ran]:
    """Run a tool in each of its ways."""
    variables = os.environ | {"HOME": str(folder)}
    for case, command in commands(peer, environment, url, folder / "guessing", folder).items():
        finished = subprocess.run(
            command, capture_output=True, text=True, cwd=folder, env=variables, timeout=CLIENT_TIMEOUT_S, check=False
        )
        said = (finished.stderr.strip() or finished.stdout.strip()).splitlines()
        yield Ran("benchmark", case, f"ended with {finished.returncode}: {said[-1:]}" if finished.returncode else "ok")


def suite(client: Client, environments: Path, url: str, junit: Path) -> list[Ran]:
    """Run the tests of one client."""
    junit.unlink(missing_ok=True)
    program, script = command_of(client, environments, client.suite)
    if client.is_node:
        command = [program, "--test", "--test-reporter", "junit", "--test-reporter-destination", str(junit), script]
    else:
        command = [program, "-m", "pytest", "-c", os.devnull, "--rootdir", str(ROOT), "--import-mode", "importlib"]
        command += ["--noconftest", "-p", "tests.compat.refused", "-p", "no:cacheprovider", "-W", "ignore", "-q"]
        command += ["--junit-xml", str(junit), script]
    variables = os.environ | {"KVRAY_URL": url, "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        command, capture_output=True, text=True, env=variables, timeout=CLIENT_TIMEOUT_S, check=False
    )
    if not junit.exists():
        return [Ran("chat", "", f"its tests did not run: {(finished.stderr or finished.stdout).strip()[-1000:]}")]
    return list(ran_from_junit(junit))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environments", type=Path, default=Path("build/compat"), help="where the libraries are")
    parser.add_argument("--format", action="append", choices=sorted(TEMPLATES), help="how the model writes calls")
    parser.add_argument("--client", action="append", choices=[client.name for client in CLIENTS])
    arguments = parser.parse_args()
    environments: Path = arguments.environments.resolve()
    for script in (HERE / "clients").glob("*.mjs"):
        shutil.copy(script, environments)
    clients = tuple(client for client in CLIENTS if client.name in (arguments.client or [client.name]))
    ran: defaultdict[str, list[Ran]] = defaultdict(list)

    def note(client: Client | Peer, one: Ran) -> None:
        ran[client.name].append(one)
        if one.outcome != "ok" or one.feature != "schemas":
            print(f"{client.name:16} {one.feature:18} {one.case:24} {one.outcome}", flush=True)

    for kind in arguments.format or FORMATS:
        run_agents(clients, environments, kind, note)
    peers = [] if arguments.client else [peer for peer in PEERS if (environments / "peers" / peer.name).exists()]
    with tempfile.TemporaryDirectory() as directory, serving_a_guess(Path(directory)) as served:
        for client in clients:
            for one in suite(client, environments, f"{served.url}/v1", Path(directory) / "junit.xml"):
                note(client, one)
        for peer in peers:
            for one in run_peer(peer, environments / "peers" / peer.name, served.url, Path(directory)):
                note(peer, one)
    if not (arguments.format or arguments.client):
        rows = [Row(client.name, version(client, environments), ran[client.name]) for client in clients]
        rows += [Row(p.name, version_of(p.package, environments / "peers" / p.name), ran[p.name]) for p in peers]
        PAGE.write_text(page(rows, FEATURES))
        print(f"written to {PAGE}")
    return 1 if any(is_wrong(one) for each in ran.values() for one in each) else 0


if __name__ == "__main__":
    sys.exit(main())
