"""Damaged datasets are found out, and repaired slice by slice."""

import numpy as np
import pytest

from nnsight_hpc.storage import (
    ActivationDataset,
    CaptureSpec,
    DatasetWriter,
    Provenance,
    TokenTable,
    find_damage,
    read_attributes,
    repair,
)
from nnsight_hpc.wire.errors import Conflict, CorruptData

SHARD = {"zarr": "c.{}.0", "hdf5": "shard-{:06d}.h5"}
STORES = pytest.mark.parametrize("store", ["zarr", "hdf5"])
ROWS = np.arange(2000, dtype=np.float32).reshape(1000, 2)
MEANS = np.arange(30, dtype=np.float32).reshape(10, 3)


def _create(path):
    tokens = TokenTable(np.zeros(1000, dtype=np.int32), np.arange(11) * 100, [str(n) for n in range(10)])
    captures = [CaptureSpec("x", (2,), "float32"), CaptureSpec("mean", (3,), "float32", rows="document")]
    return DatasetWriter.create(
        path, captures=captures, tokens=tokens, provenance=Provenance(model="m"), rows_per_slice=256
    )


def _write(writer):
    for part in writer.pending():
        with writer.slice(part.number) as s:
            s.write("x", part.start, ROWS[part.start : part.stop])
            s.write("mean", part.documents[0], MEANS[slice(*part.documents)])


def _whole(path):
    writer = _create(path)
    _write(writer)
    writer.finish()
    return writer.path


def _flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def _contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*[0-9].*") if file.is_file()}


@STORES
@pytest.mark.parametrize("harm", [_flip, _cut, lambda file: file.unlink()])
def test_a_damaged_slice_alone_is_written_again_and_the_dataset_is_as_before(tmp_path, store, harm):
    """A flipped bit, a short file, a missing file: named with its slice; repair touches no file; the rest stays."""
    path = _whole(tmp_path / f"n.{store}")
    before, shard = _contents(path), f"activations/x/{SHARD[store].format(2)}"
    harm(path / shard)
    damage = find_damage(path)
    assert [(one.path, one.slices) for one in damage] == [(shard, (2,))]
    damaged = _contents(path)
    assert repair(path) == [2]
    assert {name: data for name, data in _contents(path).items() if name in damaged} == damaged
    with pytest.raises(Conflict, match="not complete"):
        ActivationDataset(path)
    writer = DatasetWriter(path)
    assert [part.number for part in writer.pending()] == [2]
    _write(writer)
    writer.finish()
    assert _contents(path) == before
    assert find_damage(path) == []


@STORES
def test_a_damaged_shard_of_documents_is_joined_again_from_the_slices_that_hold_them(tmp_path, store):
    """All slices whose documents lie in it are written again."""
    path = _whole(tmp_path / f"n.{store}")
    before = _contents(path)
    _flip(path / "activations/mean" / SHARD[store].format(0))
    assert repair(path) == [0, 1, 2, 3]
    writer = DatasetWriter(path)
    _write(writer)
    writer.finish()
    assert _contents(path) == before


@STORES
def test_a_repair_that_was_interrupted_can_be_repeated(tmp_path, store, monkeypatch):
    """Killed before the dataset was marked as incomplete, or before the old manifest was removed."""
    path = _whole(tmp_path / f"n.{store}")
    _flip(path / "activations/x" / SHARD[store].format(1))
    for step in ("set_complete", "remove_whole_manifest"):
        with monkeypatch.context() as patch:
            patch.setattr(f"nnsight_hpc.storage.damage.{step}", _killed)
            with pytest.raises(KeyboardInterrupt):
                repair(path)
    assert repair(path) == [1]
    assert [part.number for part in DatasetWriter(path).pending()] == [1]


def _killed(*_, **__):
    raise KeyboardInterrupt


@STORES
def test_what_is_whole_needs_no_repair(tmp_path, store):
    """Neither a complete dataset nor one whose slices are pending changes."""
    path = _whole(tmp_path / f"n.{store}")
    assert (find_damage(path), repair(path), read_attributes(path).complete) == ([], [], True)
    unfinished = _create(tmp_path / f"m.{store}")
    assert (find_damage(unfinished.path), repair(unfinished.path)) == ([], [])
    assert len(unfinished.pending()) == 4


def test_committed_slices_of_an_unfinished_dataset_are_repaired(tmp_path):
    """A flipped bit that its size does not show makes the slice pending again."""
    writer = _create(tmp_path / "n.zarr")
    _write(writer)
    _flip(writer.path / "activations/x/c.3.0")
    _flip(writer.path / "staged/mean/slice-000001.rows")
    assert writer.pending() == []
    assert repair(writer.path) == [1, 3]
    assert [part.number for part in writer.pending()] == [1, 3]
    _write(writer)
    writer.finish()
    np.testing.assert_array_equal(ROWS, ActivationDataset(writer.path)["x"][:])


def test_damaged_tokens_cannot_be_repaired(tmp_path):
    """No slice writes them; nothing is changed."""
    path = _whole(tmp_path / "n.zarr")
    _flip(path / "tokens/position/c.0")
    with pytest.raises(CorruptData, match="no slice writes again") as error:
        repair(path)
    assert "tokens/position/c.0: crc32c" in error.value.why
    assert read_attributes(path).complete


def test_a_shard_that_the_manifest_lacks_is_damage(tmp_path):
    """A line that was lost from the manifest of a complete dataset."""
    path = _whole(tmp_path / "n.zarr")
    lines = (path / "manifest.jsonl").read_text().splitlines(keepends=True)
    (path / "manifest.jsonl").write_text("".join(line for line in lines if "x/c.1.0" not in line))
    assert [(one.path, one.problem, one.slices) for one in find_damage(path)] == [
        ("activations/x/c.1.0", "not written", (1,))
    ]


@STORES
def test_damage_names_rows_and_documents(tmp_path, store):
    """Of a shard of tokens its rows and the documents that have them, of one of documents these; progress is told."""
    path, seen = _whole(tmp_path / f"n.{store}"), []
    for name, number in (("x", 1), ("mean", 0)):
        _flip(path / f"activations/{name}/{SHARD[store].format(number)}")
    found = find_damage(path, lambda done, total: seen.append((done, total)))
    assert {(one.rows, one.documents) for one in found} == {((256, 512), (2, 6)), ((0, 10), (0, 10))}
    assert seen[-1][0] == seen[-1][1] > 0
    assert repair(path, found) == [0, 1, 2, 3]
