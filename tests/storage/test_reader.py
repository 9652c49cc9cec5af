import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnsight_hpc.storage import ActivationDataset, DatasetWriter, Provenance, TokenTable
from nnsight_hpc.storage.schema import CaptureSpec
from nnsight_hpc.wire.errors import Conflict, CorruptData, InvalidInput, NotFound

ROWS = 1000


@pytest.fixture(scope="module")
def written():
    return np.random.default_rng(0).standard_normal((ROWS, 3, 2), dtype=np.float32)


@pytest.fixture(scope="module")
def ds(tmp_path_factory, written):
    """A dataset in four shards, three documents long."""
    writer = DatasetWriter.create(
        tmp_path_factory.mktemp("reader") / "n.zarr",
        captures=[CaptureSpec("x", (3, 2), "float32"), CaptureSpec("b", (3, 2), "bfloat16")],
        tokens=TokenTable(np.arange(ROWS), np.array([0, 400, 400, ROWS]), ["first", "empty", "dernière"]),
        provenance=Provenance(model="org/name", revision="abc", software={"zarr": "3"}),
        rows_per_slice=256,
    )
    for part in writer.pending():
        with writer.slice(part.number) as s:
            s.write("x", part.start, written[part.start : part.stop])
            s.write("b", part.start, written[part.start : part.stop].astype(ml_dtypes.bfloat16))
    writer.finish()
    return ActivationDataset(writer.path)


_INDEX = st.integers(-ROWS, ROWS - 1)
_SLICE = st.slices(ROWS + 50)
_LIST = st.lists(_INDEX, max_size=20)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.one_of(_INDEX, _SLICE, _LIST, _LIST.map(lambda k: np.array(k, dtype=np.int64))))
def test_rows_are_chosen_as_in_numpy(ds, written, key):
    """Integers, slices of any step and sign, and lists of integers give what NumPy gives."""
    expected = written[np.array(key, dtype=np.int64) if isinstance(key, list) else key]
    actual = ds["x"][key]
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()
    assert ds["x"].to_torch(key).numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize("key", [(3, 1), (slice(10, 20), slice(None), 1), ([1, 5], 0), (7, slice(None), 0)])
def test_the_other_dimensions_are_chosen_after_the_rows(ds, written, key):
    """A tuple indexes the dimensions as in NumPy."""
    np.testing.assert_array_equal(ds["x"][key], written[key])


def test_an_array_converts_whole(ds, written):
    """np.asarray reads all rows."""
    np.testing.assert_array_equal(np.asarray(ds["x"]), written)


@pytest.mark.parametrize("key", [ROWS, -ROWS - 1, [0, ROWS]])
def test_a_row_that_does_not_exist_is_an_index_error(ds, key):
    """Loops that rely on IndexError end, and the error is one of ours."""
    with pytest.raises(IndexError) as error:
        ds["x"][key]
    assert isinstance(error.value, InvalidInput)


@pytest.mark.parametrize("key", [np.zeros(ROWS - 1, dtype=bool), True, [1.5], [[1, 2]], None, {}])
def test_rows_are_not_chosen_by_other_things(ds, key):
    """Masks of another length, floats and nested lists are refused."""
    with pytest.raises(InvalidInput, match="rows are chosen by"):
        ds["x"][key]


def test_bfloat16_converts_exactly(ds, written):
    """NumPy gets real bfloat16, whose float32 has the same value, and torch gets torch.bfloat16 with the same bits."""
    exact = torch.from_numpy(written).to(torch.bfloat16)
    rows = ds["b"][:]
    assert rows.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(rows.astype(np.float32), exact.float().numpy())
    tensor = ds["b"].to_torch(slice(0, ROWS))
    assert tensor.dtype == torch.bfloat16
    assert torch.equal(tensor.view(torch.int16), exact.view(torch.int16))


def test_a_dataset_says_what_it_is(ds):
    """Length, captures and provenance are there without reading data."""
    assert (len(ds), ds.documents, ds.complete, list(ds.captures)) == (ROWS, 3, True, ["x", "b"])
    assert ds.provenance == Provenance(model="org/name", revision="abc", software={"zarr": "3"})
    assert (ds["b"].shape, ds["b"].dtype) == ((ROWS, 3, 2), np.dtype(ml_dtypes.bfloat16))


