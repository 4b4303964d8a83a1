"""From logits to tokens. What a row gives depends on that row alone: not on the batch, nor on the worker.

Three things make it so. The uniform number of each output token comes from the sequence's own seed. Everything that
crosses the vocabulary is either a comparison or a sum of integers, so that no order of summation, hence no batch shape
and no number of threads, shows in the result. And candidates have one order: logit downwards, then token id upwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.sampling.device_sampler import DeviceSampler
from engine.sampling.grammar_masks import GrammarMasks
from engine.sampling.host_sampler import HostSampler
from engine.sampling.row import LaunchedSamples, SamplingRow
from engine.scheduling.plan import Sampled
from messages.errors import InvariantError, KvrayError
from text.grammar import GrammarCompiler


class Sampler:
    """Chooses the next token of each sequence of a step: on a CPU row by row, on a device all rows at once.

    One thread at a time. Keeps, per sequence that needs it, what its tokens' penalties are and the place in its
    grammar; both are rebuilt from the row's tokens when they are missing or ahead of them, so that nothing has to move
    with a sequence.
    """

    def __init__(self, vocab_size: int, grammars: GrammarCompiler | None) -> None:
        """Make a sampler for rows of `vocab_size`; a row whose grammar is not compiled in `grammars` gets an error."""
        self._vocab_size = vocab_size
        self._masks = GrammarMasks(grammars)
        self._sampler: HostSampler | DeviceSampler | None = None  # made for the device of the first logits

    def forget(self, seq_id: str) -> None:
        """Drop what is kept for a sequence that ended or left; unknown ids are ignored."""
        self._masks.forget(seq_id)
        if self._sampler is not None:
            self._sampler.forget(seq_id)

    def launch(self, logits: Tensor, rows: Sequence[SamplingRow]) -> LaunchedSamples:
        """Put the choice of each row's next token on its way. On a device the host waits for nothing.

        Args:
            logits: [len(rows), vocab_size] float32, always on one device; not changed.
            rows: the sequences whose next tokens these are. A token that one awaits is the one that was launched last
                for its sequence.

        Raises:
            InvariantError: logits of another shape or dtype, or a row with penalties awaits what was not launched.
        """
        if logits.shape != (len(rows), self._vocab_size) or logits.dtype != torch.float32:
            raise InvariantError(
                f"logits are {list(logits.shape)} {logits.dtype}, wanted {[len(rows), self._vocab_size]} float32"
            )
        if self._sampler is None:
            is_host = logits.device.type == "cpu"
            shape = (self._vocab_size, self._masks)
            self._sampler = HostSampler(*shape) if is_host else DeviceSampler(*shape, logits.device)
        return self._sampler.launch(logits, rows)

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[Sampled | KvrayError]:
        """Choose the next token of each row, or say why it has none. Raises as `launch` does."""
        return self.launch(logits, rows).finish()
