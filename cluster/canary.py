"""Whether routing by what is cached still works: the router's index beside what workers really hold, on a sample.

    pool_only        blocks that a pool or an arena holds, and the index does not know there
    index_only       blocks that the index knows to be held there, and the owner does not have
    predicted_only   blocks that a placement said the decode worker's pool has, and it had not

What differs is looked at again after some seconds, since changes are on their way for a while. A round asks a few
owners a few questions, once in 15 s; the wrong ones of a kind among those checked within five minutes tell: where they
are half of at least 64, routing has become inert, and goes by load alone, or by what is not so.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Final, Literal, NamedTuple, Protocol, TypeAlias, get_args

from kvcache.names import NAME_BYTES, split_names
from messages.cache import BlocksListed, CacheAnswer, CacheQuestion, ClearBlocks, ListBlocks, PieceDone
from messages.errors import KvrayError
from messages.explain import IndexAnswer, IndexQuestion, RouterAnswer, RouterQuestion
from messages.fleet import Stats, WorkerInfo
from messages.tier import AT_HAND, Tier

logger = logging.getLogger(__name__)

Kind: TypeAlias = Literal["pool_only", "index_only", "predicted_only"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

_PERIOD_S: Final = 15.0
_PATIENCE_S: Final = 3.0  #: for which a change may be on its way from a worker to the router
_TIMEOUT_S: Final = 5.0
_SAMPLED: Final = 64  #: blocks of one owner, and of the index
_MAX_OWNERS: Final = 4  #: that are asked for blocks that the index knows
_WINDOW_S: Final = 300.0
_LEAST_BLOCKS: Final = 64  #: checked ones, before they tell anything
_INERT_SHARE: Final = 0.5


class _Checked(NamedTuple):
    checked_s: float
    kind: Kind
    num_checked: int
    num_wrong: int


class CanaryBook:
    """What was checked, and what that says. Pure."""

    def __init__(self) -> None:
        self._lately: deque[_Checked] = deque()
        self._num_checked = 0
        self._num_wrong: Counter[Kind] = Counter()

    def take(self, kind: Kind, num_checked: int, num_wrong: int, now_s: float) -> None:
        """Take in that of so many blocks some were wrong."""
        self._num_checked += num_checked
        self._num_wrong[kind] += num_wrong
        if num_checked:
            self._lately.append(_Checked(now_s, kind, num_checked, num_wrong))
        self._forget(now_s)

    def inert(self, now_s: float) -> list[Kind]:
        """Return the kinds of which too many are wrong."""
        self._forget(now_s)
        checked: Counter[Kind] = Counter()
        wrong: Counter[Kind] = Counter()
        for one in self._lately:
            checked[one.kind] += one.num_checked
            wrong[one.kind] += one.num_wrong
        return [
            kind for kind in KINDS if checked[kind] >= _LEAST_BLOCKS and wrong[kind] >= _INERT_SHARE * checked[kind]
        ]

    def stats(self, now_s: float) -> dict[str, float]:
        """Return the counters and gauges by metric name."""
        wrong = {f'kvray_canary_wrong_blocks_total{{kind="{kind}"}}': float(self._num_wrong[kind]) for kind in KINDS}
        return {
            "kvray_canary_checked_blocks_total": float(self._num_checked),
            "kvray_router_inert": float(bool(self.inert(now_s))),
            **wrong,
        }

    def _forget(self, now_s: float) -> None:
        while self._lately and self._lately[0].checked_s < now_s - _WINDOW_S:
            self._lately.popleft()


class AskedFleet(Protocol):
    """The fleet as the canary asks it: `cluster.dispatch.Dispatcher`."""

    @property
    def fleet(self) -> dict[str, WorkerInfo]:
        """The workers that are there now, by id."""
        ...

    async def router_stats(self) -> Stats:
        """Ask the router for its numbers. Raises as `ask_router` does."""
        ...

    async def ask_router(self, question: RouterQuestion) -> RouterAnswer:
        """Ask the router.

        Raises:
            KvrayError: there is none, or it does not answer.
        """
        ...

    async def ask_owner(self, owner: WorkerInfo, question: CacheQuestion, timeout_s: float) -> CacheAnswer:
        """Ask a worker or a node cache.

        Raises:
            KvrayError: it does not answer.
        """
        ...


class Canary:
    """Checks on one event loop. `predicted` tells the blocks that were said to be held, and those of them not there."""

    def __init__(
        self,
        fleet: AskedFleet,
        predicted: Callable[[], tuple[int, int]] = lambda: (0, 0),
        *,
        patience_s: float = _PATIENCE_S,
        seed: int | None = None,
    ) -> None:
        self.book = CanaryBook()
        self._fleet = fleet
        self._predicted = predicted
        self._told = (0, 0)
        self._patience_s = patience_s
        self._random = random.Random(seed)
        self._was_inert: list[Kind] = []
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Check from now on, on the running loop, until `close`."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    def close(self) -> None:
        """Stop."""
        if self._task is not None:
            self._task.cancel()

    def stats(self) -> dict[str, float]:
        """Return the counters and gauges by metric name."""
        return self.book.stats(asyncio.get_running_loop().time())

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_PERIOD_S * self._random.uniform(0.5, 1.5))
            await self.check()

    async def check(self) -> None:
        """Do one round; who does not answer is left out of it."""
        for part in (self._check_pool, self._check_index):
            try:
                await part()
            except KvrayError as error:
                logger.debug("canary: %s", error.message)
        self._check_predictions()
        self._tell()

    async def _check_pool(self) -> None:
        """See whether the index knows what one owner holds."""
        caches = [cache.info for cache in (await self._fleet.router_stats()).caches]
        owners = [*self._fleet.fleet.values(), *caches]
        if not owners:
            return
        owner = self._random.choice(owners)
        tier: Tier = "host" if owner.role == "cache" else "device"
        cursor = self._random.randrange(max(1, owner.num_blocks)) if self._random.random() < 0.5 else 0
        listed = await self._fleet.ask_owner(owner, ListBlocks(query_id="", tier=tier, cursor=cursor), _TIMEOUT_S)
        assert isinstance(listed, BlocksListed)
        names = split_names(listed.names[: len(listed.names) // NAME_BYTES * NAME_BYTES])
        names = self._random.sample(names, min(_SAMPLED, len(names)))
        unknown = await self._unknown(owner, tier, names)
        if unknown is None:
            return
        if unknown:
            await asyncio.sleep(self._patience_s)
            unknown = await self._unknown(owner, tier, unknown) or []
        num_wrong = await self._num_held(owner, tier, unknown) if unknown else 0
        self.book.take("pool_only", len(names), min(num_wrong, len(unknown)), self._now_s())

    async def _unknown(self, owner: WorkerInfo, tier: Tier, names: Sequence[bytes]) -> list[bytes] | None:
        """Return those names that the index does not know there; None: it is about to be told what the owner has."""
        answer = await self._ask_index(IndexQuestion(query_id="", names=b"".join(names)))
        if owner.worker_id in answer.out_of_step:
            return None
        return [
            name
            for name, holders in zip(names, answer.holders, strict=True)
            if all((one.worker_id, one.tier) != (owner.worker_id, tier) for one in holders)
        ]

    async def _check_index(self) -> None:
        """See whether owners have what the index knows there."""
        infos = dict(self._fleet.fleet)
        infos |= {cache.info.worker_id: cache.info for cache in (await self._fleet.router_stats()).caches}
        claimed = self._claimed(await self._ask_index(IndexQuestion(query_id="", num_sampled=_SAMPLED)), infos)
        for worker_id, tier in self._random.sample(sorted(claimed), min(_MAX_OWNERS, len(claimed))):
            owner, names = infos[worker_id], claimed[worker_id, tier]
            num_wrong = len(names) - await self._num_held(owner, tier, names)
            if num_wrong:
                await asyncio.sleep(self._patience_s)
                again = self._claimed(await self._ask_index(IndexQuestion(query_id="", names=b"".join(names))), infos)
                still = again.get((worker_id, tier), [])
                num_wrong = len(still) - (await self._num_held(owner, tier, still) if still else 0)
            self.book.take("index_only", len(names), max(0, num_wrong), self._now_s())

    def _claimed(self, answer: IndexAnswer, infos: dict[str, WorkerInfo]) -> dict[tuple[str, Tier], list[bytes]]:
        """Return the names that the index knows, by owner and tier, of owners that are there and in step."""
        claimed: dict[tuple[str, Tier], list[bytes]] = defaultdict(list)
        for name, holders in zip(split_names(answer.names), answer.holders, strict=True):
            for one in holders:
                if one.tier in AT_HAND and one.worker_id in infos and one.worker_id not in answer.out_of_step:
                    claimed[one.worker_id, one.tier].append(name)
        return claimed

    async def _num_held(self, owner: WorkerInfo, tier: Tier, names: Sequence[bytes]) -> int:
        """Count those of some blocks, few enough for one question, that an owner has."""
        question = ClearBlocks(query_id="", tier=tier, names=b"".join(names), is_dry_run=True)
        done = await self._fleet.ask_owner(owner, question, _TIMEOUT_S)
        assert isinstance(done, PieceDone)
        return done.num_done + done.num_in_use

    async def _ask_index(self, question: IndexQuestion) -> IndexAnswer:
        answer = await self._fleet.ask_router(question)
        assert isinstance(answer, IndexAnswer)
        return answer

    def _check_predictions(self) -> None:
        now = self._predicted()
        num_checked, num_wrong = (after - before for after, before in zip(now, self._told, strict=True))
        self._told = now
        self.book.take("predicted_only", num_checked, num_wrong, self._now_s())

    def _tell(self) -> None:
        """Say so once, when routing becomes inert, and when it is not any more."""
        inert = self.book.inert(self._now_s())
        if inert and not self._was_inert:
            logger.error("routing by what is cached has become inert: %s (docs/EXPLAIN.md)", ", ".join(inert))
        elif self._was_inert and not inert:
            logger.warning("routing by what is cached works again")
        self._was_inert = inert

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()
