"""The links to those who connected to this process's channel, and pull from its region."""

from __future__ import annotations

from collections.abc import Callable

from messages.handoff import RoadMessage
from messages.wire import Message
from transport.channel import PeerId
from transport.protocol import Link
from transport.roads import Roads


class IncomingLinks:
    """One link for each sender that spoke of roads. Belongs to the roads' event loop.

    `send(sender, message)` queues a message; False: the sender is lost.
    """

    def __init__(self, roads: Roads, send: Callable[[PeerId, Message], bool]) -> None:
        self._roads = roads
        self._send = send
        self._links: dict[PeerId, Link] = {}

    def open(self, sender: PeerId) -> Link:
        """Return the link to a sender; it is made if there is none."""
        link = self._links.get(sender)
        if link is None:

            def send(road: str, body: bytes) -> bool:
                return self._send(sender, RoadMessage(road=road, body=body))

            link = self._links[sender] = self._roads.connect(send)
        return link

    def on_message(self, sender: PeerId, message: RoadMessage) -> None:
        """Hand what a sender's road said to the same road here."""
        self._roads.on_message(self.open(sender), message.road, message.body)

    def on_lost(self, sender: PeerId) -> None:
        """Forget a sender that is gone."""
        link = self._links.pop(sender, None)
        if link is not None:
            self._roads.disconnect(link)
