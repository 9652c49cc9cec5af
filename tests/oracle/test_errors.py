"""What goes wrong is said at the researcher's line: line, operation, shapes, module, and the exception's own type."""
# ruff: noqa: PLW0108, SIM117 - blocks are written as researchers write them

import io

import pytest
import torch

from nnsight_hpc.wire.errors import ExecutionFailed, HpcError, InvalidGraph, InvalidInput
from tests.devices import DEVICE
from tests.oracle.architectures import WIDTH
from tests.oracle.compare import same
from tests.oracle.degrees import every_degree, in_one_process
from tests.oracle.hooks import counting

FAILING = {
    "index": (lambda v: v[99], IndexError, ("index 99 is out of bounds", "operator.getitem")),
    "shape": (lambda v: v @ torch.ones(7, 7, device=DEVICE), RuntimeError, ("operator.matmul", "float32[7, 7]")),
    "dimension": (lambda v: v.sum(dim=9), IndexError, ("Dimension out of range", "Tensor.sum")),
    "view": (lambda v: v.view(7, 11), RuntimeError, ("Tensor.view", "7, 11")),
    "type": (lambda v: torch.nn.functional.one_hot(v), RuntimeError, ("torch.nn.functional.one_hot",)),
    "einsum": (lambda v: torch.einsum("a,b->ab", v, v), RuntimeError, ("torch.einsum",)),
    "key": (lambda v: v.topk(10**6), RuntimeError, ("Tensor.topk",)),
}


@pytest.mark.parametrize("name", FAILING)
def test_failing_operation(any_model, name):
    """The error has the type that torch raises, and begins with this file, line and text."""
    operation, kind, words = FAILING[name]
    with pytest.raises(kind) as caught, any_model.model.trace(any_model.inputs()):
        hidden = any_model.at(1).output
        operation(hidden).save()
    lines = str(caught.value).splitlines()
    assert isinstance(caught.value, ExecutionFailed)
    assert "test_errors.py" in lines[0]
    assert "lambda v:" in lines[0] or "operation(hidden).save()" in lines[0]
    assert all(word in str(caught.value) for word in words), str(caught.value)
    shape = ", ".join(map(str, (2, 5, WIDTH) if any_model.language else (2, WIDTH)))
    assert f"float32[{shape}]" in str(caught.value)


@in_one_process("no model")
def test_type_of_torch_itself_is_the_oracle(llama):
    """Each failing operation raises in a block what it raises on the tensor."""
    tensor = torch.zeros(2, 5, WIDTH, device=DEVICE)
    for operation, kind, _words in FAILING.values():
        with pytest.raises(kind):
            operation(tensor)


@every_degree
def test_failing_module_call_names_the_module(any_model):
    """A module called on a value of a wrong shape is named with its path."""
    with pytest.raises(RuntimeError) as caught, any_model.model.trace(any_model.inputs()):
        any_model.head_envoy(any_model.at(1).output[..., :7]).save()
    assert any_model.head in str(caught.value)
    assert "any_model.head_envoy(any_model.at(1).output[..., :7]).save()" in str(caught.value).splitlines()[0]


def test_set_of_a_wrong_shape_fails_in_the_model(any_model):
    """What the model cannot compute with is the model's own error, raised as its own type."""
    with pytest.raises(RuntimeError) as caught, any_model.model.trace(any_model.inputs()):
        any_model.at(1).output = any_model.at(1).output[..., :5]
        any_model.head_envoy.output.save()
    assert "test_errors.py" in str(caught.value).splitlines()[0]


@pytest.mark.parametrize("how", ["set", "in place", "input"])
def test_later_layer_for_an_earlier_one_is_refused(any_model, how):
    """A later layer's value in an earlier layer is refused before the model runs, and both modules are named."""
    with counting(any_model.module) as ran, pytest.raises(InvalidGraph) as caught:
        with any_model.model.trace(any_model.inputs()):
            later = any_model.at(3).output
            if how == "set":
                any_model.at(1).output = later
            elif how == "in place":
                any_model.at(1).output[:] = later * 2
            else:
                any_model.at(1).input = later + 1
            any_model.head_envoy.output.save()
    assert any_model.path(1) in str(caught.value)
    assert any_model.path(3) in str(caught.value)
    assert "test_errors.py" in str(caught.value)
    assert ran == []


def test_condition_on_a_later_layer_is_refused(any_model):
    """A branch that changes an earlier layer cannot hang on a later one."""
    with counting(any_model.module) as ran, pytest.raises(InvalidGraph) as caught:
        with any_model.model.trace(any_model.inputs()):
            if any_model.at(3).output.sum() > 0:
                any_model.at(1).output = any_model.at(1).output * 2
            any_model.head_envoy.output.save()
    assert any_model.path(1) in str(caught.value)
    assert any_model.path(3) in str(caught.value)
    assert ran == []


@in_one_process("a module is added to the researcher's own model")
def test_module_that_does_not_run_says_so(lm):
    """Reading a module that the forward never calls is an error that names it."""
    idle = torch.nn.Identity()
    lm.module.idle = idle
    try:
        with pytest.raises(HpcError) as caught, lm.model.trace(lm.inputs()):
            lm.model.idle.output.save()
        assert "did not reach idle.output" in str(caught.value)
        assert "lm.model.idle.output.save()" in str(caught.value)
    finally:
        del lm.module.idle


