"""Load triples for three minutes and falls: numbers of workers follow, nobody's request fails, nothing flaps.

    python benchmarks/autoscaling.py                   the demo model: calm, three minutes of three times as much, calm
    python benchmarks/autoscaling.py --quick           20 s of three times as much
    python benchmarks/autoscaling.py --record          also append to benchmarks/results/autoscaling.jsonl, and draw
                                                       docs/autoscaling.svg (matplotlib)

`kvray serve` with one prefill and one decode worker, and up to three of each. Each worker gets a seventh of a core, by
a cgroup of its own (v1, for root; without one they share all cores, and more of them do not compute more): as if each
were a small machine. Requests come by a Poisson process, whether answers come or not, of random tokens never seen
before; their lengths are such that the first part's load keeps a worker of each kind about half busy. The peer is the
same load on the same fleet without autoscaling, for a minute of the tripled part (left out by --quick).
Goals: no failed request; each kind grows (not measured by --quick: rates are those of half a minute) and comes back to
one; none turns more than once; TTFT p90 of the last minute of the tripled load (by --quick its last quarter) under the
target.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from harness.http_client import HttpConnection, completion
from harness.models import model_directory, vocab_size
from harness.prompts import draw_prompts
from harness.report import ROOT, goal, hardware, parser, record
from harness.serving import Served, serving

SHARE = 0.15  #: of a core, for each worker
PERIOD_US = 10_000
CGROUPS = Path("/sys/fs/cgroup/cpu")
TTFT_S, ITL_MS = 2.0, 250.0
PROMPT_S = 0.5  #: that a prompt takes alone
BUSY = 0.55  #: of one prefill worker, before the load triples
NUM_SEQS, ROWS = 6, 1.5  #: slots of a decode worker, and the sequences in them before the load triples
FACTOR = 3
PATH = "/v1/completions"
KINDS = {"prefill": "Prefill", "decode": "Decode"}


@dataclass(frozen=True, slots=True)
class Parts:
    """How long each part takes, in seconds."""

    calm_s: float
    tripled_s: float
    fall_s: float
    grow_after_s: float
    shrink_after_s: float

    @property
    def end_s(self) -> float:
        """When all parts are over."""
        return self.calm_s + self.tripled_s + self.fall_s


FULL = Parts(45.0, 180.0, 165.0, 3.0, 40.0)
QUICK = Parts(5.0, 20.0, 35.0, 2.0, 8.0)


@dataclass(slots=True)
class Course:
    """What was seen; times in seconds from the begin of the first part."""

    asked: list[tuple[float, float]] = field(default_factory=list)  #: when, and TTFT
    failed: list[str] = field(default_factory=list)
    numbers: list[tuple[float, int, int]] = field(default_factory=list)  #: when, prefill and decode workers that answer


@contextlib.contextmanager
def small_machines() -> Iterator[Path | None]:
    """Make a place for cgroups; None where there is none."""
    root = CGROUPS / f"kvray-autoscaling-{time.time_ns()}"
    try:
        root.mkdir()
    except OSError as error:
        print(f"workers share all cores: no cgroups here ({error.strerror})")
        yield None
        return
    try:
        yield root
    finally:
        for place in (*root.iterdir(), root):
            if place.is_dir():
                with contextlib.suppress(OSError):
                    place.rmdir()


class Keeper:
    """Looks how many workers answer, and keeps each that does to its share of a core."""

    def __init__(self, served: Served, root: Path | None) -> None:
        self._served, self._root = served, root
        self._kept: set[int] = set()

    def keep(self, numbers: dict[str, int]) -> None:
        """Keep those to their share that have started; one that still does is left alone, so as not to take minutes."""
        if self._root is None:
            return
        for role, deployment in KINDS.items():
            found = []
            for process in psutil.Process(self._served.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if f"ServeReplica:kvray:{deployment}" in " ".join(process.cmdline()):
                        found.append(process.pid)
            fresh = [pid for pid in found if pid not in self._kept]
            if fresh and len(found) <= numbers[role]:
                for pid in fresh:
                    self._put(pid)

    def _put(self, pid: int) -> None:
        assert self._root is not None
        place = self._root / str(pid)
        place.mkdir()
        (place / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (place / "cpu.cfs_quota_us").write_text(str(int(SHARE * PERIOD_US)))
        (place / "cgroup.procs").write_text(str(pid))
        self._kept.add(pid)


async def numbers_of(served: Served) -> dict[str, int]:
    """Return how many workers of each kind answer."""
    status = await asyncio.to_thread(served.status)
    roles = [worker["role"] for worker in status["workers"] if worker["is_answering"]]
    return {role: roles.count(role) for role in KINDS}


async def ask(url: str, prompt: list[int], num_tokens: int, begin_s: float, course: Course) -> list[float]:
    """Ask for so many tokens; return when each came, after asking."""
    asked_s = time.monotonic()
    came: list[float] = []
    try:
        connection = await HttpConnection.open(url)
        try:
            async for event in connection.events(PATH, completion(prompt, num_tokens)):
                came += [time.monotonic() - asked_s] * len(event["choices"][0].get("token_ids") or ())
        finally:
            connection.close()
        if len(came) != num_tokens:
            raise ConnectionError(f"{len(came)} tokens of {num_tokens}")
    except (OSError, asyncio.IncompleteReadError) as error:
        course.failed.append(f"{asked_s - begin_s:.0f} s: {str(error) or type(error).__name__}")
    else:
        course.asked.append((asked_s - begin_s, came[0]))
    return came


async def fitting_load(served: Served, size: int) -> tuple[int, int, float]:
    """Return tokens of a prompt and of an answer, and requests a second, for the calm part."""
    num_tokens, aside = 512, Course()
    for prompt in draw_prompts(1, 3, 512, size):  # the first ones also teach the worker its prices
        came = await ask(served.url, prompt, 24, 0.0, aside)
    prompt_tokens = max(128, min(3000, int(num_tokens * PROMPT_S / came[0])))
    (prompt,) = draw_prompts(2, 1, prompt_tokens, size)
    came = await ask(served.url, prompt, 1, 0.0, aside)
    per_s = BUSY / came[0]
    both = await asyncio.gather(*(ask(served.url, short, 96, 0.0, aside) for short in draw_prompts(3, 2, 64, size)))
    if aside.failed:
        raise RuntimeError(f"the calm server failed: {aside.failed}")
    step_s = max((came[-1] - came[32]) / 63 for came in both)  # with two rows: a step takes longer with more of them
    return prompt_tokens, max(16, min(1000, int(ROWS / per_s / step_s))), per_s


async def follow(served: Served, keeper: Keeper, parts: Parts, size: int, load: tuple[int, int, float]) -> Course:
    """Send the load of all parts; return what came of it."""
    num_prompt, num_output, per_s = load
    course, begin_s, source = Course(), time.monotonic(), random.Random(7)
    tasks: list[asyncio.Task[Any]] = []

    async def watch() -> None:
        while True:
            with contextlib.suppress(OSError):
                seen = await numbers_of(served)
                keeper.keep(seen)
                course.numbers.append((time.monotonic() - begin_s, seen["prefill"], seen["decode"]))

    watching = asyncio.create_task(watch())
    at_s = 0.0
    while at_s < parts.end_s:
        is_tripled = parts.calm_s <= at_s < parts.calm_s + parts.tripled_s
        at_s += source.expovariate(per_s * (FACTOR if is_tripled else 1))
        await asyncio.sleep(max(0.0, begin_s + at_s - time.monotonic()))
        prompt = [source.randrange(5, size) for _ in range(num_prompt)]
        tasks.append(asyncio.create_task(ask(served.url, prompt, num_output, begin_s, course)))
    await asyncio.gather(*tasks)
    watching.cancel()
    return course


async def measure(served: Served, parts: Parts, size: int, root: Path | None) -> tuple[Course, tuple[int, int, float]]:
    keeper = Keeper(served, root)
    keeper.keep(await numbers_of(served))
    load = await fitting_load(served, size)
    said = f"prompts of {load[0]} tokens, answers of {load[1]}, {load[2]:.2f} requests/s, then {FACTOR * load[2]:.2f}"
    print(said, flush=True)
    return await follow(served, keeper, parts, size, load), load


def settings(parts: Parts, *, is_scaled: bool) -> str:
    most = "max_prefill: 3, max_decode: 3, " if is_scaled else ""
    return (
        f"engine: {{max_num_seqs: {NUM_SEQS}, num_threads: 1, kv_cache_memory: 64MiB}}\n"
        "http: {access_log: false, max_ttft_s: 120}\n"
        f"autoscaling: {{{most}ttft_s: {TTFT_S}, itl_ms: {ITL_MS}, grow_after_s: {parts.grow_after_s}, "
        f"shrink_after_s: {parts.shrink_after_s}}}\n"
    )


def run(parts: Parts, *, is_scaled: bool) -> tuple[Course, tuple[int, int, float]]:
    directory = model_directory("demo")
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as config, small_machines() as root:
        config.write(settings(parts, is_scaled=is_scaled))
        config.flush()
        with serving(str(directory), "--served-model-name", "bench", "--config", config.name) as served:
            return asyncio.run(measure(served, parts, vocab_size(directory), root))


def turns(course: Course, place: int) -> int:
    """Return how often a number of workers turned from growing to shrinking, or back."""
    changes = [
        after[place] - before[place] for before, after in pairwise(course.numbers) if after[place] != before[place]
    ]
    return sum((one > 0) != (other > 0) for one, other in pairwise(changes))


def ttft_p90(course: Course, begin_s: float, end_s: float) -> float | None:
    values = sorted(ttft_s for at_s, ttft_s in course.asked if begin_s <= at_s < end_s)
    return values[int(0.9 * len(values))] if values else None


def draw(course: Course, peer: Course | None, parts: Parts, path: Path) -> None:
    """Draw numbers of workers, and times to first token with and without autoscaling, over time."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "kvray", "svg.fonttype": "none"}
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 5), sharex=True, layout="constrained")
    times, prefill, decode = zip(*course.numbers, strict=True)
    above.step(times, prefill, where="post", label="prefill workers")
    above.step(times, decode, where="post", label="decode workers", linestyle="--")
    above.set(ylabel="workers", ylim=(0, 3.5), yticks=range(4))
    above.legend(loc="upper right")
    for label, one in (("without autoscaling", peer), ("with", course)):
        if one is not None:
            below.plot(*zip(*sorted(one.asked), strict=True), ".", markersize=4, label=label)
    below.axhline(TTFT_S, color="gray", linewidth=0.8)
    below.set(xlabel="seconds", ylabel="time to first token, s", yscale="log")
    below.legend(loc="upper right")
    for axes in (above, below):
        axes.axvspan(parts.calm_s, parts.calm_s + parts.tripled_s, alpha=0.12)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    args = parser(__doc__, "autoscaling", quick="20 s of three times the load").parse_args()
    print(hardware())
    parts = QUICK if args.quick else FULL
    course, load = run(parts, is_scaled=True)
    peer: Course | None = None
    if not args.quick:
        peer, _ = run(Parts(parts.calm_s, 60.0, 15.0, 3.0, 40.0), is_scaled=False)
    end_s = parts.calm_s + parts.tripled_s
    late = ttft_p90(course, end_s - min(60.0, parts.tripled_s / 4), end_s)
    results = {
        "load": {"prompt_tokens": load[0], "output_tokens": load[1], "calm_per_s": load[2]},
        "parts": asdict(parts),
        "requests": len(course.asked),
        "failed": course.failed,
        "ttft_p90_s": {"calm": ttft_p90(course, 0, parts.calm_s), "tripled, late": late},
        "peer_ttft_p90_s": None if peer is None else ttft_p90(peer, parts.calm_s + 30, parts.calm_s + 60),
        "numbers": course.numbers,
        "asked": course.asked,
        "peer_asked": [] if peer is None else peer.asked,
    }
    if args.record:
        record("autoscaling", results)
        draw(course, peer, parts, ROOT / "docs" / "autoscaling.svg")
    for line in course.failed:
        print(f"failed: {line}")
    print(f"{len(course.asked)} answered; TTFT p90: {results['ttft_p90_s']}")
    print(f"TTFT p90 without autoscaling: {results['peer_ttft_p90_s']}")
    print()
    print(goal("failed requests", len(course.failed), under=1))
    for place, role in enumerate(KINDS, 1):
        most = None if args.quick else max(one[place] for one in course.numbers)
        print(goal(f"{role} workers at most", most, at_least=2))
        print(goal(f"{role} workers in the end", course.numbers[-1][place], under=2))
        print(goal(f"turns of {role} workers", turns(course, place), under=2))
    print(goal("TTFT p90 once it had grown", late, under=TTFT_S, unit=" s"))


if __name__ == "__main__":
    main()
