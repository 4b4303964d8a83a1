"""Both forms of the block index, for tests that hold of either."""

import shutil

import pytest

from kvrouter.compiled_index import CompiledIndex
from kvrouter.index import BlockIndex
from kvrouter.index_library import INDEX
from kvrouter.plain_index import PlainIndex


def plain(num_blocks=lambda _: 1000) -> BlockIndex:
    return PlainIndex(num_blocks)


def compiled(num_blocks=lambda _: 1000) -> BlockIndex:
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler")
    return CompiledIndex(INDEX.build(), num_blocks)


def swept(index: BlockIndex):
    """Sweep all there is to; return who was told what meanwhile."""
    appointed = []
    while not index.is_swept:
        appointed += index.sweep()
    return appointed


both = pytest.mark.parametrize("make", [plain, compiled])
