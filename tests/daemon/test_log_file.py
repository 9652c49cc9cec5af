"""The daemon's log: turned over while it runs, and shown over its files."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nnsight_hpc.daemon.log_file import KEPT, earlier, last_entries

_PROGRAM = """
import logging, os, sys
from pathlib import Path
from nnsight_hpc.daemon.log_file import TurnedOver
from nnsight_hpc.wire.logs import log_as_json
log_as_json("daemon", handler=TurnedOver(Path(sys.argv[1]), most=2000))
for number in range(int(sys.argv[2])):
    logging.getLogger("part").info("entry %d", number)
os.write(2, b"last words\\n")
os.write(1, b"printed\\n")
"""


def _log(path, entries, *, into=None):
    with (into or path).open("ab") as log:
        command = [sys.executable, "-c", _PROGRAM, str(path), str(entries)]
        subprocess.run(command, stdout=log, stderr=log, check=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A log of 500 entries, in files of some 2,000 bytes."""
    path = tmp_path_factory.mktemp("log") / "daemon.log"
    _log(path, 500)
    return path


def test_a_full_log_makes_way_for_a_new_one_and_old_ones_go(path):
    """As many earlier files stay as are to be kept, each of about the size, for the owner alone."""
    files = sorted(file.name for file in path.parent.iterdir())
    assert files == ["daemon.log", *(f"daemon.log.{number}" for number in range(1, KEPT + 1))]
    assert {2000 <= earlier(path, number).stat().st_size < 2300 for number in range(1, KEPT + 1)} == {True}
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_is_printed_past_the_log_goes_to_the_new_file(path):
    """Standard output and error follow the log."""
    assert path.read_text().splitlines()[-2:] == ["last words", "printed"]


def test_the_last_entries_come_from_as_many_files_as_are_needed(path):
    """The end of the log is whole and in order, across files."""
    in_newest = path.read_text().count('"entry ')
    wanted = in_newest + 5
    shown = [line.rpartition(": ")[2] for line in last_entries(path, wanted + 2).splitlines()]
    assert shown == [*(f"entry {number}" for number in range(500 - wanted, 500)), "last words", "printed"]
    assert last_entries(path, 0) == ""


def test_an_output_that_is_another_file_is_left_alone(tmp_path):
    """A daemon in the foreground, whose standard error is not its log, turns nothing over."""
    path, other = tmp_path / "daemon.log", tmp_path / "other"
    path.write_text("earlier\n")
    _log(path, 50, into=other)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["daemon.log", "other"]
    assert (path.read_text(), other.read_text().count('"entry ')) == ("earlier\n", 50)


def test_a_log_that_was_removed_costs_nothing(tmp_path):
    """A daemon whose log somebody has removed goes on."""
    path = tmp_path / "daemon.log"
    with path.open("ab") as log:
        path.unlink()
        command = [sys.executable, "-c", _PROGRAM, str(path), "50"]
        assert subprocess.run(command, stdout=log, stderr=log, check=False).returncode == 0
