"""Chat templates, rendered as transformers renders them, without importing it."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from messages.errors import ConfigError, RequestError
from text.past_calls import PROBE_TOOL, PastCallForm
from text.past_thoughts import NAMES, PastThoughtForm, named

Message = Mapping[str, Any]

#: Roles of OpenAI's API. A template that names another one in quotes allows it too.
KNOWN_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
#: What a template may do wrong with a client's values: all that Python raises for a value of the wrong kind.
_RENDER_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
#: Ends the text to be continued. The space shows whether the template trims its messages.
_CONTINUE_MARK = "\uf8f0kvray-continues\uf8f1 "
_PROBE = "kvray-probe"
_SHOWN_CHARS = 80  #: of what a client sent


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, which marks the assistant's text for training: renders its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _TemplateNamespace(jinja2.utils.Namespace):
    """`namespace(...)` without names that begin with an underscore, which lead into Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # no parameter named self, so that namespace(self=...) works, as in jinja2
        namespace, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_public(name)
        jinja2.utils.Namespace.__init__(namespace, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template may not set {name!r} on a namespace")


class _DictFunction:
    """`dict(...)` in a template, without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write `value` as JSON, without jinja2's own escaping of HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    functions: dict[str, Callable[..., Any]] = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _DictFunction(),
        "namespace": _TemplateNamespace,
    }
    environment.globals.update(functions)
    return environment


class ChatTemplate:
    """One model's chat template. Stateless after loading; any thread may render.

    Beyond what transformers does, and only where a template written for it needs it: text parts are joined by newlines
    into a string for a template that cannot read parts, as vLLM does, and past calls of tools are brought into the form
    that it takes, above all their arguments, JSON text in OpenAI's API, which most templates want as the object that
    they stand for.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, name: str = "chat template") -> None:
        """Compile `source`; `special_tokens` are its variables bos_token, eos_token and so on.

        Raises:
            ConfigError: the template has a syntax error; names its line.
        """
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"{name}, line {error.lineno}: {error.message}") from error
        except (RecursionError, SyntaxError) as error:  # of the parser, of the Python that it is compiled to
            raise ConfigError(f"{name} is nested too deep: {error}") from error
        self.source = source
        self._special_tokens = dict(special_tokens)
        #: roles whose messages may have a list of parts; a tool's are joined for every template, as vLLM does
        self._reads_parts = frozenset(role for role in ("system", "user", "assistant") if self._probe_parts(role))
        self._past_thoughts = PastThoughtForm.learned(self._probed)
        self._past_calls = PastCallForm.learned(functools.partial(self._probed, tools=[PROBE_TOOL]))

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Render the prompt's text. Encode it without special tokens: the template writes them itself.

        Raises:
            RequestError: the template, or a check before it, refuses a message; names the field.
        """
        self._check_roles(messages)
        chat = [self._normalized(index, message) for index, message in enumerate(messages)]
        chat = self._past_calls.fitted(self._past_thoughts.fitted(chat))
        mark_at = ""
        if continue_final_message:
            if add_generation_prompt:
                raise RequestError(
                    "continue_final_message and add_generation_prompt are both true, wanted at most one of them",
                    param="continue_final_message",
                )
            mark_at = self._mark_final(chat)
        variables = self._variables(template_kwargs or {})
        try:
            text = self._template.render(
                messages=chat,
                tools=None if tools is None else [dict(tool) for tool in tools],
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except _RENDER_ERRORS as error:
            raise RequestError(f"the model's chat template refuses the messages: {error}", param="messages") from error
        except RecursionError as error:
            raise RequestError("the messages or tools are nested too deep", param="messages") from error
        return _cut_at_mark(text, mark_at) if continue_final_message else text

    def _variables(self, template_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        for name in template_kwargs:
            if name in {"messages", "tools", "add_generation_prompt"}:
                raise RequestError(
                    f"{name!r} is set by its own field, wanted a variable of the template's own",
                    param=f"chat_template_kwargs.{name}",
                )
        return {"documents": None, **self._special_tokens, **template_kwargs}

    def _check_roles(self, messages: Sequence[Message]) -> None:
        if not messages:
            raise RequestError("messages is empty, wanted at least one message", param="messages")
        for index, message in enumerate(messages):
            role = message.get("role") if isinstance(message, Mapping) else None
            if not isinstance(role, str):
                raise RequestError(
                    f"messages[{index}].role is {role!r}, wanted a string", param=f"messages[{index}].role"
                )
            if role not in KNOWN_ROLES and f"'{role}'" not in self.source and f'"{role}"' not in self.source:
                known = ", ".join(sorted(KNOWN_ROLES))
                raise RequestError(
                    f"messages[{index}].role is {role[:_SHOWN_CHARS]!r}, wanted one of {known}",
                    param=f"messages[{index}].role",
                )

    def _normalized(self, index: int, message: Message) -> dict[str, Any]:
        """Copy a message to render: no nulls, reasoning under the names templates read."""
        copy = {key: value for key, value in message.items() if value is not None}
        thought = next((copy[name] for name in NAMES if name in copy), None)
        if thought is not None:
            copy |= named(thought)
        content = copy.get("content")
        if isinstance(content, list | tuple):
            parts = [_text_part(part, f"messages[{index}].content[{number}]") for number, part in enumerate(content)]
            reads_parts = message.get("role") in self._reads_parts
            copy["content"] = parts if reads_parts else "\n".join(part["text"] for part in parts)
        elif content is not None and not isinstance(content, str):
            raise RequestError(
                f"messages[{index}].content is {type(content).__name__}, wanted a string or a list of text parts",
                param=f"messages[{index}].content",
            )
        return copy

    def _mark_final(self, chat: list[dict[str, Any]]) -> str:
        """Mark the end of the last message's text, and return that text."""
        param = f"messages[{len(chat) - 1}].content"
        content = chat[-1].get("content")
        if isinstance(content, str):
            chat[-1]["content"] = content + _CONTINUE_MARK
            return content
        if isinstance(content, list) and content:
            last = content[-1]["text"]
            content[-1]["text"] = last + _CONTINUE_MARK
            return str(last)
        raise RequestError(f"{param} is empty, wanted text that the model can continue", param=param)

    def _probe_parts(self, role: str) -> bool:
        """Tell whether the template gives for a role's list with one text part what it gives for that text."""

        def probed(content: Any) -> str | None:
            user = {"role": "user", "content": _PROBE}
            message = {"role": role, "content": content}
            return self._probed({"user": [message], "system": [message, user], "assistant": [user, message]}[role])

        # a template that refuses either form says so when a request meets it
        as_text = probed(_PROBE)
        return as_text is not None and as_text == probed([{"type": "text", "text": _PROBE}])

    def _probed(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> str | None:
        """Render `messages` as they are; None where the template refuses them."""
        try:
            return self._template.render(
                messages=messages, tools=tools, add_generation_prompt=True, **self._variables({})
            )
        except (*_RENDER_ERRORS, RecursionError):
            return None


def _text_part(part: Any, param: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if not isinstance(part, Mapping) or kind != "text" or not isinstance(part.get("text"), str):
        raise RequestError(
            f"{param} is of type {kind!r}, wanted 'text' with a string in text: this model reads text only",
            param=param,
        )
    return dict(part)


def _cut_at_mark(text: str, continued: str) -> str:
    """Cut `text` at the end of the message to be continued."""
    mark = _CONTINUE_MARK.strip()
    at = text.rfind(mark)
    if at < 0 or continued.strip() not in text:
        raise RequestError(
            "the model's chat template drops the final message or changes it, so it cannot be continued",
            param="continue_final_message",
        )
    # A template that trims its messages has taken the mark's space, and would have taken the text's own as well.
    return text[:at] if text[at:].startswith(_CONTINUE_MARK) else text[:at].rstrip()
