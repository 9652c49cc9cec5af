"""`model.edit`: interventions that are recorded once and act in every later trace of the edited model."""

import torch

from tests.devices import DEVICE
from tests.oracle.architectures import WIDTH
from tests.oracle.compare import same
from tests.oracle.degrees import every_degree
from tests.oracle.hooks import changed, seeing


def _seen(subject, inputs):
    with seeing(subject.module) as seen:
        subject.run(inputs)
    return seen


def _edited(subject):
    with subject.model.edit() as edited:
        block = edited.get(subject.path(1))
        block.output[..., ::2] = 0
    return edited


def _silence(value):
    value[..., ::2] = 0


@every_degree
def test_edit_acts_in_later_traces_and_not_on_the_model(any_model):
    """The edited model computes as with the hook; the model it was made from does not."""
    inputs, edited = any_model.inputs(), _edited(any_model)
    for _ in range(2):
        with edited.trace(inputs):
            logits = edited.get(any_model.head).output.save()
        with changed(any_model.module, {any_model.path(1): _silence}):
            assert same(logits, any_model.logits(inputs))
    with any_model.model.trace(inputs):
        plain = any_model.head_envoy.output.save()
    assert same(plain, any_model.logits(inputs))


def test_edit_and_trace_together(any_model):
    """A trace of the edited model sees the edit's change, and changes on top of it."""
    inputs, edited = any_model.inputs(), _edited(any_model)
    with edited.trace(inputs):
        hidden = edited.get(any_model.path(1)).output.save()
        edited.get(any_model.path(2)).output *= 3
        logits = edited.get(any_model.head).output.save()
    hooks = {any_model.path(1): _silence, any_model.path(2): lambda value: value * 3}
    with changed(any_model.module, hooks):
        seen = _seen(any_model, inputs)
    assert same(hidden, seen.output(any_model.path(1)).masked_fill(torch.arange(WIDTH, device=DEVICE) % 2 == 0, 0))
    assert same(logits, seen.output(any_model.head))


def test_inplace_edit_and_clear(any_model):
    """`edit(inplace=True)` changes the model itself until `clear_edits`."""
    inputs = any_model.inputs()
    with any_model.model.edit(inplace=True):
        any_model.at(1).output = any_model.at(1).output * 2
    with any_model.model.trace(inputs):
        edited = any_model.head_envoy.output.save()
    any_model.model.clear_edits()
    with any_model.model.trace(inputs):
        plain = any_model.head_envoy.output.save()
    with changed(any_model.module, {any_model.path(1): lambda value: value * 2}):
        assert same(edited, any_model.logits(inputs))
    assert same(plain, any_model.logits(inputs))


def test_edits_add_up(any_model):
    """An edit of an edited model comes after the first."""
    inputs = any_model.inputs()
    with any_model.model.edit() as once:
        once.get(any_model.path(1)).output = once.get(any_model.path(1)).output * 2
    with once.edit() as twice:
        twice.get(any_model.path(1)).output = twice.get(any_model.path(1)).output + 1
    with twice.trace(inputs):
        logits = twice.get(any_model.head).output.save()
    with changed(any_model.module, {any_model.path(1): lambda value: value * 2 + 1}):
        assert same(logits, any_model.logits(inputs))


def test_edit_in_every_invoke(any_model):
    """An edit acts on all rows of a trace with invokes."""
    batch = [any_model.inputs(seed=seed) for seed in (1, 2)]
    edited, logits = _edited(any_model), []
    with edited.trace() as tracer:
        for inputs in batch:
            with tracer.invoke(inputs):
                logits.append(edited.get(any_model.head).output.save())
    with changed(any_model.module, {any_model.path(1): _silence}):
        assert same(torch.cat(logits), any_model.logits(torch.cat(batch)))


def test_edit_in_a_generation(lm):
    """An edit acts at every step of a generation."""
    inputs = lm.inputs()
    with lm.model.edit() as edited:
        edited.get(lm.path(1)).output = edited.get(lm.path(1)).output * -1
    with edited.generate(inputs, max_new_tokens=4) as tracer:
        tokens = tracer.result.save()
    settings = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(inputs)}
    with torch.no_grad(), changed(lm.module, {lm.path(1): lambda value: value * -1}):
        assert same(tokens, lm.module.generate(inputs, **settings))


def test_edit_stops_early_all_the_same(any_model):
    """A trace of an edited model that needs less than the edit's module does not run it."""
    from tests.oracle.hooks import counting

    with any_model.model.edit() as edited:
        edited.get(any_model.path(3)).output *= 2
    with counting(any_model.module) as ran, edited.trace(any_model.inputs()):
        edited.get(any_model.path(0)).output.save()
    assert any_model.path(1) not in ran
