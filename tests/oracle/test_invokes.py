"""Several prompts in one trace: each invoke sees and changes its own rows only, as if its prompt were alone.

Where prompts share a forward, the oracle is that forward, bit for bit. Against the prompt alone the matrices have other
shapes, and float32 sums come out in another order: `close` says by how much.
"""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from nnsight_hpc import NNsight
from nnsight_hpc.wire.errors import HpcError, InvalidGraph
from tests.devices import DEVICE
from tests.oracle.architectures import WIDTH
from tests.oracle.compare import close, same
from tests.oracle.degrees import every_degree, in_one_process
from tests.oracle.hooks import changed, counting, seeing

KINDS = ("output", "input")
LONG = in_one_process("48 prompts with all modules each are half a minute, and 12 are there")


def _seen(subject, inputs):
    with seeing(subject.module) as seen:
        subject.run(inputs)
    return seen


@every_degree
def test_equal_lengths_share_one_forward(any_model):
    """Three invokes of equal length run the model once, and each sees its rows of that forward, bit for bit."""
    batch = [any_model.inputs(seed=seed, rows=rows) for seed, rows in ((1, 1), (2, 2), (3, 1))]
    blocks, logits = [], []
    with counting(any_model.module) as ran, any_model.model.trace() as tracer:
        for inputs in batch:
            with tracer.invoke(inputs):
                blocks.append(any_model.at(2).output.save())
                logits.append(any_model.head_envoy.output.save())
    assert ran.count("") == 1
    seen = _seen(any_model, torch.cat(batch))
    for got, path in ((blocks, any_model.path(2)), (logits, any_model.head)):
        assert [len(each) for each in got] == [1, 2, 1]
        assert same(torch.cat(got), seen.output(path))
    for got, inputs in zip(logits, batch, strict=True):
        close(got, any_model.logits(inputs))


@pytest.mark.parametrize("kind", ["output", "input"])
def test_every_module_shows_an_invoke_its_rows(any_model, kind):
    """Of every module, each of two invokes sees what the prompt alone gives, or is refused: never the whole in silence.

    Modules whose rows are no longer in the order of the prompts (an expert's own tokens) cannot be cut.
    """
    batch = [any_model.inputs(seed=seed, rows=seed) for seed in (1, 2)]
    alone = [_seen(any_model, inputs) for inputs in batch]
    paths = [path for path in dict.fromkeys(alone[0].order) if path]
    refused = []
    for path in paths:
        expected = [getattr(each, kind)(path) for each in alone]
        if not all(isinstance(each, torch.Tensor) for each in expected):
            continue
        got = []
        try:
            with any_model.model.trace() as tracer:
                for inputs in batch:
                    with tracer.invoke(inputs):
                        got.append(getattr(any_model.model.get(path), kind).save())
        except HpcError as error:
            assert path in str(error)  # noqa: PT017 - most modules must not be refused
            refused.append(path)
            continue
        for one, of_one in zip(got, expected, strict=True):
            close(one, of_one)
    assert [path for path in refused if not path.endswith("experts.act_fn")] == []


@pytest.mark.parametrize(("prompts", "tokens"), [(2, 2), (4, 4), (12, 1), pytest.param(WIDTH, 3, marks=LONG)])
def test_batch_as_long_as_something_else(any_model, prompts, tokens):
    """As many prompts as tokens, heads, experts or the model is wide: each sees at every module what it gives alone."""
    batch = [any_model.inputs(seed=seed, rows=1, tokens=tokens) for seed in range(prompts)]
    alone = [_seen(any_model, inputs) for inputs in (batch[0], batch[-1])]
    paths = [path for path in dict.fromkeys(alone[0].order) if path and not path.endswith("experts.act_fn")]
    got = []
    with any_model.model.trace() as tracer:
        for inputs in batch:
            with tracer.invoke(inputs):
                got.append([getattr(any_model.model.get(path), kind).save() for path in paths for kind in KINDS])
    for one, seen in ((got[0], alone[0]), (got[-1], alone[-1])):
        expected = [getattr(seen, kind)(path) for path in paths for kind in KINDS]
        for value, right in zip(tree_leaves(one), tree_leaves(expected), strict=True):
            if isinstance(value, torch.Tensor):
                close(value, right, atol=1e-4, rtol=1e-4)


