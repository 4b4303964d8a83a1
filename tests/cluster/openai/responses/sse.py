"""The events of a response's stream, as they came, each checked against the client's own types."""

from __future__ import annotations

import json

import pydantic
from openai.types.responses import Response, ResponseStreamEvent

_EVENT = pydantic.TypeAdapter(ResponseStreamEvent)


def post(server, body, **headers):
    return server.post("/v1/responses", {"model": "tiny", **body}, **headers)


def whole(server, **body):
    """The response, after the client's type took it."""
    reply = post(server, body)
    assert reply.status_code == 200, reply.text
    Response.model_validate(reply.json())
    return reply.json()


def streamed(server, **body):
    """All events as dicts."""
    reply = post(server, {**body, "stream": True})
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in reply.text.split("\n\n")[:-1]:
        name, _, data = block.partition("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        _EVENT.validate_python(event)
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def without_ids(value):
    """The same without what is new in every response: ids and times."""
    if isinstance(value, list):
        return [without_ids(item) for item in value]
    if isinstance(value, dict):
        new = ("id", "call_id", "item_id", "created_at", "completed_at")
        return {key: without_ids(each) for key, each in value.items() if key not in new}
    return value
