import json

import pytest

from nnsight_hpc.storage import ActivationDataset, DatasetWriter, read_attributes, read_manifest
from nnsight_hpc.wire.errors import Conflict, CorruptData


@pytest.fixture
def data(random_rows):
    return {"x": ("float32", random_rows("float32", (1000, 4))), "y": ("int64", random_rows("int64", (1000,)))}


def _slices(entries):
    return sorted({entry.slice for entry in entries if entry.slice is not None})


def test_a_dataset_is_complete_only_after_every_slice_and_finish(tmp_path, create, write_slice, data):
    """`complete` stays false, and `finish` names what is missing, until the last slice is committed."""
    writer = create(tmp_path / "n.zarr", data, rows_per_slice=256)
    for number in (3, 0, 2):
        write_slice(writer, number, data)
        with pytest.raises(Conflict, match="not whole") as error:
            writer.finish()
        assert "activations/x/c.1.0: not written" in error.value.why
        assert not read_attributes(writer.path).complete
    write_slice(writer, 1, data)
    assert not read_attributes(writer.path).complete
    writer.finish()
    assert read_attributes(writer.path).complete
    assert read_attributes(writer.path).completed != ""


def test_the_manifest_lists_every_shard_once_with_its_rows(tmp_path, write_dataset, data):
    """Tokens and documents are in it too, and every file's size is right."""
    ds = write_dataset(tmp_path / "n.zarr", data, rows_per_slice=256)
    entries = read_manifest(ds.path)
    files = {str(file.relative_to(ds.path)): file.stat().st_size for file in ds.path.rglob("c.*")}
    assert {entry.path: entry.bytes for entry in entries} == files
    assert len(entries) == len(files) == 5 + 2 * 4
    assert [entry.rows for entry in entries if entry.path.startswith("activations/y")] == [
        (0, 256),
        (256, 512),
        (512, 768),
        (768, 1000),
    ]


def test_a_finished_dataset_has_one_manifest_and_no_parts(tmp_path, write_dataset, data):
    """After the merge there is nothing in the root but what the format describes."""
    ds = write_dataset(tmp_path / "n.zarr", data, rows_per_slice=256)
    assert sorted(file.name for file in ds.path.iterdir()) == [
        "activations",
        "documents",
        "manifest.jsonl",
        "tokens",
        "zarr.json",
    ]


def test_finishing_again_is_harmless(tmp_path, create, write_slice, data):
    """Two workers that write the last slices may both call `finish`."""
    writer = create(tmp_path / "n.zarr", data)
    other = DatasetWriter(writer.path)
    write_slice(writer, 0, data)
    writer.finish()
    before = (writer.path / "zarr.json").read_bytes()
    other.finish()
    assert (writer.path / "zarr.json").read_bytes() == before


def test_a_crash_between_the_merge_and_complete_can_be_finished(tmp_path, create, write_slice, data):
    """The merged manifest alone does not make a dataset complete; the next `finish` does."""
    writer = create(tmp_path / "n.zarr", data)
    incomplete = (writer.path / "zarr.json").read_bytes()
    write_slice(writer, 0, data)
    writer.finish()
    (writer.path / "zarr.json").write_bytes(incomplete)
    with pytest.raises(Conflict):
        ActivationDataset(writer.path)
    writer.finish()
    ActivationDataset(writer.path).verify()


@pytest.mark.parametrize("damage", ["removed", "cut"])
def test_a_committed_slice_whose_shard_is_lost_is_pending_again(tmp_path, create, write_slice, data, damage):
    """A resume looks at the files, not only at the manifest, and writes the slice anew."""
    writer = create(tmp_path / "n.zarr", data, rows_per_slice=512)
    for part in writer.pending():
        write_slice(writer, part.number, data)
    shard = writer.path / "activations/x/c.1.0"
    if damage == "removed":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(Conflict, match="1 shards are missing"):
        writer.finish()
    assert [part.number for part in writer.pending()] == [1]
    write_slice(writer, 1, data)
    writer.finish()
    ActivationDataset(writer.path).verify()


def test_two_writers_write_different_slices_at_the_same_time(tmp_path, create, data):
    """Opening a dataset does not disturb a slice that another writer has begun."""
    first = create(tmp_path / "n.zarr", data, rows_per_slice=512)
    with first.slice(0) as a:
        a.write("x", 0, data["x"][1][:300])
        with DatasetWriter(first.path, writer="second").slice(1) as b:
            for name, (_, rows) in data.items():
                b.write(name, 512, rows[512:])
        a.write("x", 300, data["x"][1][300:512])
        a.write("y", 0, data["y"][1][:512])
    first.finish()
    assert {entry.writer for entry in read_manifest(first.path) if entry.slice == 1} == {"second"}
    for name, (_, rows) in data.items():
        assert ActivationDataset(first.path)[name][:].tobytes() == rows.tobytes()


def test_an_incomplete_manifest_lists_the_slices_that_are_done(tmp_path, create, write_slice, data):
    """While a dataset is written its manifest is the union of the parts."""
    writer = create(tmp_path / "n.zarr", data, rows_per_slice=256)
    write_slice(writer, 2, data)
    assert _slices(read_manifest(writer.path)) == [2]


def test_a_damaged_manifest_is_corrupt_data(tmp_path, write_dataset, data):
    """The file is named."""
    ds = write_dataset(tmp_path / "n.zarr", data)
    (ds.path / "manifest.jsonl").write_bytes(b'{"path": 1}\n')
    with pytest.raises(CorruptData) as error:
        read_manifest(ds.path)
    assert error.value.where == str(ds.path / "manifest.jsonl")


def test_only_complete_and_its_time_change_in_the_root_metadata(tmp_path, create, write_slice, data):
    """What zarr-python wrote stays as it is."""
    writer = create(tmp_path / "n.zarr", data)
    before = json.loads((writer.path / "zarr.json").read_text())
    write_slice(writer, 0, data)
    writer.finish()
    after = json.loads((writer.path / "zarr.json").read_text())
    assert after["attributes"].pop("completed") != ""
    assert after["attributes"].pop("complete") is True
    assert before["attributes"].pop("completed") == ""
    assert before["attributes"].pop("complete") is False
    assert after == before
