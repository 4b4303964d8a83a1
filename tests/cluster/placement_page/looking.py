"""A deployment that is worth looking at: prompts that were placed, blocks in every tier, a tenant with its own."""

from __future__ import annotations

import time

from messages.route import RequestEnded, RouteRequest
from tests.cluster.openai.cache_world import ACME, PROMPT, World, names_of, until


async def busy(world: World) -> None:
    """Have prompts placed: three of nobody's, one of acme's, as far as they are held."""
    await world.write(PROMPT)
    own = await world.write(PROMPT, None, ACME)
    await until(lambda: world.is_known(own[-1], "disk"))
    for number in range(3):
        place(world, f"chat-{number}", names_of(PROMPT))
    place(world, "acme-1", own, ACME.owner(None))


def place(world: World, request_id: str, names: list[bytes], tenant: int = 0) -> None:
    """Have the router place a prompt with blocks of these names, and end it."""
    asked = RouteRequest(
        request_id=request_id, names=b"".join(names), num_prompt_tokens=len(PROMPT), max_tokens=4, tenant=tenant
    )
    world.router.router.on_event(asked, time.monotonic())
    world.router.router.on_event(RequestEnded(request_id=request_id), time.monotonic())
