"""Datasets of a real daemon on this machine: listed, fetched, read, removed; and what is left over of them."""

from __future__ import annotations

import os
import time

import pytest

from nnsight_hpc.storage import ActivationDataset
from tests.client.program import answer, call


@pytest.fixture
def folder(base, dataset):
    """Where the daemon of `local` has its datasets: one, of nobody's request."""
    folder = base / "state" / "embedded" / "datasets"
    folder.mkdir(parents=True)
    dataset.rename(folder / "acts.zarr")
    yield folder
    call("daemon", "stop")


def test_a_dataset_is_listed_fetched_read_and_removed(folder, base):
    """Also a part of it, and also without a copy."""
    [listed] = answer("ls", "--in", str(base))["there"]
    assert (listed["name"], listed["complete"], listed["tokens"]) == ("acts", True, 2000)
    assert listed["bytes"] == sum(path.stat().st_size for path in folder.rglob("c.*"))
    path = answer("fetch", "acts", "--to", str(base))["path"]
    part = answer("fetch", "acts", "--documents", "1:", "--to", str(base / "home"))["path"]
    with ActivationDataset("local:acts") as remote:
        name = next(iter(remote.captures))
        assert (remote[name][:] == ActivationDataset(path)[name][:]).all()
        assert (remote[name][1200:] == ActivationDataset(part)[name][:]).all()
    assert call("rm", "acts", "--yes")[0] == f"Removed {folder / 'acts.zarr'}.\n"
    assert answer("ls", "--in", str(base))["there"] == []
    assert "there is no dataset acts" in call("fetch", "acts", "--to", str(base), code=4)[1]


def test_gc_removes_what_was_half_removed(folder, base):
    """Once it has rested; the dataset itself stays."""
    left = folder / ".old.zarr.0123abcd.removing"
    left.mkdir()
    long_ago = time.time() - 86400
    os.utime(left, (long_ago, long_ago))
    assert answer("gc", "--yes", "--in", str(base)) == {"jobs": [], "folders": [str(left)], "here": []}
    assert sorted(path.name for path in folder.iterdir()) == ["acts.zarr"]
