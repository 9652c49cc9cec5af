"""What the daemon finds when it looks at what it needs."""

from __future__ import annotations

import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

from nnsight_hpc.daemon import checks
from nnsight_hpc.wire.checks import Check, Doubt, Finding, checked
from nnsight_hpc.wire.errors import HpcError
from tests.daemon.process import wait_for


def test_a_daemon_that_serves_finds_nothing_wrong(daemon, worker):
    """Its home, the site file, the batch system and the pool work, and nothing is left in its home."""
    found = daemon.people().get("/v1/checks", list[Check])
    assert [(check.link, check.finding) for check in found] == [
        ("home", Finding.WORKS),
        ("site file", Finding.WORKS),
        ("batch system", Finding.WORKS),
        ("pool smol", Finding.WORKS),
    ]
    assert list(daemon.places.home.glob("clock-*")) == []


def test_a_pool_that_is_held_is_broken_and_says_why(daemon_with):
    """Of a pool whose replicas have failed the cause is told; one whose replica is on its way is no fault."""
    daemon = daemon_with(job="failing_job", starts=1, retry=0.1)
    with suppress(HpcError):  # the same, where it fails before `up` answers
        daemon.up("bad")
    wait_for(lambda: _of(daemon, "pool bad").finding is Finding.BROKEN)
    assert _of(daemon, "pool bad").error.kind == "ReplicaFailed"


def _of(daemon, link):
    return next(check for check in daemon.people().get("/v1/checks", list[Check]) if check.link == link)


def test_a_home_that_has_gone_is_broken(tmp_path):
    """What the system says is passed on, with what to do."""
    with pytest.raises(HpcError, match="cannot be written") as caught:
        checks._home(tmp_path / "gone", unseen=False)
    assert (caught.value.why, "NNSIGHT_HPC_HOME" in caught.value.next) == ("No such file or directory", True)


def test_a_home_that_only_this_host_sees_is_a_doubt_until_a_worker_elsewhere_has_seen_it():
    """A home in memory will do for processes here; where a worker on another host serves, that is proof."""
    home = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        with pytest.raises(Doubt, match="compute nodes will hardly see"):
            checks._home(home, unseen=True)
        assert "tmpfs" in checks._home(home, unseen=False)
    finally:
        shutil.rmtree(home)


def test_clocks_that_differ_are_a_doubt(tmp_path, monkeypatch):
    """A file server whose files are an hour old when they are written tells it."""
    monkeypatch.setattr(checks, "server_time", lambda _folder: time.time() - 3600)
    check = checked("home", lambda: checks._home(tmp_path, unseen=False))
    assert (check.finding, check.found) == (
        Finding.DOUBTFUL,
        "the clocks of this host and of its file server differ by 60 min",
    )


def test_a_look_that_doubts_is_no_failure():
    """A doubt is told apart from an error, and both keep their words."""

    def doubt():
        raise Doubt("it is slow", next="wait")

    found = checked("link", doubt)
    assert (found.finding, found.found, found.error.next) == (Finding.DOUBTFUL, "it is slow", "wait")
