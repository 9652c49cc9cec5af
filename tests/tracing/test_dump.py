"""Dumps in this process: any graph over any corpus equals plain PyTorch on the same batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnsight_hpc.storage import ActivationDataset, read_attributes
from nnsight_hpc.wire.errors import Conflict, InvalidInput

TEXTS = ["one two three four five", "the city of paris is the capital", "a tower in rome", "seven", "nine eight seven"]
ALONE = {"batch_tokens": 1}
"""Each document is a forward of its own, so that the arithmetic is that of the document alone, to the last bit."""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Datasets are written to the working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ids_of(lm, text):
    return torch.tensor([lm.tokenizer(text)["input_ids"]])


def hooked(lm, ids, layer=1, change=None):
    """What a plain hook sees of a layer (and may change), and the logits: ``[tokens, width]`` each."""
    seen = []

    def hook(_module, _args, output):
        new = output if change is None else change(output)
        seen.append(new[0])
        return new

    handle = lm.module.model.layers[layer].register_forward_hook(hook)
    with torch.no_grad():
        logits = lm.module(ids, use_cache=False).logits[0]
    handle.remove()
    return seen[0], logits


def test_what_is_computed_from_activations_is_written_bit_for_bit(lm):
    """An activation, a matrix given as a tensor, and top-k of the logits: each row is that of plain hooks."""
    encoder = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    with lm.dump(TEXTS, name="set", **ALONE) as d:
        hidden = lm.model.layers[1].output
        d.write("resid_1", hidden)
        d.write("features", torch.relu(hidden @ encoder))
        d.write("top", lm.lm_head.output.topk(3).indices)
    dataset = d.dataset()
    assert d.path.name == "set.zarr"
    assert d.summary()["documents"] == len(TEXTS) == dataset.documents
    for number, text in enumerate(TEXTS):
        document, (seen, logits) = dataset.document(number), hooked(lm, ids_of(lm, text))
        assert np.array_equal(seen.numpy(), document["resid_1"])
        assert np.array_equal(torch.relu(seen @ encoder).numpy(), document["features"])
        assert np.array_equal(logits.topk(3).indices.numpy(), document["top"])


def test_changes_in_the_block_take_effect(lm):
    """What an earlier layer was set to is what a later one sees; so too for edits of the model."""
    with lm.edit() as edited:
        edited.model.layers[0].output *= 2
    for model, name in ((edited, "edited"), (lm, "block")):
        with model.dump(TEXTS, name=name, **ALONE) as d:
            if model is lm:
                model.model.layers[0].output *= 2
            d.write("logits", model.lm_head.output)
        for number, text in enumerate(TEXTS):
            expected = hooked(lm, ids_of(lm, text), layer=0, change=lambda output: output * 2)[1]
            assert np.array_equal(expected.numpy(), d.dataset().document(number)["logits"])


def test_gradients_are_written(lm):
    """The gradient of a loss by an activation has a row for each token."""
    with lm.dump(TEXTS, name="set", **ALONE) as d:
        hidden = lm.model.layers[1].output
        with lm.lm_head.output.square().sum().backward():
            d.write("gradient", hidden.grad)
    for number, text in enumerate(TEXTS):
        leaves = []

        def hook(_module, _args, output, leaves=leaves):
            leaves.append(output.detach().requires_grad_())
            return leaves[0]

        handle = lm.module.model.layers[1].register_forward_hook(hook)
        try:
            lm.module(ids_of(lm, text), use_cache=False).logits.square().sum().backward()
        finally:
            handle.remove()
        assert np.array_equal(leaves[0].grad[0].numpy(), d.dataset().document(number)["gradient"])


def test_a_mean_over_tokens_leaves_padding_out_by_the_mask(lm):
    """A value with a row for each document has one in the dataset, and the mask keeps padding out of it."""
    texts = [*TEXTS, "", "one two three four five six"]
    with lm.dump(texts, name="set") as d:
        hidden, mask = lm.model.layers[1].output, d.mask[..., None]
        d.write("mean", (hidden * mask).sum(1) / mask.sum(1))
        d.write("ids", d.input_ids)
    dataset = d.dataset()
    means = dataset["mean"][:]
    assert (len(texts), 32) == means.shape
    for number, text in enumerate(texts):
        if text:
            expected = hooked(lm, ids_of(lm, text))[0].mean(0)
            np.testing.assert_allclose(means[number], expected.numpy(), rtol=1e-4, atol=1e-5)
    assert np.isnan(means[texts.index("")]).all()
    assert dataset.tokens.input_ids[:].tolist() == dataset["ids"][:].tolist()


@pytest.mark.parametrize(
    ("block", "said", "line"),
    [
        (lambda lm, d: d.write("a", lm.lm_head.output.sum()), "no row for each token", 'd.write("a", lm.lm_head'),
        (lambda lm, d: d.write("a", lm.lm_head.output[:, 1:]), "no row for each token", "[:, 1:]"),
        (lambda lm, d: d.write("a", lm.lm_head.output.topk(2)), "not a tensor", "topk(2)"),
        (lambda lm, d: d.write("a", lm.lm_head.output > 0), "cannot be stored as bool", "> 0"),
        (lambda lm, d: d.write("a/b", lm.lm_head.output), "cannot be the name", "a/b"),
        (lambda lm, d: d.write("a", 3), "no value of this block", "3"),
        (lambda lm, d: lm.lm_head.output.save(), "keeps what is written", "save"),
        (lambda lm, d: [d.write("a", lm.lm_head.output) for _ in range(2)], "written twice", "range(2)"),
        (lambda lm, d: None, "writes nothing", "lm.dump"),
    ],
)
def test_what_cannot_be_written_is_refused_at_its_line(lm, folder, block, said, line):
    """The error has the line of the write, and nothing is left on disk."""
    with pytest.raises(InvalidInput, match=said) as raised, lm.dump(TEXTS, name="set") as d:
        block(lm, d)
    assert line in raised.value.where
    assert list(folder.iterdir()) == []


def test_a_dump_that_was_cut_goes_on_and_another_one_is_refused(lm, folder):
    """The same block written again finds its dataset done, from whatever line; another graph, tensor or context does not."""

    def dump(scale, **options):
        with lm.dump(TEXTS, name="set", **options) as d:
            d.write("hidden", lm.model.layers[1].output * scale)
        return d

    dump(torch.tensor(2.0))
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    with lm.dump(TEXTS, name="set") as d:
        d.write("hidden", lm.model.layers[1].output * torch.tensor(2.0))
    assert before == {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    for given, differs in (((torch.tensor(3.0),), "tensors"), ((2.0,), "graph")):
        with pytest.raises(Conflict, match=differs):
            dump(*given)
    with pytest.raises(Conflict, match="inputs"):
        dump(torch.tensor(2.0), context=500)


def test_windows_and_packing_cover_every_token_once(lm):
    """Each token is written once, with the values of the input that had it, and knows its document and position there."""
    long = "one two three four five six seven eight nine a the of"
    ids = ids_of(lm, long)[0]
    for name, options, starts in (
        ("windows", {"context": 5, "stride": 3}, [(0, 0), (3, 5), (6, 8), (9, 11)]),
        ("whole", {"context": 6, "stride": 6}, [(0, 0), (6, 6)]),
    ):
        with lm.dump([long, "seven"], name=name, **options, **ALONE) as d:
            d.write("hidden", lm.model.layers[1].output)
        dataset = d.dataset()
        rows = dataset.document(0)["hidden"]
        assert dataset.tokens.document[:].tolist() == [0] * 12 + [1]
        stops = [own for _, own in starts[1:]] + [12]
        for (begin, own), stop in zip(starts, stops, strict=True):
            expected = hooked(lm, ids[None, begin:stop])[0][own - begin :]
            assert np.array_equal(expected.numpy(), rows[own:stop])
            assert list(range(own - begin, stop - begin)) == dataset.tokens.position[own:stop].tolist()


def test_packed_documents_fill_the_context(lm):
    """Documents are joined, an end-of-text token after each, and cut at the context; documents stay what they are."""
    with lm.dump(["one two three", "four", "five six"], name="set", context=4, packed=True, **ALONE) as d:
        d.write("hidden", lm.model.layers[1].output)
    dataset = d.dataset()
    end = lm.tokenizer.eos_token_id
    joined = [i for text in ("one two three", "four", "five six") for i in (*lm.tokenizer(text)["input_ids"], end)]
    assert joined == dataset.tokens.input_ids[:].tolist()
    assert dataset.tokens.document[:].tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2]
    assert dataset.tokens.position[:].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    rows = dataset["hidden"][:]
    for start in range(0, 9, 4):
        expected = hooked(lm, torch.tensor([joined[start : start + 4]]))[0]
        assert np.array_equal(expected.numpy(), rows[start : start + 4])


def test_token_ids_are_a_corpus(lm):
    """As lists or arrays, cut at the context; ids outside of the vocabulary are refused by their document."""
    rows = [[3, 4, 5], [6, 7], [8, 9, 10, 11]]
    for number, corpus in enumerate((rows, [np.array(row) for row in rows], [torch.tensor(row) for row in rows])):
        with lm.dump(corpus, name=f"set{number}", context=3, **ALONE) as d:
            d.write("hidden", lm.model.layers[1].output)
        assert d.dataset().tokens.input_ids[:].tolist() == [3, 4, 5, 6, 7, 8, 9, 10]
        expected = hooked(lm, torch.tensor([[8, 9, 10]]))[0]
        assert np.array_equal(expected.numpy(), d.dataset().document(2)["hidden"])
    with (
        pytest.raises(InvalidInput, match="document 2 has the token id 99"),
        lm.dump([[1], [99]], name="other") as d,
    ):
        d.write("hidden", lm.model.layers[1].output)


def test_hdf5_is_the_other_format(lm, folder):
    """The same values, in NAME.hdf5."""
    for form in ("zarr", "hdf5"):
        with lm.dump(TEXTS, name="set", format=form) as d:
            d.write("hidden", lm.model.layers[1].output)
    one, other = (ActivationDataset(folder / f"set.{form}") for form in ("zarr", "hdf5"))
    assert np.array_equal(one["hidden"][:], other["hidden"][:])


def test_the_dataset_says_how_it_was_made(lm, folder):
    """The graph, a hash of its tensors, how documents became inputs, and the user's line."""
    with lm.dump(TEXTS, name="set", context=7) as d:
        d.write("hidden", lm.model.layers[1].output * torch.ones(32))
    found = read_attributes(d.path).provenance
    assert d.graph.without_lines().to_json() == type(d.graph).from_json(found.graph).without_lines().to_json()
    assert found.tensors.startswith("sha256:")
    assert found.inputs == {"context": 7, "stride": 0, "packed": 0, "batch_tokens": 2048}
    assert "test_dump.py" in found.command
    assert d.wait() is None
    with pytest.raises(InvalidInput, match="no request"):
        d.status()


