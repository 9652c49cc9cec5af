"""Datasets converted between Zarr and HDF5."""

import subprocess

import numpy as np
import pytest
import zarr

from nnsight_hpc.storage import ActivationDataset, CaptureSpec, DatasetWriter, Provenance, TokenTable, convert_dataset
from nnsight_hpc.wire.errors import Conflict, HpcError


def _ignore(_done, _total):
    """No progress is shown."""


@pytest.fixture
def source(tmp_path, random_rows):
    """A dataset with several slices and shards, and rows of documents."""
    offset = np.array([0, 0, 700, 1000, 3000])
    position = np.arange(3000)[::-1]
    tokens = TokenTable(np.arange(3000), offset, ["", "é", "b", "c"], position)
    captures = [
        CaptureSpec("x", (2, 3), "bfloat16"),
        CaptureSpec("y", (), "int64"),
        CaptureSpec("mean", (3,), "float32", rows="document"),
    ]
    rows = {
        "x": random_rows("bfloat16", (3000, 2, 3)),
        "y": random_rows("int64", (3000,)),
        "mean": random_rows("float32", (4, 3)),
    }
    writer = DatasetWriter.create(
        tmp_path / "n.zarr",
        captures=captures,
        tokens=tokens,
        provenance=Provenance(model="m", graph="{}", command="c"),
        rows_per_slice=512,
        shard_bytes=1,
    )
    for part in writer.pending():
        with writer.slice(part.number) as s:
            for capture in captures:
                span = slice(part.start, part.stop) if capture.rows == "token" else slice(*part.documents)
                s.write(capture.name, span.start, rows[capture.name][span])
    writer.finish()
    return ActivationDataset(writer.path)


def _shards(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("c.*")}


def test_there_and_back_gives_the_same_values_provenance_and_files(tmp_path, source):
    """Zarr to HDF5 and back to Zarr: every array, name, attribute and shard file."""
    seen = []
    convert_dataset(source.path, tmp_path / "n.hdf5", lambda *progress: seen.append(progress))
    middle = ActivationDataset(tmp_path / "n.hdf5")
    assert seen[-1] == (3000, 3000)
    assert (middle.attributes.store, middle.provenance) == ("hdf5", source.provenance)
    for name in source.captures:
        assert source[name][:].tobytes() == middle[name][:].tobytes()
    middle.verify()
    (tmp_path / "back").mkdir()
    convert_dataset(middle.path, tmp_path / "back/n.zarr", _ignore)
    assert _shards(source.path) == _shards(tmp_path / "back/n.zarr")
    np.testing.assert_array_equal(
        source["y"][:], zarr.open_array(str(tmp_path / "back/n.zarr/activations/y"), mode="r")[:]
    )


def test_an_interrupted_conversion_goes_on_and_leaves_no_partial_files(tmp_path, source):
    """Ctrl-C between slices; the copy is not complete, and the next call writes the rest."""
    target = tmp_path / "n.hdf5"

    def interrupt(done, _total):
        if done >= 1024:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_dataset(source.path, target, interrupt)
    assert list(target.rglob("*.partial")) == []
    with pytest.raises(Conflict, match="not complete"):
        ActivationDataset(target)
    before = (target / "activations/x/shard-000000.h5").stat().st_mtime_ns
    convert_dataset(source.path, target, _ignore)
    assert (target / "activations/x/shard-000000.h5").stat().st_mtime_ns == before
    assert source["x"][:].tobytes() == ActivationDataset(target)["x"][:].tobytes()


def test_a_target_that_holds_something_else_or_is_complete_is_refused(tmp_path, source, write_dataset, random_rows):
    """Nothing is overwritten."""
    convert_dataset(source.path, tmp_path / "n.hdf5", _ignore)
    with pytest.raises(Conflict, match="complete"):
        convert_dataset(source.path, tmp_path / "n.hdf5", _ignore)
    write_dataset(tmp_path / "other.hdf5", {"x": ("int8", random_rows("int8", (10, 3)))})
    with pytest.raises(Conflict, match="another dataset"):
        convert_dataset(source.path, tmp_path / "other.hdf5", _ignore)


@pytest.mark.parametrize("store", ["zarr", "hdf5"])
def test_a_full_disk_stops_a_conversion_that_goes_on_when_there_is_space(tmp_path, write_dataset, random_rows, store):
    """ENOSPC is our own error, and the copy is whole in the end."""
    other = "hdf5" if store == "zarr" else "zarr"
    data = {"x": ("float32", random_rows("float32", (6000, 256)))}
    source = write_dataset(tmp_path / f"n.{other}", data, rows_per_slice=2048)
    disk = tmp_path / "small"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=True)
    try:
        with pytest.raises(HpcError, match="the disk is full"):
            convert_dataset(source.path, disk / f"n.{store}", _ignore)
        subprocess.run(["mount", "-o", "remount,size=32m", disk], check=True)
        convert_dataset(source.path, disk / f"n.{store}", _ignore)
        assert data["x"][1].tobytes() == ActivationDataset(disk / f"n.{store}")["x"][:].tobytes()
    finally:
        subprocess.run(["umount", disk], check=True)