def test_generation_with_as_many_prompts_as_tokens(lm):
    """In a generation each prompt has its rows at each step, and what it gives alone as a result."""
    _check_generation(lm, {"max_new_tokens": 3, "do_sample": False})


def test_generation_with_beams(attentive):
    """Each prompt has the rows of all of its beams, and the one row of its result."""
    _check_generation(attentive, {"max_new_tokens": 3, "do_sample": False, "num_beams": 3})


def _check_generation(lm, options):
    batch, rows, results = [lm.inputs(seed=seed, rows=1, tokens=4) for seed in range(4)], [], []
    with lm.model.generate(**options) as tracer:
        for inputs in batch:
            with tracer.invoke(inputs):
                for _ in tracer.iter[1]:
                    block = lm.at(1).output.save()
                rows.append(block)
                results.append(tracer.result.save())
    for inputs, value, result in zip(batch, rows, results, strict=True):
        with seeing(lm.module) as seen:
            expected = lm.module.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
        close(value, seen.output(lm.path(1), 1), atol=1e-4, rtol=1e-4)
        assert same(result, expected)


def test_flattened_tokens_are_cut_by_the_invoke_s_tokens(flattening):
    """Where tokens of all rows are one dimension, an invoke sees and changes its own tokens."""
    batch = [flattening.inputs(seed=seed, rows=seed) for seed in (1, 2)]
    path = flattening.flattened[0]
    with flattening.model.trace() as tracer:
        with tracer.invoke(batch[0]):
            first = flattening.model.get(path).output.save()
            untouched = flattening.head_envoy.output.save()
        with tracer.invoke(batch[1]):
            flattening.model.get(path).output[:] = 0
            touched = flattening.head_envoy.output.save()
    assert first.shape[0] == batch[0].numel()
    close(first, _seen(flattening, batch[0]).output(path))
    close(untouched, flattening.logits(batch[0]))

    def zero(value):
        value[:] = 0

    with changed(flattening.module, {path: zero}):
        close(touched, flattening.logits(batch[1]))


def test_unequal_lengths_are_as_alone(lm):
    """Prompts of different lengths, each in its invoke, give what each gives alone, without padding."""
    batch = [lm.inputs(seed=seed, rows=1 + seed % 2, tokens=tokens) for seed, tokens in ((1, 3), (2, 7), (3, 3))]
    blocks, logits = [], []
    with lm.model.trace() as tracer:
        for inputs in batch:
            with tracer.invoke(inputs):
                blocks.append(lm.at(1).output.save())
                logits.append(lm.head_envoy.output.save())
    for inputs, block, logit in zip(batch, blocks, logits, strict=True):
        seen = _seen(lm, inputs)
        assert block.shape == seen.output(lm.path(1)).shape
        close(block, seen.output(lm.path(1)))
        close(logit, seen.output(lm.head))


@pytest.mark.parametrize("kind", ["set", "in place", "skip"])
def test_change_in_one_invoke_does_not_touch_the_others(any_model, kind):
    """Rows of another invoke are computed as if there were no change; the own rows as with a hook on the prompt alone."""
    batch = [any_model.inputs(seed=seed, rows=2) for seed in (1, 2, 3)]
    logits = []
    with any_model.model.trace() as tracer:
        for index, inputs in enumerate(batch):
            with tracer.invoke(inputs):
                if index == 1:
                    _change(any_model.at(1), kind)
                logits.append(any_model.head_envoy.output.save())
    close(logits[0], any_model.logits(batch[0]))
    close(logits[2], any_model.logits(batch[2]))
    if kind == "skip":
        return

    def negated(value):
        return -value

    with changed(any_model.module, {any_model.path(1): negated}):
        close(logits[1], any_model.logits(batch[1]))


