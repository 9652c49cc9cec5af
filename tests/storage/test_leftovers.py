"""What is left of datasets, and what is not to be taken for it."""

from __future__ import annotations

import fcntl
import os
import time

import numpy as np
import pytest

from nnsight_hpc.storage.leftovers import half_fetched, left_in


def age(folder, seconds):
    """As if nothing had changed in a folder for so long."""
    when = time.time() - seconds
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (when, when))


@pytest.fixture
def incomplete(tmp_path, create):
    """A dataset of which nothing is written."""
    return create(tmp_path / "run.zarr", {"x": ("float32", np.zeros((300, 2), np.float32))}).path


def test_half_made_and_half_removed_datasets_are_left_over(tmp_path):
    """Once nobody has worked on them for an hour."""
    names = [".run.zarr.0123abcd.partial", ".run.hdf5.0123abcd.removing"]
    for name in names:
        (tmp_path / name / "tokens").mkdir(parents=True)
    (tmp_path / ".cache").mkdir()
    assert left_in(tmp_path, []) == []
    for folder in tmp_path.iterdir():
        age(folder, 2 * 3600)
    assert [path.name for path in left_in(tmp_path, [])] == sorted(names)
    assert left_in(tmp_path / "absent", []) == []


def test_an_incomplete_dataset_of_no_request_is_left_over(incomplete):
    """After a week; one that a request is known for is not, since that may be sent again."""
    folder = incomplete.parent
    age(incomplete, 86400)
    assert left_in(folder, []) == []
    age(incomplete, 8 * 86400)
    assert left_in(folder, ["run"]) == []
    assert left_in(folder, []) == [incomplete]


def test_a_complete_dataset_stays(incomplete, write_slice):
    """Whoever wrote it, and however old it is."""
    from nnsight_hpc.storage import DatasetWriter

    writer = DatasetWriter(incomplete)
    write_slice(writer, 0, {"x": ("float32", np.zeros((300, 2), np.float32))})
    writer.finish()
    age(incomplete, 8 * 86400)
    assert left_in(incomplete.parent, []) == []


def test_half_fetched_copies_are_found_but_for_those_that_grow(tmp_path):
    """Wholes and parts; what a process has locked is its own."""
    for name in ("a.zarr.partial", "b.hdf5.0123abcd.partial", "c.zarr", "d.partial", "e.zarr.partial"):
        (tmp_path / name).mkdir()
    held = os.open(tmp_path / "e.zarr.partial", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    assert [path.name for path in half_fetched(tmp_path)] == ["a.zarr.partial", "b.hdf5.0123abcd.partial"]
    os.close(held)
