"""A request's body: read within a limit, decoded into a type, with errors that say what was seen."""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import msgspec
from starlette.requests import Request

from cluster.openai.errors import shown
from cluster.openai.unserved import Unserved, check_unserved
from cluster.openai.wanted_values import listed_at
from messages.errors import RequestError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_LOGGED_NAMES = 256  # of unknown fields: a client that invents names must not fill memory or the log
_EXCERPT_CHARS = 40
_PATH = re.compile(r"^(?P<reason>.*?)(?: - at `(?:key` in `)?\$\.?(?P<path>.*)`)?$", re.DOTALL)
_STEP = re.compile(r"\[(\d+|\.\.\.)\]|([^.\[\]]+)")
_BYTE = re.compile(r"\(byte (\d+)\)")
_VALUE_OF = re.compile(rb'"([A-Za-z0-9_]{1,64})"\s*:\s*-?(?:"[^"]*)?\Z')  # a key whose value is being read
_WHOLE = re.compile(rb"\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")  # escapes: \\, or a whole pair
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


async def read_body(request: Request, max_bytes: int, media_type: str = "application/json") -> bytes:
    """Read the body, never more than `max_bytes` of it in memory.

    Raises:
        RequestError: 415, not of the media type; 413, too long (found from Content-Length where there is one, before
            reading).
    """
    content_type = request.headers.get("content-type", media_type).partition(";")[0].strip().lower()
    if content_type != media_type and not content_type.endswith(f"+{media_type.rpartition('/')[2]}"):
        raise RequestError(
            f"Content-Type: got {shown(content_type)}, want {media_type}",
            code="unsupported_media_type",
            status=415,
        )
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > max_bytes):
        raise _too_long(f"{declared[:20]} bytes", max_bytes)
    parts: list[bytes] = []
    num_bytes = 0
    async for part in request.stream():
        num_bytes += len(part)
        if num_bytes > max_bytes:
            raise _too_long(f"more than {max_bytes} bytes", max_bytes)
        parts.append(part)
    return b"".join(parts)


def nested_too_deeply() -> RequestError:
    """Make the 400 for JSON that would overflow the stack."""
    return RequestError("body: JSON nested too deeply, want at most a few hundred levels", code="invalid_json")


def _too_long(seen: str, max_bytes: int) -> RequestError:
    return RequestError(f"body: got {seen}, want at most {max_bytes} bytes", code="request_too_large", status=413)


class BodyDecoder(Generic[T]):
    """Decodes one kind of body. Unknown fields are ignored, and logged once; some that others serve are refused."""

    def __init__(self, kind: type[T], unserved: Unserved = MappingProxyType({})) -> None:
        """Decode bodies of type `kind`. `unserved`: fields that only others have, beside those that nobody here has."""
        self._kind = kind
        self._unserved = unserved
        self._decoder = msgspec.json.Decoder(kind)
        self._names = msgspec.json.Decoder(dict[str, msgspec.Raw])
        self._known = {field.encode_name for field in msgspec.structs.fields(kind)}  # type: ignore[arg-type]
        self._logged: set[str] = set()

    def decode(self, body: bytes) -> T:
        """Decode `body`.

        Raises:
            RequestError: 400, naming the field, the value seen, the value wanted.
        """
        try:
            value = self._decoded(body)
            self._check_unknown(self._names.decode(body))
        except msgspec.ValidationError as error:
            raise explained(error, self._kind, lambda path: _value_at(body, path)) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _broken(error, body) from None
        except RecursionError:
            raise nested_too_deeply() from None
        return value

    def _decoded(self, body: bytes) -> T:
        try:
            return self._decoder.decode(body)
        except msgspec.ValidationError as error:
            if "got `float`" not in str(error):
                raise
            return self._with_whole_numbers(msgspec.json.decode(body), error)

    def _with_whole_numbers(self, value: Any, error: msgspec.ValidationError) -> T:
        """Decode a body that writes 5.0 where an integer is wanted, which JSON does not tell from 5.

        Raises:
            ValidationError: the first thing that is wrong beside that.
        """
        while True:
            path = _PATH.match(str(error))
            if path is None or not path["reason"].startswith("Expected `int") or not _make_whole(value, path["path"]):
                raise error
            try:
                return msgspec.convert(value, self._kind)
            except msgspec.ValidationError as next_error:
                error = next_error

    def _check_unknown(self, values: dict[str, msgspec.Raw]) -> None:
        unknown = values.keys() - self._known
        for name in sorted(unknown):
            check_unserved(name, values[name], self._unserved)
        for name in sorted(unknown - self._logged):
            if len(self._logged) < _MAX_LOGGED_NAMES:
                self._logged.add(name)
                logger.warning("ignored unknown request field %s (logged once)", shown(name))


