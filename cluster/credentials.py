"""The secrets and the API keys: each process finds them for itself, at its start, on its own node.

Ray and Serve keep, log and show what is handed from process to process, so that only the name of a file is handed on;
without one the node's environment decides. On a Ray of our own the command line keeps the file (`CredentialFiles`).
"""

from __future__ import annotations

import logging
import os
import re
import stat
from pathlib import Path
from typing import Literal

import msgspec

from cluster.config import KvrayConfig, environment_credential
from cluster.openai.callers import Caller, Callers
from kvcache.names import tenant_salt
from messages.errors import ConfigError
from transport.secret import SECRET_BYTES, ClusterSecret

logger = logging.getLogger(__name__)


def cluster_secret(path: str | None) -> ClusterSecret:
    """Read the cluster secret from the file at `path`, else from where the environment of this process says.

    Raises:
        ConfigError: there is none, or it is none; names the node and what to set there, and repeats nothing of it.
    """
    found = _found_secret(path)
    if found is None:
        raise ConfigError(
            f"no cluster secret on node {os.uname().nodename}: set KVRAY_SECRET or KVRAY_SECRET_FILE in the "
            "environment of every node's Ray, everywhere the same 64 hexadecimal digits (openssl rand -hex 32)"
        )
    return found


def _found_secret(path: str | None) -> ClusterSecret | None:
    source, text = _text_of("network.secret_file", path, "KVRAY_SECRET_FILE", "KVRAY_SECRET")
    if text is None:
        return None
    try:
        return ClusterSecret.from_hex(text)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error.message}") from None


def api_keys(path: str | None, *, is_required: bool = False) -> tuple[str, ...]:
    """Read the API keys from the file at `path`, else from KVRAY_API_KEY: one a line, or with commas between.

    None are no error, and every client is served then, unless a file is named or keys are required.

    Raises:
        ConfigError: the file cannot be read, there is no key where there should be, or keys are required and not there.
    """
    if path is not None:
        return _keys_in(path, "http.api_key_file")
    text = environment_credential("KVRAY_API_KEY")
    keys = _split_keys(text or "")
    if text is not None and not keys:
        raise ConfigError("KVRAY_API_KEY has no key in it")
    if is_required and not keys:
        raise ConfigError(
            f"no API key on node {os.uname().nodename}, and http.requires_api_key is set: set KVRAY_API_KEY in the "
            "environment of every node's Ray, or name a file that is there (http.api_key_file)"
        )
    return keys


def _keys_in(path: str, source: str) -> tuple[str, ...]:
    keys = _split_keys(_read(path, source))
    if not keys:
        raise ConfigError(f"{source}: {path} has no key in it")
    return keys


def _split_keys(text: str) -> tuple[str, ...]:
    return tuple(word for word in re.split(r"[\s,]+", text) if word)


def callers(config: KvrayConfig) -> Callers:
    """Read all API keys, each with whose it is, and what the salts of tenants follow from.

    Raises:
        ConfigError: as `api_keys` of any of them; a key is of two tenants; or there are tenants and no salt secret.
    """
    http, members = config.http, config.tenants.members
    nobody = Caller(may_hint=http.cache_hints == "use")
    is_required = http.requires_api_key and not members
    keys = [(key, nobody) for key in api_keys(http.api_key_file, is_required=is_required)]
    secret = _tenant_salt_secret(config.tenants.salt_file) if members else b""
    for number, member in enumerate(members):
        caller = Caller(
            name=member.name,
            base_salt=tenant_salt(member.name, secret),
            is_operator=member.role == "operator",
            may_hint=member.cache_hints == "use",
        )
        keys += [(key, caller) for key in _keys_in(member.api_key_file, f"tenants.members[{number}].api_key_file")]
    return Callers(keys, nobody)


def _tenant_salt_secret(path: str | None) -> bytes:
    source, text = _text_of("tenants.salt_file", path, "KVRAY_TENANT_SALT_FILE", "KVRAY_TENANT_SALT")
    if text is None:
        raise ConfigError(
            f"no salt secret for tenants on node {os.uname().nodename}: name a file (tenants.salt_file), or set "
            "KVRAY_TENANT_SALT_FILE or KVRAY_TENANT_SALT in the environment of every node's Ray, everywhere the same "
            "64 hexadecimal digits (openssl rand -hex 32)"
        )
    if not re.fullmatch(f"[0-9a-fA-F]{{{2 * SECRET_BYTES}}}", text.strip()):
        raise ConfigError(
            f"{source}: wanted {2 * SECRET_BYTES} hexadecimal digits, saw {len(text)} characters that are not"
        )
    return bytes.fromhex(text.strip())


