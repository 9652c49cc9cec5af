"""Datasets whose arrays are HDF5 files, read by our reader and by plain h5py."""

import shutil
import subprocess

import h5py
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnsight_hpc.storage import ActivationDataset, list_files, read_manifest, verify_files
from nnsight_hpc.storage.hdf5 import create_rows_file
from nnsight_hpc.storage.layout import ArrayLayout
from nnsight_hpc.storage.schema import LOGICAL_DTYPES
from nnsight_hpc.storage.shards import disk_errors
from nnsight_hpc.wire.errors import CorruptData, HpcError, Incompatible
from tests.storage.killed_writer import finish_killed, write_until_killed


def _shards(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("shard-*.h5"))}


def _plain(path, array):
    """All rows of an array by plain h5py: by its shard files, and by the index."""
    files = [h5py.File(file, "r") for file in sorted((path / array).glob("*.h5"))]
    with h5py.File(path / "index.h5", "r") as index:
        whole = index[array][:]
        logical = index[array].attrs["logical_dtype"]
    assert {file["rows"].attrs["logical_dtype"].decode() for file in files} <= {logical}
    parts = [file["rows"][:] for file in files]
    return whole, np.concatenate(parts) if parts else whole[:0]


@pytest.mark.parametrize("logical", LOGICAL_DTYPES)
def test_every_dtype_comes_back_to_the_bit_from_our_reader_and_from_plain_h5py(
    tmp_path, write_dataset, random_rows, logical
):
    """NaN payloads, infinities and subnormals included; bfloat16 is its bits as uint16, with the attribute."""
    rows = random_rows(logical, (700, 6))
    ds = write_dataset(tmp_path / "n.hdf5", {"x": (logical, rows)}, rows_per_slice=256, shard_bytes=1)
    assert rows.tobytes() == ds["x"][:].tobytes()
    for found in _plain(ds.path, "activations/x"):
        assert (rows.dtype, rows.tobytes()) == (found.dtype, found.tobytes())
    ds.verify()


def test_plain_h5py_gives_bfloat16_values_by_a_view(tmp_path, write_dataset):
    """The recipe of the guide."""
    values = np.array([[1.5, -2.0, 3e38, np.inf]], dtype=np.float32).astype(ml_dtypes.bfloat16)
    ds = write_dataset(tmp_path / "n.hdf5", {"x": ("bfloat16", values.view(np.uint16))})
    with h5py.File(ds.path / "index.h5", "r") as index:
        found = index["activations/x"][:].view(ml_dtypes.bfloat16)
        assert "test" in index["provenance"][()].decode()
    np.testing.assert_array_equal(values.astype(np.float32), found.astype(np.float32))


def test_tokens_and_documents_are_there_for_plain_h5py(tmp_path, write_dataset, random_rows):
    """A file of the index has every array under its Zarr path."""
    ds = write_dataset(tmp_path / "n.hdf5", {"x": ("float32", random_rows("float32", (300, 4)))})
    for name in ("input_ids", "document", "position"):
        for found in _plain(ds.path, f"tokens/{name}"):
            np.testing.assert_array_equal(getattr(ds.tokens, name)[:], found)
    assert _plain(ds.path, "documents/offset")[0][-1] == 300


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 1500),
    width=st.lists(st.integers(1, 4), max_size=3),
    logical=st.sampled_from(["bfloat16", "float16", "int64", "uint8"]),
    slice_rows=st.integers(1, 1200),
    shard_bytes=st.integers(1, 20000),
    block=st.integers(1, 700),
    order=st.randoms(use_true_random=False),
)
def test_any_blocks_in_any_order_give_the_rows_back_and_the_same_files(
    *,
    tmp_path_factory,
    create,
    write_shuffled,
    write_dataset,
    random_rows,
    rows,
    width,
    logical,
    slice_rows,
    shard_bytes,
    block,
    order,
):
    """Shapes, dtypes, slices, shards, the size and order of blocks: rows are the same, and so are the shard files."""
    folder = tmp_path_factory.mktemp("root")
    data = {"x": (logical, random_rows(logical, (rows, *width)))}
    options = {"rows_per_slice": slice_rows, "shard_bytes": shard_bytes}
    writer = create(folder / "n.hdf5", data, **options)
    write_shuffled(writer, data["x"][1], block, order)
    in_order = write_dataset(folder / "in-order.hdf5", data, **options)
    assert data["x"][1].tobytes() == ActivationDataset(writer.path)["x"][:].tobytes() == in_order["x"][:].tobytes()
    assert _shards(in_order.path) == _shards(writer.path)
    shutil.rmtree(folder)


