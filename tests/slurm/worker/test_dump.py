"""Dumps: what is written equals plain PyTorch hooks, in every dtype, and a dump that was cut goes on to the same bytes."""

from __future__ import annotations

import hashlib
import random
from importlib.metadata import version

import numpy as np
import pytest
import torch

from nnsight_hpc.models import Loaded, load
from nnsight_hpc.slurm.worker import dump as dump_module
from nnsight_hpc.slurm.worker.allowance import Allowance
from nnsight_hpc.slurm.worker.corpus import tokenizer_hash
from nnsight_hpc.slurm.worker.dumps import Dumps, Orders
from nnsight_hpc.slurm.worker.model import Alone
from nnsight_hpc.slurm.worker.scribe import OwnScribe
from nnsight_hpc.storage import ActivationDataset, read_attributes, read_manifest
from nnsight_hpc.wire.errors import Conflict, InvalidInput, NotFound, RequestCancelled
from nnsight_hpc.wire.frames import pack
from nnsight_hpc.wire.messages import DumpSpec, encode
from nnsight_hpc.wire.workers import Lease
from tests.devices import DEVICE
from tests.models_for_tests import WORDS, save_tiny_llama
from tests.slurm.worker.graphs import dump_frame
from tests.slurm.worker.shared_slices import Board
from tests.slurm.worker.stand_in import wait_for

