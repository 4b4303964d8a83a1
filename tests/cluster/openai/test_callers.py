"""Whose key it is, and what follows from it."""

from __future__ import annotations

import re

import pytest

from cluster.openai.callers import NOBODY, Caller, Callers
from cluster.openai.edge import TENANT_PATHS
from kvcache.names import tenant_number, tenant_of, tenant_salt
from messages.errors import ConfigError, RequestError

SECRET = bytes(32)
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def tenant(name: str, **settings) -> Caller:
    return Caller(name=name, base_salt=tenant_salt(name, SECRET), is_operator=False, **settings)


ACME, GLOBEX = tenant("acme"), tenant("globex")
KEYS = [("old", ACME), ("new", ACME), ("other", GLOBEX), ("plain", NOBODY)]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_a_tenant_has_any_number_of_keys_and_whoever_has_none_of_them_is_nobody():
    callers = Callers(KEYS)
    assert callers.find("Bearer old") == callers.find("bearer new") == ACME
    assert callers.find("Bearer plain") == NOBODY
    assert callers.find("Bearer") is callers.find("Basic old") is callers.find("Bearer no") is None
    assert list(callers.tenants) == ["acme", "globex"]
    assert callers.names == {tenant_number("acme"): "acme", tenant_number("globex"): "globex"}


def test_without_any_key_everybody_is_nobody_in_particular():
    assert Callers().find("") == Callers().find("Bearer x") == NOBODY
    assert Callers((), Caller(may_hint=True)).find("").may_hint


def test_one_key_of_two_callers_is_refused_and_not_repeated():
    with pytest.raises(ConfigError) as caught:
        Callers([*KEYS, ("other", ACME)])
    assert caught.value.message == "API keys: one is of tenant globex and of tenant acme; each wants keys of its own"


def test_salts_of_tenants_and_of_nobody_never_meet():
    salts = [caller.salt(salt) for caller in (NOBODY, ACME, GLOBEX) for salt in (None, "a", "b")]
    assert len(set(salts)) == len(salts)
    assert NOBODY.salt(None) == b""
    assert NOBODY.salt("a") == b"a"
    assert tenant_salt("acme", bytes(31) + b"1") != tenant_salt("acme", SECRET)


def test_blocks_are_the_tenants_whatever_its_client_adds_and_nobodys_are_by_what_it_adds():
    assert ACME.owner(None) == ACME.owner("a") == tenant_number("acme") != GLOBEX.owner(None)
    assert (NOBODY.owner(None), NOBODY.owner("acme")) == (0, tenant_of(b"acme"))
    assert tenant_of(b"acme") != tenant_number("acme")


def test_only_operators_mean_others():
    callers = Callers(KEYS)
    assert callers.meant(NOBODY, "acme") == callers.meant(ACME, "acme") == callers.meant(ACME, None) == ACME
    with pytest.raises(RequestError, match="want that of an operator"):
        callers.meant(ACME, "globex")
    with pytest.raises(RequestError, match="want one of acme, globex"):
        callers.meant(NOBODY, "initech")


def test_no_form_of_a_caller_shows_its_salt():
    assert str(ACME.base_salt) not in f"{ACME} {ACME!r}"


# -------------------------------------------------------------------------------------------------------- over HTTP


@pytest.fixture
def server(serve):
    return serve(callers=Callers(KEYS))


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_sequences_carry_the_salt_and_the_number_of_whose_key_it_is(server, path):
    prompt = {"messages": [{"role": "user", "content": "Hi"}]} if path == CHAT else {"prompt": "Hi"}
    for key, salt in (("old", None), ("new", "mine"), ("other", "mine"), ("plain", None), ("plain", "mine")):
        body = prompt | ({} if salt is None else {"cache_salt": salt})
        assert server.post(path, body, **bearer(key)).status_code == 200
    told = [(request.salt, request.tenant) for request in server.backend.requests]
    assert told == [
        (ACME.base_salt, tenant_number("acme")),
        (ACME.base_salt + b"mine", tenant_number("acme")),
        (GLOBEX.base_salt + b"mine", tenant_number("globex")),
        (b"", 0),
        (b"mine", tenant_of(b"mine")),
    ]


def test_a_tenant_sees_nothing_of_the_whole_cluster(server):
    for path in ("/metrics", "/docs/oauth2-redirect", "/status", "/nowhere", "/v1/cache/lookup/more"):
        reply = server.http.get(server.url + path, headers=bearer("old"))
        assert reply.status_code == 403
        assert reply.json()["error"]["code"] == "not_allowed"
    assert server.http.get(f"{server.url}/metrics", headers=bearer("plain")).status_code == 200
    assert server.http.get(f"{server.url}/nowhere", headers=bearer("plain")).status_code == 404
    for path in ("/v1/models", "/v1/models/tiny", "/docs", "/openapi.json"):
        assert server.http.get(server.url + path, headers=bearer("old")).status_code == 200


def test_what_a_tenant_may_ask_is_what_there_is(server):
    paths = set(server.http.get(f"{server.url}/openapi.json", headers=bearer("plain")).json()["paths"])
    known = {re.sub(r"\{\w+\}", "{id}", path) for path in paths} | {"/docs", "/openapi.json"}
    added = ("/v1/cache/", "/v1/route", "/cache")  # by whoever knows the fleet
    assert {path for path in TENANT_PATHS if not path.startswith(added)} <= known


def test_neither_metrics_nor_errors_show_a_key(server):
    server.post(COMPLETIONS, {"prompt": "Hi"}, **bearer("old"))
    scraped = server.http.get(f"{server.url}/metrics", headers=bearer("plain")).text
    assert not any(word in scraped for word in ("acme", "Bearer", '"old"', '"plain"'))
