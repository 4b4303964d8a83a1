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
    path = INDEX.found()
    if path is None:
        _log.warning("the block index is not compiled, using Python (build it: python -m kvrouter.build)")
        return PlainIndex(num_blocks)
    try:
        return CompiledIndex(path, num_blocks)
    except (OSError, AttributeError) as error:
        _log.warning("the compiled block index does not load, using Python: %s", error)
        return PlainIndex(num_blocks)
