"""Long prompts that wait for a slot and lie with another holder: with and without taking them in meanwhile.

    python benchmarks/prefetch.py             slots x how long a prompt's blocks take to load
    python benchmarks/prefetch.py --quick     two cells
    python benchmarks/prefetch.py --record    also append to benchmarks/results/prefetch.jsonl

In simulated time: scheduler and pool are the real ones, steps take what the demo model's did on an EPYC (Zen 5), and
one road brings blocks, one pull after the other. So the same figures come out each time, on any machine.
"""

from __future__ import annotations

from statistics import mean
from typing import NamedTuple

from harness.report import goal, parser, record
from harness.simulated import BLOCK_SIZE, Clock, Machine, warm

from engine.scheduling.config import SchedulerConfig
from engine.scheduling.plan import (
    AskBlocks,
    BlocksOffered,
    EmitTokens,
    Event,
    PullBlocks,
    PullEnded,
    RunStep,
    Sampled,
    SequenceAdded,
    SequenceSpec,
    StepEnded,
    StepPlan,
    StepResult,
    StepWanted,
    StopAsking,
)
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.step_cost import features
from kvcache.locations import BlockLocation, pack_locations
from kvcache.pool import BlockPool
from messages.price import MovePrice
from messages.request import Copy, HeldRun, SamplingParams

NUM_PROMPTS, PROMPT_TOKENS, OUTPUT_TOKENS = 24, 6000, 64
ANSWER_S = 2e-3  #: from a question to its answer
CELLS = [(slots, load_s) for slots in (1, 2, 4, 8) for load_s in (0.02, 0.1, 0.3)]


class Figures(NamedTuple):
    """Of all prompts, in seconds."""

    ttft_s: float  #: mean
    total_s: float


class Bench:
    """A worker of `num_slots` whose pool has room for as many prompts, and for three more."""

    def __init__(self, num_slots: int, load_s: float, *, takes_in: bool) -> None:
        self.clock, self.machine = Clock(), Machine()
        num_blocks = PROMPT_TOKENS // BLOCK_SIZE
        self.block_s = load_s / num_blocks
        pool = BlockPool((num_slots + 3) * (num_blocks + OUTPUT_TOKENS // BLOCK_SIZE + 2), BLOCK_SIZE)
        config = SchedulerConfig(max_model_len=2 * PROMPT_TOKENS, max_num_seqs=num_slots, block_bytes=1)
        self.scheduler = Scheduler(config, pool, b"model", warm(self.machine), self.price_of)
        if not takes_in:
            self.scheduler._prefetches._max_blocks = 0
        self.firsts_s: dict[str, float] = {}
        self.num_ended = 0
        self._is_stepping = False
        self._road_free_s = 0.0

    def price_of(self, copy: Copy) -> MovePrice:
        """Say what loading costs, as it is."""
        return MovePrice(
            source=copy.address, tier=copy.tier, road="shm", fixed_s=1e-3, byte_s=self.block_s, handoff_s=ANSWER_S
        )

    def run(self) -> Figures:
        """Ask for all prompts at once."""
        held = (HeldRun(0, PROMPT_TOKENS // BLOCK_SIZE, (Copy("cache", "host"),)),)
        for number in range(NUM_PROMPTS):
            tokens = [number, *range(PROMPT_TOKENS - 1)]
            params = SamplingParams(max_tokens=OUTPUT_TOKENS)
            spec = SequenceSpec(
                seq_id=f"r{number}", token_ids=tokens, num_prompt_tokens=PROMPT_TOKENS, params=params, held=held
            )
            self.post(SequenceAdded(spec))
        self.clock.run(lambda: self.num_ended == NUM_PROMPTS)
        return Figures(mean(self.firsts_s.values()), self.clock.now_s)

    def post(self, event: Event) -> None:
        """Tell the scheduler, and do what it wants; a step follows where none runs."""
        for instruction in self.scheduler.on_event(event, self.clock.now_s):
            match instruction:
                case RunStep(plan):
                    self._step(plan)
                case AskBlocks(seq_id, source, first_index, names):
                    blocks = [BlockLocation(i, i, 1, name, BLOCK_SIZE) for i, name in enumerate(names, first_index)]
                    self._later(ANSWER_S, BlocksOffered(seq_id, source, pack_locations(blocks), is_last=True))
                case PullBlocks(seq_id, targets=targets):
                    begin_s = max(self._road_free_s, self.clock.now_s)
                    self._road_free_s = begin_s + 1e-3 + len(targets) * self.block_s
                    self._later(self._road_free_s - self.clock.now_s, PullEnded(seq_id, frozenset()))
                case EmitTokens(seq_id):
                    self.firsts_s.setdefault(seq_id, self.clock.now_s)
                    self.num_ended += instruction.finish_reason is not None
                case StopAsking():
                    pass
                case _:
                    raise AssertionError(instruction)
        if not self._is_stepping and not isinstance(event, StepWanted):
            self.post(StepWanted())

    def _later(self, delay_s: float, event: Event) -> None:
        self.clock.after(delay_s, lambda: self.post(event))

    def _step(self, plan: StepPlan) -> None:
        self._is_stepping = True
        p = self.machine.compute
        prices = (p.step_s, p.row_s, p.row_key_s, p.token_s, p.pair_s)
        elapsed_s = sum(price * x for price, x in zip(prices, features(plan.parts), strict=True))
        sampled = {part.seq_id: Sampled(7) for part in plan.parts if part.is_sampled}

        def end() -> None:
            self._is_stepping = False
            self.post(StepEnded(StepResult(sampled=sampled, elapsed_s=elapsed_s)))

        self.clock.after(elapsed_s + self.machine.between_steps_s, end)


def main() -> None:
    args = parser(__doc__, "prefetch", quick="two cells").parse_args()
    rows = []
    print("slots  load of a prompt   TTFT with    without      all with    without")
    for num_slots, load_s in [(1, 0.1), (4, 0.3)] if args.quick else CELLS:
        ahead, without = (Bench(num_slots, load_s, takes_in=takes_in).run() for takes_in in (True, False))
        rows.append({"slots": num_slots, "load_s": load_s, "ahead": ahead._asdict(), "without": without._asdict()})
        print(
            f"{num_slots:5d} {1e3 * load_s:12.0f} ms {ahead.ttft_s:11.3f} s {without.ttft_s:8.3f} s "
            f"{ahead.total_s:11.3f} s {without.total_s:8.3f} s   TTFT {ahead.ttft_s / without.ttft_s:.3f}"
        )
    shares = [row["ahead"]["ttft_s"] / row["without"]["ttft_s"] for row in rows]
    if args.record:
        record("prefetch", rows)
    print()
    print(goal("prefetch: mean TTFT of without, one slot", shares[0 if args.quick else 1], under=0.80))
    print(goal("prefetch: mean TTFT of without, the worst cell", max(shares), under=1.02))


if __name__ == "__main__":
    main()
