"""`tracer.cache()`: what every module gave, by path and by attribute."""

import torch

from tests.oracle.compare import same
from tests.oracle.degrees import every_degree
from tests.oracle.hooks import changed, counting, seeing


def _seen(subject, inputs):
    """What hooks see, on the CPU: there a cache is kept."""
    with seeing(subject.module, "cpu") as seen:
        subject.run(inputs)
    return seen


@every_degree
def test_all_modules(any_model):
    """Without names every module that runs is cached, each with its own output."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs) as tracer:
        cache = tracer.cache()
    seen = _seen(any_model, inputs)
    ran = [path for path in dict.fromkeys(seen.order) if path]
    assert [path for path in ran if not same(cache[path].output, seen.output(path))] == []


def test_by_attribute(llama):
    """The cache is walked as the model is."""
    inputs = llama.inputs()
    with llama.model.trace(inputs) as tracer:
        cache = tracer.cache()
    seen = _seen(llama, inputs)
    assert same(cache.model.layers[2].output, seen.output("model.layers.2"))
    assert same(cache.model.layers[1].mlp.output, seen.output("model.layers.1.mlp"))
    assert same(cache.lm_head.output, seen.output("lm_head"))


def test_named_modules_only(any_model):
    """Named modules, by envoy or path, are cached, and the forward runs no further than they need."""
    inputs = any_model.inputs()
    with counting(any_model.module) as ran, any_model.model.trace(inputs) as tracer:
        cache = tracer.cache(modules=[any_model.at(0), any_model.path(1)])
    seen = _seen(any_model, inputs)
    assert sorted(cache.keys()) == sorted([any_model.path(0), any_model.path(1)])
    assert same(cache[any_model.path(0)].output, seen.output(any_model.path(0)))
    assert same(cache[any_model.path(1)].output, seen.output(any_model.path(1)))
    assert any_model.path(2) not in ran


def test_inputs_too(any_model):
    """With `include_inputs=True` the arguments are cached beside the output."""
    inputs, path = any_model.inputs(), any_model.path(1)
    with any_model.model.trace(inputs) as tracer:
        cache = tracer.cache(modules=[path], include_inputs=True)
    seen = _seen(any_model, inputs)
    assert same(cache[path].output, seen.output(path))
    assert same(cache[path].input, seen.input(path))
    assert same(cache[path].inputs, seen.inputs[path][0])


def test_inputs_only(any_model):
    """With `include_output=False` there is no output."""
    inputs, path = any_model.inputs(), any_model.path(1)
    with any_model.model.trace(inputs) as tracer:
        cache = tracer.cache(modules=[path], include_inputs=True, include_output=False)
    assert same(cache[path].input, _seen(any_model, inputs).input(path))
    assert cache[path].output is None


def test_dtype(any_model):
    """`dtype` is what the tensors are kept in."""
    inputs, path = any_model.inputs(), any_model.path(1)
    with any_model.model.trace(inputs) as tracer:
        cache = tracer.cache(modules=[path], dtype=torch.bfloat16)
    assert same(cache[path].output, _seen(any_model, inputs).output(path).bfloat16())


def test_dtype_of_what_is_nested(lm):
    """`dtype` and `device` hold for the tensors in a model's own output, and in keywords, too."""
    inputs, body = lm.inputs(), lm.norm.rpartition(".")[0]
    with lm.model.trace(inputs) as tracer:
        cache = tracer.cache(modules=[body], include_inputs=True, dtype=torch.bfloat16)
    expected = _seen(lm, inputs).output(body)["last_hidden_state"]
    assert same(cache[body].output.last_hidden_state, expected.bfloat16())
    tensors = [value for value in cache[body].inputs[1].values() if isinstance(value, torch.Tensor)]
    assert {"cpu"} == {tensor.device.type for tensor in tensors}


def test_cache_sees_changes(any_model):
    """The cache holds what the trace's changes made."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs) as tracer:
        cache = tracer.cache()
        any_model.at(1).output = any_model.at(1).output * 2
    with changed(any_model.module, {any_model.path(1): lambda value: value * 2}):
        seen = _seen(any_model, inputs)
    for index in (2, 3):
        assert same(cache[any_model.path(index)].output, seen.output(any_model.path(index)))


@every_degree
def test_cache_in_a_generation(lm):
    """In a generation there is an entry for each call of a module."""
    inputs, path = lm.inputs(), lm.path(1)
    with lm.model.generate(inputs, max_new_tokens=3) as tracer:
        cache = tracer.cache(modules=[path])
    with seeing(lm.module, "cpu") as seen:
        lm.module.generate(inputs, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(inputs))
    assert same(cache[path].output, seen.outputs[path])


def test_cache_of_an_invoke(any_model):
    """A cache opened in an invoke has that invoke's rows."""
    batch = [any_model.inputs(seed=seed, rows=seed) for seed in (1, 2)]
    path = any_model.path(1)
    with any_model.model.trace() as tracer:
        with tracer.invoke(batch[0]):
            other = any_model.at(1).output.save()
        with tracer.invoke(batch[1]):
            cache = tracer.cache(modules=[path])
    expected = _seen(any_model, torch.cat(batch)).output(path)
    assert same(other.cpu(), expected[:1])
    assert same(cache[path].output, expected[1:])
