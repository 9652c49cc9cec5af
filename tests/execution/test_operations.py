"""Every allowed operation, run: it writes nothing but its result, and shares memory only where the list of views says so."""

import functools
import random
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import pytest
import torch

from nnsight_hpc.execution.memory import memory_of
from nnsight_hpc.execution.resolve import FACTORIES, carry_out, constant, function_of
from nnsight_hpc.graph.nodes import Device, Seed
from nnsight_hpc.graph.operations import (
    ALLOWED,
    FIELDS_OF,
    IN_PLACE,
    MOST_POSITIONAL,
    PROTOCOL,
    RANDOM,
    VIEWS,
)

CPU = torch.device("cpu")
SPACES = defaultdict(list)  # allowed operations by where they are found
for _op in sorted(ALLOWED - PROTOCOL):
    SPACES[_op.rpartition(".")[0]].append(_op)
_MARGIN = 16


def _framed(values):
    """The tensor in the middle of larger memory, so that writing past its ends is seen."""
    whole = torch.full((values.numel() + 2 * _MARGIN,), 3, dtype=values.dtype)
    inner = whole[_MARGIN:-_MARGIN].view(values.shape)
    inner.copy_(values)
    return inner


_rand = functools.partial(torch.rand, generator=torch.Generator().manual_seed(0))


@functools.cache
def _tensors():
    matrix = _rand(4, 4) + 0.1
    return [
        matrix,
        _rand(4) + 0.1,
        _rand(()) + 0.1,
        _rand(2, 4, 4),
        _rand(1, 2, 4, 4),
        torch.arange(16).view(4, 4) % 4,
        torch.arange(4),
        matrix > 0.5,
        _rand(4, 4, dtype=torch.complex64),
    ]


def _generic():
    """Arguments that suit most operations."""
    for tensor in _tensors():
        other = tensor.clone()
        yield from (
            (tensor,),
            ([tensor, other],),
            (tensor, 0),
            (tensor, 1),
            (tensor, 2.0),
            (tensor, ()),
            (tensor, (4, 1)),
        )
        yield from ((tensor, other), (tensor, other, other.clone()), (tensor, 0, 1), (other, tensor, 0.5))
    yield from ((3,), ((3, 2),), (1, 5, 4))


@functools.cache
def _examples():
    """Arguments, and keywords, for what needs its own."""
    matrix, vector, _, batch, image, index, numbers, mask, _ = _tensors()
    volume, line, signal = _rand(1, 2, 4, 4, 4), _rand(1, 2, 4), _rand(64)
    window = {"n_fft": 16, "window": torch.hann_window(16), "return_complex": True}
    spectrum = torch.stft(signal, **window)
    positive = matrix @ matrix.T + torch.eye(4)
    return {
        "addbmm": (matrix, batch, batch),
        "addmv": (vector, matrix, vector),
        "addr": (matrix, vector, vector),
        "affine_grid": (_rand(1, 2, 3), (1, 2, 4, 4)),
        "batch_norm": (matrix, vector, vector + 1),
        "bincount": (numbers,),
        "can_cast": (torch.float32, torch.float64),
        "cholesky": (positive,),
        "conv3d": (volume, _rand(2, 2, 1, 1, 1)),
        "conv_tbc": (_rand(4, 1, 2), _rand(3, 2, 2), _rand(2)),
        "conv_transpose1d": (line, _rand(2, 2, 1)),
        "conv_transpose2d": (image, _rand(2, 2, 1, 1)),
        "conv_transpose3d": (volume, _rand(2, 2, 1, 1, 1)),
        "cosine_embedding_loss": (matrix, matrix + 1, torch.ones(4)),
        "cross": (_rand(4, 3), _rand(4, 3)),
        "diagonal_scatter": (matrix, vector),
        "einops.einsum": (matrix, "a b -> b a"),
        "einops.pack": ([matrix, batch[0]], "* b"),
        "einops.parse_shape": (matrix, "a b"),
        "einops.rearrange": (matrix, "a (b c) -> b a c", {"b": 2}),
        "einops.reduce": (matrix, "a b -> a", "mean"),
        "einops.repeat": (matrix, "a b -> a b c", {"c": 2}),
        "einops.unpack": (matrix, [(1,), (3,)], "a *"),
        "einsum": ("ij->ji", matrix),
        "float_power": (matrix.double(), 2),
        "fold": (_rand(1, 8, 9), (4, 4), (2, 2)),
        "full": ((2,), 1.0),
        "gather": (matrix, 0, index),
        "grid_sample": (image, _rand(1, 4, 4, 2)),
        "householder_product": (matrix, vector),
        "index_add": (matrix, 0, numbers, matrix + 1),
        "index_copy": (matrix, 0, numbers, matrix + 1),
        "index_fill": (matrix, 0, numbers, 1.0),
        "index_put": (matrix, (numbers,), vector),
        "index_reduce": (matrix, 0, numbers, matrix + 1, "prod"),
        "index_select": (matrix, 0, numbers),
        "istft": (spectrum, {**window, "return_complex": False}),
        "layer_norm": (matrix, (4,)),
        "lp_pool1d": (line, 2.0, 2),
        "lp_pool2d": (image, 2.0, 2),
        "lp_pool3d": (volume, 2.0, 2),
        "masked_fill": (matrix, mask, 0.0),
        "multi_dot": ([matrix, matrix + 1],),
        "multi_margin_loss": (matrix, numbers),
        "multilabel_margin_loss": (matrix, index),
        "mv": (matrix, vector),
        "narrow": (matrix, 0, 1, 2),
        "new_full": (matrix, (2,), 1.0),
        "nll_loss": (matrix, numbers),
        "nonzero_static": (matrix, {"size": 3}),
        "orgqr": (matrix, vector),
        "ormqr": (matrix, vector, matrix + 1),
        "polygamma": (1, matrix),
        "promote_types": (torch.float32, torch.float64),
        "randint": (5, (3,)),
        "renorm": (matrix, 2, 0, 1.0),
        "rms_norm": (matrix, (4,)),
        "scatter": (matrix, 0, index, matrix + 1),
        "scatter_add": (matrix, 0, index, matrix + 1),
        "scatter_reduce": (matrix, 0, index, matrix + 1, "sum"),
        "select_scatter": (matrix, vector, 0, 0),
        "solve_triangular": (matrix.triu(), matrix, {"upper": True}),
        "split_with_sizes": (matrix, [1, 3]),
        "stft": (signal, window),
        "Tensor.type": (matrix, torch.float32),
        "Tensor.unfold": (vector, 0, 2, 1),
        "tril_indices": (3, 3),
        "triu_indices": (3, 3),
        "unflatten": (matrix, 1, (2, 2)),
        "view_as_complex": (_rand(4, 2),),
    }