def _change(block, kind):
    if kind == "set":
        block.output = -block.output
    elif kind == "in place":
        block.output[:] = -block.output
    else:
        block.skip(block.input)


@every_degree
@pytest.mark.parametrize("kind", ["set", "in place", "input"])
def test_each_invoke_changes_its_own_rows(any_model, kind):
    """Different changes at one module in several invokes each act on their rows."""
    batch = [any_model.inputs(seed=seed, rows=seed) for seed in (1, 2)]
    logits = []
    with any_model.model.trace() as tracer:
        for index, inputs in enumerate(batch):
            with tracer.invoke(inputs):
                block = any_model.at(1)
                if kind == "set":
                    block.output = block.output * (index + 2)
                elif kind == "in place":
                    block.output *= index + 2
                else:
                    block.input = block.input * (index + 2)
                logits.append(any_model.head_envoy.output.save())
    where = "inputs" if kind == "input" else "outputs"
    for index, inputs in enumerate(batch):
        with changed(any_model.module, **{where: {any_model.path(1): lambda v, i=index: v * (i + 2)}}):
            close(logits[index], any_model.logits(inputs))


def test_tuple_output_of_attention_is_cut(attentive):
    """Each invoke sees a tuple with its rows, and changes inside it reach the model."""
    batch = [attentive.inputs(seed=seed, rows=seed) for seed in (1, 2)]
    with attentive.model.trace() as tracer:
        with tracer.invoke(batch[0]):
            mine = attentive.at(1, "attention").output.save()
            logits = attentive.head_envoy.output.save()
        with tracer.invoke(batch[1]):
            attentive.at(1, "attention").output[0][:, -1] = 0
            changed_logits = attentive.head_envoy.output.save()
    path = attentive.path(1, "attention")
    assert isinstance(mine, tuple)
    close(mine[0], _seen(attentive, batch[0]).output(path)[0])
    close(logits, attentive.logits(batch[0]))

    def zero_last(value):
        value[0][:, -1] = 0

    with changed(attentive.module, {path: zero_last}):
        close(changed_logits, attentive.logits(batch[1]))


def test_all_rows_invoke(any_model):
    """An invoke without inputs sees all rows, and changes all of them."""
    batch = [any_model.inputs(seed=seed, rows=seed) for seed in (1, 2)]
    with any_model.model.trace() as tracer:
        with tracer.invoke(batch[0]):
            first = any_model.head_envoy.output.save()
        with tracer.invoke(batch[1]):
            second = any_model.head_envoy.output.save()
        with tracer.invoke():
            any_model.at(1).output[:] = any_model.at(1).output * 2
            everything = any_model.at(1).output.save()
    whole = torch.cat(batch)
    with changed(any_model.module, {any_model.path(1): lambda value: value * 2}):
        assert same(torch.cat([first, second]), any_model.logits(whole))
    assert same(everything, _seen(any_model, whole).output(any_model.path(1)) * 2)


def test_all_rows_of_unequal_lengths(lm):
    """An invoke for all rows pads prompts of unequal length into one forward; each gives what it gives alone."""
    batch = [lm.inputs(seed=seed, rows=rows, tokens=tokens) for seed, rows, tokens in ((1, 1, 3), (2, 2, 7), (3, 1, 3))]
    blocks = []
    with counting(lm.module) as ran, lm.model.trace() as tracer:
        for inputs in batch:
            with tracer.invoke(inputs):
                blocks.append(lm.at(1).output.save())
        with tracer.invoke():
            lm.at(2).output[:] = lm.at(2).output * 2
            logits = lm.head_envoy.output.save()
    assert ran.count("") == 1
    rows = [inputs[i : i + 1] for inputs in batch for i in range(len(inputs))]
    for row, block, inputs in zip(logits, torch.cat(blocks), rows, strict=True):
        close(block[-inputs.shape[1] :], _seen(lm, inputs).output(lm.path(1))[0])
        with changed(lm.module, {lm.path(2): lambda value: value * 2}):
            close(row[-inputs.shape[1] :], lm.logits(inputs)[0])


