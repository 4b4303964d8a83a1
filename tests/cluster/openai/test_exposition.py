"""Numbers in the text format, read by prometheus_client's parser."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from cluster.openai.exposition import Source, families, labels_of, page, with_labels

HELP = {"kvray_blocks": "Blocks", "kvray_bytes_total": "Bytes", "kvray_x_seconds": "Seconds"}


def read(*sources: Source) -> list[Metric]:
    return list(text_string_to_metric_families(page(families(sources, HELP)).decode()))


def told(found: list[Metric]) -> list[tuple[str, str, Mapping[str, str], float]]:
    return [(sample.name, family.type, sample.labels, sample.value) for family in found for sample in family.samples]


def test_numbers_keep_their_names_and_labels_and_get_those_of_who_tells_them():
    found = read(
        ({"worker": "d1"}, {"kvray_blocks": 7.0, 'kvray_bytes_total{road="shm"}': 3.0}),
        ({"worker": "d2"}, {'kvray_bytes_total{road="ucx"}': 4.0}),
        ({}, {"kvray_blocks": 8.0, 'kvray_bytes_total{road="ucx"}': 5.0}),
    )
    assert told(found) == [
        ("kvray_blocks", "gauge", {"worker": "d1"}, 7.0),
        ("kvray_blocks", "gauge", {}, 8.0),
        ("kvray_bytes_total", "counter", {"worker": "d1", "road": "shm"}, 3.0),
        ("kvray_bytes_total", "counter", {"worker": "d2", "road": "ucx"}, 4.0),
        ("kvray_bytes_total", "counter", {"road": "ucx"}, 5.0),
    ]
    assert [family.documentation for family in found] == ["Blocks", "Bytes"]


def test_parts_of_a_histogram_are_one_family():
    found = read(
        ({"ingress": "a"}, {'kvray_x_seconds_bucket{le="1.0"}': 2.0, "kvray_x_seconds_sum": 3.0}),
        ({"ingress": "b"}, {"kvray_x_seconds_count": 2.0}),
    )
    assert [(family.name, family.type, len(family.samples)) for family in found] == [
        ("kvray_x_seconds", "histogram", 3)
    ]
    assert found[0].documentation == "Seconds"


def test_families_of_one_name_are_one_with_the_first_ones_help():
    text = page(
        [*families([({}, {"kvray_blocks": 1.0})], HELP), *families([({"worker": "d"}, {"kvray_blocks": 2.0})], {})]
    )
    assert text.decode().splitlines() == [
        "# HELP kvray_blocks Blocks",
        "# TYPE kvray_blocks gauge",
        "kvray_blocks 1.0",
        'kvray_blocks{worker="d"} 2.0',
    ]


def test_a_name_that_nobody_described_is_told_all_the_same():
    (family,) = read(({}, {"kvray_new": 1.0}))
    assert (family.name, family.documentation) == ("kvray_new", "Not described")


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e300, 5e-324, 1e16, -0.5, 3])
def test_numbers_are_read_as_they_were(value):
    assert told(read(({}, {"kvray_blocks": value}))) == [("kvray_blocks", "gauge", {}, value)]


def test_what_is_no_number_is_read_as_none():
    assert math.isnan(told(read(({}, {"kvray_blocks": math.nan})))[0][3])


@given(st.text(alphabet=st.characters(exclude_categories=("Cs",), exclude_characters="\r")))
def test_labels_are_read_as_they_were_whatever_stands_in_them(value):
    name = with_labels("kvray_blocks", peer=value, road="ucx")
    assert labels_of(name) == {"peer": value, "road": "ucx"}
    ((_, _, labels, _),) = told(read(({"worker": value}, {name: 1.0})))
    assert labels == {"worker": value, "peer": value, "road": "ucx"}
