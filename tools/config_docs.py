"""Writes docs/CONFIG.md from the fields of cluster/config.py, the comments beside them, and the flags for them.

python -m tools.config_docs            write it
python -m tools.config_docs --check    exit code 1 where it is not what would be written
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path
from typing import Any, Final, NamedTuple, get_args, get_type_hints

import msgspec
from msgspec import inspect

from cluster import config
from cluster.options import variable

ROOT: Final = Path(__file__).parent.parent
TARGET: Final = ROOT / "docs" / "CONFIG.md"
_MARK: Final = "#:"
_HEAD: Final = """\
# Every setting

Made by `python -m tools.config_docs` from `cluster/config.py`; a test holds it to that.

One YAML file (`kvray serve --config FILE`, or `args` of a serveConfigV2) has these sections. What counts, first to
last: flags, the variables beside them, the file, defaults. A key that is not here is an error that names a near one.
`kvray config show` prints all of it with what is set, `kvray config check FILE` reads a file.

Sizes are numbers of bytes, or such as `512MiB`, `2GiB`, `1.5GB`. Names end in their units: `_s` seconds, `_ms`
milliseconds, `_bytes`, `_tokens`.
"""
_TAIL: Final = """\
## Environment

| variable | |
|---|---|
| {credentials} | where no file is named: `docs/SECURITY.md` |
| `KVRAY_URL`, `KVRAY_API_KEY_FILE` | of `kvray status`, `kvray cache` and others that ask a server |
| `RAY_ADDRESS` | the Ray cluster to join, host:port; `local`: one of our own |
| `RAY_AUTH_MODE`, `RAY_AUTH_TOKEN`, `RAY_AUTH_TOKEN_PATH` | Ray's authentication, as Ray has it |
| `RAY_TMPDIR`, `XDG_CACHE_HOME` | where Ray's sessions lie; where compiled kernels and converted models do |
| `OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_EXPORTER_OTLP_CERTIFICATE`, ... | what the exporter of spans reads, too |
"""


class Setting(NamedTuple):
    """A row of a section's table."""

    name: str
    values: str  #: what it may be
    default: str
    flag: str  #: with its variable; "": there is none
    text: str


def document() -> str:
    """Return the text of docs/CONFIG.md."""
    comments, flags = _comments(Path(config.__file__)), _flags(ROOT / "cluster" / "options.py")
    parts = [_HEAD]
    for field in msgspec.structs.fields(config.KvrayConfig):
        parts += _section(field.name, type(field.default), comments, flags)
    names = get_args(get_type_hints(config.environment_credential)["name"])
    credentials = ", ".join(f"`{name}`" for name in names)
    return "\n".join([*parts, _TAIL.format(credentials=credentials)])


def _section(
    place: str, kind: type[Any], comments: dict[tuple[str, str], str], flags: dict[str, tuple[str, str]]
) -> list[str]:
    """Write a section, then those of the entries that its lists have."""
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    rows, below = [], []
    for field in info.fields:
        name = f"{place}.{field.name}"
        flag, help_text = flags.get(name, ("", ""))
        text = comments.get((kind.__name__, field.name)) or help_text
        rows.append(Setting(field.name, _values(field.type), _default(field), flag, text))
        if isinstance(field.type, inspect.VarTupleType) and isinstance(field.type.item_type, inspect.StructType):
            below += _section(f"{name}[]", field.type.item_type.cls, comments, flags)
    lines = [f"## {place}", "", " ".join((kind.__doc__ or "").split()), "", "| setting | values | default | |"]
    lines.append("|---|---|---|---|")
    lines += [f"| `{r.name}` | {r.values} | {r.default} | {_meaning(r)} |" for r in rows]
    return [*lines, "", *below]


def _meaning(row: Setting) -> str:
    return "; ".join(part for part in (row.text, row.flag) if part).replace("|", "\\|")


def _values(kind: inspect.Type) -> str:
    """Say what a value may be."""
    match kind:
        case inspect.UnionType(types=types):
            return " or ".join(_values(one) for one in types if not isinstance(one, inspect.NoneType))
        case inspect.LiteralType(values=values):
            return ", ".join(f"`{value}`" for value in values)
        case inspect.IntType(ge=low, le=high) | inspect.FloatType(ge=low, le=high) if low is not None:
            return f"{low:.15g} to {high:.15g}"
        case inspect.StrType(pattern=pattern):
            return "text" if pattern is None else f"text like `{pattern}`".replace("|", "\\|")
        case inspect.BoolType():
            return "true, false"
        case inspect.VarTupleType(item_type=item):
            return f"list of {_values(item)}"
        case inspect.TupleType(item_types=items):
            return f"list of {len(items)}: {_values(items[0])}"
        case inspect.DictType():
            return "mapping of text"
        case inspect.StructType():
            return "mappings, below"
    raise TypeError(f"cluster/config.py has a {kind} that tools/config_docs.py does not know")


def _default(field: inspect.Field) -> str:
    if field.required:
        return "wanted"
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    if value is None:
        return "none"
    if value == str(config.DEMO_MODEL):
        return "the demo model"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{str(msgspec.json.encode(value), 'utf-8').strip(chr(34))}`" if value not in ((), {}) else "empty"


def _comments(path: Path) -> dict[tuple[str, str], str]:
    """Read what `#:` says of each field: in the lines above it, or at its end."""
    source = path.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    said = {
        token.start[0]: (token.string.removeprefix(_MARK).strip(), token.line.strip().startswith(_MARK))
        for token in tokens
        if token.type == tokenize.COMMENT and token.string.startswith((_MARK, "# "))
    }
    found: dict[tuple[str, str], str] = {}
    for section in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
        for node in section.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                assert node.end_lineno is not None
                lines = [text for line in range(node.lineno, node.end_lineno + 1) if (text := said.get(line, ("",))[0])]
                above = node.lineno - 1
                while above in said and said[above][1]:
                    lines.insert(0, said[above][0])
                    above -= 1
                found[section.name, node.target.id] = " ".join(lines)
    return found


def _flags(path: Path) -> dict[str, tuple[str, str]]:
    """Read which flag and variable stand for a setting, and what they say of it."""
    found: dict[str, tuple[str, str]] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_setting":
            place, flag, text = (str(each.value) if isinstance(each, ast.Constant) else "" for each in node.args[:3])
            found[place] = (f"`{flag}`, `{variable(flag.partition('/')[0])}`", text)
    return found


def main() -> int:
    """Write the file, or say that it is another."""
    text = document()
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(text, encoding="utf-8")
    elif TARGET.read_text(encoding="utf-8") != text:
        sys.stderr.write(f"{TARGET} is not what `python -m tools.config_docs` writes\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
