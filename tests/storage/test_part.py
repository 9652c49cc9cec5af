"""Parts of datasets, as datasets of their own; the client's tests have what happens on the way."""

from __future__ import annotations

import numpy as np
import pytest

from nnsight_hpc.storage import ActivationDataset, CaptureSpec, DatasetWriter, Provenance, TokenTable
from nnsight_hpc.storage.part import bytes_of, choose, copy_part
from nnsight_hpc.storage.sources import open_source
from nnsight_hpc.wire.errors import Conflict, InvalidInput

OFFSET = [0, 0, 700, 700, 1000, 3000]


@pytest.fixture(params=["zarr", "hdf5"])
def path(request, tmp_path, random_rows):
    """A dataset with several shards, rows of documents, and documents without tokens."""
    captures = [CaptureSpec("x", (3,), "bfloat16"), CaptureSpec("mean", (2,), "float32", rows="document")]
    rows = {"x": random_rows("bfloat16", (3000, 3)), "mean": random_rows("float32", (5, 2))}
    writer = DatasetWriter.create(
        tmp_path / f"n.{request.param}",
        captures=captures,
        tokens=TokenTable(np.arange(3000), np.array(OFFSET), list("abcde"), np.arange(3000)[::-1]),
        provenance=Provenance(model="m", command="c"),
        rows_per_slice=512,
        shard_bytes=1,
    )
    for part in writer.pending():
        with writer.slice(part.number) as opened:
            opened.write("x", part.start, rows["x"][part.start : part.stop])
            opened.write("mean", part.documents[0], rows["mean"][slice(*part.documents)])
    writer.finish()
    return writer.path


def copied(path, target, **chosen):
    """The part of a dataset that is copied to `target`; and what was chosen."""
    whole = ActivationDataset(path)
    part = choose(whole, [], **chosen)

    def bring(pieces, write):
        for piece in pieces:
            write(piece, whole[piece.capture][piece.source : piece.source + piece.rows])

    copy_part(open_source(path), part, target, bring, lambda _: None)
    return ActivationDataset(target), part


def bits(array):
    return np.ascontiguousarray(array).view(np.uint8)


@pytest.mark.parametrize(
    ("chosen", "rows", "documents"),
    [
        ({"documents": slice(1, 4)}, (0, 1000), (1, 4)),
        ({"documents": slice(4, None)}, (1000, 3000), (4, 5)),
        ({"tokens": slice(699, 701)}, (699, 701), (1, 4)),
        ({"tokens": slice(-2500, -100)}, (500, 2900), (1, 5)),
        ({}, (0, 3000), (0, 5)),
    ],
)
def test_a_part_has_the_rows_and_documents_that_were_chosen(path, tmp_path, chosen, rows, documents):
    """Every bit of them; ids and positions are the source's, documents are numbered from 0."""
    whole = ActivationDataset(path)
    part, choice = copied(path, tmp_path / f"p{path.suffix}", **chosen)
    part.verify()
    assert (choice.tokens, choice.documents) == (rows, documents)
    assert part.provenance.part_of.tokens == rows
    assert np.array_equal(bits(part["x"][:]), bits(whole["x"][slice(*rows)]))
    assert np.array_equal(bits(part["mean"][:]), bits(whole["mean"][slice(*documents)]))
    for name in ("input_ids", "position"):
        assert np.array_equal(getattr(part.tokens, name)[:], getattr(whole.tokens, name)[slice(*rows)])
    assert np.array_equal(part.tokens.document[:], whole.tokens.document[slice(*rows)] - documents[0])
    assert [one.id for one in part.iter_documents()] == list("abcde")[slice(*documents)]
    assert bytes_of(choice) <= sum(file.stat().st_size for file in part.path.rglob("*"))


def test_another_part_in_its_place_is_a_conflict(path, tmp_path):
    """What goes on goes on with the same."""
    target = tmp_path / f"p{path.suffix}"
    copied(path, target, documents=slice(1, 2))
    metadata = target / ("zarr.json" if path.suffix == ".zarr" else "dataset.json")
    metadata.write_text(metadata.read_text().replace('"complete": true', '"complete": false'))
    with pytest.raises(Conflict, match="another part"):
        copied(path, target, documents=slice(1, 3))


def test_documents_without_tokens_alone_are_refused(path, tmp_path):
    """There would be no row."""
    with pytest.raises(InvalidInput, match="have no tokens"):
        copied(path, tmp_path / "p.zarr", documents=slice(0, 1))
