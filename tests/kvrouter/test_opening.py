from kvrouter.compiled_index import CompiledIndex
from kvrouter.index_library import INDEX
from kvrouter.opening import open_index
from kvrouter.plain_index import PlainIndex
from tests.kvrouter.indexes import compiled


def test_the_compiled_index_is_taken_where_it_was_built():
    compiled()
    assert isinstance(open_index(lambda _: 1), CompiledIndex)


def test_where_nothing_was_built_python_serves_and_the_log_says_what_to_do(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert isinstance(open_index(lambda _: 1), PlainIndex)
    assert "python -m kvrouter.build" in caplog.text


def test_where_the_library_does_not_load_python_serves(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = INDEX.path()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x7fELF, but no more")
    assert isinstance(open_index(lambda _: 1), PlainIndex)
    assert "does not load" in caplog.text