def _make_whole(value: Any, path: str) -> bool:
    """Make an integer of the number at msgspec's `path`, with all that are beside it in a list; False: it is none."""
    parent: Any = None
    try:
        for index, name in _STEP.findall(path):
            parent, place = value, int(index) if index else name
            value = parent[place]
    except (KeyError, IndexError, TypeError, ValueError):
        return False
    if parent is None or not _is_whole(value):
        return False
    for each in range(len(parent)) if isinstance(parent, list) else (place,):
        if _is_whole(parent[each]):
            parent[each] = int(parent[each])
    return True


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def explained(error: msgspec.ValidationError, kind: type, value_at: Callable[[str], str]) -> RequestError:
    """Make a 400 of what msgspec says of a value that is no `kind`: which field, what was seen and what is wanted.

    `value_at` shows the value at msgspec's path.
    """
    match = _PATH.match(str(error))
    reason, path = (match["reason"], match["path"] or "") if match else (str(error), "")
    listed = functools.partial(listed_at, kind, [name for _, name in _STEP.findall(path)])
    if lacking := re.match(r"Object missing required field `(.+)`", reason, re.DOTALL):
        param = f"{path}.{lacking[1]}" if path else lacking[1]
        return RequestError(f"{param}: missing, want a value", param=param, code="missing_required_field")
    param, code = path.partition("[...]")[0] or None, "invalid_value" if path else "invalid_type"
    if unknown := re.match(r"Object contains unknown field `(.*)`", reason, re.DOTALL):
        name = shown(unknown[1]).strip('"')
        message = f"{path or 'body'}: got the unknown field {name}, want one of {listed()}"
        return RequestError(message, param=param, code=code)
    wanted = f"want one of {listed()}" if reason.startswith("Invalid enum value") else _wanted(reason)
    return RequestError(f"{path or 'body'}: {wanted}, got {value_at(path)}", param=param, code=code)


def _wanted(reason: str) -> str:
    """Return what msgspec wanted: of "Expected `float` >= 0.0, got `str`" that is "want float >= 0.0"."""
    if "out of range" in reason:
        return "want a number in range"
    text = re.sub(r", got `[^`]*`$", "", reason).replace("`", "").replace(" | null", "").replace(" | ", " or ")
    return re.sub(r"^Expected ", "want ", text)


def _value_at(body: bytes, path: str) -> str:
    """Show the value at msgspec's `path`; through `[...]` (any item) the container is shown."""
    if not path:
        return shown(body[:100].decode(errors="replace"))
    value = _whole_value(body)
    for index, name in _STEP.findall(path):
        try:
            if index == "...":
                break
            value = value[int(index)] if index else value[name]
        except (KeyError, IndexError, TypeError):
            break
    return shown(value)


def _whole_value(body: bytes) -> Any:
    """All of `body`, which was read only up to a field that will not do.

    Raises:
        RequestError: it is no JSON further on.
    """
    try:
        try:
            return msgspec.json.decode(body)
        except msgspec.ValidationError:  # a number that no float holds
            return json.loads(body, parse_float=str, parse_int=str)
    except ValueError as error:
        raise _broken(error, body) from None
    except RecursionError:
        raise nested_too_deeply() from None


def _broken(error: Exception, body: bytes) -> RequestError:
    try:
        body.decode()
    except UnicodeDecodeError:
        return RequestError("body: not UTF-8, want JSON in UTF-8", code="invalid_json")
    if not body.strip():
        return RequestError("body: empty, want a JSON object", code="invalid_json")
    if _SURROGATE.search(_WHOLE.sub(b" ", body)):
        return RequestError("body: an escape is half of a surrogate pair, want whole characters", code="invalid_json")
    match = _BYTE.search(str(error))
    if match is None:
        return RequestError(f"body: broken JSON ({error})", code="invalid_json")
    at = int(match[1])
    near = body[max(0, at - _EXCERPT_CHARS) : at + _EXCERPT_CHARS].decode(errors="replace")
    near = "".join(c if c.isprintable() else "?" for c in near)
    key = _VALUE_OF.search(body[max(0, at - 200) : at])
    param = key[1].decode() if key else None
    return RequestError(f"body: broken JSON at byte {at}, near ...{near}...", param=param, code="invalid_json")
