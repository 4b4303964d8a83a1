"""`python -m nodecache`: the node cache process (nodecache.process)."""

from __future__ import annotations

from nodecache.process import main

main()
