"""The block names of sequences that begin: of several choices of one prompt, computed once."""

from __future__ import annotations

from engine.scheduling.plan import SequenceSpec
from kvcache.names import BlockNamer, pack_tokens


class PromptNames:
    """Names prompts, and remembers the last one: its choices come one after the other, and share a list of tokens."""

    def __init__(self, fingerprint: bytes, block_size: int) -> None:
        self._fingerprint = fingerprint
        self._block_size = block_size
        self._last: SequenceSpec | None = None
        self._namer: BlockNamer | None = None
        self._names: list[bytes] = []

    def is_known(self, spec: SequenceSpec) -> bool:
        """Tell whether a prompt that was named last has these very tokens."""
        last = self._last
        return last is not None and spec.token_ids is last.token_ids and spec.salt == last.salt

    def of(self, spec: SequenceSpec) -> tuple[BlockNamer, list[bytes]]:
        """Name the full blocks of all tokens of `spec`; both are the caller's, to go on with."""
        if self._namer is None or not self.is_known(spec):
            self._last, self._namer = spec, BlockNamer(self._fingerprint, spec.salt, self._block_size)
            num_full_tokens = len(spec.token_ids) // self._block_size * self._block_size
            self._names = self._namer.extend(pack_tokens(spec.token_ids[:num_full_tokens]))
        return self._namer.copy(), self._names.copy()
