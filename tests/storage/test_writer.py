import threading

import ml_dtypes
import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnsight_hpc.storage import ActivationDataset, CaptureSpec, DatasetWriter, Provenance, TokenTable
from nnsight_hpc.storage.schema import LOGICAL_DTYPES
from nnsight_hpc.wire.errors import Conflict, InvalidInput, NotFound


def _plain_reads(path):
    """The array at `path` as zarr-python and as tensorstore read it."""
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return zarr.open_array(str(path), mode="r")[...], tensorstore.open(spec, read=True).result().read().result()


def _shard_bytes(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("c.*"))}


def _write_blocks(writer, data, blocks):
    """Write rows [start, stop) of captures as slice 0."""
    with writer.slice(0) as s:
        for name, start, stop in blocks:
            s.write(name, start, data[name][1][start:stop])


@pytest.mark.parametrize("logical", LOGICAL_DTYPES)
def test_every_dtype_comes_back_bit_for_bit_from_plain_readers_and_ours(tmp_path, write_dataset, random_rows, logical):
    """zarr-python, tensorstore and our reader give the bits that were written."""
    rows = random_rows(logical, (700, 5))
    ds = write_dataset(tmp_path / "n.zarr", {"model.layers.3.output": (logical, rows)}, rows_per_slice=256)
    plain = _plain_reads(ds.path / "activations/model.layers.3.output")
    for found in (*plain, ds["model.layers.3.output"][:]):
        assert rows.shape == found.shape
        assert rows.tobytes() == found.tobytes()


@pytest.mark.parametrize(
    ("rows", "width", "options"),
    [
        (0, (4,), {}),
        (1, (4,), {}),
        (1, (), {}),
        (256, (4,), {"rows_per_slice": 256}),
        (257, (4,), {"rows_per_slice": 256}),
        (1000, (2, 3, 4), {"rows_per_slice": 300}),
        (3000, (4,), {"rows_per_slice": 2048, "shard_bytes": 1}),
        (3000, (4,), {"shard_bytes": 1024 * 8}),
    ],
    ids=["empty", "one", "scalar", "exact", "one-more", "trailing", "shards-in-a-slice", "small-shards"],
)
def test_every_shape_of_dataset_is_read_equal_by_plain_readers(
    *, tmp_path, write_dataset, random_rows, rows, width, options
):
    """Empty, one row, cut last shards, several trailing dimensions, several shards a slice; tokens and documents too."""
    data = {
        "a": ("bfloat16", random_rows("bfloat16", (rows, *width))),
        "b": ("float32", random_rows("float32", (rows, 7), 1)),
    }
    ds = write_dataset(tmp_path / "n.zarr", data, **options)
    for name, (_, written) in data.items():
        for found in _plain_reads(ds.path / "activations" / name):
            np.testing.assert_array_equal(written, found)
    for array in ("tokens/input_ids", "tokens/document", "tokens/position", "documents/offset", "documents/id"):
        by_zarr, by_tensorstore = _plain_reads(ds.path / array)
        np.testing.assert_array_equal(by_zarr, by_tensorstore)
    ds.verify()


def test_the_padding_of_the_last_chunk_reads_as_the_fill_value_when_an_array_is_enlarged(
    tmp_path, write_dataset, random_rows
):
    """Rows that were never written are NaN for a plain reader, and never 0."""
    ds = write_dataset(tmp_path / "n.zarr", {"x": ("float32", random_rows("float32", (300, 4)))}, rows_per_slice=1024)
    array = zarr.open_array(str(ds.path / "activations/x"), mode="r+")
    array.resize((1024, 4))
    assert np.isnan(array[300:]).all()


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # `create` has no state
@given(
    rows=st.integers(0, 1500),
    slice_rows=st.integers(1, 1200),
    shard_bytes=st.integers(1, 20000),
    queue_bytes=st.integers(1, 3000),
    block=st.integers(1, 700),
    order=st.randoms(use_true_random=False),
)
def test_any_blocks_in_any_order_through_any_queue_give_the_rows_back(
    *, tmp_path_factory, create, write_shuffled, rows, slice_rows, shard_bytes, queue_bytes, block, order
):
    """Sizes of slices, shards, blocks and queue, and the order of blocks and slices, change no row."""
    path = tmp_path_factory.mktemp("root") / "n.zarr"
    written = np.random.default_rng(0).standard_normal((rows, 3), dtype=np.float32)
    writer = create(
        path, {"x": ("float32", written)}, rows_per_slice=slice_rows, shard_bytes=shard_bytes, queue_bytes=queue_bytes
    )
    write_shuffled(writer, written, block, order)
    np.testing.assert_array_equal(written, ActivationDataset(path)["x"][:])
    np.testing.assert_array_equal(written, zarr.open_array(str(path / "activations/x"), mode="r")[:])


