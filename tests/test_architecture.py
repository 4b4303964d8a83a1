"""What import-linter (`make check`, pyproject.toml) does not see of docs/ARCHITECTURE.md."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = tuple(PROJECT["tool"]["importlinter"]["root_packages"])
MAX_LINES = 550
IMPORT_WITHIN_CPU_S = 0.3

FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


def imported_by(code: str) -> set[str]:
    """Top-level names in sys.modules of a fresh interpreter that ran `code`."""
    script = f"{code}\nimport sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.check_output([sys.executable, "-c", script], text=True, cwd=ROOT).split())


def test_no_other_distribution_has_a_room_of_that_name():
    """The rooms' names are plain words, and PyPI has a package `cluster`."""
    owners = importlib.metadata.packages_distributions()
    # an editable install lists no packages
    assert {room: owners[room] for room in ROOMS if room in owners and set(owners[room]) != {"kvray"}} == {}


def test_rooms_are_importable_from_anywhere_and_are_these(tmp_path):
    code = f"import importlib; print(*(importlib.import_module(room).__path__[0] for room in {ROOMS}), sep='\\n')"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=tmp_path, env=environment)
    assert found.splitlines() == [str(ROOT / room) for room in ROOMS]


def test_the_page_names_every_room():
    page = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    assert re.findall(r"^    (\w+)/  ", page, flags=re.MULTILINE) == list(ROOMS)


def test_the_page_names_files_that_exist():
    page = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", page))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.slow
def test_a_router_starts_without_torch_and_at_once():
    assert not imported_by("import kvrouter.router") & {"torch", "transformers", "ray", "numpy.distutils"}
    timed = "import time; import kvrouter.router; print(time.process_time())"
    seconds = min(float(subprocess.check_output([sys.executable, "-c", timed], text=True, cwd=ROOT)) for _ in range(3))
    assert seconds < IMPORT_WITHIN_CPU_S


@pytest.mark.slow
def test_an_ingress_starts_without_torch():
    found = imported_by("import cluster.ingress")
    assert "fastapi" in found
    assert not found & {"torch", "transformers"}


def environment_readers(tree: ast.AST) -> list[int]:
    """Lines that touch the process's environment."""
    names = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    return [
        node.lineno
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in names and ast.unparse(node.value) == "os")
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and {item.name for item in node.names} & names)
    ]


@pytest.mark.slow
def test_only_the_configuration_reads_the_environment():
    found = {name: environment_readers(ast.parse((ROOT / name).read_text())) for name in NAMES}
    # The cache's place is the desktop's convention, and the build is a command of its own (`make kernels`).
    allowed = {"cluster/config.py", "transport/compiled.py"}
    assert {name: lines for name, lines in found.items() if lines and name not in allowed} == {}


def test_the_reader_of_environments_sees_them():
    code = "import os\nfrom os import getenv\nos.environ['A']\nos.getenv('A')\nself.environ\n"
    assert environment_readers(ast.parse(code)) == [2, 3, 4]


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("__init__.py")])
def test_an_init_file_holds_a_docstring_only(name):
    body = ast.parse((ROOT / name).read_text()).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)
    assert isinstance(body[0].value, ast.Constant)


def test_no_file_is_longer_than_a_person_reads():
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name in NAMES}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


@pytest.mark.slow
def test_every_mask_of_a_checker_names_what_it_masks():
    """`noqa` and `type: ignore` carry a code."""
    bare = []
    for path in [*FILES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]:
        with path.open("rb") as file:
            comments = [token for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT]
        bare += [
            f"{path.relative_to(ROOT)}:{token.start[0]}: {token.string}"
            for token in comments
            if re.search(r"#\s*(noqa(?!: ?[A-Z]+\d)|type: ?ignore(?!\[[a-z-]+))", token.string)
        ]
    assert bare == []


def test_rooms_are_marked_as_typed():
    assert [room for room in ROOMS if not (ROOT / room / "py.typed").is_file()] == []


def test_no_module_is_named_like_one_of_the_standard_library():
    assert [name for name in NAMES if Path(name).stem in sys.stdlib_module_names] == []


def test_no_module_is_named_for_what_it_is_not():
    vague = {"utils", "util", "common", "helpers", "helper", "misc", "base", "manager"}
    assert [name for name in NAMES if Path(name).stem in vague] == []
