"""Rendezvous hashing (Thaler and Ravishankar 1998): equals are told apart so that prompts that begin alike meet.

A prompt goes to whichever worker ranks highest for its key. Workers that come or go move only the keys they get or had.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from kvcache.names import NAME_BYTES
from messages.route import RouteRequest
from transport.checksum import Words, mixed

_KEY_BLOCKS = 4


def affinity(request: RouteRequest) -> int:
    """Return the key of a prompt, 64 bits: that of its first four blocks, or of the request where it has no block."""
    end = min(len(request.names), _KEY_BLOCKS * NAME_BYTES)
    return _hash(request.names[end - NAME_BYTES : end] or request.request_id.encode())


def worker_hash(worker_id: str) -> int:
    """Return what a worker is known by here, 64 bits."""
    return _hash(worker_id.encode())


def ranks(key: int, worker_hashes: Words) -> Words:
    """Rank workers, known by their hashes, for a key: each one's place among all 64-bit numbers, drawn anew per key."""
    return mixed(worker_hashes ^ np.uint64(key))


def _hash(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")
