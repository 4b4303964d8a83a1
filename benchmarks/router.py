"""The router's index and decisions, beside Dynamo's RadixTree, in the same run.

    python benchmarks/router.py                   everything
    python benchmarks/router.py --quick           a tenth of the blocks, within 60 s
    python benchmarks/router.py --with-dynamo     install the peer first, in an environment of its own
    python benchmarks/router.py --record          also append to benchmarks/results/router.jsonl

64 workers hold a million blocks of 16 tokens. One prompt of 128 k tokens is held whole by one of them, to 4,000 blocks
by another, to 100 by all. Both sides get block names ready made (Dynamo's are 64 bits, ours 128) and the same events,
64 blocks each. Medians. Memory is what the process grew by.
Decisions are over prefill and as many decode workers, each on a node of its own, with loads that differ a little; one
in twenty links between them was measured. The slower counts of that prompt, and of one that nobody holds ("new").
Goals: matching and folding at least as fast as Dynamo's; under 100 bytes a name, 8 KB where 1,000 workers hold it;
nothing that the index does takes 20 ms; a decision over 64 + 64 workers within 0.5 ms, over
1,000 + 1,000 within 3 ms, at 32 k tokens; `import kvrouter.router` within 0.3 s.
"""

from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median

from harness.report import CACHE, ROOT, goal, hardware, parser, record

from kvrouter.opening import open_index
from kvrouter.router import Reply, Router, WorkerJoined
from messages.fleet import KvEvents, LoadReport, Role, WorkerInfo
from messages.price import ComputePrice, MovePrice
from messages.route import Placement, RequestEnded, RouteRequest

DYNAMO = "1.6.1"
SEED = 1
NUM_WORKERS = 64
BLOCK_SIZE = 16
NAME_BYTES = 16
EVENT_BLOCKS = 64
PROMPT_BLOCKS = (512, 2048, 8192)  # 8 k, 32 k, 128 k tokens
DECISION_BLOCKS = PROMPT_BLOCKS[1]
MAX_DECISION_MS = {NUM_WORKERS: 0.5, 1000: 3.0}  #: by number of prefill, and of decode workers
MEASURED_SHARE = 0.05  #: of links
NUM_HOLDERS = 1000
MAX_BYTES = 100
MAX_SHARED_BYTES = 8192  #: of a name that `NUM_HOLDERS` workers hold
MAX_TURN_MS = 20.0
MAX_IMPORT_S = 0.3

#: Runs under the peer's Python: a job on standard input, figures on standard output.
PEER = """
import json, sys, time
from statistics import median
from dynamo._core import RadixTree

job = json.load(sys.stdin)

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def event(number, parent, hashes):
    blocks = [{"block_hash": h, "tokens_hash": h} for h in hashes]
    stored = {"parent_hash": parent, "blocks": blocks}
    return json.dumps({"event_id": number, "data": {"stored": stored}, "dp_rank": 0}).encode()

state = job["seed"]
def fresh():
    global state
    state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
    return state

prompt = [fresh() for _ in range(job["num_prompt_blocks"])]
chains = [(worker, prompt[:num]) for worker, num in job["holders"]]
for worker in range(job["num_workers"]):
    chains.append((worker, [fresh() for _ in range(job["num_blocks"] // job["num_workers"])]))
events = []
for worker, chain in chains:
    for begin in range(0, len(chain), job["event_blocks"]):
        parent = chain[begin - 1] if begin else None
        events.append((worker, event(len(events), parent, chain[begin : begin + job["event_blocks"]])))
tree = RadixTree()
before = resident()
started = time.perf_counter()
for worker, data in events:
    tree.apply_event(worker, data)
tree.find_matches(prompt[:1])  # events are applied by a thread, in order: wait for it
fold_s = time.perf_counter() - started
num_stored = sum(len(chain) for _, chain in chains)
figures = {"fold_blocks_per_s": num_stored / fold_s, "bytes_per_block": (resident() - before) / num_stored}
for num in job["prompt_blocks"]:
    taken = []
    for _ in range(job["repeats"]):
        started = time.perf_counter()
        scores = tree.find_matches(prompt[:num]).scores
        taken.append(time.perf_counter() - started)
    assert max(scores.values()) == num, scores
    figures[f"match_{num}_us"] = 1e6 * median(taken)
print(json.dumps(figures))
"""


