"""Opens what there is in more than one form."""

from __future__ import annotations

import logging
from collections.abc import Callable

from kvrouter.compiled_index import CompiledIndex
from kvrouter.index import BlockIndex
from kvrouter.index_library import INDEX
from kvrouter.plain_index import PlainIndex

_log = logging.getLogger(__name__)


def open_index(num_blocks: Callable[[str], int]) -> BlockIndex:
    """Open an empty index: the compiled one where it was built and loads, else the plain one, with a log line.

    `num_blocks` tells how many blocks a worker has room for.
    """
    compiled = INDEX.opened(lambda path: CompiledIndex(path, num_blocks))
    if compiled is None:
        _log.warning(
            "the block index is not compiled, or does not load, using Python (build it: python -m kvrouter.build)"
        )
        return PlainIndex(num_blocks)
    return compiled
