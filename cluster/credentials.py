"""The cluster secret and the API keys: each process finds them for itself, at its start, on its own node.

Ray and Serve keep, log and show what is handed from process to process, so that only the name of a file is handed on;
without one the node's environment decides. On a Ray of our own the command line keeps the file (`CredentialFiles`).
"""

from __future__ import annotations

import logging
import os
import re
import stat
from pathlib import Path

import msgspec

from cluster.config import KvrayConfig, environment_credential
from messages.errors import ConfigError
from transport.secret import ClusterSecret

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
    source, text = "KVRAY_SECRET", environment_credential("KVRAY_SECRET")
    if path is not None:
        source, text = "network.secret_file", _read(path, "network.secret_file")
    elif (named := environment_credential("KVRAY_SECRET_FILE")) is not None:
        source, text = "KVRAY_SECRET_FILE", _read(named, "KVRAY_SECRET_FILE")
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
    text = environment_credential("KVRAY_API_KEY") if path is None else _read(path, "http.api_key_file")
    keys = tuple(word for word in re.split(r"[\s,]+", text or "") if word)
    if text is not None and not keys:
        raise ConfigError(f"{'KVRAY_API_KEY' if path is None else f'http.api_key_file: {path}'} has no key in it")
    if is_required and not keys:
        raise ConfigError(
            f"no API key on node {os.uname().nodename}, and http.requires_api_key is set: set KVRAY_API_KEY in the "
            "environment of every node's Ray, or name a file that is there (http.api_key_file)"
        )
    return keys


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
        keys = config.http.api_keys or api_keys(config.http.api_key_file, is_required=config.http.requires_api_key)
        network = msgspec.structs.replace(config.network, secret_file=self._file(secret.hex()))
        key_file = self._file("\n".join(keys)) if keys else None
        http = msgspec.structs.replace(config.http, api_keys=(), api_key_file=key_file)
        return msgspec.structs.replace(config, network=network, http=http)

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
