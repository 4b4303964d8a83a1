"""The canary over a fake fleet: a real router's index, and pools that are but sets of names."""

from __future__ import annotations

import logging
import random

import pytest

from cluster.canary import KINDS, Canary, CanaryBook
from kvcache.names import split_names
from kvrouter.router import Router, RouterConfig, WorkerJoined
from messages.cache import BlocksListed, ClearBlocks, ListBlocks, PieceDone
from messages.errors import CapacityError, WorkerError
from messages.fleet import KvEvents, LoadReport, NodeCacheStats, Stats
from tests.kvrouter.test_router import info


class FakeFleet:
    """Two decode workers and a node cache, which say what they hold, and a router that may be told less, or more."""

    def __init__(self, *, hears: bool = True, believes: int = 0, is_silent: bool = False) -> None:
        self.router = Router(RouterConfig(is_observed=True))
        self.fleet = {worker_id: info(worker_id, num_blocks=1000) for worker_id in ("d0", "d1")}
        self.cache = info("c", "cache", num_blocks=1000)
        self.is_silent = is_silent
        self.held: dict[str, list[bytes]] = {}
        self.num_asked = 0
        rng = random.Random(1)
        shared = [rng.randbytes(16) for _ in range(200)]  # by all
        for worker in (*self.fleet.values(), self.cache):
            self.router.on_event(WorkerJoined(worker), 0.0)
            self.router.on_event(KvEvents(worker_id=worker.worker_id, seq=0, cleared=True), 0.0)
            names = [*shared, *(rng.randbytes(16) for _ in range(300))]
            self.held[worker.worker_id] = names
            believed = [*(names if hears else ()), *(rng.randbytes(16) for _ in range(believes))]
            tier = "host" if worker.role == "cache" else "device"
            for seq, name in enumerate(believed, 1):
                self.router.on_event(KvEvents(worker_id=worker.worker_id, seq=seq, tier=tier, stored=name), 0.0)

    async def router_stats(self):
        caches = (NodeCacheStats(info=self.cache, values={}),)
        return Stats(query_id="", worker_id="router", role="router", values={}, caches=caches)

    async def ask_router(self, question):
        self.num_asked += 1
        return self.router.who_holds(question)

    async def ask_owner(self, owner, question, timeout_s):
        self.num_asked += 1
        if self.is_silent:
            raise WorkerError("no answer")
        held = self.held[owner.worker_id]
        match question:
            case ListBlocks(tier=tier, cursor=cursor):
                assert tier == ("host" if owner.role == "cache" else "device")
                names = held[cursor:]
                return BlocksListed(
                    query_id="",
                    layout_version=1,
                    num_blocks=len(names),
                    names=b"".join(names),
                    places=b"",
                    num_tokens=b"",
                    checksums=b"",
                )
            case ClearBlocks(names=names, is_dry_run=True):
                there = len(set(split_names(names)) & set(held))
                return PieceDone(query_id="", num_done=there - there // 3, num_in_use=there // 3)
            case _:
                raise AssertionError(question)


async def checked(fleet, rounds=12, **options):
    canary = Canary(fleet, patience_s=0.0, seed=1, **options)
    for _ in range(rounds):
        await canary.check()
    return canary


async def test_it_keeps_silent_where_the_index_says_what_is_so(caplog):
    fleet = FakeFleet()
    canary = await checked(fleet)
    stats = canary.stats()
    assert stats["kvray_canary_checked_blocks_total"] > 500
    assert stats["kvray_router_inert"] == 0.0
    assert not any(stats[f'kvray_canary_wrong_blocks_total{{kind="{kind}"}}'] for kind in KINDS)
    assert not caplog.records
    assert fleet.num_asked <= 12 * 9, "a bounded number of questions in each round"


async def test_an_index_that_hears_nothing_of_what_pools_hold_is_told(caplog):
    canary = await checked(FakeFleet(hears=False))
    assert canary.stats()["kvray_router_inert"] == 1.0
    assert canary.stats()['kvray_canary_wrong_blocks_total{kind="pool_only"}'] > 300
    assert [record.levelno for record in caplog.records] == [logging.ERROR], "once, not in every round"
    assert "pool_only" in caplog.text


async def test_an_index_that_knows_what_no_pool_holds_is_told():
    fleet = FakeFleet(believes=1000)
    for names in fleet.held.values():
        names.clear()
    stats = (await checked(fleet)).stats()
    assert stats["kvray_router_inert"] == 1.0
    assert stats['kvray_canary_wrong_blocks_total{kind="index_only"}'] > 300
    assert stats['kvray_canary_wrong_blocks_total{kind="pool_only"}'] == 0


async def test_a_few_wrong_blocks_are_counted_and_do_not_make_it_inert():
    fleet = FakeFleet(believes=50)
    stats = (await checked(fleet, rounds=30)).stats()
    assert stats['kvray_canary_wrong_blocks_total{kind="index_only"}'] > 0
    assert stats["kvray_router_inert"] == 0.0


async def test_predictions_that_do_not_come_true_are_told_and_each_counts_once():
    told = iter([(100, 80), *[(100, 80)] * 9])
    canary = await checked(FakeFleet(), rounds=10, predicted=lambda: next(told))
    assert canary.stats()["kvray_router_inert"] == 1.0
    assert canary.stats()['kvray_canary_wrong_blocks_total{kind="predicted_only"}'] == 80


async def test_what_came_meanwhile_is_not_wrong():
    fleet = FakeFleet(hears=False)
    ask = fleet.ask_router

    async def ask_and_hear(question):
        answer = await ask(question)
        for worker_id, names in fleet.held.items():
            tier = "host" if worker_id == "c" else "device"
            fleet.router._index.fold(worker_id, tier, stored=b"".join(names))
        return answer

    fleet.ask_router = ask_and_hear
    stats = (await checked(fleet, rounds=5)).stats()
    assert stats["kvray_canary_checked_blocks_total"] > 0
    assert stats['kvray_canary_wrong_blocks_total{kind="pool_only"}'] == 0


async def test_a_worker_whose_snapshot_is_under_way_is_not_compared():
    fleet = FakeFleet(hears=False)
    for worker in (*fleet.fleet.values(), fleet.cache):
        fleet.router.on_event(WorkerJoined(worker), 1.0)
        fleet.router.on_event(
            LoadReport(
                worker_id=worker.worker_id, queued_s=0, num_waiting=0, num_running=0, free_blocks=1, decode_step_s=0
            ),
            1.0,
        )
    assert (await checked(fleet)).stats()["kvray_canary_checked_blocks_total"] == 0


async def test_who_does_not_answer_is_left_out():
    silent = await checked(FakeFleet(is_silent=True), rounds=3)
    assert silent.stats()["kvray_canary_checked_blocks_total"] == 0
    fleet = FakeFleet()

    async def nobody():
        raise CapacityError("no router answers")

    fleet.router_stats = nobody
    assert (await checked(fleet, rounds=3)).stats()["kvray_router_inert"] == 0.0


@pytest.mark.parametrize(("num_wrong", "is_inert"), [(31, False), (32, True)])
def test_half_of_at_least_64_blocks_makes_it_inert_for_five_minutes(num_wrong, is_inert):
    book = CanaryBook()
    book.take("pool_only", 63, 63 if is_inert else 31, 0.0)
    assert book.inert(0.0) == []
    book.take("index_only", 64, num_wrong, 10.0)
    assert book.inert(300.0) == (["index_only"] if is_inert else [])
    assert book.inert(311.0) == []
