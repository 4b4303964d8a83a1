"""Where a process finds the cluster secret and the API keys, and what is said where there are none, or bad ones."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.config import KvrayConfig, parse_config
from cluster.credentials import CredentialFiles, api_keys, callers, cluster_secret, for_joined_cluster
from kvcache.names import tenant_salt
from messages.errors import ConfigError
from transport.secret import ClusterSecret

ONE, OTHER = ClusterSecret(b"\1" * 32), ClusterSecret(b"\2" * 32)
NODE = os.uname().nodename


@pytest.fixture(autouse=True)
def _bare(monkeypatch):
    for name in ("KVRAY_SECRET", "KVRAY_SECRET_FILE", "KVRAY_API_KEY", "KVRAY_TENANT_SALT", "KVRAY_TENANT_SALT_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def file(tmp_path):
    """Writes a text into a file that its owner alone may read, unless another mode is said; the file's name."""

    def write(text: str, mode: int = 0o600) -> str:
        path = tmp_path / f"file-{len(list(tmp_path.iterdir()))}"
        path.write_text(text)
        path.chmod(mode)
        return str(path)

    return write


@pytest.fixture
def files():
    kept = CredentialFiles()
    yield kept
    kept.close()


def complaint(read, *arguments, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        read(*arguments, **options)
    assert "\n" not in caught.value.message
    return caught.value.message


# ---------------------------------------------------------------------------------------------------------- the secret


def test_a_file_that_is_named_counts_before_the_environments_and_that_before_its_text(monkeypatch, file):
    monkeypatch.setenv("KVRAY_SECRET", ClusterSecret(b"\3" * 32).hex())
    assert cluster_secret(None) == ClusterSecret(b"\3" * 32)
    monkeypatch.setenv("KVRAY_SECRET_FILE", file(OTHER.hex()))
    assert cluster_secret(None) == OTHER
    assert cluster_secret(file(ONE.hex() + "\n")) == ONE


@pytest.mark.parametrize("between", [",", "\n"])
def test_two_secrets_may_be_valid_at_once(monkeypatch, file, between):
    monkeypatch.setenv("KVRAY_SECRET", f"{ONE.hex()}{between}{OTHER.hex()}")
    assert cluster_secret(None) == ClusterSecret(ONE.key, OTHER.key)
    assert cluster_secret(file(f"{OTHER.hex()}{between}{ONE.hex()}\n")) == ClusterSecret(OTHER.key, ONE.key)


def test_without_any_one_line_says_what_to_set_where(monkeypatch):
    monkeypatch.setenv("KVRAY_SECRET", "")  # is unset
    words = complaint(cluster_secret, None)
    assert words.startswith(
        f"no cluster secret on node {NODE}: set KVRAY_SECRET or KVRAY_SECRET_FILE in the environment"
    )


@pytest.mark.parametrize(
    "text", ["xyz", "f" * 63, "g" * 64, " ".join("ff" for _ in range(32)), ",".join(["ab" * 32] * 3)]
)
def test_a_bad_secret_is_refused_by_its_source_and_not_repeated(monkeypatch, file, text):
    path = file(text)
    monkeypatch.setenv("KVRAY_SECRET", text)
    of_text = complaint(cluster_secret, None)
    monkeypatch.setenv("KVRAY_SECRET_FILE", path)
    of_environment, of_configuration = complaint(cluster_secret, None), complaint(cluster_secret, path)
    assert of_text.startswith("KVRAY_SECRET: wanted ")
    assert of_environment.startswith("KVRAY_SECRET_FILE: wanted ")
    assert of_configuration.startswith("network.secret_file: wanted ")
    assert not any(text in words for words in (of_text, of_environment, of_configuration))


def test_a_file_that_cannot_be_read_is_named_with_its_node(monkeypatch, tmp_path):
    monkeypatch.setenv("KVRAY_SECRET_FILE", "/no/secret")
    assert complaint(cluster_secret, None) == (
        f"KVRAY_SECRET_FILE: /no/secret cannot be read on node {NODE}: No such file or directory"
    )
    assert complaint(cluster_secret, str(tmp_path)).endswith("Is a directory")
    (tmp_path / "bytes").write_bytes(b"\xff" * 64)
    assert complaint(cluster_secret, str(tmp_path / "bytes")).endswith("not text")


def test_a_pipe_that_nobody_fills_is_refused_and_not_waited_for(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    assert complaint(api_keys, str(pipe)) == f"http.api_key_file: {pipe} is no regular file on node {NODE}"


def test_a_file_that_everybody_may_read_is_warned_of_and_one_that_everybody_may_write_is_refused(file, caplog):
    cluster_secret(file(ONE.hex(), 0o440))  # as Kubernetes mounts for a group
    assert not caplog.records
    open_to_read = file(ONE.hex(), 0o644)
    cluster_secret(open_to_read)
    assert f"everybody may read {open_to_read}, wanted mode 0600" in caplog.text
    assert "everybody may write" in complaint(cluster_secret, file(ONE.hex(), 0o666))


# ------------------------------------------------------------------------------------------------------------ API keys


def test_keys_are_the_files_else_the_environments_else_none(monkeypatch, file):
    assert api_keys(None) == ()
    monkeypatch.setenv("KVRAY_API_KEY", "one,two\nthree\n")
    assert api_keys(None, is_required=True) == ("one", "two", "three")
    assert api_keys(file("four\n\nfive\r\n")) == ("four", "five")


def test_a_source_without_a_key_serves_nobody_instead_of_everybody(file, monkeypatch):
    monkeypatch.setenv("KVRAY_API_KEY", " , ")
    assert complaint(api_keys, None) == "KVRAY_API_KEY has no key in it"
    path = file("\n")
    assert complaint(api_keys, path) == f"http.api_key_file: {path} has no key in it"


def test_keys_that_are_required_and_not_there_are_one_line_that_names_the_node():
    words = complaint(api_keys, None, is_required=True)
    assert words.startswith(f"no API key on node {NODE}, and http.requires_api_key is set: set KVRAY_API_KEY")


def test_an_ingress_elsewhere_must_have_keys_where_the_command_line_has_some(monkeypatch):
    assert not for_joined_cluster(KvrayConfig()).http.requires_api_key
    with pytest.raises(ConfigError, match="API keys in the configuration"):  # before anything is started
        for_joined_cluster(parse_config({"http": {"api_keys": ["k"]}}))
    monkeypatch.setenv("KVRAY_API_KEY", "5417041")
    told = for_joined_cluster(KvrayConfig())
    assert told.http.requires_api_key
    assert b"5417041" not in pickle.dumps(told)


# -------------------------------------------------------------------------------------------------------------- tenants


@pytest.fixture
def with_tenants(file):
    """A configuration with two tenants: acme has two keys, globex one."""

    def make(salt: str | None = "ab" * 32, **http) -> KvrayConfig:
        members = [
            {"name": "acme", "api_key_file": file("acme-1\nacme-2\n"), "cache_hints": "use"},
            {"name": "globex", "api_key_file": file("globex-1"), "role": "operator"},
        ]
        tenants = {"salt_file": None if salt is None else file(salt), "members": members}
        return parse_config({"tenants": tenants, "http": http})

    return make


def test_keys_are_their_tenants_and_those_without_a_tenant_nobodys(with_tenants, file):
    found = callers(with_tenants(api_key_file=file("plain"), cache_hints="use"))
    acme, globex, plain = (found.find(f"Bearer {key}") for key in ("acme-1", "globex-1", "plain"))
    assert found.find("Bearer acme-2") == acme
    assert (acme.name, acme.is_operator, acme.may_hint) == ("acme", False, True)
    assert (globex.name, globex.is_operator, globex.may_hint) == ("globex", True, False)
    assert (plain.name, plain.is_operator, plain.may_hint) == ("", True, True)
    assert acme.base_salt == tenant_salt("acme", b"\xab" * 32) != globex.base_salt


def test_tenants_alone_are_keys_enough(with_tenants):
    found = callers(with_tenants(requires_api_key=True))
    assert found.find("") is None


def test_tenants_without_a_salt_secret_are_refused_with_what_to_set(with_tenants, monkeypatch, file):
    config = with_tenants(None)
    words = complaint(callers, config)
    assert words.startswith(f"no salt secret for tenants on node {NODE}: name a file (tenants.salt_file), or set")
    monkeypatch.setenv("KVRAY_TENANT_SALT", "cd" * 32)
    assert callers(config).find("Bearer acme-1").base_salt == tenant_salt("acme", b"\xcd" * 32)
    monkeypatch.setenv("KVRAY_TENANT_SALT_FILE", file("ef" * 32))
    assert callers(config).find("Bearer acme-1").base_salt == tenant_salt("acme", b"\xef" * 32)
    words = complaint(callers, with_tenants("5417041"))
    assert words == "tenants.salt_file: wanted 64 hexadecimal digits, saw 7 characters that are not"


def test_a_key_of_two_is_refused_before_anything_starts(with_tenants, file, files):
    config = with_tenants(api_key_file=file("acme-2"))
    assert "one is of no tenant and of tenant acme" in complaint(callers, config)
    assert "one is of no tenant and of tenant acme" in complaint(files.keep, config)
    assert "acme-2" not in complaint(callers, config)


def test_a_tenant_without_a_key_is_refused(file, monkeypatch):
    path = file("\n")
    config = parse_config({"tenants": {"members": [{"name": "acme", "api_key_file": path}]}})
    monkeypatch.setenv("KVRAY_TENANT_SALT", "ab" * 32)
    assert complaint(callers, config) == f"tenants.members[0].api_key_file: {path} has no key in it"


def test_what_tenants_have_is_kept_and_not_handed_on(with_tenants, files):
    config = with_tenants()
    kept = files.keep(config)
    assert callers(kept).find("Bearer acme-2") == callers(config).find("Bearer acme-1")
    assert not any(word in pickle.dumps(kept) for word in (b"acme-1", b"globex-1", b"ab" * 32, b"\xab" * 16))
    paths = [kept.tenants.salt_file, *(member.api_key_file for member in kept.tenants.members)]
    assert all(path.startswith("/proc/") for path in paths)


# ----------------------------------------------------------------------------------------------- a Ray of our own


def test_other_processes_of_the_user_read_what_is_kept_and_nothing_is_handed_on(files, monkeypatch):
    monkeypatch.setenv("KVRAY_SECRET", f"{ONE.hex()},{OTHER.hex()}")
    kept = files.keep(parse_config({"http": {"api_keys": ["5417041", "5417042"]}}))
    handed_on = pickle.dumps(kept)
    assert ONE.hex().encode() not in handed_on
    assert b"541704" not in handed_on
    code = f"from pathlib import Path; print(Path({kept.network.secret_file!r}).read_text(), "
    code += f"Path({kept.http.api_key_file!r}).read_text())"
    printed = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert printed == [ONE.hex(), OTHER.hex(), "5417041", "5417042"]
    assert all(
        Path(path).stat().st_mode & 0o777 == 0o600 for path in (kept.network.secret_file, kept.http.api_key_file)
    )
    monkeypatch.delenv("KVRAY_SECRET")
    again = files.keep(kept)  # a Ray that is started anew
    assert cluster_secret(again.network.secret_file) == ClusterSecret(ONE.key, OTHER.key)
    assert api_keys(again.http.api_key_file) == ("5417041", "5417042")


def test_a_secret_is_drawn_where_there_is_none_and_clients_need_a_key_only_where_there_is_one(files):
    first, second = (files.keep(KvrayConfig()) for _ in range(2))
    assert cluster_secret(first.network.secret_file) != cluster_secret(second.network.secret_file)
    assert first.http.api_key_file is None


def test_keys_of_a_file_and_of_the_environment_are_kept_too(files, file, monkeypatch):
    monkeypatch.setenv("KVRAY_API_KEY", "of-environment")
    assert api_keys(files.keep(KvrayConfig()).http.api_key_file) == ("of-environment",)
    named = parse_config({"http": {"api_key_file": file("of-file")}})
    assert api_keys(files.keep(named).http.api_key_file) == ("of-file",)


def test_nothing_is_left_at_the_end():
    kept = CredentialFiles()
    path = kept.keep(KvrayConfig()).network.secret_file
    kept.close()
    assert not Path(path).exists()