def test_value_passed_to_a_later_layer_of_another_invoke(any_model):
    """A value of one invoke, read at an early block, is set in another at a later one; they share one forward."""
    batch = [any_model.inputs(seed=seed) for seed in (1, 2)]
    with counting(any_model.module) as ran, any_model.model.trace() as tracer:
        with tracer.invoke(batch[0]):
            early = any_model.at(0).output
        with tracer.invoke(batch[1]):
            any_model.at(2).output = early + any_model.at(2).output
            logits = any_model.head_envoy.output.save()
    assert ran.count("") == 1
    source = _seen(any_model, batch[0]).output(any_model.path(0))
    with changed(any_model.module, {any_model.path(2): lambda value: value + source}):
        close(logits, any_model.logits(batch[1]))


@pytest.mark.parametrize("barrier", [False, True])
def test_patching_at_one_layer_between_invokes(any_model, barrier):
    """Activation patching at one point between two invokes; `tracer.barrier` is accepted and changes nothing."""
    clean, corrupt = (any_model.inputs(seed=seed) for seed in (1, 2))
    source = _seen(any_model, clean).output(any_model.path(1))
    with any_model.model.trace() as tracer:
        wait = tracer.barrier(2)
        with tracer.invoke(clean):
            hidden = any_model.at(1).output[..., -1, :]
            if barrier:
                wait()
        with tracer.invoke(corrupt):
            if barrier:
                wait()
            any_model.at(1).output[..., -1, :] = hidden
            logits = any_model.head_envoy.output.save()

    def patch(value):
        value[..., -1, :] = source[..., -1, :]

    with changed(any_model.module, {any_model.path(1): patch}):
        close(logits, any_model.logits(corrupt))


def test_value_passed_between_prompts_of_different_lengths(lm):
    """The last token's activation of a short prompt is patched into a longer one."""
    short, long = lm.inputs(seed=1, rows=1, tokens=3), lm.inputs(seed=2, rows=1, tokens=8)
    with lm.model.trace() as tracer:
        with tracer.invoke(short):
            hidden = lm.at(2).output[:, -1]
        with tracer.invoke(long):
            lm.at(2).output[:, -1] = hidden
            logits = lm.head_envoy.output.save()
    source = _seen(lm, short).output(lm.path(2))

    def patch(value):
        value[:, -1] = source[:, -1]

    with changed(lm.module, {lm.path(2): patch}):
        close(logits, lm.logits(long))


def test_circle_between_invokes_is_refused_before_the_model_runs(any_model):
    """Each invoke needs a later layer of the other: refused, with both modules named, and nothing runs."""
    with (
        counting(any_model.module) as ran,
        pytest.raises(InvalidGraph) as caught,
        any_model.model.trace() as tracer,
    ):
        with tracer.invoke(any_model.inputs(seed=1)):
            late = any_model.at(3).output
        with tracer.invoke(any_model.inputs(seed=2)):
            any_model.at(1).output = late
            any_model.head_envoy.output.save()
    assert ran == []
    assert any_model.path(1) in str(caught.value)
    assert any_model.path(3) in str(caught.value)


def _padded(prompts):
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=DEVICE)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=DEVICE)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


PROMPTS = [[5, 17, 31], [9, 80, 44, 3, 60, 12, 7], [23]]


