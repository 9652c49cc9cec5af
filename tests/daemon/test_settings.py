"""The file daemon.toml: what it says is what counts, and what it says wrong is named."""

from __future__ import annotations

import grp
import os
import pwd
import re
from dataclasses import replace

import pytest

from nnsight_hpc.daemon.admission import Share
from nnsight_hpc.daemon.config import Config
from nnsight_hpc.daemon.settings import read_settings, share_of
from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.places import places_at


@pytest.fixture
def file(tmp_path):
    return tmp_path / "daemon.toml"


def test_without_a_file_nobody_is_let_in_and_nothing_changes(file):
    """As before there was such a file."""
    settings, config = read_settings(file), Config(executor="slurm", places=places_at(file.parent))
    assert (share_of(settings, file), settings.applied_to(config)) == (None, config)


def test_users_and_group_are_looked_up(file):
    """Names become the numbers that the kernel tells."""
    group = grp.getgrgid(os.getgid()).gr_name
    file.write_text(f'[share]\nusers = ["games", "man"]\ngroup = "{group}"\n')
    uids = frozenset(pwd.getpwnam(name).pw_uid for name in ("games", "man"))
    assert share_of(read_settings(file), file) == Share(uids=uids, gid=os.getgid())


def test_a_share_that_names_nobody_is_none(file):
    """An empty table opens nothing."""
    file.write_text("[share]\nusers = []\n")
    assert share_of(read_settings(file), file) is None


@pytest.mark.parametrize("name", ["queued", "running", "result_bytes"])
def test_a_quota_that_is_given_takes_the_place_of_the_usual_one(file, name):
    """The others stay."""
    file.write_text(f"[quota]\n{name} = 7\n")
    config = Config(executor="slurm", places=places_at(file.parent))
    assert read_settings(file).applied_to(config) == replace(config, **{f"{name}_per_user": 7})


def test_how_long_requests_are_kept(file):
    """In days in the file."""
    file.write_text("[keep]\ndays = 2\n")
    config = Config(executor="slurm", places=places_at(file.parent))
    assert read_settings(file).applied_to(config) == replace(config, keep=172_800.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[share", "Expected"),
        ("[shares]\n", "unknown field `shares`"),
        ("[share]\nuser = ['bob']\n", r"unknown field `user` - at `\$.share`"),
        ("[share]\nusers = 'bob'\n", r"at `\$.share.users`"),
        ("[share]\nusers = ['no-such-user']\n", "knows no user 'no-such-user'"),
        ("[share]\ngroup = 'no-such-group'\n", "knows no group 'no-such-group'"),
        ("[quota]\nqueued = 0\n", r"at `\$.quota.queued`"),
        ("[quota]\nrunning = '4'\n", r"at `\$.quota.running`"),
    ],
)
def test_what_is_wrong_is_named_with_the_file_and_the_key(file, text, said):
    """Nothing is guessed."""
    file.write_text(text)
    with pytest.raises(InvalidInput, match="settings cannot be used") as caught:
        share_of(read_settings(file), file)
    assert caught.value.where.startswith(str(file))
    assert re.search(said, caught.value.why)
