"""How a pool lies in one registered region: on a host a generation per block, then the blocks.

    [generations: num_blocks * uint64, padded to 4096][block 0][block 1] ...

A block's generation changes *before* its bytes do, and only then: it tells a reader whose bytes are not those that
were published whether the block was reused or the bytes were damaged. On an accelerator there are only the blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

_PAGE = 4096
GENERATION_BYTES = 8

NumberKind: TypeAlias = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True, slots=True)
class BlockNumbers:
    """What a block's bytes are: numbers of one kind, in groups `[num_heads, block_size, dim]`, one behind the other."""

    kind: NumberKind
    block_size: int  #: tokens
    groups: tuple[tuple[int, int], ...]  #: num_heads and dim; of heads of one dim that follow each other, K or V

    @property
    def element_bytes(self) -> int:
        """Bytes of one number."""
        return 4 if self.kind == "float32" else 2

    @property
    def num_numbers(self) -> int:
        """How many a block has."""
        return self.block_size * self.num_channels

    @property
    def num_channels(self) -> int:
        """How many places of a token's K and V a block has, of all heads and layers."""
        return sum(num_heads * dim for num_heads, dim in self.groups)


@dataclass(frozen=True, slots=True)
class RegionLayout:
    """Offsets in bytes within a pool's region."""

    num_blocks: int
    block_bytes: int
    has_generations: bool = True

    @property
    def data_offset(self) -> int:
        """Offset of block 0."""
        if not self.has_generations:
            return 0
        return (self.num_blocks * GENERATION_BYTES + _PAGE - 1) // _PAGE * _PAGE

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole region."""
        return self.data_offset + self.num_blocks * self.block_bytes

    def block_offset(self, block_id: int) -> int:
        """Return the offset at which the block's bytes begin."""
        return self.data_offset + block_id * self.block_bytes

    def block_offsets(self, block_ids: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        """Do as `block_offset` for many blocks."""
        return self.data_offset + block_ids.astype(np.int64) * self.block_bytes

    def generation_offset(self, block_id: int) -> int:
        """Return the offset of the block's generation, a uint64, little endian."""
        return block_id * GENERATION_BYTES
