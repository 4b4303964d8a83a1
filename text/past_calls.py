"""The calls that a conversation has had, in the form in which its chat template takes them, learned by rendering."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

PROBE_NAME: Final = "probe_call"
_VALUE: Final = "probe-value"
PROBE_ARGUMENTS: Final = {"probe_key": _VALUE}
PROBE_TOOL: Final[dict[str, Any]] = {
    "type": "function",
    "function": {
        "name": PROBE_NAME,
        "description": "probe",
        "parameters": {
            "type": "object",
            "properties": {"probe_key": {"type": "string", "description": "probe"}},
            "required": ["probe_key"],
        },
    },
}
PROBE_USER: Final = "probe-user"
_SHORT_ID: Final = re.compile(r"[A-Za-z0-9]{9}")


def probe_messages(
    *, as_text: bool = False, content: str | None = "", call_id: str = "probe0000", has_name: bool = True
) -> list[dict[str, Any]]:
    """Return a conversation of a question, a call and its result."""
    arguments = json.dumps(PROBE_ARGUMENTS) if as_text else PROBE_ARGUMENTS
    call = {"id": call_id, "type": "function", "function": {"name": PROBE_NAME, "arguments": arguments}}
    result = {"role": "tool", "tool_call_id": call_id, "content": "probe-result"}
    return [
        {"role": "user", "content": PROBE_USER},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {**result, "name": PROBE_NAME} if has_name else result,
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class PastCallForm:
    """What a chat template wants of past calls that another one does not."""

    wants_text: bool = False  #: arguments as JSON text, which it puts in as it stands
    takes_text: bool = True  #: it renders arguments that are text, too, whatever it makes of them
    wants_null: bool = False  #: it shows calls only where there is no content beside them, not even an empty one
    has_short_ids: bool = False  #: it refuses ids that are not nine letters and digits
    has_named_results: bool = False  #: it refuses results that do not name their function
    has_single_calls: bool = False  #: it refuses several calls in one message

    @classmethod
    def learned(cls, render: Callable[[Sequence[dict[str, Any]]], str | None]) -> PastCallForm:
        """Find out by `render`, which returns None where the template refuses a conversation."""
        content: str | None = ""
        for content in ("", None):
            with_object, with_text = (
                render(probe_messages(as_text=is_text, content=content)) for is_text in (False, True)
            )
            if any(text is not None and _VALUE in text for text in (with_object, with_text)):
                break
        else:
            return cls()  # it shows no calls, or refuses them
        # Python's way to write a dictionary: the template means text to stand there
        wants_text = with_object is None or (with_text is not None and repr(PROBE_ARGUMENTS) in with_object)
        probe = functools.partial(probe_messages, as_text=wants_text, content=content)
        question, call, result = probe()
        several = [question, {**call, "tool_calls": call["tool_calls"] * 2}, result, result]
        return cls(
            wants_text=wants_text,
            takes_text=with_text is not None,
            wants_null=content is None,
            has_short_ids=render(probe(call_id="call_probe_0000")) is None,
            has_named_results=render(probe(has_name=False)) is None,
            has_single_calls=render(several) is None,
        )

    def fitted(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return `messages` in this form; those that have no calls as they are."""
        names: dict[str, str] = {}  # of functions, by the ids of their calls
        result: list[dict[str, Any]] = []
        for message in messages:
            calls = message.get("tool_calls")
            if isinstance(calls, list | tuple) and calls:
                names |= {call["id"]: call["function"]["name"] for call in calls if _is_named(call)}
                message = {**message, "tool_calls": [self._call(call) for call in calls]}
                if self.wants_null and not message.get("content"):
                    message["content"] = None
            elif "tool_call_id" in message:
                message = self._result(message, names)
            result.append(message)
        return _one_call_each(result) if self.has_single_calls else result

    def _call(self, call: Any) -> Any:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or "arguments" not in function:
            return call
        fitted = {**call, "function": {**function, "arguments": self._arguments(function["arguments"])}}
        if isinstance(call.get("id"), str):
            fitted["id"] = self._id(call["id"])
        return fitted

    def _arguments(self, arguments: Any) -> Any:
        if not isinstance(arguments, str):
            return json.dumps(arguments, ensure_ascii=False) if self.wants_text else arguments
        if self.wants_text:
            return arguments
        parsed = _parsed(arguments) if arguments.strip() not in ("", "null") else {}
        if parsed is not None:
            return parsed
        # What a model once wrote need not be an object: it is shown as it is, where the template can.
        return arguments if self.takes_text else {"arguments": arguments}

    def _result(self, message: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
        call_id = message["tool_call_id"]
        fitted = {**message, "tool_call_id": self._id(call_id)} if isinstance(call_id, str) else message
        if self.has_named_results and "name" not in fitted and call_id in names:
            fitted = {**fitted, "name": names[call_id]}
        return fitted

    def _id(self, call_id: str) -> str:
        """Return an id that the template takes, always the same one for the same call."""
        if not self.has_short_ids or _SHORT_ID.fullmatch(call_id):
            return call_id
        return hashlib.blake2b(call_id.encode(), digest_size=8).hexdigest()[:9]


def _is_named(call: Any) -> bool:
    return (
        isinstance(call, dict)
        and isinstance(call.get("id"), str)
        and isinstance(call.get("function"), dict)
        and "name" in call["function"]
    )


def _parsed(text: str) -> dict[str, Any] | None:
    """Return the object that `text` is in JSON; None where it is none. Half a surrogate pair becomes U+FFFD."""
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            return None
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            whole = json.dumps(value, ensure_ascii=False).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            value = json.loads(whole)
    except (ValueError, RecursionError):
        return None
    return dict(value)


def _one_call_each(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write several calls of one message as messages of one call, each followed by its result."""
    result: list[dict[str, Any]] = []
    at = 0
    while at < len(messages):
        message, at = messages[at], at + 1
        calls = message.get("tool_calls") or ()
        if len(calls) < 2:
            result.append(message)
            continue
        results: list[dict[str, Any]] = []
        while at < len(messages) and "tool_call_id" in messages[at]:
            results.append(messages[at])
            at += 1
        for number, call in enumerate(calls):
            result.append({**message, "tool_calls": [call], **({"content": ""} if number else {})})
            own = [each for each in results if each["tool_call_id"] == call.get("id")]
            result += own
            results = [each for each in results if each not in own]
        result += results
    return result
