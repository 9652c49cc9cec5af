"""What stands at the points of real architectures, known without weights: against real runs with hooks."""

import pytest
import torch
from torch.utils._pytree import tree_map

from nnsight_hpc.execution.fake import UNKNOWN, Shadow
from nnsight_hpc.execution.fake_model import Call, twin_of
from nnsight_hpc.graph import GraphBuilder, Ref, TensorRef
from nnsight_hpc.models import prepare_inputs
from tests.oracle.architectures import LANGUAGE, VOCABULARY, WIDTH, bare

PROMPTS = {"equal": [[1, 2, 3], [4, 5, 6]], "padded": [[1, 2, 3], [4, 5, 6, 7, 8]]}


def seen_by_hooks(model, run):
    """What `run` brings past each module: by path and kind, a list with one value for each call."""
    seen, handles = {}, []
    for path, module in model.named_modules():

        def before(_module, args, kwargs, path=path):
            seen.setdefault((path, "inputs"), []).append((args, dict(kwargs)))

        def after(_module, _args, output, path=path):
            seen.setdefault((path, "output"), []).append(output)

        handles += [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return seen


def form(value):
    """Shapes, dtypes and devices in place of tensors, and types in place of all else that is no container."""

    def leaf(item):
        return (item.shape, item.dtype, item.device) if isinstance(item, torch.Tensor) else type(item).__name__

    return tree_map(leaf, value)


def with_masks_unknown(real, fake):
    """The real value with `UNKNOWN` where the fake one has it: allowed for masks, or None, only."""
    if fake is UNKNOWN:
        assert real is None or real.ndim == 4 or (real.ndim == 2 and not real.is_floating_point())
        return UNKNOWN
    if isinstance(real, dict):
        return {key: with_masks_unknown(real[key], fake.get(key)) for key in real}
    if isinstance(real, tuple):
        return tuple(with_masks_unknown(*pair) for pair in zip(real, fake, strict=True))
    return real


def reader(model, inputs, op="model.forward", **options):
    """A function from a point to its fake value, in a graph with one forward or generation."""
    shadow, builder = Shadow(model), GraphBuilder()
    forward = builder.append(op, (), {**{name: TensorRef(name) for name in inputs}, **options}, None)
    shadow.node(builder.nodes[forward], inputs)

    def read(path, kind, call=0):
        return shadow.node(builder.nodes[builder.add(f"model.{kind}", Ref(forward), path, call=call)], inputs)

    return shadow, read


@pytest.mark.parametrize("name", LANGUAGE)
@pytest.mark.parametrize("prompts", PROMPTS)
def test_every_point_of_a_forward_has_the_form_of_a_real_one(name, prompts):
    """On the meta device every point of the model has the shapes, dtypes and structure that hooks see with weights."""
    model, inputs = bare(name), prepare_inputs(PROMPTS[prompts])
    seen = seen_by_hooks(model, lambda: model(**inputs, use_cache=False))
    shadow, read = reader(bare(name, "meta"), inputs, use_cache=False)
    assert len(seen) > 20
    for (path, kind), values in seen.items():
        for call, value in enumerate(values):
            got = read(path, kind, call)
            expected = with_masks_unknown(value, got) if kind == "inputs" else value
            assert form(expected) == form(got), (path, kind, call)
    assert shadow.why == ""


@pytest.mark.parametrize("name", LANGUAGE)
def test_every_point_of_a_generation_has_the_form_of_a_real_one(name):
    """Points of a generation are known at each step: the prompt, single tokens, and at later steps what does not grow."""
    model, inputs = (
        bare(name),
        {key: prepare_inputs(PROMPTS["padded"])[key] for key in ("input_ids", "attention_mask")},
    )
    seen = seen_by_hooks(model, lambda: model.generate(**inputs, max_new_tokens=5, do_sample=False))
    _, read = reader(bare(name, "meta"), inputs, "model.generate", max_new_tokens=5)
    known = 0
    for (path, kind), values in seen.items():
        for call, value in enumerate(values if kind == "output" else ()):
            got = read(path, kind, call)
            if got is not UNKNOWN and path:
                known += 1
                assert form(value) == form(got), (path, kind, call)
    outputs = sum(len(values) for (path, kind), values in seen.items() if path and kind == "output")
    assert known >= 0.8 * outputs


def test_operation_inside_of_a_forward_has_the_form_of_a_real_one():
    """Operations of a module's source are known like modules, in a forward and at the steps of a generation."""
    model, inputs = bare("llama", "meta"), prepare_inputs([[1, 2, 3], [4, 5, 6]])
    path = "model.layers.1.self_attn:attention_interface_0"
    heads, width = model.config.num_attention_heads, model.config.head_dim
    _, read = reader(model, inputs, use_cache=False)
    assert read(path, "output")[0].shape == (2, 3, heads, width)
    assert read(path, "inputs")[0][1].shape == (2, heads, 3, width)
    assert twin_of(model).runs == 2
    _, read = reader(model, {"input_ids": inputs["input_ids"]}, "model.generate", max_new_tokens=9)
    assert [read(path, "output", call)[0].shape for call in (0, 1, 7)] == [
        (2, 3, heads, width),
        (2, 1, heads, width),
        (2, 1, heads, width),
    ]


def test_mask_that_depends_on_data_is_unknown():
    """The mask that transformers leaves out where nothing is padded is not said to have a shape; the one given is."""
    inputs = prepare_inputs(PROMPTS["equal"])
    _, read = reader(bare("llama", "meta"), inputs, use_cache=False)
    assert read("model.layers.0", "inputs")[1]["attention_mask"] is UNKNOWN
    assert read("model", "inputs")[1]["attention_mask"].shape == (2, 3)


def test_meta_model_is_on_the_cpu():
    """A model that is not loaded is shown where its weights would be loaded."""
    _, read = reader(bare("gpt2", "meta"), prepare_inputs([[1, 2]]), use_cache=False)
    assert read("lm_head", "output").device == torch.device("cpu")


def test_second_trace_of_the_same_shape_runs_no_model():
    """The model is run on fakes once for each shape of its inputs and each set of constants."""
    model, runs = bare("gpt2", "meta"), []
    for prompts in ([[1, 2, 3]], [[4, 5, 6]], [[1, 2, 3, 4]], [[7, 8, 9]]):
        _, read = reader(model, prepare_inputs(prompts), use_cache=False)
        assert read("transformer.h.1", "output").shape == (1, len(prompts[0]), WIDTH)
        runs.append(twin_of(model).runs)
    assert runs == [1, 1, 2, 2]
    reader(model, prepare_inputs([[1, 2, 3]]), use_cache=True)
    assert twin_of(model).runs == 3


def test_real_model_is_left_alone():
    """Neither weights nor hooks nor the mode of a real module are touched, and its own hooks do not fire."""
    model, fired = bare("gpt2"), []
    model.transformer.h[0].register_forward_hook(lambda *_: fired.append(1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _, read = reader(model, prepare_inputs([[1, 2]]), use_cache=False)
    assert read("lm_head", "output").shape == (1, 2, VOCABULARY)
    assert fired == []
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == 1


def test_changed_module_gets_a_new_twin():
    """A model whose layers are replaced, or converted to another dtype, is not confused with what it was."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 6))
    tensors = {"x": torch.zeros(2, 4)}

    def output():
        shadow, builder = Shadow(model), GraphBuilder()
        forward = builder.add("model.forward", TensorRef("x"))
        shadow.node(builder.nodes[forward], tensors)
        return shadow.node(builder.nodes[builder.add("model.output", Ref(forward), "")], tensors)

    assert output().shape == (2, 6)
    model[1] = torch.nn.Linear(4, 9)
    assert output().shape == (2, 9)
    model.double()
    tensors["x"] = torch.zeros(2, 4, dtype=torch.float64)
    assert output().dtype == torch.float64


def test_model_that_asks_for_data_has_unknown_points():
    """Where a forward depends on data, its points are unknown, and the shadow says why."""

    class Choosing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else x

    shadow, builder, tensors = Shadow(Choosing()), GraphBuilder(), {"x": torch.ones(2, 3)}
    forward = builder.add("model.forward", TensorRef("x"))
    shadow.node(builder.nodes[forward], tensors)
    assert shadow.node(builder.nodes[builder.add("model.output", Ref(forward), "layer")], tensors) is UNKNOWN
    assert "asks for data" in shadow.why


def test_several_operations_of_one_module_are_seen_in_one_run():
    """As a graph that divides a batch asks for them."""
    twin = twin_of(bare("llama", "meta"))
    module = "model.layers.0.self_attn"
    operations = frozenset(f"{module}:{name}" for name in ("self_q_proj_0", "self_k_proj_0"))
    with twin.active():
        tokens = torch.zeros((1, 2), dtype=torch.int64)
    recording = twin.record(Call((), {"input_ids": tokens}), operations)
    assert {(path, "output", 0) for path in operations} <= recording.points.keys()
