"""What was measured of pairs of workers, beside a plain dict."""

import random

import numpy as np

from kvrouter.measured_pairs import MeasuredPairs


def test_pairs_that_come_go_and_come_again_are_as_they_were_measured_last():
    rng = random.Random(3)
    pairs, plain, capacity = MeasuredPairs(), {}, 0
    for turn in range(2000):
        if turn in (0, 500, 1000):
            capacity = capacity * 2 or 8
            pairs.grow(capacity)
        if rng.random() < 0.05:
            row = rng.randrange(capacity)
            pairs.remove(row)
            plain = {key: parts for key, parts in plain.items() if row not in key}
        else:
            key = rng.randrange(capacity), rng.randrange(capacity)
            plain[key] = [rng.random() for _ in range(3)]
            pairs.put(*key, np.array(plain[key]))
        if turn % 100 == 0:
            targets, sources = np.nonzero(pairs.numbers)
            found = pairs.prices[:, pairs.numbers[targets, sources]].T.tolist()
            keys = np.column_stack([targets, sources]).tolist()
            assert {tuple(key): parts for key, parts in zip(keys, found, strict=True)} == plain
    for source in range(capacity):
        targets, parts = pairs.of_source(source)
        assert {(target, source): each for target, each in zip(targets.tolist(), parts.T.tolist(), strict=True)} == {
            key: each for key, each in plain.items() if key[1] == source
        }
    assert pairs.prices.shape[1] <= 1024  # numbers are used again


def test_what_four_thousand_workers_measured_takes_little_memory():
    pairs = MeasuredPairs()
    for capacity in (64, 1024, 4096):
        pairs.grow(capacity)
        for row in range(0, capacity, 64):
            pairs.put(row, row // 2, np.ones(3))
    assert pairs.numbers.nbytes + pairs.prices.nbytes <= 65 << 20
