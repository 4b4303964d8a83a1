"""Blocks on the node's disk: append-only segment files, an index in memory, one thread that writes, some that read."""
