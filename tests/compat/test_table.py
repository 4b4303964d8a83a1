"""The page says what ran, and nothing else."""

from __future__ import annotations

from tests.compat.table import Ran, Row, is_wrong, page, ran_from_junit

JUNIT = """<testsuites><testsuite>
<testcase name="test_tool_stream"/>
<testcase name="test_schemas[json-Plain]"/>
<testcase name="test_schemas[json-Sets]"><skipped message="refused: uniqueItems"/></testcase>
<testcase name="schemas tree"/>
<testcase name="too long"><failure message="TypeError: a | b
is none">where</failure></testcase>
</testsuite></testsuites>"""


def test_what_both_test_runners_write_is_read_alike(tmp_path):
    path = tmp_path / "junit.xml"
    path.write_text(JUNIT)
    ran = list(ran_from_junit(path))
    assert ran[:4] == [
        Ran("tool stream", "", "ok"),
        Ran("schemas", "json-Plain", "ok"),
        Ran("schemas", "json-Sets", "refused: uniqueItems"),
        Ran("schemas", "tree", "ok"),
    ]
    assert [is_wrong(one) for one in ran] == [False, False, False, False, True]


def test_a_cell_is_yes_or_counts_or_says_what_went_wrong():
    ran = [
        Ran("chat", "", "ok"),
        *(Ran("schemas", str(number), "ok") for number in range(12)),
        Ran("schemas", "Sets", "refused: uniqueItems"),
        Ran("schemas", "Root", "arguments are an object"),
        Ran("stream", "a", "ok"),
        Ran("stream", "b", "x | y\nz"),
    ]
    text = page([Row("some client", "1.2", ran)], {"chat": "c", "stream": "s", "schemas": "m", "tools": "t"})
    row = next(line for line in text.splitlines() if line.startswith("| some client"))
    assert row == '| some client 1.2 | yes | **no** (1 of 2: b): "x / y z" | 12 of 13; `uniqueItems` 1 |  |'