def _calls(op):
    """Positional and keyword arguments to try, on tensors of their own."""
    name = op.rpartition(".")[2].rstrip("_")
    own = _examples().get(op) or _examples().get(name)
    seed = {"generator": constant(Seed(1), CPU)} if op in RANDOM else {}
    for given in ([own] if own else []) + list(_generic()):
        kwargs = given[-1] if isinstance(given[-1], dict) else {}
        args = given[: len(given) - bool(kwargs)]
        if len(args) <= MOST_POSITIONAL.get(op, len(args)):
            yield _map(_framed, args), {**_map(_framed, kwargs), **seed}


def _map(function, value):
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value)(_map(function, item) for item in value)
    return {key: _map(function, item) for key, item in value.items()} if isinstance(value, dict) else value


def _flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in _flat(item)] if isinstance(value, list | tuple) else []


def _whole(tensor):
    """All the memory that a framed tensor lies in, as it is now, and how it is seen."""
    bytes_ = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).clone()
    return bytes_, tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad, tensor._version


def _same(a, b):
    return torch.equal(a[0], b[0]) and a[1:] == b[1:]


def _process():
    """What an operation must leave alone in its process."""
    return (
        bytes(torch.get_rng_state().numpy()),
        random.getstate(),
        np.random.get_state()[1].tobytes(),  # noqa: NPY002 - the state that nobody may draw from
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    )


class _Outcome(NamedTuple):
    """What running an operation on all arguments that it takes has shown."""

    runs: int
    wrote: list[str]
    shares: bool
    fields: set[str]


@functools.cache
def _outcome(op):
    process, runs, wrote, shares, fields = _process(), 0, [], False, set()
    for args, kwargs in _calls(op):
        given = _flat((args, kwargs))
        before = [_whole(tensor) for tensor in given]
        try:
            result = carry_out(op, args, kwargs, CPU)
        except Exception:  # noqa: BLE001 - not every operation takes these
            result = None
        else:
            runs += 1
        changed = [index for index, was in enumerate(before) if not _same(was, _whole(given[index]))]
        if changed == [0] and op in IN_PLACE and _only_elements(before[0], _whole(given[0])):
            changed = []
        wrote += [f"argument {index} of {given}" for index in changed]
        shares = shares or bool(memory_of(_flat(result)) & memory_of(given))
        if type(result).__module__ == "torch.return_types":
            fields |= {name for name in dir(result) if not name.startswith(("_", "n_")) and not hasattr(tuple, name)}
    return _Outcome(runs, wrote + ["the process"] * (_process() != process), shares, fields)


