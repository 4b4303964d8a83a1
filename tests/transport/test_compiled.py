"""A compiled library is found again as long as nothing changes that its bits depend on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from transport.compiled import BuildError, CompiledLibrary


@pytest.fixture
def library(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "source.cpp"
    source.write_text("int one = 1;")
    return CompiledLibrary("one", (source,), ("-O3",))


def written(text: str):
    """A compiler that writes `text`."""

    def compile_into(directory):
        path = directory / "made.so"
        path.write_text(text)
        return path

    return compile_into


def test_a_library_is_compiled_once(library):
    assert not library.path().exists()
    path = library.build(written("first"))
    assert path == library.path()
    assert library.build(written("second")).read_text() == "first"


def test_other_sources_and_other_facts_are_another_library(library):
    first = library.build(written("first"))
    assert not replace(library, facts=("-O2",)).path().exists()
    library.sources[0].write_text("int one = 2;")
    assert not library.path().exists()
    assert library.build(written("second")) != first


def test_what_could_not_be_compiled_leaves_nothing_behind(library):
    def refuse(directory):
        (directory / "half").write_text("")
        raise BuildError("no")

    with pytest.raises(BuildError):
        library.build(refuse)
    assert not library.path().exists()
    assert list(library.path().parent.parent.iterdir()) == []
