"""OpenAI's error object, for every error that leaves through HTTP.

messages.errors         status      error.type
RequestError            4xx         invalid_request_error (401: authentication_error)
CapacityError           429, 503    rate_limit_error, service_unavailable_error; with Retry-After
WorkerError             503         service_unavailable_error
anything else           500         server_error
"""

from __future__ import annotations

import math

import msgspec
from starlette.types import Send

from messages.errors import CapacityError, KvrayError, RequestError

_MAX_SHOWN_CHARS = 80  # of a value that an error message repeats


class ErrorBody(msgspec.Struct, frozen=True):
    """The object under `error`."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(msgspec.Struct, frozen=True):
    """The whole reply."""

    error: ErrorBody


_TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "service_unavailable_error"}
_CODES = {
    400: "invalid_value",
    404: "not_found",
    405: "method_not_allowed",
    429: "rate_limit_exceeded",
    503: "service_unavailable",
}


def shown(value: object) -> str:
    """Write `value` as an error message repeats it: JSON where possible, on one line, clipped."""
    if isinstance(value, str):
        value = value[: _MAX_SHOWN_CHARS + 1]  # do not encode megabytes to show a line
    elif isinstance(value, (list, tuple)):
        value = value[:_MAX_SHOWN_CHARS]
    try:
        text = msgspec.json.encode(value).decode()
    except (TypeError, ValueError, RecursionError):
        text = str(type(value).__name__)
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "..."


def bad_field(param: str, seen: object, wanted: str, *, code: str = "invalid_value") -> RequestError:
    """Make a 400 that names the field, the value seen and the value wanted."""
    return RequestError(f"{param}: got {shown(seen)}, want {wanted}", param=param, code=code)


def context_overflow(param: str, message: str) -> RequestError:
    """Make the 400 for what does not fit into the model's context; `message` has the numbers.

    Agents' frameworks look for words in the message, the code among them, before they shorten a prompt and try again:
    litellm for "this model's maximum context length is", LangChain for the code, which openai's errors do not show.
    """
    code = "context_length_exceeded"
    return RequestError(f"{param}: {message} ({code})", param=param, code=code)


def error_body(error: KvrayError) -> ErrorBody:
    """Write `error` in OpenAI's form."""
    fallback = "invalid_request_error" if 400 <= error.status < 500 else "server_error"
    return ErrorBody(
        message=error.message,
        type=_TYPES.get(error.status, fallback),
        param=error.param,
        code=error.code or _CODES.get(error.status),
    )


def error_json(error: KvrayError) -> bytes:
    """Write the reply for `error`, as JSON in OpenAI's form."""
    return msgspec.json.encode(ErrorReply(error_body(error)))


async def send_error(error: KvrayError, send: Send) -> None:
    """Answer a request with `error`, in plain ASGI; nothing may have been sent for it before."""
    body = error_json(error)
    headers = {**error_headers(error), "content-type": "application/json", "content-length": str(len(body))}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def error_headers(error: KvrayError) -> dict[str, str]:
    """Return the headers that go with an error's status."""
    if error.status == 401:
        return {"WWW-Authenticate": "Bearer"}
    if error.status == 413:
        return {"Connection": "close"}  # or the server would go on reading, and discarding, what the client sends
    if error.retry_after_s is not None:
        return {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
    if isinstance(error, CapacityError):
        return {"Retry-After": "1"}
    return {}


def model_not_found(name: str, served: tuple[str, ...]) -> RequestError:
    """Make the 404 for a model that is not served here."""
    return RequestError(
        f"model: got {shown(name)}, want one of {', '.join(served)}",
        param="model",
        code="model_not_found",
        status=404,
    )
