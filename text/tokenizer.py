"""Text to token ids and back, through `tokenizers`; no torch, no transformers.

A model directory's tokenizer.json is used as it is, with the special tokens that tokenizer_config.json and the older
special_tokens_map.json name, which is what transformers' fast tokenizers do.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import tokenizers

from messages.errors import ConfigError, RequestError
from text.chat_template import ChatTemplate, Message
from text.json_file import read_json
from text.llama_tokenizer import TokenizerRules, rebuilt
from text.pieces import MAX_STRETCH_BYTES, PIECE_CHARS, StretchTooLongError, encode_pieces

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
#: of the directory, or told apart
_FILES = frozenset({"vocab_file", "merges_file", "tokenizer_file", "name_or_path", "chat_template"})
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_NUM_OTHER_TEMPLATES = 16


class Tokenizer:
    """A model's tokenizer and chat template. Any thread may use it, but one at a time to render a chat."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, ChatTemplate] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Wrap a `tokenizers` object.

        Args:
            backend: the object.
            special_tokens: by name, such as bos_token.
            chat_templates: by name.
            config: what tokenizer_config.json says, for people.
        """
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self._chat_templates = dict(chat_templates or {})
        self._config = dict(config or {})
        self._others: dict[str, ChatTemplate] = {}  # that clients brought, by their source
        added = backend.get_added_tokens_decoder()
        #: ids of control tokens, which decode can skip
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.added_tokens = [token.content for token in added.values()]  #: as texts, special ones and others
        #: one past the largest id; the model's own vocabulary is often padded beyond it
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        #: facts about the decoder, for the classes below
        self.decoding = _Decoding(backend)
        self._bytes: dict[int, bytes] = {}
        self._long_piece = threading.Lock()  #: whoever encodes much at once, which takes much memory
        #: texts of tokens that begin and end between characters, as they were seen; by whether special ones are skipped
        self.texts: dict[bool, dict[int, str]] = {True: {}, False: {}}

    @classmethod
    def load(
        cls,
        model_dir: str | Path,
        *,
        chat_template: str | Path | None = None,
        rules: TokenizerRules = "transformers",
    ) -> Tokenizer:
        """Load the tokenizer of a transformers model directory.

        Args:
            model_dir: the directory.
            chat_template: a file to use instead of its own.
            rules: of "file" tokenizer.json alone says how texts are tokenized, where transformers does it otherwise.

        Raises:
            ConfigError: there is no tokenizer.json, or a file cannot be read as what it should be.
        """
        folder = Path(model_dir)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"no tokenizer: {path} is not there")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises a bare Exception for every fault of the file
            raise ConfigError(f"no tokenizer: {path} cannot be read: {_one_line(error)}") from error
        config = read_json(folder / "tokenizer_config.json", is_optional=True)
        if "added_tokens_decoder" not in config:
            config = {**config, **read_json(folder / "special_tokens_map.json", is_optional=True)}
        built = rebuilt(folder, config) if rules == "transformers" else None
        if built is not None:
            backend, config = tokenizers.Tokenizer.from_str(built[0]), built[1]
        _add_tokens(backend, config)
        special = {name: _content(config[name]) for name in _NAMED_TOKENS if config.get(name)}
        templates = {
            name: ChatTemplate(source, special, name=f"chat template {name!r} of {folder}")
            for name, source in _template_sources(folder, config, chat_template).items()
        }
        return cls(backend, special, templates, config)

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's end token; the model's generation_config may name more."""
        return self._named_id("eos_token")

    def encode(self, text: str, *, add_special_tokens: bool = True, enough: int | None = None) -> list[int]:
        """Encode `text`; with `add_special_tokens`, add those that tokenizer.json puts around a text (often a bos).

        A long text is encoded in pieces: no further than until there are more than `enough` tokens. Other threads run
        meanwhile.

        Raises:
            RequestError: `text` holds half a surrogate pair, or over a MiB that cannot be cut into pieces.
        """
        try:
            around = self._around() if add_special_tokens and len(text) > PIECE_CHARS else ((), ())
            if len(text) <= PIECE_CHARS or around is None:
                return self._encode([text], add_special_tokens=add_special_tokens)[0]
            pieces = encode_pieces(text, partial(self._encode, add_special_tokens=False), enough)
            return [*around[0], *chain.from_iterable(pieces), *around[1]]
        except (UnicodeEncodeError, TypeError) as error:
            raise RequestError(f"the text is not valid Unicode: {_one_line(error)}") from error
        except StretchTooLongError as error:
            raise RequestError(
                f"got a text of {len(text)} characters, want one that has the end of a word in every"
                f" {MAX_STRETCH_BYTES} bytes: this tokenizer encodes them at once"
            ) from error

    def _encode(self, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
        # Not encode, which keeps all other threads from running: for seconds where a text has megabytes.
        with self._long_piece if max(map(len, texts)) > PIECE_CHARS else nullcontext():
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
            return [encoding.ids for encoding in encodings]

    def _around(self) -> tuple[Sequence[int], Sequence[int]] | None:
        """Return the ids that are put before and behind every text; None where that depends on the text."""
        [inner], [whole] = (self._encode(["a"], add_special_tokens=adds) for adds in (False, True))
        for begin in range(len(whole) - len(inner) + 1):
            if whole[begin : begin + len(inner)] == inner:
                return whole[:begin], whole[begin + len(inner) :]
        return None

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`; ids that the tokenizer does not know count as nothing."""
        text: str = self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that the token stands for inside a text; b"" where the tokenizer does not know it."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._find_bytes(token_id)
        return found

    def token_text(self, token_id: int) -> str:
        """Return `token_bytes` as text; bytes that are no whole character show as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> str:
        """Render the prompt's text by the model's chat template, or by `chat_template`, as `ChatTemplate.render` does.

        Raises:
            RequestError: the model has no chat template, or the template refuses the messages, or is none.
        """
        template = self._template(has_tools=tools is not None) if chat_template is None else self._other(chat_template)
        if template is None:
            raise RequestError(
                "the model has no chat template: use /v1/completions with a prompt",
                param="messages",
                code="no_template",
            )
        return template.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
        )

    @property
    def chat_template_source(self) -> str:
        """The chat template that shows tools, as it was written; "" where the model has none."""
        template = self._template(has_tools=True)
        return "" if template is None else template.source

    def info(self) -> dict[str, Any]:
        """Return what tokenizer_config.json says, as it came to be: JSON, tokens as their texts."""
        added = self.backend.get_added_tokens_decoder()
        template = self._template(has_tools=False)
        config = {name: _plain(value) for name, value in self._config.items() if name not in _FILES}
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **config,
            **self.special_tokens,
            "added_tokens_decoder": {str(token_id): token.content for token_id, token in sorted(added.items())},
            **({} if template is None else {"chat_template": template.source}),
        }

    def _template(self, *, has_tools: bool) -> ChatTemplate | None:
        name = "tool_use" if has_tools and "tool_use" in self._chat_templates else "default"
        return self._chat_templates.get(name)

    def _other(self, source: str) -> ChatTemplate:
        """Return a template that is not the model's, compiled; some are kept, for clients send them again and again."""
        template = self._others.get(source)
        if template is None:
            try:
                template = ChatTemplate(source, self.special_tokens, name="chat_template")
            except ConfigError as error:
                raise RequestError(error.message, param="chat_template") from error
            while len(self._others) >= _NUM_OTHER_TEMPLATES:
                self._others.pop(next(iter(self._others)))
            self._others[source] = template
        return template

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        token_id: int | None = None if token is None else self.backend.token_to_id(token)
        return token_id

    def _find_bytes(self, token_id: int) -> bytes:
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if self.decoding.is_byte_level:
            return _byte_level_bytes(token)
        if token_id in self.special_ids:
            return str(token).encode()
        byte = self.decoding.byte_of(token)
        if byte is not None:
            return bytes([byte])
        # Decoders may trim the start of a text, so the token is decoded behind another one.
        anchor = self.decoding.anchor_id
        before = self.backend.decode([anchor], skip_special_tokens=False)
        text: str = self.backend.decode([anchor, token_id], skip_special_tokens=False)
        return text[len(before) :].encode()


class _Decoding:
    """The facts about a tokenizer's decoder that matter for decoding piece by piece."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        spec = json.loads(backend.to_str())["decoder"]
        steps = [] if spec is None else spec["decoders"] if spec["type"] == "Sequence" else [spec]
        self.kinds = kinds = [step["type"] for step in steps]  #: of its steps; empty: it puts a space between tokens
        self.is_byte_level = kinds == ["ByteLevel"]
        self.has_byte_tokens = "ByteFallback" in kinds
        self.may_end_open = "ByteLevel" in kinds
        self.is_local = _is_local(steps)
        self.anchor_id = self._find_anchor(backend)

    def byte_of(self, token: str) -> int | None:
        """Return the byte of a byte-fallback token such as <0xE4>; None for other tokens."""
        match = _BYTE_TOKEN.fullmatch(token) if self.has_byte_tokens else None
        return None if match is None else int(match[1], 16)

    def _find_anchor(self, backend: tokenizers.Tokenizer) -> int:
        """Find the id of an ordinary token that decodes to more than space."""
        for token_id in range(backend.get_vocab_size(with_added_tokens=True)):
            token = backend.id_to_token(token_id)
            if token is not None and token.isalnum() and backend.decode([token_id], skip_special_tokens=False) == token:
                return token_id
        return 0


def _is_local(steps: list[dict[str, Any]]) -> bool:
    """Tell whether text once decoded stays, up to trimming at its very start, whatever tokens follow."""
    is_fused = False
    for step in steps:
        kind = step["type"]
        if kind == "Fuse":
            is_fused = True
        elif kind == "Strip":
            if is_fused and step["stop"] > 0:
                return False
        elif kind == "Replace":
            if is_fused:
                return False
        elif kind not in {"ByteFallback", "Metaspace", "WordPiece"}:
            return False
    return True


def _byte_level_table() -> dict[str, int]:
    """Map characters to bytes as byte-level BPE does (Radford et al. 2019): printable bytes stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_level_table()


def _byte_level_bytes(token: str) -> bytes:
    """Return a token's bytes; one with a character that is no byte's (an added token) stands for its own UTF-8."""
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _plain(value: Any) -> Any:
    """Return a value of the configuration with its tokens' texts instead of objects."""
    if isinstance(value, dict):
        return value["content"] if "content" in value else {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list) else value


def _content(token: Any) -> str:
    """Return a token's text: the configuration files write it as a string or as an object."""
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _added_token(token: Any, *, is_special: bool) -> tokenizers.AddedToken:
    if not isinstance(token, dict):
        return tokenizers.AddedToken(str(token), special=is_special, normalized=False)
    return tokenizers.AddedToken(
        token["content"],
        single_word=token.get("single_word", False),
        lstrip=token.get("lstrip", False),
        rstrip=token.get("rstrip", False),
        normalized=token.get("normalized", not is_special),
        special=is_special,
    )


def _add_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Add the tokens that the configuration names and tokenizer.json lacks, or has as ordinary ones."""
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder") or {}
    for _, token in sorted(listed.items(), key=lambda item: int(item[0])):
        if token["content"] not in known:
            backend.add_tokens([_added_token(token, is_special=bool(token.get("special", False)))])
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    special = [config[name] for name in _NAMED_TOKENS if config.get(name)]
    for token in [*special, *(extra.values() if isinstance(extra, dict) else extra)]:
        present = known.get(_content(token))
        if present is None:
            backend.add_special_tokens([_added_token(token, is_special=True)])
        elif not present.special:
            present.special = True
            backend.add_special_tokens([present])


def _template_sources(folder: Path, config: Mapping[str, Any], named: str | Path | None) -> dict[str, str]:
    """Find the chat templates, by name. Files of their own come before those in tokenizer_config.json."""
    if named is not None:
        try:
            return {"default": Path(named).read_text(encoding="utf-8")}
        except OSError as error:
            raise ConfigError(f"chat template {named}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"chat template {named} is not UTF-8: {_one_line(error)}") from error
    sources = {}
    if (folder / "chat_template.jinja").is_file():
        sources["default"] = folder / "chat_template.jinja"
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        sources[path.name.removesuffix(".jinja")] = path
    if sources:
        try:
            return {name: path.read_text(encoding="utf-8") for name, path in sources.items()}
        except UnicodeDecodeError as error:
            raise ConfigError(f"a chat template of {folder} is not UTF-8: {_one_line(error)}") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        return dict(template)
    return {} if template is None else {"default": str(template)}