def for_joined_cluster(config: KvrayConfig) -> KvrayConfig:
    """Return `config` for nodes that have credentials of their own: where we know API keys, ingresses must, too.

    Raises:
        ConfigError: the configuration itself holds API keys.
    """
    refuse_keys(config)
    if environment_credential("KVRAY_API_KEY") is None:
        return config
    return msgspec.structs.replace(config, http=msgspec.structs.replace(config.http, requires_api_key=True))


def refuse_keys(config: KvrayConfig) -> None:
    """Refuse API keys that Ray would hand on with the configuration.

    Raises:
        ConfigError: there are some.
    """
    if config.http.api_keys:
        raise ConfigError(
            "API keys in the configuration: Ray Serve would show them; wanted a file that every node has "
            "(http.api_key_file), or KVRAY_API_KEY in the environment of every node's Ray"
        )


class CredentialFiles:
    """The files that a `kvray serve` with a Ray of its own keeps for the processes that it starts.

    They are memory that has a file's name for as long as this process lives, open to its user alone (mode 0600):
    nothing is left on a disk, whatever ends it.
    """

    def __init__(self) -> None:
        self._files: list[int] = []

    def keep(self, config: KvrayConfig) -> KvrayConfig:
        """Return `config` with the names of kept files in place of all credentials; a secret is drawn if there is none.

        Raises:
            ConfigError: a file that `config` or the environment names will not do.
        """
        secret = _found_secret(config.network.secret_file) or ClusterSecret.generate()
        http, tenants = config.http, config.tenants
        keys = http.api_keys or api_keys(http.api_key_file, is_required=http.requires_api_key and not tenants.members)
        network = msgspec.structs.replace(config.network, secret_file=self._file(secret.hex()))
        key_file = self._file("\n".join(keys)) if keys else None
        http = msgspec.structs.replace(http, api_keys=(), api_key_file=key_file)
        if tenants.members:
            members = [
                msgspec.structs.replace(
                    member,
                    api_key_file=self._file(
                        "\n".join(_keys_in(member.api_key_file, f"tenants.members[{number}].api_key_file"))
                    ),
                )
                for number, member in enumerate(tenants.members)
            ]
            salt_file = self._file(_tenant_salt_secret(tenants.salt_file).hex())
            tenants = msgspec.structs.replace(tenants, salt_file=salt_file, members=tuple(members))
        kept = msgspec.structs.replace(config, network=network, http=http, tenants=tenants)
        callers(kept)  # nobody is to start with keys that will not do
        return kept

    def close(self) -> None:
        """Forget it all: nobody is to start any more."""
        while self._files:
            os.close(self._files.pop())

    def _file(self, text: str) -> str:
        descriptor = os.memfd_create("kvray")
        self._files.append(descriptor)
        os.fchmod(descriptor, stat.S_IRUSR | stat.S_IWUSR)
        os.write(descriptor, text.encode())
        return f"/proc/{os.getpid()}/fd/{descriptor}"


def _text_of(
    setting: str,
    path: str | None,
    file_variable: Literal["KVRAY_SECRET_FILE", "KVRAY_TENANT_SALT_FILE"],
    variable: Literal["KVRAY_SECRET", "KVRAY_TENANT_SALT"],
) -> tuple[str, str | None]:
    """Return where a secret was found, and its text: in the file that is set, or what the environment says; or None."""
    if path is not None:
        return setting, _read(path, setting)
    named = environment_credential(file_variable)
    if named is not None:
        return file_variable, _read(named, file_variable)
    return variable, environment_credential(variable)


def _read(path: str, source: str) -> str:
    """Read a small text file that `source` names.

    Others may be able to read it where a Kubernetes Secret is mounted; no one but its owner may be able to change it.

    Raises:
        ConfigError: it cannot be read, is not text, or everybody may write it; or it is a pipe or the like, which gives
            its text once, where every process of ours reads for itself, or never.
    """
    file = Path(path)
    try:
        mode = file.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # of a directory, reading tells
            raise ConfigError(f"{source}: {path} is no regular file on node {os.uname().nodename}")
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise ConfigError(f"{source}: {path} cannot be read on node {os.uname().nodename}: {reason}") from None
    if mode & stat.S_IWOTH:
        raise ConfigError(f"{source}: everybody may write {path}, wanted mode 0600")
    if mode & stat.S_IROTH:
        logger.warning("%s: everybody may read %s, wanted mode 0600", source, path)
    return text.strip()