LAYERS = ("model.layers.*.output",)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""float32 values of a document in a batch of another shape than its own: matrix products add in another order."""


def texts(count: int, lengths: tuple[int, int], seed: int = 0) -> list[str]:
    source = random.Random(seed)
    return [" ".join(source.choices(WORDS, k=source.randint(*lengths))) for _ in range(count)]


def on_device(folder) -> Loaded:
    """The model in `folder`, where the tests run."""
    loaded = load(str(folder))
    loaded.module.to(DEVICE)
    return loaded


@pytest.fixture(scope="module")
def loaded(tiny_llama):
    return on_device(tiny_llama)


def run(frame, loaded, folder, *, cancelled=lambda: False, progress=lambda _: None):
    dumps = Dumps(Alone(loaded), Board(progress).slices("w"))
    return go_on(dumps, 1, frame, folder, cancelled=cancelled)


def go_on(dumps, attempt, frame, folder, *, gives_way=lambda: False, cancelled=lambda: False, kind="dump"):
    """One attempt of a worker that keeps `dumps`; of the kind ``part`` for one that helps."""
    lease = Lease(id="d" if kind == "dump" else "d/w", kind=kind, attempt=attempt, request="", result="", user="me")
    return dumps.run(lease, frame, folder, Allowance(None), Orders(cancelled, gives_way))


def hooked(loaded, text: str, context: int = 1024) -> list[torch.Tensor]:
    """What plain hooks on the layers see of a document run alone: one ``[tokens, width]`` a layer."""
    seen: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(lambda _m, _a, output: seen.append(output[0].cpu()))
        for layer in loaded.module.model.layers
    ]
    with torch.no_grad():
        given = loaded.tokenizer(text, return_tensors="pt", truncation=True, max_length=context)
        loaded.module(**given.to(DEVICE))
    for handle in handles:
        handle.remove()
    return seen


def digests(folder) -> dict[str, str]:
    """SHA-256 of every file with arrays in it."""
    files = [f for f in folder.rglob("*") if f.is_file() and "manifest" not in f.name and f != folder / "zarr.json"]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_values_equal_hooks_on_each_document_alone(loaded, tmp_path):
    """Every row of every layer is what a plain hook sees when the document is run alone, within float32 tolerance."""
    documents = texts(60, (1, 40))
    summary = run(dump_frame(documents, LAYERS, batch_tokens=128), loaded, tmp_path)
    dataset = ActivationDataset(tmp_path / "set.zarr")
    assert 60 == summary["documents"] == dataset.documents
    assert 0 < summary["padding"] < 0.1
    for index, text in enumerate(documents):
        document = dataset.document(index)
        assert f"doc-{index}" == document.id
        assert loaded.tokenizer(text)["input_ids"] == document.input_ids.tolist()
        for layer, expected in enumerate(hooked(loaded, text)):
            np.testing.assert_allclose(document[f"model.layers.{layer}.output"], expected.numpy(), **CLOSE)


def test_values_are_bit_equal_in_batches_of_the_same_shape(loaded, tmp_path):
    """When each document is a batch of its own, the rows are bit for bit those of the hooks."""
    documents = texts(20, (1, 40))
    run(dump_frame(documents, LAYERS, batch_tokens=1), loaded, tmp_path)
    dataset = ActivationDataset(tmp_path / "set.zarr")
    for index, text in enumerate(documents):
        for layer, expected in enumerate(hooked(loaded, text)):
            assert np.array_equal(expected.numpy(), dataset.document(index)[f"model.layers.{layer}.output"])


def test_bfloat16_is_stored_exactly(tmp_path):
    """The rows of a bfloat16 model are its bits, without a detour over another type."""
    loaded = on_device(save_tiny_llama(tmp_path / "model", dtype="bfloat16"))
    documents = texts(10, (2, 30))
    run(dump_frame(documents, LAYERS, batch_tokens=1), loaded, tmp_path)
    dataset = ActivationDataset(tmp_path / "set.zarr")
    assert {"bfloat16"} == {capture.dtype for capture in dataset.captures.values()}
    for index, text in enumerate(documents):
        for layer, expected in enumerate(hooked(loaded, text)):
            rows = dataset.document(index)[f"model.layers.{layer}.output"]
            assert np.array_equal(expected.view(torch.uint16).numpy(), rows.view(np.uint16))


def test_overflow_of_float16_is_counted(loaded, tmp_path):
    """Values beyond float16 are stored as infinite and counted by capture in the summary; others are just rounded."""
    weight = loaded.module.model.layers[2].mlp.down_proj.weight
    before = weight.clone()
    try:
        weight.mul_(1e6)
        documents = texts(5, (3, 9))
        summary = run(dump_frame(documents, LAYERS, dtype="float16"), loaded, tmp_path)
        expected = sum(int((hooked(loaded, text)[2].abs() > 65519).sum()) for text in documents)
    finally:
        weight.copy_(before)
    assert expected > 0
    assert {"model.layers.2.output": expected} == summary["overflows"]
    rows = ActivationDataset(tmp_path / "set.zarr")["model.layers.2.output"][:]
    assert np.float16 == rows.dtype
    assert expected == np.isinf(rows).sum()


def test_of_a_tuple_the_first_element_is_kept(loaded, tmp_path):
    """An attention module returns a tuple, of which the first element is its output, as wide as the model."""
    run(dump_frame(["one two three"], ("model.layers.1.self_attn.output",)), loaded, tmp_path)
    attention = ActivationDataset(tmp_path / "set.zarr")["model.layers.1.self_attn.output"]
    seen = []
    handle = loaded.module.model.layers[1].self_attn.register_forward_hook(lambda _m, _a, output: seen.append(output))
    loaded.module(**loaded.tokenizer("one two three", return_tensors="pt").to(DEVICE))
    handle.remove()
    assert np.array_equal(seen[0][0][0].cpu().numpy(), attention[:])


def test_context_cuts_documents(loaded, tmp_path):
    """Of a document only the first `context` tokens are kept, and empty documents have no rows."""
    run(dump_frame(["one two three four", "", "five"], LAYERS, context=2), loaded, tmp_path)
    dataset = ActivationDataset(tmp_path / "set.zarr")
    assert [len(dataset.document(index)) for index in range(3)] == [2, 0, 1]
    assert dataset.tokens.position[:].tolist() == [0, 1, 0]


def test_the_dataset_says_where_it_comes_from(loaded, tmp_path):
    """Model, fingerprint, tokenizer, graph, corpus, versions and command are in the attributes."""
    frame = dump_frame(["one two"], LAYERS, command="nnsight-hpc dump …")
    run(frame, loaded, tmp_path)
    attributes = read_attributes(tmp_path / "set.zarr")
    provenance = attributes.provenance
    assert attributes.complete
    assert loaded.identity.id == provenance.model
    assert loaded.identity.fingerprint == provenance.fingerprint
    assert tokenizer_hash(loaded.tokenizer) == provenance.tokenizer_hash
    assert "model.layers.0" in provenance.graph
    assert provenance.corpus_fingerprint.startswith("sha256:")
    assert version("torch") == provenance.software["torch"]
    assert provenance.command == "nnsight-hpc dump …"


def test_the_tokenizer_hash_does_not_depend_on_what_it_did(loaded):
    """Truncation left set by an earlier call is not part of a tokenizer's hash."""
    before = tokenizer_hash(loaded.tokenizer)
    loaded.tokenizer(["one"], truncation=True, max_length=7)
    assert before == tokenizer_hash(loaded.tokenizer)


