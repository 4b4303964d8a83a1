"""`make compat`: agents of other people's libraries, run to their end against a real `kvray serve`.

Its model follows a script, said in the format of each of some models, so that what the libraries are given comes
through the whole path: engine, detokenizer, reader of calls, HTTP stream, and back through the chat template.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.cluster.openai.call_templates import TEMPLATES, spoken
from tests.scripted_model import make_scripted_model
from tests.served import serving

HERE = Path(__file__).parent
FORMATS = ("hermes", "qwen3_xml", "llama3_json", "kimi_k2")
CLIENT_TIMEOUT_S = 120
TURNS = {
    0: [("get_weather", {"city": "Oslo", "days": 2}), ("get_weather", {"city": "Rome", "days": 1})],
    2: [("add", {"numbers": [3, 20.5]})],
}
ANSWER = "It is 23.5 in all."


def clients(environment: Path) -> dict[str, list[str]]:
    """The command of each agent, but for its arguments."""
    python = str(environment / "bin" / "python")
    # node looks for packages beside the script
    script = shutil.copy(HERE / "vercel_agent.mjs", environment)
    return {
        **{
            f"openai-agents {api}": [python, str(HERE / "openai_agents_agent.py"), api]
            for api in ("chat", "responses", "kept")
        },
        "langchain": [python, str(HERE / "langchain_agent.py")],
        "vercel ai": ["node", str(script)],
    }


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environment", type=Path, default=Path("build/compat"), help="where the libraries are")
    parser.add_argument("--format", action="append", choices=sorted(TEMPLATES), help="how the model writes calls")
    arguments = parser.parse_args()
    num_failed = 0
    for kind in arguments.format or FORMATS:
        with tempfile.TemporaryDirectory() as directory:
            template = TEMPLATES[kind]
            replies = {count: spoken(template, turn) for count, turn in TURNS.items()}
            model = make_scripted_model(Path(directory) / "scripted", template, {**replies, 3: ANSWER})
            with serving(str(model), "--dtype", "float32", log_dir=Path(directory)) as served:
                for name, command in clients(arguments.environment).items():
                    for mode in ("whole", "stream"):
                        wrong = complaint([*command, f"{served.url}/v1", "scripted", mode])
                        num_failed += wrong is not None
                        print(f"{kind:12} {name:24} {mode:6} {'ok' if wrong is None else wrong}", flush=True)
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
