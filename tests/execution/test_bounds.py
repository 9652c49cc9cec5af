"""Indices and probabilities are refused where torch refuses them on the CPU, and only there."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnsight_hpc.execution.bounds import check_ids, check_indices, may_be_wrong
from nnsight_hpc.execution.resolve import carry_out, function_of
from nnsight_hpc.graph import Ref
from nnsight_hpc.graph.nodes import Node, Seed

CPU = torch.device("cpu")
ROWS, COLUMNS = 3, 4
numbers = st.integers(-COLUMNS - 2, COLUMNS + 2)
lists = st.lists(numbers, min_size=1, max_size=3)


def _x():
    return torch.arange(1.0, ROWS * COLUMNS + 1).reshape(ROWS, COLUMNS)


def _refused(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except (IndexError, RuntimeError):
        return True
    return False


def _agree(op, args, kwargs=None):
    """Whether the check refuses exactly what the operation itself refuses on the CPU."""
    kwargs = kwargs or {}
    checked = _refused(check_indices, op, args, kwargs)
    return checked == _refused(carry_out, op, args, kwargs, CPU)


@settings(deadline=None)
@given(lists, st.sampled_from(["list", "tensor", "pair", "last", "behind a mask", "behind None"]))
def test_subscripts(index, form):
    """Lists and tensors of numbers in any place of a subscript."""
    as_tensor = torch.tensor(index)
    subscript = {
        "list": (slice(None), index),
        "tensor": as_tensor,
        "pair": (as_tensor, as_tensor.flip(0)),
        "last": (..., index),
        "behind a mask": (torch.tensor([True, False, False]), as_tensor),
        "behind None": (None, index),
    }[form]
    assert _agree("operator.getitem", (_x(), subscript))
    assert _agree("operator.setitem", (_x(), subscript, 0.0))


ALONG = ["gather", "scatter", "scatter_add", "index_select", "index_add", "index_copy", "index_fill"]


@settings(deadline=None)
@given(lists, st.sampled_from(ALONG), st.integers(-2, 1))
def test_indices_along_a_dimension(index, name, dim):
    """Operations that take a dimension and an index for it."""
    values = torch.tensor(index)
    x = _x().T.contiguous() if dim % 2 == 0 else _x()  # the other dimension has three
    if name in ("gather", "scatter", "scatter_add"):
        values = values.reshape((1, -1) if dim % 2 else (-1, 1))
    more = {
        "scatter": (0.0,),
        "scatter_add": (torch.ones(values.shape),),
        "index_add": (torch.ones((ROWS, len(index)) if dim % 2 else (len(index), ROWS)),),
        "index_fill": (0.0,),
    }
    more["index_copy"] = more["index_add"]
    assert _agree(f"torch.{name}", (x, dim, values, *more.get(name, ())))


@settings(deadline=None)
@given(st.lists(st.integers(-14, 14), min_size=1, max_size=3))
def test_indices_of_a_flat_tensor(index):
    """``take``, ``put`` and ``take_along_dim`` without a dimension."""
    values = torch.tensor(index)
    assert _agree("torch.take", (_x(), values))
    assert _agree("torch.put", (_x(), values, torch.ones(len(index))))
    assert _agree("torch.take_along_dim", (_x(), values))
    assert _agree("torch.take_along_dim", (_x(), values.reshape(1, -1), 1))


@settings(deadline=None)
@given(st.lists(st.sampled_from([-100, -2, -1, 0, 1, 3, 4, 9]), min_size=ROWS, max_size=ROWS))
def test_classes_and_rows(target):
    """Losses over classes, one-hot vectors and embeddings."""
    values = torch.tensor(target)
    for loss in ("cross_entropy", "nll_loss"):
        assert _agree(f"torch.nn.functional.{loss}", (_x(), values))
    assert _agree("torch.nn.functional.cross_entropy", (_x(), values), {"ignore_index": 9})
    assert _agree("torch.nn.functional.one_hot", (values,), {"num_classes": COLUMNS})
    assert _agree("torch.nn.functional.embedding", (values, _x()))


@settings(deadline=None)
@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0, float("nan"), float("inf")]), min_size=2, max_size=4))
def test_probabilities(values):
    """What a distribution cannot be."""
    given = torch.tensor(values)
    seed = torch.Generator().manual_seed(0)
    assert _agree("torch.bernoulli", (given,), {"generator": seed})
    if given.isfinite().all() and not (given > 0).any():
        return  # all are zero or negative: the CPU's own words differ
    checked = _refused(check_indices, "torch.multinomial", (given, 1), {"generator": seed})
    assert checked == _refused(function_of("torch.multinomial"), given, 1, generator=seed)


@settings(deadline=None)
@given(st.lists(st.integers(-1, 3), min_size=COLUMNS, max_size=COLUMNS), st.integers(0, 13))
def test_counts(repeats, source):
    """Repetitions cannot be negative, and a mask cannot take more than there is."""
    assert _agree("torch.repeat_interleave", (_x()[0], torch.tensor(repeats)))
    mask = torch.tensor(repeats) > 0
    assert _agree("torch.masked_scatter", (_x(), mask, torch.ones(source)))


def test_ids_that_an_embedding_does_not_have():
    """The hook says how many rows there are; what is in bounds passes."""
    embedding = torch.nn.Embedding(5, 2)
    embedding.register_forward_pre_hook(check_ids)
    assert embedding(torch.tensor([0, 4])).shape == (2, 2)
    assert embedding(torch.zeros(0, dtype=torch.int64)).shape == (0, 2)
    for wrong in (-1, 5):
        with pytest.raises(IndexError, match=f"index {wrong} is out of range: the embedding has 5 rows"):
            embedding(torch.tensor([0, wrong]))


@pytest.mark.parametrize(
    ("op", "args", "expected"),
    [
        ("operator.getitem", (Ref(0), (slice(None), -1)), False),
        ("operator.getitem", (Ref(0), (slice(None), [1, 2])), True),
        ("operator.getitem", (Ref(0), Ref(1)), True),
        ("operator.setitem", (Ref(0), (..., 3), Ref(1)), False),
        ("torch.gather", (Ref(0), 1, Ref(1)), True),
        ("torch.bernoulli", (Ref(0),), True),
        ("torch.sin", (Ref(0),), False),
    ],
)
def test_which_nodes_are_looked_at(op, args, expected):
    """Those with an index that is a list or a value; a slice or a number torch itself looks at before any kernel."""
    assert expected == may_be_wrong(Node(2, op, args, {"generator": Seed(1)} if op == "torch.bernoulli" else {}))