@pytest.mark.parametrize(
    ("frame", "error", "said"),
    [
        (lambda: dump_frame([], LAYERS), InvalidInput, "no documents"),
        (lambda: dump_frame(["", ""], LAYERS), InvalidInput, "no tokens"),
        (lambda: dump_frame(["one"], ("model.layrs.*.output",)), NotFound, "model.layrs"),
        (lambda: dump_frame(["one"], ("model.output",)), InvalidInput, "not a tensor"),
        (lambda: dump_frame(["one"], LAYERS, dtype="int7"), InvalidInput, "int7"),
        (lambda: dump_frame(["one"], LAYERS, format="csv"), InvalidInput, "csv"),
        (lambda: dump_frame(["one"], LAYERS, batch_tokens=0), InvalidInput, "batch_tokens"),
        (lambda: dump_frame(["one"], LAYERS, context=0), InvalidInput, "context"),
        (lambda: pack(encode(DumpSpec(name="set", captures=LAYERS)), b'{"id": "a"}'), InvalidInput, "text"),
        (lambda: pack(encode(DumpSpec(name="set", captures=LAYERS)), b"\xff\xfe"), InvalidInput, "corpus"),
    ],
)
def test_what_cannot_be_dumped_is_refused(loaded, tmp_path, frame, error, said):
    """A request that cannot be carried out is refused with the reason, and leaves no complete dataset."""
    with pytest.raises(error, match=said):
        run(frame(), loaded, tmp_path)
    assert not (tmp_path / "set.zarr").exists() or not read_attributes(tmp_path / "set.zarr").complete


def test_a_model_without_a_tokenizer_is_refused(loaded, tmp_path):
    """A dump begins with text, so there must be a tokenizer."""
    bare = type(loaded)(loaded.module, None, loaded.identity)
    with pytest.raises(InvalidInput, match="no tokenizer"):
        run(dump_frame(["one"], LAYERS), bare, tmp_path)


def test_another_dataset_of_the_name_is_left_alone(loaded, tmp_path):
    """A dump over a dataset of another corpus is refused, and changes no byte of it."""
    run(dump_frame(["one two three"], LAYERS), loaded, tmp_path)
    before = digests(tmp_path / "set.zarr")
    with pytest.raises(Conflict, match="corpus_fingerprint"):
        run(dump_frame(["four five six"], LAYERS), loaded, tmp_path)
    assert before == digests(tmp_path / "set.zarr")


def test_a_dump_leased_again_after_it_was_complete_is_done(loaded, tmp_path):
    """When only the outcome was lost, the second run finds the work done and touches nothing."""
    frame = dump_frame(texts(5, (3, 9)), LAYERS)
    first = run(frame, loaded, tmp_path)
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "set.zarr").rglob("*")}
    second = run(frame, loaded, tmp_path)
    assert first["tokens"] == second["tokens"]
    assert before == {f: f.stat().st_mtime_ns for f in (tmp_path / "set.zarr").rglob("*")}


def test_a_cancelled_dump_stops_and_is_not_complete(loaded, tmp_path):
    """Cancelling between modules leaves a dataset that says it is incomplete and has no loose files."""
    asked = iter(range(20))
    with pytest.raises(RequestCancelled):
        run(dump_frame(texts(50, (3, 40)), LAYERS), loaded, tmp_path, cancelled=lambda: next(asked, None) is None)
    assert not read_attributes(tmp_path / "set.zarr").complete
    assert list((tmp_path / "set.zarr").rglob("*.partial")) == []


def test_a_dump_that_gives_way_goes_on_where_it_was(loaded, tmp_path, monkeypatch):
    """Stopped after each batch it runs none twice, and the bytes are those of one run; so too where another worker had it."""
    frame, ran = dump_frame(texts(12, (1, 30)), LAYERS, batch_tokens=64), []
    whole = run(frame, loaded, tmp_path / "whole")
    once = OwnScribe.put
    monkeypatch.setattr(OwnScribe, "put", lambda self, kept: ran.append([*map(len, kept.values())]) or once(self, kept))
    run(frame, loaded, tmp_path / "again")
    expected, attempt = list(ran), 0
    for folder, names in (("one", ["a"]), ("two", ["a", "b"])):
        ran.clear()
        summary, board = None, Board()
        workers = [Dumps(Alone(loaded), board.slices(name)) for name in names]
        for attempt in range(1, 4 * len(expected)):
            patient = len(workers) == 2 and attempt > 6
            number = attempt % 3 % len(workers)
            gives_way = {"gives_way": lambda patient=patient: not patient}
            summary = go_on(workers[number], attempt, frame, tmp_path / folder, **gives_way)
            if summary is not None:
                break
            board.queue.give_back(names[number])
        assert summary["tokens"] == whole["tokens"]
        assert digests(tmp_path / folder / "set.zarr") == digests(tmp_path / "whole" / "set.zarr")
        if len(workers) == 1:
            assert (ran, attempt) == (expected, len(expected) + 1)


