"""The peers of a worker: other owners of blocks, whatever their role, with what it takes to pull from them.

A peer is known by its channel's address. It is connected to when it is first wanted, and forgotten when it is lost:
whoever wants it again connects anew.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from engine.crashing import Crash, guarded
from engine.loans import LearnHandoff
from engine.puller import REJECTIONS, BlockPuller, PullOutcome
from kvcache.price import ASSUMED_MOVES, MoveCost
from kvcache.region import RegionLayout
from messages.fleet import RoadStatus
from messages.handoff import DescribeRegions, RegionInfo, RegionsDescribed, RoadMessage
from messages.price import MovePrice
from messages.request import Copy
from messages.tier import AT_HAND, Tier
from messages.wire import Message
from transport.channel import ChannelClient, ChannelConfig
from transport.protocol import Link, RegionError
from transport.roads import Roads
from transport.secret import ClusterSecret

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Peer:
    """An owner of blocks as this worker sees it."""

    client: ChannelClient
    link: Link  #: what roads say to it
    address: str
    costs: dict[Tier, MoveCost] = field(default_factory=dict)  #: of its blocks, by where it has them
    told: dict[Tier, MovePrice] = field(default_factory=dict)  #: the prices that were last reported
    pulled_s: float | None = None  #: when the first pull had ended
    layout: RegionLayout | None = None  #: of its pool, once it described it
    regions: tuple[RegionInfo, ...] = ()  #: where it lies, as it described it
    is_misfit: bool = False  #: its blocks cannot be pulled into ours

    def cost(self, tier: Tier) -> MoveCost:
        """Return what its blocks in that tier cost, as it is learned."""
        if tier not in self.costs:
            self.costs[tier] = MoveCost(self.address, tier)
        return self.costs[tier]


class Peers:
    """All peers of one worker. All methods belong to one event loop.

    `on_message(address, message)` gets what is not about regions and roads; `on_lost(address)` comes once for each
    connection that ends but by `close`: what the peer held for us is gone, pulls from it fail by themselves.
    `on_described(address)` comes once it said where its blocks lie.
    `crash` gets what any of it raises.
    """

    def __init__(
        self,
        puller: BlockPuller,
        roads: Roads,
        secret: ClusterSecret,
        channel: ChannelConfig,
        on_message: Callable[[str, Message], None],
        on_lost: Callable[[str], None],
        crash: Crash,
        on_described: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._puller = puller
        self._roads = roads
        self._secret = secret
        self._channel = channel
        self._on_message = on_message
        self._on_lost = on_lost
        self._on_described = on_described
        self._crash = crash
        self._block_bytes = puller.block_bytes
        self.own_address = ""  #: of this worker's own channel, once it listens: nothing is pulled from there
        self._peers: dict[str, Peer] = {}

    def connect(self, address: str) -> None:
        """Begin to connect to an owner, unless that was done, and ask where its blocks lie: roads are tried at once."""
        if address in self._peers:
            return
        client = ChannelClient(
            self._secret,
            address,
            on_message=guarded(lambda message: self._take(address, message), self._crash),
            on_lost=guarded(lambda reason: self._lose(address, reason), self._crash),
            config=self._channel,
        )
        link = self._roads.connect(lambda road, body: client.send(RoadMessage(road=road, body=body)))
        self._peers[address] = Peer(client, link, address)
        client.send(DescribeRegions())

    def send(self, address: str, message: Message) -> None:
        """Send a message to a connected peer; it is dropped where there is none at `address`."""
        peer = self._peers.get(address)
        if peer is not None:
            peer.client.send(message)

    def can_pull(self, address: str) -> bool:
        """Tell whether blocks can come from `address`, as far as is known: an owner not connected to yet is trusted."""
        peer = self._peers.get(address)
        if peer is None:
            return self._roads.names != ()
        return not peer.is_misfit and self._roads.can_pull(peer.link)

    def price_of(self, copy: Copy) -> MovePrice | None:
        """Return what bringing blocks from a copy costs, as far as is known; None where they cannot come from there."""
        if copy.address == self.own_address or not self.can_pull(copy.address):
            return None
        peer = self._peers.get(copy.address)
        price = None if peer is None else peer.cost(copy.tier).price
        return price or ASSUMED_MOVES[copy.tier]

    def layout_of(self, address: str) -> RegionLayout | None:
        """Return how the pool at `address` lies; None before it was described, or where it is of another kind."""
        peer = self._peers.get(address)
        return None if peer is None else peer.layout

    def region_of(self, address: str, road: str) -> RegionInfo | None:
        """Return where the pool at `address` lies for a road; None where it is not described so."""
        peer = self._peers.get(address)
        regions = () if peer is None else peer.regions
        return next((region for region in regions if region.road == road), None)

    async def pull(
        self, source: str, blocks: bytes, targets: Sequence[int], on_progress: Callable[[], None]
    ) -> PullOutcome:
        """Bring blocks from the pool at `source` here, as `BlockPuller.pull`; all are bad if it is not connected.

        `on_progress` is called for each block that came, from any thread.
        """
        peer = self._peers.get(source)
        if peer is None or peer.layout is None:
            return PullOutcome.nothing(blocks)
        outcome = await self._puller.pull(peer.link, peer.layout, blocks, targets, on_progress)
        if peer.pulled_s is None:
            peer.pulled_s = time.monotonic()
        if outcome.pulled is not None:
            num_bytes = len(targets) * self._block_bytes
            at_hand: frozenset[Tier] = AT_HAND & peer.costs.keys() or frozenset({"device"})
            for tier in at_hand:
                peer.cost(tier).observe_pull(outcome.pulled.road, num_bytes, outcome.pulled.elapsed_s)
        return outcome

    def observe_handoff(self, learned: LearnHandoff) -> None:
        """Learn from KV that came, as `MoveCost.observe_handoff`, in blocks; `asked_s` is by time.monotonic().

        What was asked before the first pull waited until the roads were tried, and says nothing of later ones.
        """
        peer = self._peers.get(learned.source)
        if peer is None or peer.pulled_s is None or learned.asked_s < peer.pulled_s:
            return
        num_bytes = learned.num_blocks * self._block_bytes
        if learned.tier is None or learned.tier in AT_HAND:
            peer.cost(learned.tier or "device").observe_handoff(learned.elapsed_s, learned.source_s, num_bytes)
        else:
            peer.cost(learned.tier).observe_load(learned.tier, num_bytes, learned.elapsed_s)

    def changed_prices(self) -> tuple[MovePrice, ...]:
        """Return the prices of those peers whose price differs by a tenth or so from what was told last."""
        changed = []
        for peer in self._peers.values():
            for tier, cost in peer.costs.items():
                price, told = cost.price, peer.told.get(tier)
                if price is not None and (told is None or _rounded(price) != _rounded(told)):
                    peer.told[tier] = price
                    changed.append(price)
        return tuple(changed)

    def prices(self) -> tuple[MovePrice, ...]:
        """Return the prices of all peers that were pulled from."""
        prices = (cost.price for peer in self._peers.values() for cost in peer.costs.values())
        return tuple(price for price in prices if price is not None)

    def statuses(self) -> tuple[RoadStatus, ...]:
        """Return the road from each peer."""
        return tuple(self._roads.status(peer.link, address) for address, peer in self._peers.items())

    def stats(self) -> dict[str, float]:
        """Return what became of pulls, by metric name."""
        rejected = {
            f'kvray_blocks_rejected_total{{reason="{reason}"}}': float(self._puller.num_rejected[reason])
            for reason in REJECTIONS
        }
        return {"kvray_pulls_failed_total": float(self._puller.num_failed), **rejected}

    def close(self) -> None:
        """Hang up on all peers; `on_lost` does not come any more."""
        for peer in self._peers.values():
            peer.client.close()
            self._roads.disconnect(peer.link)
        self._peers.clear()

    def _take(self, address: str, message: Message) -> None:
        peer = self._peers[address]
        match message:
            case RegionsDescribed():
                self._learn(address, peer, message)
            case RoadMessage(road=road, body=body):
                self._roads.on_message(peer.link, road, body)
            case _:
                self._on_message(address, message)

    def _learn(self, address: str, peer: Peer, described: RegionsDescribed) -> None:
        try:
            peer.layout = self._puller.understand(described)
            peer.regions = tuple(described.regions)
        except RegionError as error:
            peer.is_misfit = True
            logger.warning("peer at %s cannot be pulled from: %s", address, error.message)
        else:
            self._roads.learn(peer.link, described.regions)
            self._on_described(address)

    def _lose(self, address: str, reason: str) -> None:
        peer = self._peers.pop(address)
        logger.warning("peer at %s lost: %s", address, reason)
        self._roads.disconnect(peer.link)
        peer.client.close()
        self._on_lost(address)


def _rounded(price: MovePrice) -> tuple[str, ...]:
    return (price.road, *(f"{part:.1e}" for part in (price.fixed_s, price.byte_s, price.handoff_s)))