def _only_elements(was, now):
    """Whether the elements of a framed tensor changed and nothing else."""
    margin = _MARGIN * now[3].itemsize
    ends = torch.equal(now[0][:margin], was[0][:margin]) and torch.equal(now[0][-margin:], was[0][-margin:])
    return ends and now[1:4] == was[1:4]


@pytest.mark.filterwarnings("ignore")  # operations warn of odd arguments
@pytest.mark.parametrize("space", SPACES)
def test_operation_writes_only_its_result(space):
    """No argument changes but the first of a change in place, nothing beside it, and nothing in the process."""
    outcomes = {op: _outcome(op) for op in SPACES[space]}
    assert [op for op in outcomes if not outcomes[op].runs] == []  # none of these arguments suit it: add an example
    assert {op: outcomes[op].wrote for op in outcomes if outcomes[op].wrote} == {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("space", SPACES)
def test_result_shares_memory_only_where_the_list_says_so(space):
    """An operation that is not on the list of views gives memory of its own."""
    assert [op for op in SPACES[space] if op not in VIEWS | IN_PLACE and _outcome(op).shares] == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("space", SPACES)
def test_fields_of_named_tuples_are_listed(space):
    """The fields that the list has for an operation are those of what it returns, none for one that returns no named tuple."""
    fields = {op: _outcome(op).fields for op in SPACES[space] if _outcome(op).fields or op in FIELDS_OF}
    assert {op: set(FIELDS_OF.get(op, ())) for op in fields} == fields


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", sorted(RANDOM))
def test_same_seed_gives_the_same_numbers(op):
    """A random operation draws from its seed, and from nothing else."""
    for (args, kwargs), (again, same) in zip(_calls(op), _calls(op), strict=True):
        try:
            first = carry_out(op, args, kwargs, CPU)
        except Exception:  # noqa: BLE001 - not every operation takes these
            continue
        torch.rand(7)
        assert torch.equal(first, carry_out(op, again, same, CPU))


@pytest.mark.parametrize("name", ["cuda", "cuda:3", "meta", 0])
@pytest.mark.parametrize(
    ("op", "by_keyword"),
    [("Tensor.to", False), ("Tensor.to", True), ("Tensor.cuda", False), ("torch.zeros_like", True)],
)
def test_every_device_but_the_cpu_means_the_model_s(op, by_keyword, name):
    """A device that is named by a string or a number is the model's own, here that of a model without memory."""
    own, x = torch.device("meta"), torch.ones(2)
    args, kwargs = ((x,), {"device": name}) if by_keyword else ((x, name), {})
    assert carry_out(op, args, kwargs, own).device == own


def test_cpu_means_the_cpu():
    """The CPU, as a string or a constant, stays the CPU whatever device the model is on."""
    own = torch.device("meta")
    assert carry_out("Tensor.to", (torch.ones(2), "cpu"), {}, own).device == CPU
    assert carry_out("torch.zeros", (2,), {"device": constant(Device("cpu"), own)}, own).device == CPU


@pytest.mark.parametrize("op", sorted(FACTORIES))
def test_new_tensors_are_made_on_the_model_s_device(op):
    """Where no device is named, numbers become a tensor beside the model's values, so that one can compute with both."""
    own = torch.device("meta")
    sizes = {"torch.full": ((2,), 1), "torch.linspace": (0, 1, 4), "torch.logspace": (0, 1, 4)}
    sizes |= {op: ([1, 2],) for op in ("torch.tensor", "torch.as_tensor")}
    sizes |= dict.fromkeys(("torch.tril_indices", "torch.triu_indices"), (3, 3))
    args = sizes.get(op, (4,))
    assert carry_out(op, args, {}, own).device == own
    assert carry_out(op, args, {"device": "cpu"}, own).device == CPU


def test_copies_of_tensors_stay_where_they_are():
    """``torch.tensor`` and ``torch.as_tensor`` of a tensor are on its device, as in torch."""
    own = torch.device("meta")
    assert carry_out("torch.as_tensor", (torch.ones(2),), {}, own).device == CPU


def test_random_tensors_are_made_on_the_model_s_device():
    """A seed says nothing of a device: what is drawn lies where the model is, or where it is asked for."""
    own = torch.device("meta")
    assert carry_out("torch.randn", (2,), {"generator": constant(Seed(1), own)}, own).device == own
    here = {"generator": constant(Seed(1), own), "device": "cpu"}
    assert torch.equal(
        carry_out("torch.randn", (2,), here, own), torch.randn(2, generator=torch.Generator().manual_seed(1))
    )


HUGE = {
    "power": ("operator.pow", 9, 9**9),
    "power in place": ("operator.ipow", 9, 9**9),
    "product": ("operator.mul", 2**62, 2**62),
    "shift": ("operator.lshift", 1, 10**12),
    "sum": ("operator.add", 2**63 - 1, 1),
    "long text": ("operator.mul", "a", 10**10),
    "long text, reflected": ("operator.mul", 10**10, "a"),
    "two long texts": ("operator.add", "a" * 60_000, "a" * 60_000),
    "wide format": ("operator.mod", "%1000000000d", 1),
    "long list": ("operator.mul", [0], 10**10),
    "long tuple": ("operator.mul", torch.Size([1]), 10**10),
    "list in place": ("operator.imul", [0], 10**10),
    "two long lists": ("operator.iadd", [0] * 600_000, [0] * 600_000),
}


@pytest.mark.parametrize(("op", "a", "b"), HUGE.values(), ids=HUGE.keys())
def test_huge_results_of_plain_python_are_refused(op, a, b):
    """Numbers, text and lists beyond their limits are an error, at once, and not computed."""
    with pytest.raises((OverflowError, ValueError, TypeError)):
        carry_out(op, (a, b), {}, CPU)


PLAIN = {
    "shapes": ("operator.add", torch.Size([2, 3]), (4,), (2, 3, 4)),
    "power": ("operator.pow", 2, 40, 2**40),
    "negative power": ("operator.pow", 2, -1, 0.5),
    "power of one": ("operator.pow", -1, 10**9, 1),
    "fractions": ("operator.pow", 9.0, 0.5, 3.0),
    "lists": ("operator.mul", [1, 2], 2, [1, 2, 1, 2]),
    "remainder": ("operator.mod", 7, 4, 3),
    "shift": ("operator.lshift", 1, 5, 32),
}


@pytest.mark.parametrize(("op", "a", "b", "expected"), PLAIN.values(), ids=PLAIN.keys())
def test_plain_python_is_computed(op, a, b, expected):
    """Operators on numbers, shapes and lists give what Python gives."""
    assert carry_out(op, (a, b), {}, CPU) == expected


def test_elements_of_lists_and_dicts_are_set():
    """Setting an element works on tensors, lists and dicts, and gives the container."""
    assert carry_out("operator.setitem", ([1, 2], 1, 3), {}, CPU) == [1, 3]
    assert carry_out("operator.setitem", ({"a": 1}, "b", 2), {}, CPU) == {"a": 1, "b": 2}
    assert carry_out("operator.setitem", (torch.zeros(2), 0, 1.0), {}, CPU).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    "args", [((1, 2), 0, 1), ([1], slice(0, 0), [1]), ({}, 3, 1), ("text", 0, "b"), (torch.nn.Linear(1, 1), "bias", 0)]
)
def test_elements_of_nothing_else_are_set(args):
    """Tuples, slices of lists, keys that are no text, and any other object are refused as a wrong type."""
    with pytest.raises(TypeError):
        carry_out("operator.setitem", args, {}, CPU)


