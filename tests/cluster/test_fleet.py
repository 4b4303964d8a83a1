"""Who is told of a deployment's replicas, and when. Without Serve: what it would push is published by hand."""

from __future__ import annotations

import asyncio
import threading

import pytest

from cluster import fleet
from cluster.fleet import FleetRouter, FleetWatch, publish

ONE, TWO = {"r1": {"address": "a:1"}}, {"r1": {"address": "a:1"}, "r2": {"address": "b:2"}}


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch):
    monkeypatch.setattr(fleet, "_latest", {})
    monkeypatch.setattr(fleet, "_listeners", {})


def watch(deployment: str) -> list[fleet.ReplicaMetadata]:
    """What a watcher is told, as it is told. Its handle to Serve, which is not there, is never asked for."""
    told: list[fleet.ReplicaMetadata] = []
    watching = FleetWatch("app")
    watching.start(deployment, told.append)
    for task in watching._tasks:
        task.cancel()
    return told


def push(deployment: str, replicas: fleet.ReplicaMetadata) -> None:
    """From a thread that is not the watcher's, as Serve does it."""
    thread = threading.Thread(target=publish, args=(deployment, replicas))
    thread.start()
    thread.join()


async def test_a_watcher_is_told_of_every_change_on_its_own_loop_in_order():
    told = watch("Decode")
    push("Decode", ONE)
    push("Decode", TWO)
    assert told == [], "not in the thread that brought it"
    await asyncio.sleep(0)
    assert told == [ONE, TWO]


async def test_who_begins_to_watch_late_is_told_the_latest_at_once():
    push("Decode", ONE)
    push("Decode", TWO)
    assert watch("Decode") == [TWO]


async def test_a_fleet_that_is_empty_is_known_to_be_empty():
    push("Decode", {})
    assert watch("Decode") == [{}]
    assert watch("Prefill") == []


async def test_every_watcher_of_a_deployment_is_told_and_nobody_elses():
    first, second, other = watch("Decode"), watch("Decode"), watch("Prefill")
    push("Decode", ONE)
    await asyncio.sleep(0)
    assert (first, second, other) == ([ONE], [ONE], [])


async def test_any_replica_may_serve_what_still_comes_over_a_handle():
    candidates = [object(), object()]
    assert await FleetRouter.choose_replicas(None, candidates) == [candidates]  # type: ignore[arg-type]
