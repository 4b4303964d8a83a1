"""The error tree, and its form on the wire.

KvrayError                 everything this project raises on purpose
|-- RequestError           the caller's fault: 4xx; names the field, the value seen, the value wanted
|-- CapacityError          no room now: 429 (try later) or 503 (nobody there)
|-- WorkerError            a worker failed or vanished: the request may be tried elsewhere
|-- InvariantError         a bug of ours: the worker that meets it crashes
`-- ConfigError            the product cannot start as configured: one line, exit code 2
"""

from __future__ import annotations

from typing import ClassVar

import msgspec


class ErrorInfo(msgspec.Struct, frozen=True, kw_only=True):
    """An error as it crosses a process."""

    kind: str  #: class name of the KvrayError
    message: str
    param: str | None = None  #: request field at fault, as the client spells it
    code: str | None = None  #: stable machine-readable reason, e.g. "context_length_exceeded"
    status: int = 500  #: HTTP status
    retry_after_s: float | None = None


class KvrayError(Exception):
    """Base of all errors that are part of the contract.

    Attributes are those of `ErrorInfo`; `status` falls back to the class's own.
    """

    default_status: ClassVar[int] = 500

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.status = self.default_status if status is None else status
        self.retry_after_s = retry_after_s

    def info(self) -> ErrorInfo:
        """Return this error in its wire form."""
        return ErrorInfo(
            kind=type(self).__name__,
            message=self.message,
            param=self.param,
            code=self.code,
            status=self.status,
            retry_after_s=self.retry_after_s,
        )


class RequestError(KvrayError):
    """The request can never succeed as it is."""

    default_status = 400


class CapacityError(KvrayError):
    """There is no room for the request now."""

    default_status = 429


class WorkerError(KvrayError):
    """A worker failed, vanished or did not answer in time."""

    default_status = 503


class InvariantError(KvrayError):
    """Something that must hold does not."""

    default_status = 500


class ConfigError(KvrayError):
    """The product cannot start as configured."""

    default_status = 500


_KINDS: dict[str, type[KvrayError]] = {
    cls.__name__: cls for cls in (KvrayError, RequestError, CapacityError, WorkerError, InvariantError, ConfigError)
}


def error_from_info(info: ErrorInfo) -> KvrayError:
    """Return the exception that `info` was made from; an unknown kind becomes a plain KvrayError."""
    cls = _KINDS.get(info.kind, KvrayError)
    return cls(info.message, param=info.param, code=info.code, status=info.status, retry_after_s=info.retry_after_s)


def first_line(error: BaseException) -> str:
    """Return the class of `error` and the first line of its message: messages of large libraries are pages."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