def test_list_of_prompts_is_padded_on_the_left(lm):
    """A list of prompts has the mask and the positions of left padding: the forward is that of plain transformers."""
    with torch.no_grad(), seeing(lm.module) as seen:
        lm.module(**_padded(PROMPTS), use_cache=False)
    with lm.model.trace(PROMPTS):
        blocks = lm.at(1).output.save()
        logits = lm.head_envoy.output.save()
        ids = lm.model.inputs[1]["input_ids"].save()
        mask = lm.model.inputs[1]["attention_mask"].save()
    assert same(mask, _padded(PROMPTS)["attention_mask"])
    assert same(ids, _padded(PROMPTS)["input_ids"])
    assert same(blocks, seen.output(lm.path(1)))
    assert same(logits, seen.output(lm.head))


def test_rows_of_a_padded_list_are_the_prompts_alone(lm):
    """Each row equals the prompt alone at the prompt's own tokens."""
    with lm.model.trace(PROMPTS):
        blocks = lm.at(2).output.save()
        logits = lm.head_envoy.output.save()
    for row, prompt in enumerate(PROMPTS):
        seen = _seen(lm, torch.tensor([prompt], device=DEVICE))
        close(blocks[row, -len(prompt) :], seen.output(lm.path(2))[0])
        close(logits[row, -len(prompt) :], seen.output(lm.head)[0])


def test_list_of_prompts_in_an_invoke(lm):
    """A padded list in one invoke, beside another invoke, is what the list alone is."""
    other = lm.inputs(seed=4, rows=1, tokens=7)
    with lm.model.trace() as tracer:
        with tracer.invoke(PROMPTS):
            listed = lm.head_envoy.output.save()
        with tracer.invoke(other):
            beside = lm.head_envoy.output.save()
    with torch.no_grad(), seeing(lm.module) as seen:
        lm.module(**_padded(PROMPTS), use_cache=False)
    for row, prompt in enumerate(PROMPTS):
        close(listed[row, -len(prompt) :], seen.output(lm.head)[row, -len(prompt) :])
    close(beside, lm.logits(other))


def test_single_invoke_is_the_trace(any_model):
    """One invoke is the same as inputs given to the trace, bit for bit."""
    inputs = any_model.inputs()
    with any_model.model.trace() as tracer, tracer.invoke(inputs):
        logits = any_model.head_envoy.output.save()
    assert same(logits, any_model.logits(inputs))


def test_gather_over_invokes(any_model):
    """Values of several invokes are put together in one operation."""
    batch = [any_model.inputs(seed=seed, rows=1) for seed in (1, 2, 3)]
    rows = []
    with any_model.model.trace() as tracer:
        for inputs in batch:
            with tracer.invoke(inputs):
                rows.append(any_model.at(1).output)
        together = torch.cat(rows).mean(0).save()
    expected = _seen(any_model, torch.cat(batch)).output(any_model.path(1)).mean(0)
    close(together, expected)


@pytest.mark.parametrize("how", ["set", "in place"])
def test_rows_set_where_modules_hand_on_one_tensor(how):
    """A set in an invoke does not write into what an earlier module gave, though that module's tensor is handed on as it is.

    A change in place of it does, as it does in PyTorch, for values that are computed later.
    """
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Identity(), torch.nn.Linear(3, 3)).requires_grad_(
        requires_grad=False
    )
    model, batch, saved = NNsight(net.to(DEVICE)), torch.randn(2, 4, 3, device=DEVICE), []
    with model.trace() as tracer:
        for index in range(2):
            with tracer.invoke(batch[index]):
                first = model[0].output
                saved.append(first.save())
                if index:
                    if how == "set":
                        model[1].output = model[1].output * 2
                    else:
                        model[1].output[:] = 0
                saved.append((model[2].output - first).save())
    hidden = [net[0](each) for each in batch]
    standing = [hidden[1], hidden[1] * 2] if how == "set" else [hidden[1] * 0, hidden[1] * 0]
    close(saved[0], hidden[0])
    close(saved[1], net[2](hidden[0]) - hidden[0])
    close(saved[2], hidden[1])
    close(saved[3], net[2](standing[1]) - standing[0])