def test_module_inside_a_skipped_one_says_so(any_model):
    """A module inside a skipped block never runs: the error names it."""
    with pytest.raises(HpcError) as caught, any_model.model.trace(any_model.inputs()):
        any_model.at(1).skip(any_model.at(1).input)
        any_model.at(1, "mlp").output.save()
    assert any_model.path(1, "mlp") in str(caught.value)


def test_unsaved_value_says_which(any_model):
    """A value that was not saved says so after the block, with its line."""
    with any_model.model.trace(any_model.inputs()):
        hidden = any_model.at(1).output
        kept = hidden.sum().save()
    assert kept.ndim == 0
    for use in (lambda: hidden + 1, lambda: hidden.result(), lambda: torch.sum(hidden), lambda: hidden[0]):
        with pytest.raises(InvalidInput, match=r"(?s)saved.*|.*saved") as caught:
            use()
    assert "hidden" in str(caught.value) or "test_errors.py" in str(caught.value)


def test_value_whose_trace_failed_says_so(any_model):
    """After a failed trace, its saved values say that there is no result."""
    with pytest.raises(IndexError), any_model.model.trace(any_model.inputs()):
        fine = any_model.at(0).output.save()
        any_model.at(1).output[99].save()
    with pytest.raises(InvalidInput, match="no result"):
        fine.result()


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda v: v.numpy(), ("numpy",)),
        (lambda v: v.data_ptr(), ("data_ptr",)),
        (lambda v: v.set_(v), ("set_",)),
        (lambda v: v.untyped_storage(), ("untyped_storage",)),
        (lambda v: v.resize_(3), ("resize_",)),
        (lambda v: torch.save(v, io.BytesIO()), ("save", "pickle", "known")),
        (lambda v: v.apply_(abs), ("apply_",)),
        (lambda v: torch.rand_like(v), ("seed",)),
    ],
    ids=["numpy", "data_ptr", "set_", "storage", "resize_", "save", "apply_", "rand_like"],
)
@in_one_process("refused while it is recorded: nothing is sent")
def test_operation_that_is_not_allowed(llama, use, words):
    """What is not on the list is refused at the line, and nothing runs."""
    with counting(llama.module) as ran:
        with pytest.raises((InvalidGraph, InvalidInput, TypeError)) as caught, llama.model.trace(llama.inputs()):
            use(llama.at(1).output)
    assert ran == []
    assert any(word in str(caught.value) for word in words)


@in_one_process("refused while it is recorded: nothing is sent")
def test_misspelt_module(any_model):
    """An attribute that is not there is an AttributeError with near names."""
    name = any_model.head if any_model.language else "6"
    with pytest.raises(AttributeError, match=r"did you mean|has no"):
        getattr(any_model.model, f"{name}x")


def test_parameters_cannot_be_changed(any_model):
    """A change in place of a parameter is refused before the model runs, and the weights stay."""
    head = any_model.module.get_submodule(any_model.head)
    before = head.weight.clone()
    with counting(any_model.module) as ran, pytest.raises(InvalidGraph, match="parameter"):
        with any_model.model.trace(any_model.inputs()):
            any_model.head_envoy.weight[:] = 0
            any_model.head_envoy.output.save()
    assert ran == []
    assert same(head.weight, before)


@in_one_process("refused while it is recorded: nothing is sent")
def test_trace_inside_a_trace(any_model):
    """A trace in a trace is refused and names the session."""
    with pytest.raises(InvalidInput, match="session"):
        with any_model.model.trace(any_model.inputs()), any_model.model.trace(any_model.inputs()):
            pass


@in_one_process("refused while it is recorded: nothing is sent")
def test_point_outside_of_a_trace(any_model):
    """Outside of a trace a point is refused with what to write."""
    with pytest.raises(InvalidInput, match="trace"):
        _ = any_model.at(1).output


@in_one_process("refused while it is recorded: nothing is sent")
def test_own_error_of_the_block_comes_out_as_it_is(any_model):
    """An exception of the researcher's own code is that exception, and its traceback ends in the block."""
    with counting(any_model.module) as ran, pytest.raises(KeyError) as caught:
        with any_model.model.trace(any_model.inputs()):
            any_model.at(1).output.save()
            _ = {}["missing"]
    assert ran == []
    assert caught.value.args == ("missing",)
    assert "test_errors.py" in str(caught.traceback[-1].path)


def test_error_in_one_invoke_names_its_line(any_model):
    """With several invokes, the line of the failing one is shown."""
    with pytest.raises(IndexError) as caught, any_model.model.trace() as tracer:
        with tracer.invoke(any_model.inputs(seed=1)):
            any_model.at(1).output.sum().save()
        with tracer.invoke(any_model.inputs(seed=2)):
            any_model.at(1).output[77].save()
    assert "any_model.at(1).output[77].save()" in str(caught.value).splitlines()[0]


def test_error_in_a_loop_names_its_line(any_model):
    """An operation that fails in a later pass of a loop is shown at its line."""
    with pytest.raises(IndexError) as caught, any_model.model.trace(any_model.inputs()):
        for row in any_model.at(1).output:
            row[1000].save()
    assert "row[1000].save()" in str(caught.value).splitlines()[0]


@pytest.mark.parametrize("threshold", [1, -1])
def test_list_of_python_filled_in_a_branch(llama, threshold):
    """A list outside has the saved value of a branch that ran, and nothing of one that did not."""
    kept = []
    with llama.model.trace(llama.inputs()):
        total = llama.at(1).output.sum()
        if total * 0 > threshold:
            kept.append((total + 1).save())
        total = total.save()
    assert kept == ([total + 1] if threshold < 0 else [])
