"""Logs: a JSON object a line for tools, text for people."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnsight_hpc.wire.logs import readable

_PROGRAM = """
import logging, sys
from nnsight_hpc.wire.logs import log_as_json
log_as_json("worker", replica="smol-1")
logger = logging.getLogger("nnsight_hpc.some.part")
for text in sys.argv[1:]:
    logger.info("%s", text, extra={"request": "r-abcdefgh2345"})
logger.debug("not shown")
try:
    1 / 0
except ZeroDivisionError:
    logger.exception("failed")
"""


def _logged(*texts: str) -> list[str]:
    command = [sys.executable, "-c", _PROGRAM, *texts]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return _logged("plain", 'two\nlines and a "quote"', "no UTF-8: \udcff", '{"time":"')


def test_a_record_is_one_line_of_json_with_what_it_is_about(lines):
    """Each record is one JSON object: time with its zone, level, program, logger, text, replica and request."""
    first, second = map(json.loads, lines[:2])
    about = {key: first[key] for key in ("level", "program", "logger", "text", "replica", "request")}
    assert about == {
        "level": "INFO",
        "program": "worker",
        "logger": "nnsight_hpc.some.part",
        "text": "plain",
        "replica": "smol-1",
        "request": "r-abcdefgh2345",
    }
    assert first["time"].endswith("Z")
    assert second["text"] == 'two\nlines and a "quote"'


def test_what_is_no_utf8_is_said_all_the_same(lines):
    """A byte that is no UTF-8 is written as an escape."""
    assert json.loads(lines[2])["text"] == r"no UTF-8: \udcff"


def test_an_error_brings_its_traceback_in_the_same_line(lines):
    """The traceback is a field, and readable below the text."""
    entry = json.loads(lines[-1])
    assert (len(lines), entry["text"], entry["error"].splitlines()[-1]) == (
        5,
        "failed",
        "ZeroDivisionError: division by zero",
    )
    shown = readable(lines[-1] + "\n").splitlines()
    assert shown[0].endswith(" ERROR nnsight_hpc.some.part: failed")
    assert shown[-1] == "ZeroDivisionError: division by zero"


def test_a_rank_s_label_stands_before_each_line_that_comes_of_one(lines):
    """A labelled entry of two lines of text becomes two lines with the label."""
    shown = readable(f" 3: {lines[1]}\n").splitlines()
    assert [line[:4] for line in shown] == [" 3: ", " 3: "]
    assert shown[1] == ' 3: lines and a "quote"'


def test_people_read_local_time_to_the_millisecond():
    """The time is that of the reader's zone."""
    line = (
        '{"time":"2026-11-22T20:15:03.120Z","level":"INFO","program":"daemon","process":1,"logger":"a.b","text":"said"}'
    )
    command = [
        sys.executable,
        "-c",
        "import sys; from nnsight_hpc.wire.logs import readable; print(readable(sys.argv[1]))",
    ]
    zone = {"TZ": "Asia/Tokyo", "PATH": ""}
    shown = subprocess.run([*command, line], capture_output=True, text=True, check=True, env=zone).stdout
    assert shown == "2026-11-23 05:15:03.120 INFO a.b: said\n"


@given(st.lists(st.one_of(st.text(), st.just('{"time":"2026'), st.builds(lambda t: '{"time":"' + t, st.text()))))
def test_what_is_no_entry_stays_as_it_is(parts):
    """Text that holds no whole entry of ours is unchanged, whatever it is."""
    text = "\n".join(parts)
    assert readable(text) == text