def dynamo_python(*, is_wanted: bool) -> Path | None:
    """Return the Python of the peer's environment, made if `is_wanted`; None where there is none."""
    home = CACHE / "peers" / f"dynamo-{DYNAMO}"
    python, done = home / "bin" / "python", home / "installed"
    if done.exists() or not is_wanted:
        return python if done.exists() else None
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    wheel = f"ai-dynamo-runtime=={DYNAMO}"
    if subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel]).returncode != 0:
        return None
    done.touch()
    return python


def holders() -> list[tuple[int, int]]:
    """Return (worker, leading blocks of the prompt that it holds)."""
    return [(5, PROMPT_BLOCKS[-1]), (9, 4000)] + [(worker, 100) for worker in range(NUM_WORKERS)]


def measure_dynamo(python: Path, num_blocks: int, repeats: int) -> dict[str, float]:
    """Measure the peer: folding, matching, memory."""
    job = {
        "seed": SEED,
        "num_workers": NUM_WORKERS,
        "num_blocks": num_blocks,
        "num_prompt_blocks": PROMPT_BLOCKS[-1],
        "prompt_blocks": PROMPT_BLOCKS,
        "holders": holders(),
        "event_blocks": EVENT_BLOCKS,
        "repeats": repeats,
    }
    done = subprocess.run([python, "-c", PEER], input=json.dumps(job), capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def chains(num_blocks: int) -> tuple[bytes, list[tuple[str, bytes]]]:
    """Return the prompt's names, and (worker, names that it stores) for each event."""
    rng = random.Random(SEED)
    prompt = rng.randbytes(NAME_BYTES * PROMPT_BLOCKS[-1])
    shared = [(f"w{worker}", prompt[: NAME_BYTES * num]) for worker, num in holders()]
    own = [(f"w{worker}", rng.randbytes(NAME_BYTES * (num_blocks // NUM_WORKERS))) for worker in range(NUM_WORKERS)]
    return prompt, shared + own


def measure_index(num_blocks: int, repeats: int) -> dict[str, float]:
    """Measure our index: folding, matching, memory, and for how long at most it holds the loop."""
    prompt, stores = chains(num_blocks)
    step = NAME_BYTES * EVENT_BLOCKS
    events = [(worker, names[i : i + step]) for worker, names in stores for i in range(0, len(names), step)]
    index = open_index(lambda _: num_blocks)
    gc.collect()
    before = anonymous_bytes()
    started = time.perf_counter()
    for worker, names in events:
        index.fold(worker, stored=names)
    fold_s = time.perf_counter() - started
    grown = anonymous_bytes() - before
    num_stored = sum(len(names) for _, names in stores) // NAME_BYTES
    figures = {"fold_blocks_per_s": num_stored / fold_s, "bytes_per_block": grown / num_stored}
    for num in PROMPT_BLOCKS:
        names = prompt[: NAME_BYTES * num]
        figures[f"match_{num}_us"] = 1e6 * typical(partial(index.runs, names), repeats)
        assert index.runs(names)[-1].end == num
    longest_s = 0.0
    for worker, names in events:  # all anew, as a worker's snapshot is
        calls: list[Callable[[], object]] = [partial(index.fold, worker, stored=names, is_use=False)]
        if random.Random(names).random() < 0.01:
            calls.append(partial(index.drop, worker))
        if not index.is_swept:
            calls.append(index.sweep)
        for call in calls:
            started = time.thread_time()
            call()
            longest_s = max(longest_s, time.thread_time() - started)
    return figures | {"longest_turn_ms": 1e3 * longest_s}


def anonymous_bytes() -> int:
    """Return the memory of this process that is no file's: such comes and goes as the machine likes."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(1024 * int(fields[name].split()[0]) for name in ("RssAnon", "VmSwap"))


def fresh(measure: Callable[..., dict[str, float]], *args: int) -> dict[str, float]:
    """Measure in a process of its own, whose memory holds nothing yet that was freed."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(measure, *args).result()


def measure_shared(num_names: int) -> dict[str, float]:
    """Measure the memory of names that many workers hold, each other ones, and the longest event of one of them."""
    rng = random.Random(SEED)
    names = [rng.randbytes(NAME_BYTES) for _ in range(num_names)]
    index = open_index(lambda _: num_names)
    gc.collect()
    before = anonymous_bytes()
    num_held, longest_s = 0, 0.0
    for worker in range(NUM_HOLDERS * 11 // 10):
        held = [name for name in names if rng.random() < 10 / 11]
        num_held += len(held)
        for at in range(0, len(held), EVENT_BLOCKS):
            stored = b"".join(held[at : at + EVENT_BLOCKS])
            started = time.thread_time()
            index.fold(f"w{worker}", stored=stored)
            longest_s = max(longest_s, time.thread_time() - started)
    assert abs(num_held / num_names / NUM_HOLDERS - 1) < 0.1
    grown = anonymous_bytes() - before
    return {f"bytes_per_block_of_{NUM_HOLDERS}": grown / num_names, "longest_shared_turn_ms": 1e3 * longest_s}


def measure_decisions(num_blocks: int, repeats: int) -> dict[str, float]:
    """Measure routing, reserving and ending, over fleets of several sizes."""
    prompt, stores = chains(num_blocks)
    figures = {}
    for num_each in MAX_DECISION_MS:
        router = Router()
        rng = random.Random(SEED)
        for number in range(num_each):
            join(router, f"w{number}", "decode", rng, num_each)
            join(router, f"p{number}", "prefill", rng, num_each)
        seqs = dict.fromkeys((worker for worker, _ in stores), 0)
        for worker, names in stores:
            seqs[worker] += 1
            router.on_event(KvEvents(worker_id=worker, seq=seqs[worker], stored=names), 0.0)
        prompts = {str(num): prompt[: NAME_BYTES * num] for num in PROMPT_BLOCKS}
        prompts[f"{DECISION_BLOCKS}_new"] = rng.randbytes(NAME_BYTES * DECISION_BLOCKS)
        for what, names in prompts.items():
            request = RouteRequest(
                request_id="r",
                names=names,
                num_prompt_tokens=len(names) // NAME_BYTES * BLOCK_SIZE + 1,
                max_tokens=100,
            )

            def decide(router: Router = router, request: RouteRequest = request) -> None:
                (reply,) = router.on_event(request, 0.0)
                assert isinstance(reply, Reply)
                assert isinstance(reply.message, Placement)
                router.on_event(RequestEnded(request_id="r"), 1.0)

            figures[f"route_{num_each}+{num_each}_{what}_us"] = 1e6 * typical(decide, repeats)
    return figures


def join(router: Router, worker_id: str, role: Role, rng: random.Random, num_prefill: int) -> None:
    """Let a worker join that is about as busy as the others and has measured its prices, and those of a few links."""
    info = WorkerInfo(
        worker_id=worker_id,
        role=role,
        address=f"tcp://{worker_id}:1",
        node_id=worker_id,
        fingerprint=b"f",
        block_size=BLOCK_SIZE,
        num_blocks=100_000,
        block_bytes=100_000,
        max_model_len=200_000,
        max_num_seqs=256,
        roads=("shm", "ucx", "socket"),
    )
    sources = [number for number in range(num_prefill) if role == "decode" and rng.random() < MEASURED_SHARE]
    load = LoadReport(
        worker_id=worker_id,
        queued_s=rng.uniform(0.0, 0.1),
        num_waiting=0,
        num_running=rng.randint(8, 12),
        free_blocks=100_000,
        compute=ComputePrice(step_s=0.004, token_s=1e-4 * rng.uniform(0.95, 1.05), pair_s=1e-9),
        decode_step_s=0.02 * rng.uniform(0.95, 1.05),
        moves=tuple(move(f"tcp://p{number}:1", rng) for number in sources),
    )
    router.on_event(WorkerJoined(info), 0.0)
    router.on_event(KvEvents(worker_id=worker_id, seq=0, cleared=True), 0.0)
    router.on_event(load, 0.0)


def move(source: str, rng: random.Random) -> MovePrice:
    """Return the price of a link, which differ a little."""
    byte_s = 1e-10 * rng.uniform(0.9, 1.1)
    return MovePrice(source=source, road="ucx", fixed_s=1e-4, byte_s=byte_s, handoff_s=rng.uniform(0.003, 0.008))


def typical(call: Callable[[], object], repeats: int) -> float:
    """Measure the median seconds of `call`."""
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return median(taken)


def import_s() -> float:
    """Measure the seconds of `import kvrouter.router` in a fresh process, the fastest of five."""
    program = "import time; t = time.perf_counter(); import kvrouter.router; print(time.perf_counter() - t)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return min(float(subprocess.check_output([sys.executable, "-c", program], env=environment)) for _ in range(5))


def goals(ours: dict[str, float], theirs: dict[str, float] | None) -> list[str]:
    """Write the goals, a line each."""
    lines = []
    comparisons = [(f"match at {num * BLOCK_SIZE // 1024} k tokens", f"match_{num}_us") for num in PROMPT_BLOCKS]
    for name, key in [*comparisons, ("folding events", "fold_blocks_per_s")]:
        ratio = None
        if theirs is not None:
            ratio = ours[key] / theirs[key] if key.endswith("per_s") else theirs[key] / ours[key]
        lines.append(goal(f"{name} over Dynamo's RadixTree", ratio, at_least=1.0, unit="x"))
    for num, under_ms in MAX_DECISION_MS.items():
        decision_ms = max(ours[f"route_{num}+{num}_{DECISION_BLOCKS}{kind}_us"] for kind in ("", "_new")) / 1e3
        lines.append(goal(f"decision over {num:,} + {num:,} workers", decision_ms, under=under_ms, unit=" ms"))
    lines.append(goal("memory of a name", ours["bytes_per_block"], under=MAX_BYTES, unit=" B"))
    shared = ours[f"bytes_per_block_of_{NUM_HOLDERS}"]
    lines.append(goal(f"memory of a name of {NUM_HOLDERS:,} workers", shared, under=MAX_SHARED_BYTES, unit=" B"))
    longest_ms = max(ours["longest_turn_ms"], ours["longest_shared_turn_ms"])
    lines.append(goal("longest turn of the index", longest_ms, under=MAX_TURN_MS, unit=" ms"))
    lines.append(goal("import of kvrouter.router", ours["import_s"], under=MAX_IMPORT_S, unit=" s"))
    return lines


def main() -> None:
    options = parser(__doc__, "router", quick="a tenth of the blocks")
    options.add_argument("--with-dynamo", action="store_true", help="install the peer on first use")
    args = options.parse_args()
    num_blocks, repeats = (100_000, 100) if args.quick else (1_000_000, 1000)
    python = dynamo_python(is_wanted=args.with_dynamo)
    theirs = measure_dynamo(python, num_blocks, repeats) if python else None
    ours = fresh(measure_shared, num_blocks // 100) | fresh(measure_index, num_blocks, repeats)
    ours |= measure_decisions(num_blocks // 10, repeats) | {"import_s": import_s()}
    print(f"{hardware()}; {num_blocks:,} blocks on {NUM_WORKERS} workers\n{'':28}{'kvray':>14}{'dynamo':>14}")
    for name, figure in ours.items():
        peer = f"{theirs[name]:14,.2f}" if theirs and name in theirs else f"{'-':>14}"
        print(f"{name:28}{figure:14,.2f}{peer}")
    if args.record:
        record("router", {"kvray": ours, "dynamo": theirs})
    print("\n".join(goals(ours, theirs)))


if __name__ == "__main__":
    main()