@pytest.mark.parametrize("name", ["data", "grad_fn", "__class__", "storage", "anything"])
def test_attribute_that_is_not_listed_says_why(name):
    """Of a tensor only listed attributes can be had; the message names the attribute and the ones there are."""
    with pytest.raises(AttributeError, match=rf"no '{name}' here.*shape"):
        carry_out("attribute", (torch.ones(1), name), {}, CPU)


def test_attributes_of_other_objects_cannot_be_had():
    """A module, a function, a string: none of their attributes is reachable."""
    for value, name in ((torch.nn.Linear(1, 1), "weight"), (print, "__self__"), ("text", "format"), ([], "append")):
        with pytest.raises(AttributeError):
            carry_out("attribute", (value, name), {}, CPU)


def test_method_of_something_else_is_refused():
    """A tensor's method on what is no tensor is not looked up there."""
    with pytest.raises(TypeError, match="method of tensors"):
        carry_out("Tensor.view", ("text", 1), {}, CPU)


@pytest.mark.parametrize("kind", ["torch.cuda.FloatTensor", torch.FloatTensor, None])
def test_type_takes_a_dtype_only(kind):
    """Names of classes are no types."""
    with pytest.raises(TypeError, match="dtype"):
        carry_out("Tensor.type", (torch.ones(1), kind), {}, CPU)


def test_function_as_a_reduction_is_refused():
    """Einops calls a function that it is given; here it is not given one."""
    with pytest.raises(TypeError, match="name such as"):
        carry_out("einops.reduce", (torch.ones(2, 2), "a b -> a", torch.var), {}, CPU)


@pytest.mark.parametrize("op", ["torch.load", "builtins.eval", "os.system", "save", "local.apply", "Tensor.data_ptr"])
def test_what_is_not_listed_is_never_looked_up(op):
    """The name of anything else leads nowhere."""
    with pytest.raises(KeyError):
        function_of(op)
