"""The few calls by which a remote store reaches its bucket or directory: pyarrow's, with what we know of them.

pyarrow's time-outs are no deadlines: a call may last a multiple of them, so that it is made on threads of our own
(`nodecache.remote.threads`), never by who waits for blocks.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

import pyarrow as pa
import pyarrow.fs

from messages.errors import ConfigError, first_line
from nodecache.store import StoreError

logger = logging.getLogger(__name__)

#: No byte for so long ends an attempt; it takes a thread for as long at least. A hung write lasts several times this.
_REQUEST_TIMEOUT_S = 3.0
_CONNECT_TIMEOUT_S = 2.0

_S3_OPTIONS = ("endpoint_override", "region", "scheme", "tls_ca_file_path")
_DENIED_ERRNOS = {errno.EACCES, errno.EPERM, errno.EROFS}
#: As object stores word it, in pyarrow's messages.
_DENIED_WORDS = (
    "ACCESS_DENIED",
    "SIGNATURE_DOES_NOT_MATCH",
    "INVALID_ACCESS_KEY_ID",
    "INVALID_CLIENT_TOKEN_ID",
    "UNRECOGNIZED_CLIENT",
    "MISSING_AUTHENTICATION_TOKEN",
    "TOKEN_EXPIRED",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "NO CREDENTIALS",
    "HTTP STATUS 403",
    "HTTP STATUS 401",
)

_AWS = "AWS Error "

_UNFINISHED = "unfinished"
_UNFINISHED_S = 3600.0  #: what is older was left by a process that ended


class MissingError(StoreError):
    """There is no such object, or no such bucket: object stores answer alike."""


class DeniedError(StoreError):
    """The store knows us, or does not, and refuses: it will do so again."""


class Listed(NamedTuple):
    """An object in a listing."""

    name: str
    num_bytes: int
    changed_ns: int  #: since 1970, by the store's clock


class RemoteFilesystem:
    """A folder of a pyarrow filesystem; paths are relative to it. Any thread. All calls may hang; all raise StoreError.

    Objects appear whole or not at all, in a directory; in a bucket, a write that failed may have left a part.
    """

    def __init__(self, uri: str) -> None:
        """Open what a URI, or a path, names; does no IO.

        Raises:
            ConfigError: it is no URI of a kind that pyarrow knows.
        """
        self.uri = _without_credentials(uri)  #: for people
        try:
            self._fs, root = _open(uri)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ConfigError(f"remote store {self.uri}: {first_line(error)}") from error
        self._root = root.rstrip("/")
        self._is_local = isinstance(self._fs, pyarrow.fs.LocalFileSystem)
        self._writer = uuid.uuid4().hex
        self._numbers = itertools.count()

    def read(self, path: str, offset: int, max_bytes: int) -> bytes:
        """Return up to `max_bytes` bytes of an object from `offset` on; fewer where it ends before.

        By `read_at` in one request: a stream would ask for 256 KiB at a time.

        Raises:
            MissingError, DeniedError, StoreError.
        """
        with self._translated(path), self._fs.open_input_file(self._at(path)) as file:
            data: bytes = file.read_at(max_bytes, offset) if offset < file.size() else b""
            return data

    def write(self, path: str, data: memoryview) -> None:
        """Write an object, in place of what was there.

        Raises:
            DeniedError, StoreError: it may be there in part, in a bucket.
        """
        with self._translated(path):
            if self._is_local:
                self._write_and_move(path, data)
            else:
                self._put(self._at(path), data)

    def delete(self, path: str) -> None:
        """Delete an object, if it is there.

        Raises:
            DeniedError, StoreError.
        """
        with contextlib.suppress(MissingError), self._translated(path):
            self._fs.delete_file(self._at(path))

    def objects(self, folder: str) -> list[Listed]:
        """List the objects directly in a folder; none where it does not exist.

        Raises:
            DeniedError, StoreError.
        """
        return [
            Listed(info.base_name, info.size or 0, info.mtime_ns or 0)
            for info in self._infos(folder)
            if info.type == pyarrow.fs.FileType.File
        ]

    def folders(self, folder: str) -> list[str]:
        """List the names of the folders directly in a folder; none where it does not exist.

        Raises:
            DeniedError, StoreError.
        """
        infos = self._infos(folder)
        return sorted(info.base_name for info in infos if info.type == pyarrow.fs.FileType.Directory)

    def make_folders(self, folder: str, names: list[str]) -> None:
        """Make folders in a folder, where there are such things: in a directory; its parent must be there.

        Raises:
            DeniedError, StoreError.
        """
        if not self._is_local:
            return
        for path in ("", folder, *(f"{folder}/{name}" for name in (*names, _UNFINISHED))):
            with self._translated(path):
                if self._fs.get_file_info(self._at(path)).type == pyarrow.fs.FileType.NotFound:
                    self._fs.create_dir(self._at(path), recursive=False)
        for listed in self.objects(f"{folder}/{_UNFINISHED}"):
            if listed.changed_ns < time.time_ns() - _UNFINISHED_S * 1e9:
                self.delete(f"{folder}/{_UNFINISHED}/{listed.name}")

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root or "/"

    def _infos(self, folder: str) -> list[pyarrow.fs.FileInfo]:
        with self._translated(folder):
            selector = pyarrow.fs.FileSelector(self._at(folder), allow_not_found=True)
            infos: list[pyarrow.fs.FileInfo] = self._fs.get_file_info(selector)
            return infos

    def _put(self, path: str, data: memoryview) -> None:
        with self._fs.open_output_stream(path, compression=None) as stream:
            stream.write(data)

    def _write_and_move(self, path: str, data: memoryview) -> None:
        folder = path.partition("/")[0]
        unfinished = self._at(f"{folder}/{_UNFINISHED}/{self._writer}-{next(self._numbers)}")
        try:
            self._put(unfinished, data)
            self._fs.move(unfinished, self._at(path))
        except BaseException:
            with contextlib.suppress(OSError):
                self._fs.delete_file(unfinished)
            raise

    @contextlib.contextmanager
    def _translated(self, path: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise MissingError(f"{self.uri}: there is no {path or 'such directory'}") from error
        except (OSError, pa.ArrowException) as error:
            _, _, answer = str(error).partition(_AWS)  # behind the key, which is long
            text = f"{_AWS}{answer.splitlines()[0][:200]}" if answer else first_line(error)
            is_denied = isinstance(error, OSError) and error.errno in _DENIED_ERRNOS
            is_denied |= any(word in str(error).upper() for word in _DENIED_WORDS)
            raise (DeniedError if is_denied else StoreError)(f"{self.uri}: {text}") from error


def _open(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    parts = urlsplit(uri)
    if not parts.scheme:
        return pyarrow.fs.LocalFileSystem(), str(Path(uri).absolute())
    if parts.scheme == "s3":
        return _open_s3(uri)
    if parts.scheme in ("gs", "gcs"):
        # Without it a call that fails is made again by the library for a quarter of an hour.
        query = urlencode({"retry_limit_seconds": f"{_REQUEST_TIMEOUT_S:g}", **dict(parse_qsl(parts.query))})
        uri = urlunsplit(parts._replace(query=query))
    fs, root = pyarrow.fs.FileSystem.from_uri(uri)
    return fs, root


def _open_s3(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """As pyarrow's from_uri, which cannot be told of attempts and time-outs."""
    parts = urlsplit(uri)
    options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    unknown = sorted(set(options) - set(_S3_OPTIONS))
    bucket = parts.netloc.rpartition("@")[2]
    if unknown or not bucket:
        wrong = f"options {', '.join(unknown)}" if unknown else "no bucket"
        raise ConfigError(
            f"remote store {_without_credentials(uri)}: {wrong} in the URI; wanted s3://BUCKET/PREFIX, "
            f"and of options {', '.join(_S3_OPTIONS)}"
        )
    fs = pyarrow.fs.S3FileSystem(
        access_key=unquote(parts.username) if parts.username else None,
        secret_key=unquote(parts.password) if parts.password else None,
        request_timeout=_REQUEST_TIMEOUT_S,
        connect_timeout=_CONNECT_TIMEOUT_S,
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=1),
        allow_delayed_open=True,  # one request for a write of up to MAX_OBJECT_BYTES
        background_writes=False,  # a write that hangs shall take a thread of ours
        **options,
    )
    return fs, f"{bucket}{unquote(parts.path)}"


def _without_credentials(uri: str) -> str:
    parts = urlsplit(uri)
    if not parts.scheme:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))
