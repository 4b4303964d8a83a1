"""The configuration: what it takes, what it refuses and in which words, where it comes from."""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec
import pytest
import rich.pretty
import yaml

from cluster.config import (
    KvrayConfig,
    forget_credentials,
    load_config,
    named_ray_address,
    parse_config,
    parse_size,
    prepare_environment,
)
from cluster.openai.call_formats import FORMATS
from cluster.openai.thought_formats import THOUGHT_FORMATS
from messages.errors import ConfigError


def refusal(document: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(document)
    assert "\n" not in caught.value.message
    return caught.value.message


def test_nothing_given_is_all_defaults():
    assert parse_config({}) == KvrayConfig() == load_config(None, {})


def test_a_section_that_is_empty_in_yaml_is_all_defaults():
    assert parse_config(yaml.safe_load("http:\nengine: {block_size: 32}")).engine.block_size == 32


def test_a_model_may_be_named_by_its_directory_alone(tmp_path):
    path = tmp_path / "kvray.yaml"
    path.write_text("model: /models/x")
    assert parse_config({"model": "/models/x"}).model.path == "/models/x"
    config = load_config(path, {"model": {"dtype": "float32"}})
    assert (config.model.path, config.model.dtype) == ("/models/x", "float32")


def test_values_are_frozen():
    with pytest.raises(AttributeError):
        parse_config({}).http.port = 1


def test_what_is_shown_can_be_read_again():
    config = parse_config({"http": {"api_keys": ["k"]}, "pools": {"decode_labels": {"zone": "a"}}, "log": {}})
    document = yaml.safe_load(yaml.safe_dump(msgspec.to_builtins(config, builtin_types=(), str_keys=True, order=None)))
    assert parse_config(document) == config


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"engin": {}}, "engin: no such key; did you mean engine?"),
        (
            {"zebra": {}},
            "zebra: no such key; known are model, engine, pools, http, connections, responses, network, tiers, "
            "tenants, log, observability, autoscaling",
        ),
        ({"engine": {"blok_size": 1}}, "engine.blok_size: no such key; did you mean block_size?"),
        ({"log": {"zebra": 1}}, "log.zebra: no such key; known are level, format"),
        ({"http": 3}, "http: wanted a mapping, saw int 3"),
        ({"http": {"port": "8000"}}, "http.port: wanted int, saw str '8000'"),
        ({"http": {"port": True}}, "http.port: wanted int, saw bool True"),
        ({"http": {"port": 80.5}}, "http.port: wanted int, saw float 80.5"),
        ({"model": {"path": None}}, "model.path: wanted str, saw NoneType None"),
        ({"model": {"served_names": "a"}}, "model.served_names: wanted a list, saw str 'a'"),
        ({"pools": {"prefill_labels": {"a": 3}}}, "pools.prefill_labels: wanted str in every entry, saw dict {'a': 3}"),
        (
            {"model": {"dtype": "float8"}},
            "model.dtype: wanted one of auto, float32, bfloat16, float16, saw str 'float8'",
        ),
        (
            {"tiers": {"remote_compression": "zip"}},
            "tiers.remote_compression: wanted one of off, lossless, int8, saw str 'zip'",
        ),
        ({"log": {"format": "xml"}}, "log.format: wanted one of text, json, saw str 'xml'"),
        (
            {"model": {"tool_parser": "x"}},
            f"model.tool_parser: wanted one of {', '.join(FORMATS)}, saw str 'x'",
        ),
        (
            {"model": {"reasoning_parser": "x"}},
            f"model.reasoning_parser: wanted one of {', '.join(THOUGHT_FORMATS)}, saw str 'x'",
        ),
        (
            {"http": {"client_chat_template": "yes"}},
            "http.client_chat_template: wanted one of refuse, use, saw str 'yes'",
        ),
        ({1: {}}, "names of sections: wanted str, saw dict {1: {}}"),
    ],
)
def test_a_wrong_shape_is_refused_by_place_and_value(document, words):
    assert refusal(document) == words


