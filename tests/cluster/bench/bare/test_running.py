from __future__ import annotations

import itertools

from cluster.bench.bare.batch import Batch, Tokens, Workload
from cluster.bench.bare.running import Side, run
from messages.errors import WorkerError

WORKLOAD = Workload(batch_size=2, input_len=3, output_len=20, vocab_size=100)


class Scripted:
    """Takes a second for each token, and fails when it was asked so often."""

    def __init__(self, name: str, asked: list, fails_at: int = 1000) -> None:
        self.name = name
        self.asked = asked
        self.fails_at = fails_at
        self.num_asked = 0

    def generate(self, prompts: Tokens, num_tokens: int) -> Batch:
        self.asked.append((self.name, str(prompts), num_tokens))
        self.num_asked += 1
        if self.num_asked > self.fails_at:
            raise WorkerError("out of memory")
        return Batch(0.0, [[float(n) for n in range(1, num_tokens + 1)]] * 2, [[7] * num_tokens] * 2)

    def close(self) -> None: ...


def test_both_are_asked_the_same_in_turn_and_warmed_up_with_little():
    asked: list = []
    progress: list = []
    sides = [Side(Scripted("a", asked)), Side(Scripted("b", asked))]
    run(sides, WORKLOAD, 2, lambda *told: progress.append(told))
    assert [(name, num) for name, _, num in asked] == [
        *[("b", 8), ("a", 8)],
        *[("a", 1), ("a", 20), ("b", 1), ("b", 20)],
        *[("b", 1), ("b", 20), ("a", 1), ("a", 20)],
    ]
    of_each = [[prompts for name, prompts, _ in asked if name == side] for side in ("a", "b")]
    assert of_each[0] == of_each[1]
    assert len(set(of_each[0])) == 5
    assert [len(side.repeats) for side in sides] == [2, 2]
    assert [repeat.whole.seconds for repeat in sides[0].repeats] == [20.0, 20.0]
    assert progress[0] == ("b", -1, "whole")
    assert progress[2:4] == [("a", 0, "prefill"), ("a", 0, "whole")]


def test_who_fails_is_asked_no_more_and_the_other_goes_on():
    asked: list = []
    sides = [Side(Scripted("a", asked)), Side(Scripted("b", asked, fails_at=2))]
    run(sides, WORKLOAD, 3, lambda *_: None)
    assert (sides[1].failure, sides[0].failure) == ("out of memory", "")
    assert len(sides[0].repeats) == 3
    counts = {name: len(list(group)) for name, group in itertools.groupby(sorted(name for name, *_ in asked))}
    assert counts == {"a": 7, "b": 3}
