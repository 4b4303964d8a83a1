"""The whole service beside `vllm serve`: tokens/s, time to first token, time between tokens, and agent sessions.

    python benchmarks/served.py                 three loads and the sessions, about twenty minutes
    python benchmarks/served.py --quick         one load, ours alone, within 60 s
    python benchmarks/served.py --with-vllm     install the peer first, in an environment of its own
    python benchmarks/served.py --before DIR    also serve with a source tree of an older commit
    python benchmarks/served.py --record        also append to benchmarks/results/served.jsonl

Both servers as their users start them, with the same KV memory, one after the other, in rounds that take turns;
streamed completions of random token ids, greedy, ends ignored. Loads on a random model of 120 M parameters, bfloat16:

    1 user      256 tokens in, 64 out, one request after the other
    16 users    the same, all at once
    8 users     4 turns each: 384 more tokens in, 32 out

Sessions: 32 agent sessions at once on the demo model (harness.trace; skipped where the traces are not there), with 64 k
tokens of KV. Medians over all repeats, with the least and the largest; ratios of medians.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeAlias

from engine_cpu import vllm_python
from harness.http_client import HttpConnection, completion
from harness.models import model_directory, vocab_size
from harness.report import ROOT, goal, hardware, parser, record
from harness.serving import serving
from harness.trace import Turn, agent_sessions
from harness.vllm_serving import vllm_serving

PATH = "/v1/completions"
KV_BYTES = 1 << 30
#: 64 k tokens of the demo model in bfloat16, a KiB each.
SESSION_KV_BYTES = 64 << 20
#: Serves a model, by name, with so many bytes of KV; the answer is its URL.
Server: TypeAlias = Callable[[str, int], AbstractContextManager[str]]
AGENTS = ROOT.parent / "shared" / "traces" / "agent_sessions.jsonl.xz"


@dataclass(frozen=True, slots=True)
class Load:
    """Users who ask one turn after the other, each turn's prompt the one before with its answer and more behind."""

    num_users: int
    num_turns: int
    num_added_tokens: int
    num_output_tokens: int
    num_rounds: int = 1  #: of new conversations, one after the other

    @property
    def name(self) -> str:
        """The load as tables and goals name it."""
        turns = f", {self.num_turns} turns" if self.num_turns > 1 else ""
        users = "1 user" if self.num_users == 1 else f"{self.num_users} users"
        return f"{users}, {self.num_added_tokens}/{self.num_output_tokens}{turns}"


LOADS = (Load(1, 1, 256, 64, num_rounds=8), Load(16, 1, 256, 64, num_rounds=2), Load(8, 4, 384, 32))


@dataclass(slots=True)
class Figures:
    """Of one repeat of a load."""

    tokens_per_s: float
    ttft_ms: float  #: p50
    itl_ms: float  #: p50
    itl_p99_ms: float
    seconds: float


@dataclass(slots=True)
class Watched:
    """What the clients of a load saw."""

    ttfts_s: list[float] = field(default_factory=list)
    itls_s: list[float] = field(default_factory=list)
    num_tokens: int = 0

    def figures(self, seconds: float) -> Figures:
        """Sum up."""
        itls_s = sorted(self.itls_s) or [0.0]
        return Figures(
            self.num_tokens / seconds,
            1e3 * median(self.ttfts_s),
            1e3 * median(itls_s),
            1e3 * itls_s[int(0.99 * (len(itls_s) - 1))],
            seconds,
        )


async def ask(connection: HttpConnection, prompt: list[int], max_tokens: int, seen: Watched) -> list[int]:
    """Stream an answer; return its tokens. Tokens that come together count as one wait and none."""
    answer: list[int] = []
    last_s = time.perf_counter()
    async for event in connection.events(PATH, completion(prompt, max_tokens)):
        tokens = [token for choice in event["choices"] for token in choice.get("token_ids") or ()]
        if not tokens:
            continue
        now_s = time.perf_counter()
        if answer:
            seen.itls_s += [now_s - last_s] + [0.0] * (len(tokens) - 1)
        else:
            seen.ttfts_s.append(now_s - last_s)
        last_s = now_s
        answer += tokens
    seen.num_tokens += len(answer)
    return answer


async def run_load(url: str, load: Load, seed: int, vocabulary: int) -> Figures:
    """Run a load once, with prompts that were never asked before."""
    rng = random.Random(seed)
    seen = Watched()

    async def user(prompts: list[list[int]]) -> None:
        connection = await HttpConnection.open(url)
        conversation: list[int] = []
        for added in prompts:
            conversation += added
            conversation += await ask(connection, conversation, load.num_output_tokens, seen)
        connection.close()

    def prompts() -> list[list[int]]:
        return [[rng.randrange(5, vocabulary) for _ in range(load.num_added_tokens)] for _ in range(load.num_turns)]

    users = [[prompts() for _ in range(load.num_users)] for _ in range(load.num_rounds)]
    begin_s = time.perf_counter()
    for each in users:
        await asyncio.gather(*map(user, each))
    return seen.figures(time.perf_counter() - begin_s)


async def run_sessions(url: str, sessions: list[list[Turn]]) -> Figures:
    """Ask all turns of all sessions at once, each turn when the one before was answered."""
    seen = Watched()

    async def work(turns: list[Turn]) -> None:
        connection = await HttpConnection.open(url)
        for turn in turns:
            await ask(connection, turn.prompt, turn.max_tokens, seen)
        connection.close()

    begin_s = time.perf_counter()
    await asyncio.gather(*map(work, sessions))
    return seen.figures(time.perf_counter() - begin_s)


