"""Finding the daemon that somebody else shares on this host."""

from __future__ import annotations

import os
import pwd
import shlex
import socket
from contextlib import closing

import pytest

from nnsight_hpc.client import shared
from nnsight_hpc.client.config import Cluster
from nnsight_hpc.client.session import bridge_command
from nnsight_hpc.client.share_socket import WANTED_FILES
from nnsight_hpc.client.shared import open_of, shared_socket, uid_of
from nnsight_hpc.wire.errors import Conflict, Denied, InvalidInput, NotFound
from tests.daemon.others import being

ME = os.getuid()


@pytest.fixture
def folder(tmp_path_factory, monkeypatch):
    """The folder of shared sockets."""
    folder = tmp_path_factory.mktemp("s")
    monkeypatch.setattr(shared, "shared_folder", lambda _uid: folder)
    return folder


def listening(path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return closing(listener)


def test_the_one_that_answers_is_found(folder):
    """What a killed daemon has left, and a daemon for another executor, do not stand in the way."""
    listening(folder / "slurm-1.sock").__exit__()
    with listening(folder / "slurm-2.sock"), listening(folder / "embedded-3.sock"):
        assert shared_socket("slurm", ME) == folder / "slurm-2.sock"


def test_none_is_not_found_and_several_are_a_conflict(folder):
    """Both say whom to ask."""
    name = pwd.getpwuid(ME).pw_name
    with pytest.raises(NotFound, match=f"{name} shares no daemon"):
        shared_socket("slurm", ME)
    with listening(folder / "slurm-1.sock"), listening(folder / "slurm-2.sock"):
        with pytest.raises(Conflict, match="more than one") as caught:
            shared_socket("slurm", ME)
        assert f"ask {name}" in caught.value.next


def test_a_socket_of_somebody_else_is_not_used(folder):
    """The kernel says who listens."""
    with listening(folder / "slurm-1.sock"), pytest.raises(Denied, match="it is not games who listens there"):
        open_of(folder / "slurm-1.sock", uid_of("games"))


@pytest.mark.skipif(ME != 0, reason="is another user")
def test_a_socket_that_is_closed_to_us_is_denied(folder):
    """Not a daemon that is away: one whose owner has not let us in."""
    for parent in (folder, *folder.parents[:2]):
        parent.chmod(0o755)
    with listening(folder / "slurm-1.sock"):
        (folder / "slurm-1.sock").chmod(0o600)
        with being("games"), pytest.raises(Denied, match="root has not let you in"):
            shared_socket("slurm", 0)


def test_an_unknown_owner_is_named():
    """A wrong name in the profile is not a daemon that is away."""
    with pytest.raises(InvalidInput, match="no user 'no-such-user'"):
        uid_of("no-such-user")


def test_the_owner_of_a_profile_reaches_the_bridge_as_one_word():
    """Whatever stands there, a shell reads it as a name."""
    command = bridge_command(Cluster(host="h", owner="a; rm -rf b"))
    assert shlex.split(command) == ["nnsight-hpc", "bridge", "--owner", "a; rm -rf b"]


def test_the_files_of_somebody_else_are_read_by_his_daemon():
    """One's own by the bridge itself, which would find nothing of his."""
    assert bridge_command(Cluster(host="h"), WANTED_FILES) == "nnsight-hpc bridge --files"
    assert bridge_command(Cluster(host="h", owner="ada"), WANTED_FILES) == "nnsight-hpc bridge --owner ada"
