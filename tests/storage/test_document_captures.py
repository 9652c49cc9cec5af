"""Captures with one row a document, beside those with one row a token."""

import msgspec
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnsight_hpc.storage import (
    ActivationDataset,
    CaptureSpec,
    DatasetWriter,
    Provenance,
    TokenTable,
    read_attributes,
    read_manifest,
)
from nnsight_hpc.wire.errors import Conflict, InvalidInput, NotFound

SPECS = [CaptureSpec("x", (2,), "float32"), CaptureSpec("mean", (3,), "float32", rows="document")]


def _create(path, lengths, **options):
    offset = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    tokens = TokenTable(np.zeros(offset[-1], dtype=np.int32), offset, [str(n) for n in range(len(lengths))])
    options = {"captures": SPECS, "provenance": Provenance(model="m"), **options}
    return DatasetWriter.create(path, tokens=tokens, **options)


def _rows(rows, width):
    return np.arange(rows * width, dtype=np.float32).reshape(rows, width)


def _write(writer, part):
    first, stop = part.documents
    with writer.slice(part.number) as s:
        s.write("mean", first, _rows(stop, 3)[first:])
        s.write("x", part.start, _rows(part.stop, 2)[part.start :])


def _files(path):
    found = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    return {name: data for name, data in found.items() if name.rpartition("/")[2].startswith(("c.", "shard-"))}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 700), max_size=12),
    store=st.sampled_from(["zarr", "hdf5"]),
    order=st.randoms(use_true_random=False),
)
def test_each_document_has_one_row_whatever_slices_and_documents_are(tmp_path_factory, lengths, store, order):
    """Empty documents, documents over several slices, slices in which none begins, slices in any order."""
    if not sum(lengths):
        lengths = [*lengths, 1]
    writer = _create(tmp_path_factory.mktemp("root") / f"n.{store}", lengths, rows_per_slice=256, shard_bytes=1)
    parts = writer.pending()
    assert [n for part in parts for n in range(*part.documents)] == list(range(len(lengths)))
    order.shuffle(parts)
    for part in parts:
        _write(writer, part)
    writer.finish()
    ds = ActivationDataset(writer.path)
    assert ds["mean"].shape == (len(lengths), 3)
    np.testing.assert_array_equal(_rows(len(lengths), 3), ds["mean"][:])
    np.testing.assert_array_equal(_rows(sum(lengths), 2), ds["x"][:])
    ds.verify()
    assert sorted(file.name for file in writer.path.iterdir() if file.name in {"staged", "manifest"}) == []


def test_plain_zarr_reads_the_rows_of_documents(tmp_path):
    """The array has its own leading dimension, and its dimension says so."""
    writer = _create(tmp_path / "n.zarr", [100, 300, 50])
    for part in writer.pending():
        _write(writer, part)
    writer.finish()
    array = zarr.open_array(str(writer.path / "activations/mean"), mode="r")
    np.testing.assert_array_equal(_rows(3, 3), array[:])
    assert array.metadata.dimension_names == ("document", "d_model")
    entries = {entry.path: entry for entry in read_manifest(writer.path)}
    assert (entries["activations/mean/c.0.0"].rows, entries["activations/mean/c.0.0"].slice) == ((0, 3), None)


def test_rows_of_documents_are_there_only_when_the_dataset_is_complete(tmp_path):
    """Until then they wait, and reading them is an error, not the fill value."""
    writer = _create(tmp_path / "n.zarr", [300, 300], rows_per_slice=256)
    _write(writer, writer.pending()[0])
    ds = ActivationDataset(writer.path, allow_incomplete=True)
    np.testing.assert_array_equal(_rows(256, 2), ds["x"][:256])
    with pytest.raises(NotFound, match="does not have rows 0 to 0"):
        ds["mean"][0]
    with pytest.raises(Conflict, match="not whole"):
        writer.finish()


