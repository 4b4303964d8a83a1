import logging

import pytest

from messages.errors import ConfigError
from transport.opening import RoadOptions, open_roads
from transport.plasma.vault import LocalVaults
from transport.secret import ClusterSecret


def opened(*names, vaults=None, **options):
    roads = open_roads(RoadOptions(names=names, **options), ClusterSecret.generate(), "127.0.0.1", vaults, lambda: None)
    for road in roads:
        road.close()
    return [road.road for road in roads]


def test_roads_are_opened_in_the_order_named():
    assert opened("socket", "plasma", "shm", vaults=LocalVaults()) == ["socket", "plasma", "shm"]


def test_a_road_that_cannot_be_taken_is_left_out_and_the_log_says_why(caplog):
    caplog.set_level(logging.INFO)
    assert opened("plasma", "shm") == ["shm"]
    assert "road plasma cannot be taken: there is no Ray here" in caplog.text


def test_a_name_that_is_none_is_an_error_that_names_it():
    with pytest.raises(ConfigError, match="'pigeon': wanted one of shm, ucx, socket, plasma"):
        opened("pigeon")


def test_what_is_set_for_ucx_reaches_it(caplog):
    pytest.importorskip("ucxx", reason="ucxx is not installed: no UCX road")
    caplog.set_level(logging.INFO)
    assert opened("ucx", ucx_devices=("nosuch0:1",)) == []
    assert "nosuch0:1" in caplog.text
