"""Small pools of one pretended network, each with its layout, checksums and roads: what pulls go between."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.memory.checksums import BlockChecksums
from engine.memory.kv_pool import KvPool, LayerSpec
from engine.puller import BlockPuller
from kvcache.locations import BlockLocation
from kvcache.pool import BlockPool
from kvcache.region import GENERATION_BYTES, RegionLayout
from messages.handoff import RegionsDescribed
from transport.loopback import LoopbackNetwork, LoopbackTransport
from transport.memory import Memory
from transport.protocol import Transport
from transport.roads import Roads

NUM_BLOCKS = 8
SPECS = [LayerSpec(1, 4, 4)]
SIZE = 4


class SharedPool:
    """A pool of random bytes on the roads `networks`, by name, and on `others`."""

    def __init__(
        self,
        networks: dict[str, LoopbackNetwork],
        *,
        seed: int = 0,
        specs: Sequence = SPECS,
        others: Sequence[Transport] = (),
    ) -> None:
        block_bytes = KvPool(specs, SIZE, torch.float32, "cpu", num_blocks=1).block_bytes
        self.layout = RegionLayout(NUM_BLOCKS, block_bytes)
        self.memory = Memory.allocate(self.layout.num_bytes)
        self.kv = KvPool(specs, SIZE, torch.float32, "cpu", memory=self.memory.view[self.layout.data_offset :])
        rows = self.kv.data.view(torch.uint8)
        rows.copy_(torch.randint(0, 256, rows.shape, generator=torch.Generator().manual_seed(seed)))
        self.books = BlockPool(NUM_BLOCKS, SIZE, self.memory.view[: NUM_BLOCKS * GENERATION_BYTES].cast("Q"))
        self.checksums = BlockChecksums(self.books, self.kv)
        self.transports = {name: LoopbackTransport(network, road=name) for name, network in networks.items()}
        self.roads = Roads([*self.transports.values(), *others], self.memory, Memory.allocate(1 << 20), 0.2)
        self.puller = BlockPuller(self.layout, self.memory, self.checksums, self.roads)

    def described(self, **changes: object) -> RegionsDescribed:
        values = {
            "regions": list(self.roads.regions),
            "num_blocks": NUM_BLOCKS,
            "has_generations": True,
            **changes,
        }
        return RegionsDescribed(**values)

    def published(self, *block_ids: int) -> list[BlockLocation]:
        """Those blocks, as the first of a sequence."""
        checksums = self.checksums.published(block_ids).tolist()
        return [
            BlockLocation(index, block_id, self.books.generation(block_id), b"name".ljust(16), SIZE, checksum)
            for index, (block_id, checksum) in enumerate(zip(block_ids, checksums, strict=True))
        ]

    def row(self, block_id: int) -> bytes:
        return bytes(self.memory.view[self.layout.block_offset(block_id) :][: self.layout.block_bytes])

    def damage(self, block_id: int) -> None:
        """Its bytes are others than were published."""
        self.memory.view[self.layout.block_offset(block_id) + 3] ^= 1

    def close(self) -> None:
        self.roads.close()