def test_the_manifest_and_the_list_of_files_name_every_file(tmp_path, write_dataset, random_rows):
    """A copy made from the list is whole, and opens."""
    ds = write_dataset(tmp_path / "n.hdf5", {"x": ("int8", random_rows("int8", (1000, 3)))}, rows_per_slice=256)
    files = list_files(ds.path)
    assert sorted(str(file.relative_to(ds.path)) for file in ds.path.rglob("*") if file.is_file()) == sorted(
        file.path for file in files
    )
    assert {entry.path for entry in read_manifest(ds.path)} == set(_shards(ds.path))
    verify_files(ds.path, files)
    (ds.path / "index.h5").unlink()
    assert {file.path for file in files} - {file.path for file in list_files(ds.path)} == {"index.h5"}


def test_a_killed_writer_leaves_files_that_hdf5_opens_and_is_resumed_to_identical_bytes(
    tmp_path, create, write_slice, write_dataset, random_rows
):
    """After SIGKILL even the partial files are valid HDF5, and no index pretends to a whole; resuming gives equal bytes."""
    data = {"x": ("bfloat16", random_rows("bfloat16", (5000, 64)))}
    options = {"rows_per_slice": 2048, "shard_bytes": 1}
    path = tmp_path / "killed.hdf5"
    create(path, data, **options)
    write_until_killed(path, data["x"][1])

    partial, *_ = sorted((path / "activations/x").glob("*.partial"))
    with h5py.File(partial, "r") as file:
        assert file["rows"].shape == (1024, 64)
    assert not (path / "index.h5").exists()
    finish_killed(path, write_slice, data)
    unbroken = write_dataset(tmp_path / "unbroken.hdf5", data, **options)
    assert list(path.rglob("*.partial")) == []
    assert _shards(unbroken.path) == _shards(path)
    assert [(e.path, e.rows, e.crc32c) for e in read_manifest(unbroken.path)] == [
        (e.path, e.rows, e.crc32c) for e in read_manifest(path)
    ]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda text: text.replace('"shard_rows": 256', '"shard_rows": 0'), "0 rows a shard"),
        (lambda text: text.replace('"dtype": "int32"', '"dtype": "int31"'), "int31"),
        (lambda text: text.replace('"tokens/input_ids"', '"tokens/other"'), "tokens/input_ids"),
    ],
)
def test_metadata_that_does_not_fit_is_corrupt_data(tmp_path, write_dataset, random_rows, change, why):
    """The file is named, with what is wrong in it."""
    ds = write_dataset(tmp_path / "n.hdf5", {"x": ("int8", random_rows("int8", (10, 3)))})
    file = ds.path / "dataset.json"
    file.write_text(change(file.read_text()))
    with pytest.raises(CorruptData) as error:
        ActivationDataset(ds.path)
    assert str(file) == error.value.where
    assert why in error.value.why


def test_a_library_that_lays_files_out_otherwise_is_refused(tmp_path, monkeypatch):
    """Rows that would lie elsewhere than the specification says are never written, and no file is left."""
    array = ArrayLayout("activations/x", (1000, 7), "float32", 256, 256, "hdf5")
    monkeypatch.setattr("nnsight_hpc.storage.layout.HDF5_HEADER_BYTES", 2049)
    with pytest.raises(Incompatible, match="lays files out otherwise"):
        create_rows_file(tmp_path / "a.h5", array.shard_file(0))
    assert list(tmp_path.iterdir()) == []


def test_a_file_for_which_there_is_no_space_is_not_left_behind(tmp_path):
    """A disk on which HDF5 cannot even write its header."""
    disk = tmp_path / "small"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", disk], check=True)
    try:
        (disk / "full").write_bytes(bytes(4096))
        array = ArrayLayout("activations/x", (1000, 7), "float32", 256, 256, "hdf5")
        with pytest.raises(HpcError, match="the disk is full"), disk_errors(disk):
            create_rows_file(disk / "a.h5", array.shard_file(0))
        assert [file.name for file in disk.iterdir()] == ["full"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_file_of_rows_has_its_final_size_and_its_rows_at_the_byte_that_the_specification_says(tmp_path):
    """2,048 bytes of HDF5's, then the rows, then nothing."""
    array = ArrayLayout("activations/x", (1000, 7), "float32", 256, 256, "hdf5")
    create_rows_file(tmp_path / "a.h5", array.shard_file(3))
    assert (tmp_path / "a.h5").stat().st_size == 2048 + (1000 - 768) * 28 == array.shard_bytes(3)
    with (tmp_path / "a.h5").open("r+b") as file:
        file.seek(2048)
        file.write(np.arange(7, dtype="<f4").tobytes())
    with h5py.File(tmp_path / "a.h5", "r") as file:
        np.testing.assert_array_equal(np.arange(7), file["rows"][0])
