"""Responses that one ingress keeps, asked for at another: real channels, a real router."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import pytest_asyncio

from cluster.config import ResponsesConfig
from cluster.dispatch import Dispatcher, DispatchOptions
from cluster.openai.responses.kept import KeptResponses, id_of
from cluster.openai.responses.protocol import InputItem
from cluster.stored_responses import stored_responses
from kvrouter.worker import RouterWorker
from messages.errors import CapacityError, RequestError
from tests.cluster.openai.responses.test_store import stored
from tests.workers import SECRET, until
from transport.channel import ChannelConfig

CHANNEL = ChannelConfig(heartbeat_s=0.05, lost_after_s=5.0)


@dataclass
class Ingress:
    dispatcher: Dispatcher
    kept: KeptResponses


@dataclass
class Two:
    router: RouterWorker
    first: Ingress
    second: Ingress

    async def found(self, at: Ingress, response_id: str):
        """What `at` finds, once the router knows all ingresses."""
        await until(lambda: len(self.router._ingresses) == 2, 10.0)
        return await at.kept.find("previous_response_id", "me", response_id)


def ingress(name: str, router: RouterWorker) -> Ingress:
    options = DispatchOptions(ingress_id=name, secret=SECRET, channel=CHANNEL, request_timeout_s=60.0, max_ttft_s=20.0)
    dispatcher = Dispatcher(options)
    dispatcher.set_routers([router.address])
    return Ingress(dispatcher, stored_responses(dispatcher, ResponsesConfig(), name))


@pytest_asyncio.fixture
async def two():
    router = RouterWorker("router-1", SECRET, "127.0.0.1", CHANNEL)
    made = Two(router, ingress("abc123", router), ingress("xyz789", router))
    yield made
    for each in (made.first, made.second):
        each.dispatcher.close()
    router.close()


def keep(at: Ingress, text: str, previous=None) -> str:
    response_id = id_of(at.kept.new_key())
    at.kept.keep("me", response_id, stored(text, previous))
    return response_id


def said(items: list[InputItem]) -> list[object]:
    return [item.content for item in items]


async def test_a_response_is_found_whichever_ingress_is_asked(two):
    first = stored("one")
    two.first.kept.keep("me", id_of(two.first.kept.new_key()), first)
    response_id = keep(two.first, "two", first)
    here = await two.found(two.first, response_id)
    there = await two.found(two.second, response_id)
    assert said(there.conversation()) == said(here.conversation()) == ["one", "one!", "two", "two!"]
    assert (there.reply, said(there.given())) == (here.reply, said(here.given()))
    third = keep(two.second, "three", there)
    assert said((await two.found(two.first, third)).conversation())[-4:] == ["two", "two!", "three", "three!"]


async def test_another_owner_does_not_find_it_there_either(two):
    response_id = keep(two.first, "one")
    assert await two.found(two.second, response_id)
    with pytest.raises(RequestError) as raised:
        await two.second.kept.find("previous_response_id", "you", response_id)
    assert raised.value.status == 404
    with pytest.raises(RequestError):
        await two.second.kept.drop("you", response_id)
    assert await two.found(two.first, response_id)


async def test_it_is_forgotten_by_way_of_another_ingress(two):
    response_id = keep(two.first, "one")
    assert await two.found(two.second, response_id)
    await two.second.kept.drop("me", response_id)
    for at in (two.first, two.second):
        with pytest.raises(RequestError):
            await two.found(at, response_id)
    with pytest.raises(RequestError):
        await two.second.kept.drop("me", response_id)


@pytest.mark.parametrize("name", ["gone00", "xyz789"])
async def test_what_nobody_has_is_a_404(two, name):
    assert await two.found(two.second, keep(two.first, "one"))
    with pytest.raises(RequestError) as raised:
        await two.found(two.first, f"resp_{name}{'0' * 32}")
    assert raised.value.status == 404


async def test_without_a_router_its_own_are_found_and_others_are_to_be_asked_for_later(two):
    own, other = keep(two.first, "one"), keep(two.second, "two")
    assert await two.found(two.first, other)
    two.router.close()
    await until(lambda: two.first.dispatcher._router is None, 20.0)
    assert two.first.kept.store.find("me", own, 0.0) is not None
    with pytest.raises(CapacityError) as raised:
        await two.first.kept.find("previous_response_id", "me", other)
    assert raised.value.status == 503
