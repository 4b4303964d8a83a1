"""Log lines: one per record, text or JSON, from our rooms only."""

from __future__ import annotations

import json
import logging
import re

import pytest

from cluster.logs import ROOMS, configure_logging


@pytest.fixture(autouse=True)
def as_before():
    kept = {room: (logger.handlers[:], logger.level, logger.propagate) for room, logger in _loggers().items()}
    yield
    for room, logger in _loggers().items():
        logger.handlers[:], logger.propagate = kept[room][0], kept[room][2]
        logger.setLevel(kept[room][1])


def _loggers():
    return {room: logging.getLogger(room) for room in ROOMS}


def test_text_is_one_line_with_clock_level_and_place(capsys):
    configure_logging("info", "text")
    logging.getLogger("engine.model.load").info("loading %s", "llama")
    assert re.fullmatch(r"\d\d:\d\d:\d\d info    engine\.model\.load: loading llama\n", capsys.readouterr().err)


def test_a_message_of_many_lines_stays_one_line(capsys):
    configure_logging("info", "text")
    logging.getLogger("cluster.app").warning("first\nsecond\r\x1b[31m")
    line = capsys.readouterr().err
    assert line.endswith("cluster.app: first\\nsecond\\r\\x1b[31m\n")


def test_json_is_one_object_per_line(capsys):
    configure_logging("info", "json")
    logging.getLogger("decode.worker").warning('pull of "%s"\nfailed', "b")
    fields = json.loads(capsys.readouterr().err)
    assert fields["level"] == "warning"
    assert fields["logger"] == "decode.worker"
    assert fields["message"] == 'pull of "b"\nfailed'
    assert fields["time"] > 1.7e9


@pytest.mark.parametrize("style", ["text", "json"])
def test_an_error_brings_its_traceback(capsys, style):
    configure_logging("info", style)
    try:
        int("three")
    except ValueError:
        logging.getLogger("kvrouter").exception("folding")
    written = capsys.readouterr().err
    text = json.loads(written)["traceback"] if style == "json" else written
    assert "Traceback (most recent call last)" in text
    assert "ValueError: invalid literal" in text


def test_what_is_below_the_level_is_not_written(capsys):
    configure_logging("warning", "text")
    logging.getLogger("engine").info("quiet")
    logging.getLogger("engine").warning("loud")
    assert capsys.readouterr().err.count("\n") == 1


def test_configuring_again_replaces_and_leaves_others_alone(capsys):
    others = logging.getLogger("somebody.else")
    before = (others.level, others.handlers[:], logging.getLogger().handlers[:])
    configure_logging("debug", "text")
    configure_logging("info", "text")
    logging.getLogger("transport.shm").info("once")
    assert capsys.readouterr().err.count("once") == 1
    assert (others.level, others.handlers[:], logging.getLogger().handlers[:]) == before
