"""Decode steps as graphs, one for each bucket of rows: captured at the start, launched over inputs in fixed places.

    buckets   largest first, so that the smaller ones work in the memory of the larger
    inputs    one run of words on the device, of which each bucket takes as much as it needs, from the beginning
    logits    one tensor, of which each bucket writes its rows

What a graph reads stays where it is: these two, the pool, the block tables, the tokens that were sampled last, the
weights. Nothing in it depends on what the host knew as it was captured, but for the number of rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.steps.device import StepDevice, StepGraph
from engine.steps.packing import NOWHERE, HostInputs, StepInputs, StepShape
from engine.steps.staging import Staging

#: Largest |captured - eager| / |eager| of a row's logits that passes: both run the same kernels.
_TOLERANCE = 0.02


@dataclass(frozen=True, slots=True)
class TrialLimits:
    """What the rows of a trial may be: positions within one block, and tokens that there are."""

    num_positions: int
    num_tokens: int


class CapturedSteps:
    """The graphs, and what they read and write. One thread at a time, in inference mode."""

    def __init__(
        self,
        device: StepDevice,
        sizes: Sequence[int],
        compute: Callable[[StepInputs], torch.Tensor],
        vocab_size: int,
        limits: TrialLimits,
    ) -> None:
        """Capture a step for each of `sizes`, and hold what each gives once to what it gives eagerly.

        Rows of the trial are stored in block 0 and read from it by way of slot 0, whose table is all 0 by then.

        Args:
            device: where steps run.
            sizes: numbers of rows, upwards.
            compute: puts a step of decode rows, all kept, on its way, and returns its logits `[rows, vocab_size]`;
                reads nothing that may lie elsewhere by the time of a launch.
            vocab_size: width of the logits.
            limits: of the trial.

        Raises:
            RuntimeError: the step waits for the device, cannot be captured or does not fit into memory, or its
                graph gives something else.
        """
        started_s = time.perf_counter()
        self.sizes = tuple(sizes)
        self._device = device
        self._compute = compute
        self._words = torch.zeros(StepShape.of_bucket(sizes[-1]).num_words, dtype=torch.int64, device=device.device)
        self._logits = torch.zeros(sizes[-1], vocab_size, device=device.device)  # [most rows, vocab_size] float32
        self._staging = Staging(device, len(self._words))
        self._graphs: dict[int, StepGraph] = {}
        shapes = {size: StepShape.of_bucket(size) for size in self.sizes}
        self._inputs = {size: shape.cut(self._words[: shape.num_words]) for size, shape in shapes.items()}
        first_rows = {size: self._capture(size, limits) for size in reversed(self.sizes)}
        self.classes = _classes(first_rows)  #: sizes by the bits that the same row has in them
        self.elapsed_s = time.perf_counter() - started_s

    @property
    def summary(self) -> str:
        """What was captured, a line for people."""
        found = f"decode steps of up to {self.sizes[-1]} rows are captured, {len(self.sizes)} sizes"
        same = "the same bits in all of them"
        if len(self.classes) > 1:
            same = f"other bits in steps of {' or '.join(', '.join(map(str, each)) for each in self.classes)} rows"
        return f"{found} in {self.elapsed_s:.1f} s; a token has {same}"

    def launch(self, size: int, write: Callable[[HostInputs], None]) -> torch.Tensor:
        """Put a step on its way whose inputs, on the host, `write` fills in; they are of so many rows, all kept.

        Returns:
            The kept rows' logits, `[size, vocab_size]` float32, until the next launch.
        """
        self._bring(size, write)
        self._graphs[size].launch()
        return self._logits[:size]

    def inputs(self, size: int) -> StepInputs:
        """Return the inputs of a step of so many rows on the device, as it was launched last."""
        return self._inputs[size]

    def _bring(self, size: int, write: Callable[[HostInputs], None]) -> None:
        shape = StepShape.of_bucket(size)
        self._staging.bring(
            shape.num_words, lambda words: write(shape.cut_host(words)), target=self._words[: shape.num_words]
        )

    def _capture(self, size: int, limits: TrialLimits) -> torch.Tensor:
        """Capture the step of so many rows; return the logits of a row that is the same for all sizes."""
        inputs, logits = self.inputs(size), self._logits[:size]
        num_real = min(size, limits.num_positions)

        def work() -> None:
            logits.copy_(self._compute(inputs))

        self._bring(size, lambda trial: _write_trial(trial, num_real, limits.num_tokens))
        work()  # once without a watch: kernels are compiled, libraries make themselves ready
        with self._device.forbid_waits():
            work()
        eager = logits[:num_real].clone()
        self._graphs[size] = self._device.capture(work)
        logits.fill_(torch.nan)
        self._graphs[size].launch()
        captured = logits[:num_real]
        distance = float(((captured - eager).norm(dim=1) / eager.norm(dim=1).clamp_min(1e-6)).max())
        if not distance <= _TOLERANCE:
            raise RuntimeError(
                f"the captured step of {size} rows differs from the step itself by {distance:.2g} of its size, "
                f"at most {_TOLERANCE} was expected"
            )
        return captured[0].clone()


def _write_trial(inputs: HostInputs, num_real: int, num_tokens: int) -> None:
    """Write one sequence's first `num_real` tokens as decode rows, and padding behind them, into `inputs`."""
    places = np.arange(num_real)
    inputs.tokens[:], inputs.kv_lens[:] = 0, 0
    inputs.tokens[0, :num_real] = 7919 * places % num_tokens
    inputs.tokens[1, :num_real] = inputs.tokens[3, :num_real] = places
    inputs.tokens[2, num_real:] = NOWHERE
    inputs.kv_lens[:num_real] = places + 1
    inputs.kept[:] = np.arange(len(inputs.kept))


def _classes(rows: dict[int, torch.Tensor]) -> list[list[int]]:
    """Return which numbers of rows gave equal bits, upwards."""
    classes: list[list[int]] = []
    for size in sorted(rows):
        same = next((each for each in classes if torch.equal(rows[each[0]], rows[size])), None)
        if same is None:
            classes.append([size])
        else:
            same.append(size)
    return classes
