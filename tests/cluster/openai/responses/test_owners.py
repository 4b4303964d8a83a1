"""Whose responses are whose: tenants' by the tenant, others' by the key."""

from __future__ import annotations

import pytest

from cluster.openai.callers import Caller, Callers

ACME = Caller(name="acme", base_salt=b"a" * 16, is_operator=False)
GLOBEX = Caller(name="globex", base_salt=b"g" * 16, is_operator=False)


@pytest.fixture
def server(serve):
    keys = [("acme-1", ACME), ("acme-2", ACME), ("globex", GLOBEX), ("ops-1", Caller()), ("ops-2", Caller())]
    return serve(callers=Callers(keys))


def status(server, key, response_id, method="GET", path=""):
    return server.http.request(
        method, f"{server.url}/v1/responses/{response_id}{path}", headers={"authorization": f"Bearer {key}"}
    ).status_code


@pytest.mark.parametrize(
    ("maker", "friend", "strangers"),
    [("acme-1", "acme-2", ("globex", "ops-1")), ("ops-1", "ops-1", ("ops-2", "acme-1"))],
)
def test_nobody_else_finds_a_response(server, maker, friend, strangers):
    made = server.client(maker).responses.create(model="tiny", input="A secret")
    for key in strangers:
        for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/input_items")):
            assert status(server, key, made.id, method, path) == 404
        for body in (
            {"input": "Hi", "previous_response_id": made.id},
            {"input": [{"type": "item_reference", "id": made.output[0].id}]},
        ):
            reply = server.post("/v1/responses", {"model": "tiny", **body}, authorization=f"Bearer {key}")
            assert reply.status_code == 404
    assert status(server, friend, made.id) == 200
    assert status(server, friend, made.id, "DELETE") == 200


def test_a_tenant_is_told_what_is_not_built(server):
    for path in ("/v1/embeddings", "/v1/messages"):
        reply = server.post(path, {}, authorization="Bearer acme-1")
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_served")


def test_without_any_keys_all_are_one(serve):
    server = serve()
    made = server.client("one").responses.create(model="tiny", input="Hi")
    assert server.client("two").responses.retrieve(made.id).id == made.id
