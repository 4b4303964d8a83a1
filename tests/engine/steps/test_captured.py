"""Capturing and launching, with a step that is one product: what goes in and out, and what is refused."""

from __future__ import annotations

import pytest
import torch

from engine.steps.captured import CapturedSteps, TrialLimits
from engine.steps.packing import HostInputs, StepInputs
from tests.engine.steps.emulator import Emulator

VOCAB_SIZE = 6
LIMITS = TrialLimits(num_positions=3, num_tokens=VOCAB_SIZE)


class Toy:
    """A model whose logits are those of its tokens, times how many keys they see."""

    def __init__(self) -> None:
        self.weights = torch.rand(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        return (self.weights[inputs.token_ids] * inputs.kv_lens[:, None])[inputs.kept]


TOY = Toy()


@pytest.fixture
def emulator() -> Emulator:
    return Emulator()


def captured(emulator, compute, sizes=(1, 2, 4)) -> CapturedSteps:
    return CapturedSteps(emulator, sizes, compute, VOCAB_SIZE, LIMITS)


def rows_of(*tokens):
    def write(inputs: HostInputs) -> None:
        inputs.tokens[:] = 0
        inputs.tokens[0, : len(tokens)] = tokens
        inputs.kv_lens[:] = 2
        inputs.kept[:] = range(inputs.kept.shape[0])

    return write


def test_a_launch_gives_what_its_own_inputs_come_to(emulator):
    steps = captured(emulator, TOY)
    for tokens in ([3], [1, 5], [2, 2, 4, 0], [4]):
        logits = steps.launch(len(tokens), rows_of(*tokens))
        assert logits.dtype is torch.float32
        assert torch.equal(logits, 2 * TOY.weights[tokens])
        assert steps.inputs(len(tokens)).token_ids.tolist() == tokens
    emulator.synchronize()


def test_the_largest_is_captured_first_and_each_is_launched_once(emulator):
    shapes = []

    def compute(inputs: StepInputs) -> torch.Tensor:
        shapes.append(len(inputs.kv_lens))
        return TOY(inputs)

    captured(emulator, compute)
    assert shapes == [4, 4, 4, 2, 2, 2, 1, 1, 1], "once, once under watch, once to be captured"
    assert [each for each in emulator.done if each in ("capture", "launch")] == ["capture", "launch"] * 3


def test_the_trial_has_real_rows_and_padding(emulator):
    seen = []

    def compute(inputs: StepInputs) -> torch.Tensor:
        seen.append([inputs.block_ids.tolist(), inputs.positions.tolist(), inputs.kv_lens.tolist()])
        return TOY(inputs)

    captured(emulator, compute, sizes=(2, 5))
    assert seen[0] == [[0, 0, 0, -1, -1], [0, 1, 2, 0, 0], [1, 2, 3, 0, 0]]
    assert seen[-1] == [[0, 0], [0, 1], [1, 2]]


def test_steps_that_wait_for_the_device_are_not_captured(emulator):
    def compute(inputs: StepInputs) -> torch.Tensor:
        return TOY(inputs) + float(inputs.kv_lens.max())

    with pytest.raises(RuntimeError, match="the host waits for the device"):
        captured(emulator, compute)
    assert "capture" not in emulator.done


@pytest.mark.parametrize("wrong", [1.0, float("nan")])
def test_steps_whose_graph_gives_something_else_are_refused(emulator, wrong):
    calls = []

    def compute(inputs: StepInputs) -> torch.Tensor:
        calls.append(1)
        return TOY(inputs) + (wrong if len(calls) % 3 == 0 else 0.0)

    with pytest.raises(
        RuntimeError, match=r"the captured step of 4 rows differs from the step itself by .* of its size"
    ):
        captured(emulator, compute)


def test_it_is_told_whether_a_token_has_the_same_bits_in_all_sizes(emulator):
    def compute(inputs: StepInputs) -> torch.Tensor:
        return TOY(inputs) * (1.0 if len(inputs.kv_lens) > 2 else 1.0001)

    steps = captured(emulator, TOY)
    assert steps.classes == [[1, 2, 4]]
    assert steps.summary.startswith("decode steps of up to 4 rows are captured, 3 sizes in ")
    assert steps.summary.endswith("; a token has the same bits in all of them")
    steps = captured(emulator, compute)
    assert steps.classes == [[1, 2], [4]]
    assert steps.summary.endswith("; a token has other bits in steps of 1, 2 or 4 rows")