def test_a_finish_that_was_interrupted_goes_on_to_the_same_files(tmp_path):
    """A crash after the rows of documents were joined, before the dataset was complete."""
    first, second = (_create(tmp_path / f"{name}.hdf5", [300, 1, 300], rows_per_slice=256) for name in "ab")
    for writer in (first, second):
        for part in writer.pending():
            _write(writer, part)
    first.finish()
    staged = (second.path / "staged/mean").rename(tmp_path / "kept")
    with pytest.raises(Conflict, match="not whole"):
        second.finish()
    staged.rename(second.path / "staged/mean")
    incomplete = (second.path / "dataset.json").read_bytes()
    second.finish()
    (second.path / "dataset.json").write_bytes(incomplete)
    second.finish()
    assert _files(first.path) == _files(second.path)


def test_of_two_workers_that_finish_at_once_the_slower_one_does_not_fail(tmp_path, monkeypatch):
    """The faster one has removed what the slower one was reading, and the dataset is complete."""
    writer = _create(tmp_path / "n.zarr", [300, 300], rows_per_slice=256)
    for part in writer.pending():
        _write(writer, part)

    def overtaken(*_):
        monkeypatch.undo()
        DatasetWriter(writer.path).finish()
        raise FileNotFoundError("staged/mean/slice-000000.rows")

    monkeypatch.setattr("nnsight_hpc.storage.finish.finish_documents", overtaken)
    (writer.path / "activations/mean/c.0.0.0123abcd.partial").touch()  # of one that was killed
    writer.finish()
    ActivationDataset(writer.path).verify()
    assert [file.name for file in (writer.path / "activations/mean").iterdir() if file.suffix == ".partial"] == []


@pytest.mark.parametrize(("row", "count"), [(0, 1), (2, 1), (1, 2)])
def test_documents_that_begin_in_another_slice_are_refused(tmp_path, row, count):
    """A slice writes the documents that begin in it, and no other."""
    writer = _create(tmp_path / "n.zarr", [256, 100, 156], rows_per_slice=256)
    assert [part.documents for part in writer.slices] == [(0, 1), (1, 3)]
    with pytest.raises(InvalidInput, match="are not in slice"), writer.slice(0 if row else 1) as s:
        s.write("mean", row, _rows(count, 3))


def test_a_slice_that_lacks_the_row_of_a_document_is_not_committed(tmp_path):
    """The capture and the document are named."""
    writer = _create(tmp_path / "n.zarr", [100, 100])
    with pytest.raises(InvalidInput) as error, writer.slice(0) as s:
        s.write("x", 0, _rows(200, 2))
        s.write("mean", 0, _rows(1, 3))
    assert error.value.why == "mean: rows 1 to 1"


def test_a_dataset_may_have_rows_of_documents_only(tmp_path):
    """Slices are of tokens then, too."""
    writer = _create(tmp_path / "n.zarr", [100] * 10, captures=SPECS[1:])
    for part in writer.pending():
        with writer.slice(part.number) as s:
            s.write("mean", part.documents[0], _rows(10, 3)[slice(*part.documents)])
    writer.finish()
    np.testing.assert_array_equal(_rows(10, 3), ActivationDataset(writer.path)["mean"][:])


def test_documents_without_any_token_cannot_have_rows(tmp_path):
    """No slice would compute them."""
    with pytest.raises(InvalidInput, match="need documents that have tokens"):
        _create(tmp_path / "n.zarr", [0, 0])
    assert list(tmp_path.iterdir()) == []


def test_attributes_written_before_there_were_rows_of_documents_are_read(tmp_path):
    """Captures of older datasets are of tokens, and these are Zarr."""
    writer = _create(tmp_path / "n.zarr", [100], captures=SPECS[:1])
    file = writer.path / "zarr.json"
    metadata = msgspec.json.decode(file.read_bytes())
    del metadata["attributes"]["captures"][0]["rows"], metadata["attributes"]["store"]
    file.write_bytes(msgspec.json.encode(metadata))
    attributes = read_attributes(writer.path)
    assert (attributes.captures, attributes.store) == ((SPECS[0],), "zarr")