def test_slices_share_documents_at_their_borders(loaded, tmp_path, monkeypatch):
    """With many slices, most borders cut a document, and still every row is right and written once."""
    monkeypatch.setattr(dump_module, "SLICE_ROWS", 256)
    documents = texts(60, (5, 60))
    reports = []
    run(dump_frame(documents, LAYERS), loaded, tmp_path, progress=reports.append)
    attributes = read_attributes(tmp_path / "set.zarr")
    assert attributes.slices > 5
    dataset = ActivationDataset(tmp_path / "set.zarr")
    for index, text in enumerate(documents):
        np.testing.assert_allclose(
            dataset.document(index)["model.layers.2.output"], hooked(loaded, text)[2].numpy(), **CLOSE
        )
    last = reports[-1]
    assert (last.documents, last.documents_total) == (60, 60)
    assert last.tokens == last.tokens_total == attributes.rows
    assert last.bytes == last.bytes_total == attributes.rows * 3 * 32 * 4


def test_two_workers_write_the_bytes_of_one(loaded, tmp_path, monkeypatch):
    """Slices that two workers write in turns, one of them as a part, make the files, checksums and rows of a dump by one."""
    monkeypatch.setattr(dump_module, "SLICE_ROWS", 256)
    frame, board = dump_frame(texts(60, (5, 60)), LAYERS, batch_tokens=128), Board()
    alone = run(frame, loaded, tmp_path / "one")
    leads, helps = (Dumps(Alone(loaded), board.slices(name)) for name in "ab")
    summary, wrote = None, set()
    for attempt in range(1, 1000):
        summary = go_on(leads, attempt, frame, tmp_path / "two", gives_way=lambda: True)
        wrote |= board.queue.doing().keys()
        if summary is not None:
            break
        go_on(helps, attempt, frame, tmp_path / "two", gives_way=lambda: True, kind="part")
    one, two = tmp_path / "one" / "set.zarr", tmp_path / "two" / "set.zarr"
    assert wrote == {"a", "b"}
    assert summary["tokens"] == read_attributes(two).rows
    assert summary["padding"] == alone["padding"] > 0
    assert digests(one) == digests(two)
    same = [(entry.path, entry.rows, entry.bytes, entry.crc32c, entry.slice) for entry in read_manifest(one)]
    assert same == [(entry.path, entry.rows, entry.bytes, entry.crc32c, entry.slice) for entry in read_manifest(two)]


def test_a_worker_that_was_taken_for_dead_changes_nothing_when_it_wakes(loaded, tmp_path, monkeypatch):
    """Its slice was written by another one meanwhile: it drops what it has begun, and completes the dataset."""
    monkeypatch.setattr(dump_module, "SLICE_ROWS", 256)
    frame, board = dump_frame(texts(60, (5, 60)), LAYERS, batch_tokens=128), Board()
    run(frame, loaded, tmp_path / "one")
    sleeper, other = (Dumps(Alone(loaded), board.slices(name)) for name in "ab")
    go_on(sleeper, 1, frame, tmp_path / "two", gives_way=lambda: True)
    board.queue.give_back("a")
    go_on(other, 1, frame, tmp_path / "two", kind="part")
    assert board.queue.complete
    assert not read_attributes(tmp_path / "two" / "set.zarr").complete
    assert list((tmp_path / "two").rglob("*.partial")) == []
    go_on(sleeper, 2, frame, tmp_path / "two")
    assert digests(tmp_path / "one" / "set.zarr") == digests(tmp_path / "two" / "set.zarr")


def test_a_dump_goes_on_without_a_daemon(bench, loaded, tmp_path):
    """The daemon dies while a worker has a dump: it writes all slices alone, and tells the next daemon that it has."""
    frame = dump_frame(texts(2000, (60, 90)), ("model.layers.0.output",), batch_tokens=8192)
    bench.ready_worker()
    request = bench.daemon.submit(frame, kind="dump")
    path = bench.places.datasets / "set.zarr"
    wait_for(lambda: request in bench.daemon.queues, "the first slice")
    bench.daemon.stop()
    bench.daemon.queues.clear()
    wait_for(lambda: read_attributes(path).complete, "the complete dataset")
    bench.daemon.start()
    outcome = bench.daemon.outcome(request)
    assert outcome.error is None
    run(frame, loaded, tmp_path)
    assert read_attributes(path).slices > 2
    assert digests(tmp_path / "set.zarr") == digests(path)
