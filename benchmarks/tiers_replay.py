"""Agent sessions and conversations through `kvray serve` with little memory: hits by tier, time to first token.

    python benchmarks/tiers_replay.py             8 and 32 sessions, the conversation trace, pools beside each other
    python benchmarks/tiers_replay.py --quick     8 sessions of few requests
    python benchmarks/tiers_replay.py --record    also append to benchmarks/results/tiers_replay.jsonl

Needs the traces (--traces DIR: agent_sessions.jsonl.xz, mooncake_conversation.jsonl), scaled so that one token stands
for 64 of a coding agent's, or 32 of a conversation's. Closed loop, all sessions at once, the demo model, sizes in bytes
of KV in bfloat16 (1 KiB a token).

    tiers    one prefill and one decode worker: no lower tier, a host tier, a host tier and a disk
    pools    the same memory in one worker, and in two prefill and two decode workers; a quarter of it with a host tier
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from harness.http_client import HttpConnection, completion
from harness.models import model_directory, vocab_size
from harness.report import ROOT, goal, hardware, parser, record
from harness.serving import Served, serving
from harness.trace import Turn, agent_sessions, conversations, endless_hits

TRACES = ROOT.parent / "shared" / "traces"
PATH = "/v1/completions"
#: By a name: flags beside the model's. 64 MiB are 64 k tokens of the demo model in bfloat16.
TIERS = {
    "no tier": ["--prefill", "1", "--decode", "1", "--kv-cache-memory", "16MiB"],
    "host": ["--prefill", "1", "--decode", "1", "--kv-cache-memory", "16MiB", "--host-memory", "48MiB"],
    "host, disk": [
        *("--prefill", "1", "--decode", "1", "--kv-cache-memory", "16MiB", "--host-memory", "48MiB"),
        *("--disk-dir", "{disk}", "--disk-capacity", "1GiB"),
    ],
}
POOLS = {
    "1 decode, 64 MiB": ["--prefill", "0", "--decode", "1", "--kv-cache-memory", "64MiB"],
    "2 + 2, 64 MiB in all": ["--prefill", "2", "--decode", "2", "--kv-cache-memory", "16MiB"],
    "1 + 1, 16 MiB in all, host 128 MiB": [
        *("--prefill", "1", "--decode", "1", "--kv-cache-memory", "8MiB"),
        *("--host-memory", "128MiB", "--max-model-len", "6144"),
    ],
}


@dataclass(slots=True)
class Run:
    """What one server did with all sessions."""

    seconds: float
    num_requests: int
    hits: dict[str, float]  #: share of the prompt tokens, by source
    mean_ttft_ms: float
    p99_ttft_ms: float

    @property
    def hit(self) -> float:
        """Share of the prompt tokens that nobody computed."""
        return sum(self.hits.values())


async def replay(url: str, sessions: list[list[Turn]], num_at_once: int) -> Run:
    """Ask all turns, of `num_at_once` sessions at a time, each turn when the one before was answered."""
    waiting = list(reversed(sessions))
    sources: Counter[str] = Counter()
    ttfts_s: list[float] = []

    async def work() -> None:
        connection = await HttpConnection.open(url)
        while waiting:
            for turn in waiting.pop():
                body = completion(turn.prompt, turn.max_tokens, return_prompt_sources=True)
                first_s, begin_s = 0.0, time.perf_counter()
                async for event in connection.events(PATH, body):
                    first_s = first_s or time.perf_counter() - begin_s
                    sources.update(event.get("kvray", {}).get("prompt_sources", {}))
                ttfts_s.append(first_s)
        connection.close()

    begin_s = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(num_at_once)))
    seconds = time.perf_counter() - begin_s
    num_tokens = sources.total()
    ttfts_s.sort()
    return Run(
        seconds,
        len(ttfts_s),
        {source: count / num_tokens for source, count in sources.items() if source != "computed"},
        1e3 * mean(ttfts_s),
        1e3 * ttfts_s[int(0.99 * (len(ttfts_s) - 1))],
    )


def measure(name: str, flags: list[str], sessions: list[list[Turn]], num_at_once: int) -> Run:
    """Serve with these flags and ask all of the sessions once, the machine for itself."""
    disk = tempfile.mkdtemp(prefix="kvray-disk-")
    model = str(model_directory("demo"))
    try:
        given = [flag.format(disk=disk) for flag in flags]
        with serving(model, "--served-model-name", "bench", "--dtype", "bfloat16", *given) as served:
            run = asyncio.run(replay(served.url, sessions, num_at_once))
            served_all(served)
    finally:
        shutil.rmtree(disk, ignore_errors=True)
    tiers = ", ".join(f"{source} {share:.3f}" for source, share in run.hits.items() if share > 0)
    print(
        f"  {name:36s} hit {run.hit:.3f} ({tiers})  {run.seconds:6.1f} s  "
        f"TTFT mean {run.mean_ttft_ms:.0f} ms, p99 {run.p99_ttft_ms:.0f} ms",
        flush=True,
    )
    return run


def served_all(served: Served) -> None:
    """Check that nothing is left behind for anybody."""
    served.wait_until_idle()


def main() -> None:
    options = parser(__doc__, "tiers_replay", quick="8 sessions of few requests, tiers only")
    options.add_argument("--traces", type=Path, default=TRACES, help="the directory of the traces")
    options.add_argument("--only", choices=("tiers", "pools"), help="only one of the two tables")
    args = options.parse_args()
    agents, talks = args.traces / "agent_sessions.jsonl.xz", args.traces / "mooncake_conversation.jsonl"
    if not agents.exists() or not talks.exists():
        print(f"not run: there are no traces in {args.traces}")
        sys.exit(0)
    print(hardware())
    vocab = vocab_size(model_directory("demo"))
    workloads = {
        f"{count} agent sessions": (agent_sessions(agents, count, 6 if args.quick else 25, vocab), count)
        for count in ((8,) if args.quick else (8, 32))
    }
    if not args.quick:
        workloads["500 conversations"] = (conversations(talks, 500, vocab), 16)
    rows: dict[str, dict[str, dict[str, object]]] = {}
    lines = []
    if args.only != "pools":
        for workload, (sessions, num_at_once) in workloads.items():
            bound = endless_hits(sessions)
            print(f"\n{workload}, {sum(map(len, sessions))} requests; an endless cache hits {bound:.3f}")
            runs = {name: measure(name, flags, sessions, num_at_once) for name, flags in TIERS.items()}
            rows[workload] = {name: asdict(run) for name, run in runs.items()} | {"bound": {"hit": bound}}
            lines.append(
                goal(
                    f"{workload}: hits with host and disk, of the bound", runs["host, disk"].hit / bound, at_least=0.97
                )
            )
    if args.only != "tiers" and not args.quick:
        sessions, num_at_once = workloads["32 agent sessions"]
        print(f"\npools, 32 agent sessions; an endless cache hits {endless_hits(sessions):.3f}")
        runs = {name: measure(name, flags, sessions, num_at_once) for name, flags in POOLS.items()}
        rows["pools"] = {name: asdict(run) for name, run in runs.items()}
        one, four, host = runs.values()
        lines += [
            goal("2 + 2 workers, 64 MiB in all: hits", four.hit, at_least=0.90),
            goal("2 + 2 workers: seconds, of one worker's", four.seconds / one.seconds, under=1.0),
            goal("a quarter of the memory and a host tier: hits", host.hit, at_least=0.91),
        ]
    if args.record:
        record("tiers_replay", rows)
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
