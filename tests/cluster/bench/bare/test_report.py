from __future__ import annotations

from types import SimpleNamespace

import pytest

from cluster.bench.bare.batch import Batch, Workload
from cluster.bench.bare.machine import Machine
from cluster.bench.bare.report import Report
from cluster.bench.bare.running import Repeat, Side
from cluster.bench.bare.work import ModelWork, Weights
from engine.kernels.protocol import LayerUse
from engine.memory.kv_pool import LayerSpec


def side(name: str, step_s: float, outputs: list[list[int]], failure: str = "") -> Side:
    prefill = Batch(0.0, [[1.0], [1.0]], [[1], [1]])
    whole = Batch(0.0, [[1.0, 1.0 + step_s, 1.0 + 2 * step_s]] * 2, outputs)
    return Side(SimpleNamespace(name=name), [Repeat(prefill, whole)], failure)


def report(*sides: Side) -> Report:
    return Report(
        model={"name": "made up"},
        described="made up: a few numbers",
        workload=Workload(batch_size=2, input_len=4, output_len=3, vocab_size=10),
        work=ModelWork(
            Weights(body=90, experts=0, head=10, chosen_share=1.0, vectors=0, total=100),
            [LayerUse(LayerSpec(1, 1, 1), 1)],
            1,
            1,
        ),
        machine=Machine("made up", 2, copy_bytes_per_s=1e3, flops_per_s=1e4),
        sides=sides,
    )


def test_two_are_told_beside_each_other_with_ratios_and_the_tokens_they_share():
    found = report(side("kvray", 1.0, [[1, 2, 3], [4, 5, 6]]), side("transformers", 2.0, [[1, 2, 3], [4, 5, 7]]))
    document = found.document()
    assert [engine["name"] for engine in document["engines"]] == ["kvray", "transformers"]
    assert document["ratios"]["decode_tokens_per_s"]["median"] == 2.0
    assert document["same_tokens"] == {"sequences": 1, "of": 2}
    assert "failures" not in document
    assert "1 of 2 sequences got the same tokens from both" in found.lines()
    assert [column.header for column in found.table().columns] == ["", "kvray", "transformers", "ratio"]


def test_a_peer_that_failed_is_said_and_leaves_no_column():
    found = report(side("kvray", 1.0, [[1], [1]]), side("transformers", 1.0, [[1], [1]], failure="out of memory"))
    assert [column.header for column in found.table().columns] == ["", "kvray"]
    assert "transformers: out of memory" in found.lines()
    document = found.document()
    assert document["failures"] == {"transformers": "out of memory"}
    assert not {"ratios", "same_tokens"} & set(document)


def test_the_machine_and_the_workload_are_said():
    lines = list(report(side("kvray", 1.0, [[1], [1]])).lines())
    assert lines[0] == "made up: a few numbers"
    assert lines[1].startswith("made up, 2 threads: copies at 0.0 GB/s read and written, products at 0 GFLOP/s")
    assert lines[2:] == ["2 sequences, 4 tokens in, 3 out"]


@pytest.mark.parametrize(("times", "is_said"), [([[1.0, 2.0], [3.0, 4.0]], True), ([[1.0, 2.0], [1.0, 2.0]], False)])
def test_it_is_said_where_no_step_only_decoded(times, is_said):
    one = side("kvray", 1.0, [[1, 1], [1, 1]])
    one.repeats[0].whole.token_times_s = times
    assert any(line.startswith("decode is not told apart") for line in report(one).lines()) is is_said