@pytest.mark.parametrize(
    ("place", "value", "wanted"),
    [
        ("engine.block_size", 0, "1 to 1024"),
        ("engine.block_size", 2048, "1 to 1024"),
        ("engine.max_num_seqs", 0, "1 to 65536"),
        ("engine.max_num_batched_tokens", -1, "1 to 1048576"),
        ("engine.num_threads", 0, "1 to 4096"),
        ("model.max_model_len", 0, "1 to 1073741824"),
        ("pools.prefill", -1, "0 to 4096"),
        ("pools.decode", 0, "1 to 4096"),
        ("pools.ingress", 0, "1 to 4096"),
        ("pools.cpus_per_worker", -0.5, "0 to 4096"),
        ("pools.gpus_per_worker", 1000, "0 to 64"),
        ("pools.drain_timeout_s", -1, "0 to 86400"),
        ("http.port", 70000, "1 to 65535"),
        ("http.port", 0, "1 to 65535"),
        ("http.max_body_bytes", 10, "1024 to 1099511627776"),
        ("http.max_choices", 0, "1 to 4096"),
        ("http.max_tokenize_bytes", 1, "1024 to 1099511627776"),
        ("http.request_timeout_s", 0, "0.1 to 10000000"),
        ("network.heartbeat_s", 0, "0.05 to 60"),
        ("network.lost_after_s", 0, "0.2 to 600"),
        ("network.lease_s", float("nan"), "0.5 to 3600"),
        ("network.stall_s", float("inf"), "0.05 to 3600"),
        ("network.prefill_timeout_s", -1, "0.1 to 1000000"),
    ],
)
def test_an_absurd_number_is_refused_with_its_range(place, value, wanted):
    section, name = place.split(".")
    assert refusal({section: {name: value}}) == f"{place}: wanted {wanted}, saw {value}"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([20000, 70000], "wanted 1 to 65535 in every entry, saw list [20000, 70000]"),
        ([30000, 20000], "wanted the first port below the last, saw 30000 and 20000"),
        ([20000], "wanted a list of 2, saw list [20000]"),
        (["a", "b"], "wanted int in every entry, saw list ['a', 'b']"),
    ],
)
def test_a_range_of_ports_that_is_none_is_refused(value, words):
    assert refusal({"network": {"port_range": value}}) == f"network.port_range: {words}"


def number_fields():
    """Place and type of each number of the configuration."""
    numbers = msgspec.inspect.IntType | msgspec.inspect.FloatType
    return [
        pytest.param(f"{section.name}.{field.name}", kind, id=field.name)
        for section in msgspec.structs.fields(KvrayConfig)
        for field in msgspec.inspect.type_info(section.type).fields
        for kind in getattr(field.type, "types", [field.type])
        if isinstance(kind, numbers)
    ]


@pytest.mark.parametrize(("place", "kind"), number_fields())
def test_every_number_has_a_least_and_a_largest_value_and_both_are_told(place, kind):
    section, name = place.split(".")
    words = refusal({section: {name: int(kind.le) + 1}})
    assert words == f"{place}: wanted {kind.ge:.15g} to {kind.le:.15g}, saw {int(kind.le) + 1}"


def test_the_bounds_themselves_are_taken():
    config = parse_config({"pools": {"prefill": 0, "decode": 4096}, "http": {"port": 65535}})
    assert (config.pools.prefill, config.pools.decode, config.http.port) == (0, 4096, 65535)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_workers_grow_from_those_of_pools(role):
    assert parse_config({"autoscaling": {f"max_{role}": 1}}).autoscaling.is_wanted
    assert not parse_config({"autoscaling": {"ttft_s": 3}}).autoscaling.is_wanted
    assert refusal({"autoscaling": {f"max_{role}": 2}, "pools": {role: 3}}) == (
        f"pools.{role}: wanted at most autoscaling.max_{role} (2), saw 3"
    )


def test_prefill_workers_do_not_grow_from_none():
    assert refusal({"autoscaling": {"max_prefill": 2}, "pools": {"prefill": 0}}) == (
        "pools.prefill: wanted at least 1, saw 0"
    )


def test_silence_must_outlast_two_heartbeats():
    assert refusal({"network": {"heartbeat_s": 2, "lost_after_s": 3}}) == (
        "network.lost_after_s: wanted at least twice heartbeat_s (2), saw 3"
    )


def test_one_body_of_full_length_must_fit():
    assert refusal({"http": {"max_body_bytes": 2**30}}) == (
        "connections.max_receiving_bytes: wanted at least http.max_body_bytes (1073741824), saw 67108864"
    )


@pytest.mark.parametrize(
    "document",
    [
        {"network": {"secret": 5417041}},
        {"http": {"api_keys": "5417041"}},
        {"http": {"api_keys": [5417041]}},
        {"http": {"api_keys": ["5417 041"]}},
        {"http": {"api_keys": ["5417,041"]}},
        {"http": {"api_keys": ["5417041"], "api_key_file": "/run/keys"}},
    ],
)
def test_secrets_are_never_repeated_in_a_refusal(document):
    assert "541" not in refusal(document)


