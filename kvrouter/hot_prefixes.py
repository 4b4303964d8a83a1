"""Which beginnings of prompts are found held most often. Bounded, pure.

A tree over block names: each node is a beginning where prompts part or end. A name is a digest of all that is before
it, so that two prompts with the same name there have the same beginning, and where they part is found by halving.

    system prompt, 37 blocks          120 requests     one node
      conversation A, 37 + 20 blocks    6 requests     a node each
      conversation B, 37 + 12 blocks    4 requests

Requests count half as much every ten minutes. When there are too many nodes, or names in them, the leaves that count
least go, a quarter of all at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from kvcache.names import NAME_BYTES
from messages.errors import InvariantError

_HALF_LIFE_S = 600.0
_MAX_NODES = 2048
_MAX_NAMES = 1 << 17  #: 2 MiB
_KEPT_SHARE = 0.75  #: of either, when there are too many
#: A beginning is left out where nearly all who had it went on alike: what they went on to says more.
_SAME_SHARE = 0.8
_MAX_EXPONENT = 60.0  #: of the weight of a request; then all are scaled down


@dataclass(frozen=True, slots=True)
class HotPrefix:
    """A beginning of prompts, whole."""

    names: bytes  #: 16 bytes each, concatenated
    num_requests: float
    age_s: float  #: since the last of them
    last_request: str  #: its id
    tenant: int
    block_size: int  #: tokens


@dataclass(slots=True, eq=False)
class _Node:
    names: bytes  #: from its parent's end on; at least one
    parent: _Node | None
    tenant: int = 0
    block_size: int = 0
    weight: float = 0.0  #: sum over requests of 2 ** (when it came / half life)
    last_s: float = 0.0
    last_request: str = ""
    children: dict[bytes, _Node] = field(default_factory=dict)  #: by their first name


class HotPrefixes:
    """Counts beginnings of prompts. One thread; time never goes back."""

    def __init__(self, max_nodes: int = _MAX_NODES, max_names: int = _MAX_NAMES) -> None:
        """Count in at most so many nodes, with at most so many names in all of them; more for a moment."""
        self._max_nodes = max_nodes
        self._max_names = max_names
        self._root = _Node(b"", None)
        self._num_nodes = 0
        self._num_names = 0
        self._epoch_s: float | None = None  # when a request counted 1

    def __len__(self) -> int:
        """Return how many beginnings are known."""
        return self._num_nodes

    def count(self, names: bytes, request_id: str, tenant: int, block_size: int, now_s: float) -> None:
        """Take in that a request was found to begin with these blocks, names concatenated; without any: nothing."""
        if not names:
            return
        amount = self._amount(now_s)
        node, begin = self._root, 0
        while begin < len(names):
            child = node.children.get(names[begin : begin + NAME_BYTES])
            if child is None:
                child = _Node(names[begin:], node, tenant, block_size)
                self._add(child, node)
            elif (num_same := _num_same(child.names, names, begin)) < len(child.names):
                child = self._split(child, num_same)
            child.weight += amount
            child.last_s, child.last_request = now_s, request_id
            begin += len(child.names)
            node = child
        if self._num_nodes > self._max_nodes or self._num_names > self._max_names:
            self._make_room()

    def hottest(self, limit: int, tenant: int | None, now_s: float) -> list[HotPrefix]:
        """Return those that most requests began with, most first. `tenant`: only this one's; None: everybody's."""
        one = self._amount(now_s)
        nodes = [
            node
            for node in self._nodes()
            if (tenant is None or node.tenant == tenant)
            and all(child.weight < _SAME_SHARE * node.weight for child in node.children.values())
        ]
        nodes.sort(key=lambda node: -node.weight)
        return [
            HotPrefix(
                names=_whole(node),
                num_requests=node.weight / one,
                age_s=now_s - node.last_s,
                last_request=node.last_request,
                tenant=node.tenant,
                block_size=node.block_size,
            )
            for node in nodes[:limit]
        ]

    def check_invariants(self) -> None:
        """Raise InvariantError where the counts and the tree do not agree."""
        nodes = list(self._nodes())
        num_names = sum(len(node.names) // NAME_BYTES for node in nodes)
        if (len(nodes), num_names) != (self._num_nodes, self._num_names):
            raise InvariantError(
                f"hot prefixes: {len(nodes)} nodes with {num_names} names, "
                f"counted are {self._num_nodes} with {self._num_names}"
            )
        for node in nodes:
            beneath = sum(child.weight for child in node.children.values())
            if not node.names or beneath > node.weight * (1 + 1e-6):
                raise InvariantError(f"hot prefixes: a node of weight {node.weight} has {beneath} beneath it")

    def _amount(self, now_s: float) -> float:
        """Return what a request counts that comes now."""
        if self._epoch_s is None:
            self._epoch_s = now_s
        exponent = (now_s - self._epoch_s) / _HALF_LIFE_S
        if exponent > _MAX_EXPONENT:
            for node in self._nodes():
                node.weight *= 2.0**-exponent
            self._epoch_s = now_s
            return 1.0
        return float(2.0**exponent)

    def _add(self, child: _Node, parent: _Node) -> None:
        parent.children[child.names[:NAME_BYTES]] = child
        self._num_nodes += 1
        self._num_names += len(child.names) // NAME_BYTES

    def _split(self, node: _Node, num_bytes: int) -> _Node:
        """Put a node between this one and its parent that has the first `num_bytes` of its names; return that."""
        assert node.parent is not None
        upper = _Node(
            node.names[:num_bytes],
            node.parent,
            node.tenant,
            node.block_size,
            node.weight,
            node.last_s,
            node.last_request,
        )
        node.parent.children[upper.names[:NAME_BYTES]] = upper
        node.names, node.parent = node.names[num_bytes:], upper
        upper.children[node.names[:NAME_BYTES]] = node
        self._num_nodes += 1
        return upper

    def _make_room(self) -> None:
        max_nodes, max_names = _KEPT_SHARE * self._max_nodes, _KEPT_SHARE * self._max_names
        while self._num_nodes > max_nodes or self._num_names > max_names:
            leaves = sorted((node for node in self._nodes() if not node.children), key=lambda node: node.weight)
            for leaf in leaves:
                if self._num_nodes <= max_nodes and self._num_names <= max_names:
                    return
                assert leaf.parent is not None
                del leaf.parent.children[leaf.names[:NAME_BYTES]]
                self._num_nodes -= 1
                self._num_names -= len(leaf.names) // NAME_BYTES

    def _nodes(self) -> Iterator[_Node]:
        stack = list(self._root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack += node.children.values()


def _num_same(edge: bytes, names: bytes, begin: int) -> int:
    """Return how many bytes of `edge` also stand in `names` from `begin` on; its first name does."""
    same, other = 1, min(len(edge), len(names) - begin) // NAME_BYTES + 1  # names: the same, and not or beyond the end
    while other - same > 1:
        middle = (same + other) // 2
        at = (middle - 1) * NAME_BYTES
        if edge[at : at + NAME_BYTES] == names[begin + at : begin + at + NAME_BYTES]:
            same = middle
        else:
            other = middle
    return same * NAME_BYTES


def _whole(node: _Node) -> bytes:
    parts: list[bytes] = []
    above: _Node | None = node
    while above is not None:
        parts.append(above.names)
        above = above.parent
    return b"".join(reversed(parts))
