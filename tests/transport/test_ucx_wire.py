"""Which messages of the ucx road carry which bytes."""

import random

import pytest

pytest.importorskip("ucxx", reason="ucxx is not installed: the extra kvray[ucx-cu12]")

from transport.protocol import Copy
from transport.ucx import wire

MIB = 1 << 20


@pytest.mark.parametrize("can_gather", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_messages_carry_all_bytes_once(seed, can_gather):
    chance = random.Random(seed)
    copies, source, target = [], 0, 0
    for _ in range(chance.choice([0, 1, 5, 300])):
        source += chance.choice([0, 0, 1, -1000 if source > 1000 else 0])
        target += chance.choice([0, 0, 7])
        size = chance.choice([0, 1, 100, 49152, 49151, 3 * MIB, 8 * MIB, 20 * MIB + 1])
        copies.append(Copy(source, target, size))
        source, target = source + size, target + size
    messages = wire.plan(copies, can_gather=can_gather)
    carried = sorted((c.target_offset, c.num_bytes, c.source_offset) for m in messages for c in m.copies)
    assert sum(size for _, size, _ in carried) == sum(copy.num_bytes for copy in copies)
    ends = [(offset + size, source + size) for offset, size, source in carried]
    assert all(end <= after[0] for (end, _), after in zip(ends, carried[1:], strict=False))
    for position, copy in enumerate(copies):
        touching = [
            message
            for message in messages
            for each in message.copies
            if copy.num_bytes
            and each.target_offset < copy.target_offset + copy.num_bytes
            and copy.target_offset < each.target_offset + each.num_bytes
            and each.source_offset - each.target_offset == copy.source_offset - copy.target_offset
        ]
        assert len(touching) == sum(message.positions.count(position) for message in messages)
    for message in messages:
        assert message.num_bytes == sum(copy.num_bytes for copy in message.copies) <= wire.MAX_MESSAGE_BYTES
        assert can_gather or len(message.copies) == 1
    ranges, counts = wire.pack_ranges(messages)
    request = wire.PullRequest(0, 0, b"", 0, ranges, counts)
    unpacked = wire.unpack_ranges(request, 1 << 40)
    assert unpacked == [[(c.source_offset, c.num_bytes) for c in m.copies] for m in messages]


def test_many_small_blocks_are_few_messages():
    scattered = [Copy(i * 8192, i * 5000, 4096) for i in range(256)]
    adjacent = [Copy(i * MIB, i * MIB, MIB) for i in range(256)]
    assert len(wire.plan(scattered, can_gather=True)) == 1
    assert len(wire.plan(scattered, can_gather=False)) == 256
    assert len(wire.plan(adjacent, can_gather=False)) == 32