def test_documents_give_their_own_rows(ds, written):
    """A document knows its id and tokens, and reads its part of a capture."""
    last = ds.document(-1)
    assert (last.index, last.id, last.start, last.stop, len(last)) == (2, "dernière", 400, ROWS, 600)
    np.testing.assert_array_equal(last["x"], written[400:])
    np.testing.assert_array_equal(last.input_ids, np.arange(400, ROWS))
    assert (ds.document(1).id, len(ds.document(1)), ds.document(1)["x"].shape) == ("empty", 0, (0, 3, 2))
    for index in (3, -4):
        with pytest.raises(IndexError):
            ds.document(index)


def test_documents_are_found_by_their_id(ds):
    """An id leads to its document; one that is not there is a KeyError of ours, also when it is longer than any."""
    assert (ds.document("dernière").index, ds.document("empty").index) == (2, 1)
    for name in ("derni", "dernière ", "", "x" * 2000):
        with pytest.raises(KeyError, match="there is no document") as error:
            ds.document(name)
        assert isinstance(error.value, NotFound)


def test_documents_come_in_order(ds):
    """Iterating gives each document once, empty ones too, and their rows follow one another."""
    documents = list(ds.iter_documents())
    assert [(d.id, d.start, d.stop) for d in documents] == [
        ("first", 0, 400),
        ("empty", 400, 400),
        ("dernière", 400, ROWS),
    ]
    assert [ds.document(i) for i in range(3)] == documents


def test_rows_of_all_captures_come_together(ds, written):
    """What indexes a capture indexes the dataset: a dict of captures and of what is known of the tokens."""
    for key in (slice(395, 405), [3, -1], 7, np.arange(ROWS) % 7 == 0):
        rows = ds[key]
        assert list(rows) == ["x", "b", "input_ids", "document", "position"]
        np.testing.assert_array_equal(written[key], rows["x"])
        np.testing.assert_array_equal(np.arange(ROWS)[key], rows["input_ids"])
        np.testing.assert_array_equal(ds.tokens.document[key], rows["document"])
    assert list(ds.rows(slice(5), ["b"])) == ["b", "input_ids", "document", "position"]
    with pytest.raises(KeyError):
        ds.rows(slice(5), ["z"])


def test_tokens_know_their_document_and_position(ds):
    """Positions count from the start of the document."""
    np.testing.assert_array_equal(ds.tokens.document[398:402], [0, 0, 2, 2])
    np.testing.assert_array_equal(ds.tokens.position[398:402], [398, 399, 0, 1])


@pytest.mark.parametrize("ending", ["zarr", "hdf5"])
def test_captures_of_documents_stand_apart_from_those_of_tokens(tmp_path, written, ending):
    """A document gives its one row; rows of tokens, and batches, come without it, or say why it cannot be among them."""
    writer = DatasetWriter.create(
        tmp_path / f"n.{ending}",
        captures=[CaptureSpec("x", (3, 2), "float32"), CaptureSpec("mean", (4,), "float32", rows="document")],
        tokens=TokenTable(np.arange(ROWS), np.array([0, 400, ROWS]), ["a", "b"]),
        provenance=Provenance(model="org/name"),
    )
    means = np.arange(8, dtype=np.float32).reshape(2, 4)
    with writer.slice(0) as s:
        s.write("x", 0, written)
        s.write("mean", 0, means)
    writer.finish()
    ds = ActivationDataset(writer.path)
    np.testing.assert_array_equal(ds["mean"][:], means)
    np.testing.assert_array_equal(ds.document("b")["mean"], means[1])
    np.testing.assert_array_equal(ds.document("b")["x"], written[400:])
    assert list(ds[:5]) == ["x", "input_ids", "document", "position"]
    rows = torch.cat([batch["x"] for batch in ds.to_torch(batch_size=300, shuffle=False)])
    assert rows.numpy().tobytes() == written.tobytes()
    for ask in (ds.to_torch, ds.to_xarray, lambda names: ds.rows(3, names)):
        with pytest.raises(InvalidInput, match="mean: a row of this capture is a document"):
            ask(["x", "mean"])