@pytest.mark.parametrize("form", ["zarr", "hdf5"])
def test_a_plan_has_the_files_and_bytes_that_are_written(lm, folder, form):
    """Measured first, then written: documents, tokens, padding, and the very files."""
    found = []
    for dry_run in (True, False):
        with lm.dump([*TEXTS, ""], name="set", format=form, dry_run=dry_run, dtype="bfloat16") as d:
            hidden = lm.model.layers[1].output
            d.write("hidden", hidden)
            d.write("mean", hidden.mean(1))
        found.append(d)
        if dry_run:
            assert list(folder.iterdir()) == []
    plan, summary = found[0].plan(), found[1].summary()
    files = [file for file in d.path.rglob("*") if file.is_file()]
    assert (plan.documents, plan.tokens, plan.padding) == (6, summary["tokens"], summary["padding"])
    assert [("hidden", "token", summary["tokens"] * 64), ("mean", "document", 6 * 64)] == [
        (one.name, one.rows, one.bytes) for one in plan.captures
    ]
    assert len(files) == plan.files
    assert sum(file.stat().st_size for file in files if file.suffix not in (".json", ".jsonl")) >= plan.bytes * 0.99
    assert plan.seconds > 0 < plan.free
    with pytest.raises(InvalidInput, match="dry_run"):
        d.plan()