def test_the_same_input_gives_the_same_bytes(tmp_path, write_dataset, random_rows):
    """Two datasets of the same rows have the same shard files."""
    data = {"x": ("float16", random_rows("float16", (1000, 8)))}
    first, second = (write_dataset(tmp_path / f"{n}.zarr", data, rows_per_slice=256) for n in "ab")
    assert len(_shard_bytes(first.path)) == 9
    assert _shard_bytes(first.path) == _shard_bytes(second.path)


def test_a_block_may_be_changed_after_it_was_handed_over(tmp_path, create, random_rows):
    """The writer keeps a copy, so that a pinned buffer can be used again at once."""
    rows = random_rows("float32", (1000, 8))
    writer = create(tmp_path / "n.zarr", {"x": ("float32", rows)})
    buffer = np.empty((100, 8), dtype=np.float32)
    with writer.slice(0) as s:
        for at in range(0, 1000, 100):
            buffer[:] = rows[at : at + 100]
            s.write("x", at, buffer)
            buffer[:] = 0
    writer.finish()
    assert rows.tobytes() == ActivationDataset(writer.path)["x"][:].tobytes()


def test_bfloat16_may_be_given_as_bits_or_as_ml_dtypes(tmp_path, create):
    """Both give the same dataset."""
    values = np.arange(100, dtype=np.float32).reshape(50, 2).astype(ml_dtypes.bfloat16)
    writer = create(tmp_path / "n.zarr", {"x": ("bfloat16", values)})
    with writer.slice(0) as s:
        s.write("x", 0, values[:25])
        s.write("x", 25, values[25:].view(np.uint16))
    writer.finish()
    np.testing.assert_array_equal(values, ActivationDataset(writer.path)["x"][:])


@pytest.mark.parametrize(
    ("capture", "row", "block", "message"),
    [
        ("y", 256, np.zeros((1, 4), "<f4"), "no capture 'y'"),
        ("x", 256, np.zeros((1, 5), "<f4"), "shape"),
        ("x", 256, np.zeros(4, "<f4"), "shape"),
        ("x", 256, np.float32(1), "shape"),
        ("x", 256, np.zeros((1, 4), "<f2"), "dtype"),
        ("x", 256, np.zeros((1, 4), ">f4"), "dtype"),
        ("x", 255, np.zeros((2, 4), "<f4"), "rows 255 to 256 are not in slice 1"),
        ("x", 511, np.zeros((2, 4), "<f4"), "are not in slice 1"),
        ("x", -1, np.zeros((1, 4), "<f4"), "are not in slice 1"),
    ],
)
def test_a_block_that_does_not_fit_is_refused_at_once(*, tmp_path, create, random_rows, capture, row, block, message):
    """Wrong names, shapes, dtypes, byte orders and rows are the caller's error, in the caller's thread."""
    writer = create(tmp_path / "n.zarr", {"x": ("float32", random_rows("float32", (1000, 4)))}, rows_per_slice=256)
    with pytest.raises(InvalidInput, match=message), writer.slice(1) as s:
        s.write(capture, row, np.asarray(block))
    assert [part.number for part in writer.pending()] == [0, 1, 2, 3]


def test_a_slice_with_missing_rows_is_not_committed(tmp_path, create, random_rows):
    """The error names every capture's missing rows, and nothing is left of the slice."""
    data = {name: ("float32", random_rows("float32", (600, 4))) for name in ("x", "y")}
    writer = create(tmp_path / "n.zarr", data, rows_per_slice=512)
    with pytest.raises(InvalidInput) as error:
        _write_blocks(writer, data, [("x", 0, 512), ("y", 100, 200), ("y", 300, 512)])
    assert error.value.why == "y: rows 0 to 99\ny: rows 200 to 299"
    assert _shard_bytes(writer.path / "activations") == {}
    assert [part.number for part in writer.pending()] == [0, 1]


def test_rows_written_twice_are_an_error_of_the_slice(tmp_path, create, random_rows):
    """The writing thread's error is raised in the producer, at the latest when the slice ends."""
    data = {"x": ("float32", random_rows("float32", (600, 4)))}
    writer = create(tmp_path / "n.zarr", data)
    with pytest.raises(InvalidInput, match="rows 10 to 19 were written before"):
        _write_blocks(writer, data, [("x", 0, 100), ("x", 10, 20)])
    assert _shard_bytes(writer.path / "activations") == {}