def test_an_unknown_capture_is_a_key_error_that_lists_the_captures(ds):
    """`except KeyError` works, and the message helps."""
    with pytest.raises(KeyError) as error:
        ds["z"]
    assert isinstance(error.value, NotFound)
    assert "x, b" in str(error.value)


def test_an_incomplete_dataset_is_refused_or_read_where_it_is_there(tmp_path, create, write_slice, random_rows):
    """Missing rows are named and never read as fill values; what is there is read."""
    data = {"x": ("float32", random_rows("float32", (ROWS, 4)))}
    writer = create(tmp_path / "n.zarr", data, rows_per_slice=256)
    for number in (0, 1, 3):
        write_slice(writer, number, data)
    with pytest.raises(Conflict, match="not complete"):
        ActivationDataset(writer.path)
    ds = ActivationDataset(writer.path, allow_incomplete=True)
    assert ds.present == [(0, 512), (768, ROWS)]
    assert ds["x"][100:500].tobytes() == data["x"][1][100:500].tobytes()
    assert ds["x"][[768, -1]].tobytes() == data["x"][1][[768, -1]].tobytes()
    for key in (slice(None), slice(500, 513), 600, [1, 767]):
        with pytest.raises(NotFound, match="does not have rows"):
            ds["x"][key]
    with pytest.raises(NotFound, match="rows 512 to 767 yet"):
        ds["x"][:]
    assert len(ds.tokens.document[:]) == ROWS
    rows = torch.cat([batch["x"] for batch in ds.to_torch(batch_size=100, shuffle=False)])
    assert rows.numpy().tobytes() == data["x"][1][np.r_[0:512, 768:ROWS]].tobytes()


@pytest.mark.parametrize("file", ["activations/x/c.2.0.0", "tokens/document/c.0", "documents/id/c.0.0"])
@pytest.mark.parametrize("where", ["first", "last"])
def test_one_flipped_bit_anywhere_is_found(tmp_path, write_dataset, random_rows, file, where):
    """Data, padding, index and checksum are all covered, and only the damaged file is named."""
    ds = write_dataset(
        tmp_path / "n.zarr", {"x": ("float32", random_rows("float32", (ROWS, 3, 2)))}, rows_per_slice=256
    )
    ds.verify()
    content = bytearray((ds.path / file).read_bytes())
    content[0 if where == "first" else -1] ^= 0x10
    (ds.path / file).write_bytes(content)
    with pytest.raises(CorruptData, match="1 of the dataset's files") as error:
        ds.verify()
    assert error.value.why.startswith(f"{file}: crc32c")


def test_missing_and_short_shards_are_corrupt_data_that_names_the_file(tmp_path, write_dataset, random_rows):
    """Reading stops where plain Zarr would give fill values, and `verify` names both files."""
    ds = write_dataset(tmp_path / "n.zarr", {"x": ("float32", random_rows("float32", (ROWS, 4)))}, rows_per_slice=256)
    (ds.path / "activations/x/c.0.0").unlink()
    (ds.path / "activations/x/c.1.0").write_bytes(b"short")
    for row, name in ((0, "c.0.0"), (300, "c.1.0")):
        with pytest.raises(CorruptData) as error:
            ds["x"][row]
        assert error.value.where == str(ds.path / "activations/x" / name)
    with pytest.raises(CorruptData, match="2 of the dataset's files") as error:
        ds.verify()
    assert error.value.why.splitlines() == [
        "activations/x/c.0.0: missing",
        "activations/x/c.1.0: 5 bytes, expected 4116",
    ]


def test_reading_and_writing_load_no_torch():
    """Only tensors need torch; the daemon's part needs no zarr either."""
    code = """
import sys
import nnsight_hpc.storage as s
s.list_files, s.verify_files, s.read_manifest, s.read_attributes
assert "zarr" not in sys.modules
for name in s.__all__: getattr(s, name)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
