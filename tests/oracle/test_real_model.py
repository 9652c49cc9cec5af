"""SmolLM2-135M and real text: what the API is for, end to end, against plain hooks."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch

from nnsight_hpc import LanguageModel
from nnsight_hpc.models import load
from tests.devices import DEVICE
from tests.oracle.compare import close, same, within_tolerances
from tests.oracle.degrees import DEGREES, places
from tests.oracle.hooks import changed, hooks_of, seeing
from tests.oracle.on_ranks import OnRanks, RanksBackend

PROMPT = "The Eiffel Tower is in the city of"


@pytest.fixture(scope="module", params=places(["smollm2"], {3}.intersection(DEGREES)))
def smol(request, smollm2):
    """The wrapped model and the plain module, in one process, and spread over three ranks: it has nine heads."""
    loaded = load(str(smollm2))
    if request.param.ranks == 1:
        return LanguageModel(loaded.module.to(DEVICE), tokenizer=loaded.tokenizer)
    ranks = RanksBackend(partial(request.getfixturevalue("replicas").of, request.param.ranks), smollm2)
    return OnRanks(loaded.module, ranks, tokenizer=loaded.tokenizer)


@pytest.fixture(autouse=True)
def _compared_as_it_ran(smol):
    with within_tolerances() if isinstance(smol, OnRanks) else nullcontext():
        yield
    assert hooks_of(smol.module) == []


def _logits(smol, text):
    with torch.no_grad():
        return smol.module(**smol.tokenizer(text, return_tensors="pt").to(DEVICE), use_cache=False).logits


def test_reads_and_the_answer(smol):
    """A layer and the logits of a real sentence are the hooks', and the answer is the city."""
    with smol.trace(PROMPT):
        hidden = smol.model.layers[11].output.save()
        token = smol.lm_head.output[:, -1].argmax(-1).save()
    with seeing(smol.module) as seen:
        _logits(smol, PROMPT)
    assert same(hidden, seen.output("model.layers.11"))
    assert smol.tokenizer.decode(token) == " Paris"


def test_neurons_move_the_answer(smol):
    """Neurons set at the last token, as in the paper's first example, give the hook's logits."""
    neurons = list(range(100, 112))
    with smol.trace(PROMPT):
        smol.model.layers[20].mlp.down_proj.input[:, -1, neurons] = 10
        logits = smol.lm_head.output.save()

    def neuron_hook(value):
        value[:, -1, neurons] = 10

    with changed(smol.module, inputs={"model.layers.20.mlp.down_proj": neuron_hook}):
        assert same(logits, _logits(smol, PROMPT))


def test_patching_in_two_invokes_of_unequal_length(smol):
    """The last token of one sentence, patched at a late layer, brings its answer to another sentence (atol 1e-3)."""
    other = "The Colosseum is an ancient building in the city of"
    with smol.trace() as tracer:
        with tracer.invoke(PROMPT):
            hidden = smol.model.layers[27].output[:, -1]
        with tracer.invoke(other):
            smol.model.layers[27].output[:, -1] = hidden
            logits = smol.lm_head.output[:, -1].save()
    with seeing(smol.module) as seen:
        _logits(smol, PROMPT)
    source = seen.output("model.layers.27")[:, -1]

    def patch(value):
        value[:, -1] = source

    with changed(smol.module, {"model.layers.27": patch}):
        close(logits, _logits(smol, other)[:, -1], atol=1e-3, rtol=1e-4)
    assert smol.tokenizer.decode(logits.argmax(-1)) == " Paris"


def test_texts_of_unequal_length_as_a_list(smol):
    """Texts in a list are padded on the left; each row's last token is that of the text alone (atol 1e-3)."""
    texts = [PROMPT, "Berlin is the capital of", "One, two, three,"]
    with smol.trace(texts):
        logits = smol.lm_head.output[:, -1].save()
    for row, text in enumerate(texts):
        close(logits[row], _logits(smol, text)[0, -1], atol=1e-3, rtol=1e-4)


def test_generation(smol):
    """Greedy generation of text is that of transformers, with each step's layer."""
    with smol.generate(PROMPT, max_new_tokens=5) as tracer:
        states = tracer.list().save()
        with tracer.iter[:]:
            states.append(smol.model.layers[5].output[:, -1])
        tokens = tracer.result.save()
    given = smol.tokenizer(PROMPT, return_tensors="pt").to(DEVICE)
    with seeing(smol.module) as seen:
        expected = smol.module.generate(**given, max_new_tokens=5, do_sample=False)
    assert same(tokens, expected)
    assert len(states) == 5
    for got, plain in zip(states, seen.outputs["model.layers.5"], strict=True):
        assert same(got, plain[:, -1])