MEMBER = {"name": "acme", "api_key_file": "/run/keys"}


def test_tenants_have_names_key_files_and_quotas():
    config = parse_config({"tenants": {"salt_file": "/run/salt", "members": [{**MEMBER, "host_quota": "2GiB"}]}})
    [member] = config.tenants.members
    assert (member.name, member.role, member.cache_hints, member.host_quota) == ("acme", "member", "refuse", "2GiB")


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([MEMBER, MEMBER], "tenants.members[1].name: wanted each name once, saw acme again"),
        ([{**MEMBER, "name": "a b"}], "tenants.members[0].name: wanted what matches ^[A-Za-z0-9]"),
        ([MEMBER, {"name": "b"}], "tenants.members[1].api_key_file: missing, a value is wanted"),
        ([{**MEMBER, "disk_quota": "lots"}], "tenants.members[0].disk_quota: wanted a size such as 512MiB"),
        ([{**MEMBER, "disc_quota": "1GiB"}], "tenants.members[0].disc_quota: no such key; did you mean disk_quota?"),
        ([{**MEMBER, "role": "boss"}], "tenants.members[0].role: wanted one of member, operator, saw str 'boss'"),
        ([{**MEMBER, "host_quota": 5}], "tenants.members[0].host_quota: wanted str, saw int 5"),
        (["acme"], "tenants.members: wanted a mapping in every entry, saw list ['acme']"),
        ("acme", "tenants.members: wanted a list, saw str 'acme'"),
    ],
)
def test_a_tenant_that_makes_no_sense_is_refused_where_it_stands(members, words):
    assert refusal({"tenants": {"members": members}}).startswith(words)


def test_an_empty_api_key_is_refused():
    assert "wanted keys without white space and commas" in refusal({"http": {"api_keys": [""]}})


@pytest.mark.parametrize("origin", ["*", "null", "https://chat.example.com", "http://[::1]:3000", "tauri://localhost"])
def test_an_origin_is_what_browsers_send(origin):
    assert parse_config({"http": {"allowed_origins": [origin]}}).http.allowed_origins == (origin,)


@pytest.mark.parametrize("origin", ["chat.example.com", "https://x.org/", "https://x.org/chat", "https://*.x.org", ""])
def test_what_no_browser_sends_is_no_origin(origin):
    assert "wanted *, or scheme://host[:port]" in refusal({"http": {"allowed_origins": [origin]}})


@pytest.mark.parametrize("endpoint", ["http://c:4318", "https://collector.example/v1/traces", "http://[::1]:4318/"])
def test_spans_go_to_a_url(endpoint):
    assert parse_config({"observability": {"otlp_endpoint": endpoint}}).observability.otlp_endpoint == endpoint


@pytest.mark.parametrize(
    "endpoint", ["", "collector:4318", "grpc://c:4317", "http://", "http://n:p@c", "http://c/x?y=z"]
)
def test_what_is_no_place_for_spans_is_refused(endpoint):
    assert refusal({"observability": {"otlp_endpoint": endpoint}}) == (
        "observability.otlp_endpoint: wanted http://HOST:PORT or https://HOST/PATH, without a name and password, saw "
        f"str '{endpoint}'"
    )


def test_no_form_of_a_configuration_shows_an_api_key():
    config = parse_config({"http": {"api_keys": ["5417041"], "port": 9000}})
    assert "5417041" not in f"{config} {config!r} {config.http!s} {rich.pretty.pretty_repr(config)}"
    assert "port=9000" in repr(config)


def test_no_process_started_from_now_on_inherits_a_credential(monkeypatch):
    for name in (
        *("KVRAY_SECRET", "KVRAY_SECRET_FILE", "KVRAY_API_KEY"),
        *("KVRAY_TENANT_SALT", "KVRAY_TENANT_SALT_FILE"),
    ):
        monkeypatch.setenv(name, "5417041")
    forget_credentials()
    code = "import os; print(dict(os.environ))"
    assert "5417041" not in subprocess.check_output([sys.executable, "-c", code], text=True)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("512MiB", 2**29), ("2GiB", 2**31), ("1.5GB", 1_500_000_000), ("1048576", 2**20), ("64 KiB", 2**16), ("7B", 7)],
)
def test_sizes(text, num_bytes):
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["banana", "", "GiB", "-1GiB", "0", "nan", "inf", "1e30", "2gib", "2 GiB of memory"])
def test_what_is_no_size_is_refused_where_it_stands(text):
    assert refusal({"engine": {"kv_cache_memory": text}}) == (
        f"engine.kv_cache_memory: wanted a size such as 512MiB or 2GiB, saw {text!r}"
    )
    assert refusal({"responses": {"memory": text}}).startswith("responses.memory: wanted a size")


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path):
    path = tmp_path / "kvray.yaml"
    path.write_text("http: {port: 9000, host: 0.0.0.0}\nlog:\n")
    config = load_config(path, {"http": {"port": 9001}, "log": {"level": "debug"}, "pools": {"decode": 2}})
    assert (config.http.port, config.http.host, config.log.level, config.pools.decode) == (9001, "0.0.0.0", "debug", 2)
    assert config.http.max_choices == KvrayConfig().http.max_choices