@contextmanager
def ours(checkout: Path, model: str, kv_cache_bytes: int) -> Iterator[str]:
    """Serve with kvray as a source tree has it; the answer is its URL."""
    flags = ["--served-model-name", "bench", "--dtype", "bfloat16", "--kv-cache-memory", str(kv_cache_bytes)]
    with serving(str(model_directory(model)), *flags, checkout=checkout) as served:
        yield served.url


@contextmanager
def theirs(python: Path, model: str, kv_cache_bytes: int) -> Iterator[str]:
    """Serve with vLLM; the answer is its URL."""
    with vllm_serving(python, str(model_directory(model)), "bfloat16", kv_cache_bytes) as url:
        yield url


def measure(
    contenders: dict[str, Server], loads: tuple[Load, ...], num_rounds: int, num_repeats: int
) -> dict[str, dict[str, list[Figures]]]:
    """Run every load in rounds: by load and contender all repeats."""
    found: dict[str, dict[str, list[Figures]]] = {load.name: {name: [] for name in contenders} for load in loads}
    vocabulary = vocab_size(model_directory("120M"))
    for number in range(num_rounds):
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            with contenders[name]("120M", KV_BYTES) as url:
                for load in loads:
                    asyncio.run(run_load(url, load, 1000 * number, vocabulary))  # warms up, compiles
                    for repeat in range(num_repeats):
                        seed = 1000 * number + repeat + 1
                        found[load.name][name].append(asyncio.run(run_load(url, load, seed, vocabulary)))
                    show(load.name, name, found[load.name][name])
    return found


def measure_sessions(contenders: dict[str, Server], num_rounds: int) -> dict[str, list[Figures]]:
    """Run the sessions on servers that hold nothing yet."""
    sessions = agent_sessions(AGENTS, 32, 25, vocab_size(model_directory("demo")))
    found: dict[str, list[Figures]] = {name: [] for name in contenders}
    for number in range(num_rounds):
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            with contenders[name]("demo", SESSION_KV_BYTES) as url:
                asyncio.run(run_load(url, LOADS[0], 1, 1000))  # warms up
                found[name].append(asyncio.run(run_sessions(url, sessions)))
            show("32 agent sessions", name, found[name])
    return found


def middle(figures: list[Figures], field_name: str) -> float:
    """Return the median of a field."""
    return median(getattr(each, field_name) for each in figures)


def show(load: str, name: str, figures: list[Figures]) -> None:
    """Print a row: medians, with the least and the largest."""
    parts = []
    for field_name in ("tokens_per_s", "ttft_ms", "itl_ms", "itl_p99_ms", "seconds"):
        values = [getattr(each, field_name) for each in figures]
        parts.append(f"{field_name} {median(values):.1f} ({min(values):.1f} to {max(values):.1f})")
    print(f"  {load:24}{name:8}{', '.join(parts)}", flush=True)


def main() -> None:
    options = parser(__doc__, "served", quick="one load, ours alone")
    options.add_argument("--with-vllm", action="store_true", help="install vLLM on first use")
    options.add_argument("--before", type=Path, metavar="DIR", help="source tree of an older commit, kernels built")
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--repeats", type=int, default=3, help="of each load in each round")
    args = options.parse_args()
    print(hardware())
    python = None if args.quick else vllm_python(is_wanted=args.with_vllm)
    contenders: dict[str, Server] = {"kvray": partial(ours, ROOT)}
    if args.before is not None:
        contenders["before"] = partial(ours, args.before)
    if python is not None:
        contenders["vllm"] = partial(theirs, python)
    elif not args.quick:
        print("vllm: not run, it is not installed (--with-vllm)", file=sys.stderr)
    loads = LOADS[:1] if args.quick else LOADS
    found = measure(contenders, loads, *((1, 1) if args.quick else (args.rounds, args.repeats)))
    sessions: dict[str, list[Figures]] = {}
    if not args.quick and AGENTS.exists():
        sessions = measure_sessions(contenders, args.rounds)
    elif not args.quick:
        print(f"sessions: not run, there is no {AGENTS}")
    if args.record:
        rows = {
            load: {name: [asdict(each) for each in figures] for name, figures in by_name.items()}
            for load, by_name in (found | {"sessions": sessions}).items()
        }
        record("served", rows)
    print()
    for load, by_name in found.items():
        ratios = {
            field_name: middle(by_name["kvray"], field_name) / middle(by_name["vllm"], field_name)
            if "vllm" in by_name
            else None
            for field_name in ("tokens_per_s", "ttft_ms", "itl_p99_ms")
        }
        print(goal(f"{load}: tokens/s, of vLLM's", ratios["tokens_per_s"], at_least=1.1))
        print(goal(f"{load}: TTFT p50, of vLLM's", ratios["ttft_ms"], under=0.9 if load.startswith("1 user") else 0.6))
        print(goal(f"{load}: ITL p99, of vLLM's", ratios["itl_p99_ms"], under=0.8))
    ratio = None
    if "vllm" in sessions:
        ratio = middle(sessions["kvray"], "seconds") / middle(sessions["vllm"], "seconds")
    print(goal("agent sessions: seconds, of vLLM's", ratio, under=0.9))


if __name__ == "__main__":
    main()