def test_an_exception_in_the_block_leaves_no_thread_and_no_file(tmp_path, create, random_rows):
    """An abandoned slice is as if it had never begun."""
    rows = random_rows("float32", (600, 4))
    writer = create(tmp_path / "n.zarr", {"x": ("float32", rows)}, shard_bytes=1)
    with pytest.raises(KeyboardInterrupt), writer.slice(0) as s:
        s.write("x", 0, rows[:300])
        raise KeyboardInterrupt
    assert [thread for thread in threading.enumerate() if thread.name.startswith("dataset-")] == []
    assert [file.name for file in (writer.path / "activations/x").iterdir()] == ["zarr.json"]


def test_a_committed_slice_is_not_written_again(tmp_path, create, write_slice, random_rows):
    """Slices that are done, and numbers that the plan does not have, are refused."""
    data = {"x": ("float32", random_rows("float32", (600, 4)))}
    writer = create(tmp_path / "n.zarr", data, rows_per_slice=256)
    write_slice(writer, 1, data)
    assert [part.number for part in writer.pending()] == [0, 2]
    with pytest.raises(Conflict, match="slice 1 is written already"):
        writer.slice(1)
    for number in (-1, 3):
        with pytest.raises(NotFound, match=f"no slice {number}"):
            writer.slice(number)


def test_an_existing_dataset_and_a_bad_place_are_refused(tmp_path, create, random_rows):
    """A dataset is never overwritten, and nothing is left where it cannot be made."""
    data = {"x": ("float32", random_rows("float32", (10, 4)))}
    create(tmp_path / "n.zarr", data)
    with pytest.raises(Conflict, match="a dataset of this name exists"):
        create(tmp_path / "n.zarr", data)
    with pytest.raises(NotFound, match="folder for the dataset does not exist"):
        create(tmp_path / "nowhere/n.zarr", data)
    with pytest.raises(InvalidInput, match=r"must end in \.zarr"):
        create(tmp_path / "n", data)
    with pytest.raises(InvalidInput, match="not a name"):
        create(tmp_path / ".zarr", data)
    assert [file.name for file in tmp_path.iterdir()] == ["n.zarr"]


def test_a_complete_dataset_is_not_opened_for_writing(tmp_path, write_dataset, random_rows):
    """Resuming what is complete is refused."""
    ds = write_dataset(tmp_path / "n.zarr", {"x": ("float32", random_rows("float32", (10, 4)))})
    with pytest.raises(Conflict, match="complete"):
        DatasetWriter(ds.path)


def test_the_planned_bytes_are_those_on_disk(tmp_path, create, write_slice, random_rows):
    """What is estimated before the run is what the shards have after it."""
    data = {"x": ("bfloat16", random_rows("bfloat16", (1000, 6))), "y": ("int64", random_rows("int64", (1000,)))}
    writer = create(tmp_path / "n.zarr", data, rows_per_slice=512)
    for part in writer.pending():
        write_slice(writer, part.number, data)
    assert writer.planned_bytes == sum(len(content) for content in _shard_bytes(writer.path).values())


@pytest.mark.parametrize(
    ("input_ids", "offset", "ids"),
    [
        ([1, 2, 3], [0, 2], ["a"]),
        ([1, 2, 3], [1, 3], ["a"]),
        ([1, 2, 3], [0, 3], ["a", "b"]),
        ([1, 2, 3], [0, 2, 1, 3], ["a", "b", "c"]),
        ([1, 2, -3], [0, 3], ["a"]),
        ([1, 2, 2**31], [0, 3], ["a"]),
        ([1.0, 2.0], [0, 2], ["a"]),
        ([1, 2], [0.0, 2.0], ["a"]),
        ([1, 2], [0, 2], ["a\0b"]),
        ([1, 2], [0, 2], ["é" * 513]),
    ],
)
def test_tokens_and_documents_that_do_not_fit_together_are_refused(tmp_path, input_ids, offset, ids):
    """Nothing is created from a wrong corpus."""
    with pytest.raises(InvalidInput):
        DatasetWriter.create(
            tmp_path / "n.zarr",
            captures=[CaptureSpec("x", (2,), "float32")],
            tokens=TokenTable(np.array(input_ids), np.array(offset), ids),
            provenance=Provenance(model="m"),
        )
    assert list(tmp_path.iterdir()) == []