def test_flags_do_not_hide_a_section_of_the_wrong_shape(tmp_path):
    path = tmp_path / "kvray.yaml"
    path.write_text("http: 3")
    with pytest.raises(ConfigError, match="http: wanted a mapping, saw int 3"):
        load_config(path, {"http": {"port": 9001}})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [", "is not YAML: while parsing"),
        (b"\xff\xfe", "is not YAML"),
        (b"http: {host: 2026-13-45}", "is not YAML: month must be in"),
        (b"[" * 20_000, "is not YAML"),
        (b"- a\n- b", "wanted a mapping of sections, saw list ['a', 'b']"),
        (b"model", "wanted a mapping of sections, saw str 'model'"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_by_name(tmp_path, content, words):
    path = tmp_path / "kvray.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path, {})
    assert f"configuration file {path}" in caught.value.message
    assert words in caught.value.message
    assert "\n" not in caught.value.message


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file or directory"):
        load_config(tmp_path / "none.yaml", {})
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path, {})


def test_an_empty_file_is_all_defaults(tmp_path):
    path = tmp_path / "kvray.yaml"
    path.write_text("# nothing\n")
    assert load_config(path, {}) == KvrayConfig()


def test_what_the_operator_set_for_ray_stays(monkeypatch):
    chosen = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "t", "RAY_USAGE_STATS_ENABLED": "1"}
    monkeypatch.setattr(os, "environ", dict(chosen))
    prepare_environment(is_own_cluster=True)
    assert chosen.items() <= os.environ.items()
    assert os.environ["RAY_ENABLE_AUTO_CONNECT"] == "0"


def test_a_ray_of_our_own_has_a_token_of_its_own(monkeypatch):
    tokens = set()
    for _ in range(2):
        monkeypatch.setattr(os, "environ", {"RAY_AUTH_MODE": ""})
        prepare_environment(is_own_cluster=True)
        assert os.environ["RAY_AUTH_MODE"] == "token"
        tokens.add(os.environ["RAY_AUTH_TOKEN"])
    assert [len(token) for token in tokens] == [64, 64]
    monkeypatch.setattr(os, "environ", {"RAY_AUTH_TOKEN_PATH": "/run/token"})
    prepare_environment(is_own_cluster=True)
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_the_credentials_of_a_cluster_that_is_joined_are_the_operators(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    prepare_environment(is_own_cluster=False)
    assert not [name for name in os.environ if "AUTH" in name or "WINDOWS" in name]


@pytest.mark.parametrize(
    ("value", "address"), [("", None), ("auto", None), ("local", "local"), ("10.0.0.1:6379", "10.0.0.1:6379")]
)
def test_ray_address_names_a_cluster(monkeypatch, value, address):
    monkeypatch.setenv("RAY_ADDRESS", value)
    assert named_ray_address() == address


@pytest.mark.parametrize("value", ["ray://head:10001", "head", "head:", ":", "head:port"])
def test_a_ray_address_that_is_none_is_refused(monkeypatch, value):
    monkeypatch.setenv("RAY_ADDRESS", value)
    with pytest.raises(ConfigError, match="RAY_ADDRESS: wanted host:port"):
        named_ray_address()


def test_reading_a_configuration_imports_neither_ray_nor_torch():
    code = "import cluster.config, sys; print([name for name in ('ray', 'torch', 'fastapi') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_off_and_on_of_yaml_are_the_words_where_words_are_wanted(tmp_path):
    path = tmp_path / "kvray.yaml"
    path.write_text("observability: {level: off}\nengine: {kernels: off}\nhttp: {access_log: off}\n")
    config = load_config(path, {})
    assert (config.observability.level, config.engine.kernels, config.http.access_log) == ("off", "off", False)
    assert parse_config({"observability": {"level": True}}).observability.level == "on"
    assert refusal({"model": {"dtype": True}}).endswith("saw bool True")
