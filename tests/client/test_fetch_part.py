"""Parts of a dataset over HTTP: they are datasets of their own, and no byte comes that was not asked for."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from nnsight_hpc.client.fetch_part import Wanted, fetch_part
from nnsight_hpc.storage import ActivationDataset, convert_dataset
from nnsight_hpc.wire.errors import CorruptData, InvalidInput, NotFound
from tests.client.program import answer, call

ONE, TWO = "model.layers.1.output", "model.layers.2.output"
ROW = 16 * 4


def asked_of(server, folder):
    """The bytes that were asked for of files below a folder of the dataset."""
    ranges = [asked for path, asked in server.served if path.startswith(folder) and not path.endswith("zarr.json")]
    assert all(ranges), "a whole file was asked for"
    ends = [asked.removeprefix("bytes=").split("-") for asked in ranges]
    return sum(int(last) - int(first) + 1 for first, last in ends)


def test_rows_of_one_capture_are_a_dataset_and_only_they_travel(clients, server, dataset, base):
    """Rows 1100 to 1499: documents, positions and ids are those of the whole; the other capture is not touched."""
    path = fetch_part(clients, "acts", base, Wanted((TWO,), tokens=slice(1100, 1500)))
    part, whole = ActivationDataset(path), ActivationDataset(dataset)
    part.verify()
    assert path == base / "acts.zarr"
    assert list(part.captures) == [TWO]
    for name in ("input_ids", "position"):
        assert np.array_equal(getattr(part.tokens, name)[:], getattr(whole.tokens, name)[1100:1500])
    assert np.array_equal(part[TWO][:], whole[TWO][1100:1500])
    assert [(one.id, len(one)) for one in part.iter_documents()] == [("a", 100), ("b", 300)]
    made_of = part.provenance.part_of
    assert (made_of.dataset, made_of.tokens, made_of.documents) == ("acts", (1100, 1500), (0, 2))
    assert msgspec.structs.replace(part.provenance, part_of=None) == whole.provenance
    assert asked_of(server, f"activations/{TWO}") == 400 * ROW
    assert asked_of(server, f"activations/{ONE}") == 0
    assert list(base.glob("*.partial")) == []


def test_documents_are_chosen_by_number(clients, dataset, base):
    """Whole documents, all captures."""
    part = ActivationDataset(fetch_part(clients, "acts", base, Wanted(documents=slice(-1, None))))
    assert [(one.id, len(one)) for one in part.iter_documents()] == [("b", 800)]
    for name in (ONE, TWO):
        assert np.array_equal(part[name][:], ActivationDataset(dataset)[name][1200:])


def test_a_part_of_hdf5_is_hdf5(clients, server, dataset, base):
    """In the source's format, its whole shards compared with the source's checksums."""
    server.datasets["acts"] = dataset.with_suffix(".hdf5")
    convert_dataset(dataset, server.datasets["acts"], lambda done, total: None)
    path = fetch_part(clients, "acts", base, Wanted((ONE,)))
    assert path == base / "acts.hdf5"
    assert np.array_equal(ActivationDataset(path)[ONE][:], ActivationDataset(dataset)[ONE][:])


def test_damage_in_a_whole_shard_is_found(clients, dataset, base):
    """The source's manifest has a checksum of it; the part gets no name."""
    shard = dataset / "activations" / ONE / "c.1.0"
    with shard.open("r+b") as file:
        file.seek(100)
        file.write(b"\x55\x66")
    with pytest.raises(CorruptData, match="not what its manifest says") as raised:
        fetch_part(clients, "acts", base, Wanted((ONE,), tokens=slice(300, 1500)))
    assert str(shard.relative_to(dataset)) in raised.value.why
    assert not (base / "acts.zarr").exists()


def test_a_part_that_was_interrupted_goes_on_with_its_slices(clients, server, dataset, base, monkeypatch):
    """What is whole is not brought again; another part begins anew."""
    wanted = Wanted((ONE,))
    with monkeypatch.context() as patch:
        patch.setattr("nnsight_hpc.storage.part._SHARD_BYTES", 512 * ROW)
        patch.setattr("nnsight_hpc.storage.part.DatasetWriter.finish", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch_part(clients, "acts", base, wanted)
    server.served.clear()
    path = fetch_part(clients, "acts", base, wanted)
    assert asked_of(server, f"activations/{ONE}") == 0
    assert np.array_equal(ActivationDataset(path)[ONE][:], ActivationDataset(dataset)[ONE][:])


def _interrupt(_writer):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("wanted", "error", "words"),
    [
        (Wanted(("nope",)), NotFound, "no capture 'nope'"),
        (Wanted(tokens=slice(3000, 4000)), InvalidInput, "3000:4000 are no tokens"),
        (Wanted(documents=slice(2, None)), InvalidInput, "2: are no documents"),
        (Wanted(tokens=slice(0, 1), documents=slice(0, 1)), InvalidInput, "not by both"),
    ],
)
def test_what_cannot_be_chosen_is_refused(clients, base, wanted, error, words):
    """Before anything is made."""
    with pytest.raises(error, match=words):
        fetch_part(clients, "acts", base, wanted)
    assert list(base.glob("acts*")) == []


def test_the_command_chooses_and_refuses_what_is_there(server, dataset, base):
    """`fetch` with --capture and a range; a copy that exists is a conflict; a range that is none is told."""
    server.datasets["acts"] = dataset
    path = answer("fetch", "acts", "--capture", ONE, "--tokens", ":100", "--to", str(base))["path"]
    assert len(ActivationDataset(path)) == 100
    assert "exists" in call("fetch", "acts", "--documents", "0:1", "--to", str(base), code=5)[1]
    assert "give a range" in call("fetch", "acts", "--tokens", "100", "--to", str(base), code=2)[1]
