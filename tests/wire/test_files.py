import os
import stat

import pytest

from nnsight_hpc.wire.files import read_if_there, replacing, write_atomically


def test_file_has_the_content_and_the_mode(tmp_path):
    """A written file has exactly the bytes and permissions asked for, and nothing else is left."""
    write_atomically(tmp_path / "secret", b"abc", mode=0o600)
    assert (tmp_path / "secret").read_bytes() == b"abc"
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["secret"]


def test_error_leaves_the_old_content(tmp_path):
    """An error while a file is being replaced leaves the old file and no partial one."""
    write_atomically(tmp_path / "a", b"old")
    with pytest.raises(RuntimeError), replacing(tmp_path / "a") as file:
        file.write(b"half of the n")
        raise RuntimeError
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_missing_file_reads_as_none(tmp_path):
    """A file or a folder that is not there reads as None, without an error."""
    assert read_if_there(tmp_path / "a") is None
    assert read_if_there(tmp_path / "no" / "a") is None
