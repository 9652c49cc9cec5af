"""The list of allowed operations against the torch that is installed: everything there is allowed, or left out for a reason."""

import operator
import types

import einops
import pytest
import torch

from nnsight_hpc.graph import build
from nnsight_hpc.graph.denied import BY_REASON, DENIED, reason_against
from nnsight_hpc.graph.nodes import Seed
from nnsight_hpc.graph.operations import (
    ALLOWED,
    ATTRIBUTES,
    DTYPES,
    FACTS,
    IN_PLACE,
    LOCAL_ONLY,
    PROTOCOL,
    RANDOM,
    VIEWS,
    random_without_seed,
    why_no_attribute,
    why_refused,
)

SPACES = {
    "torch": torch,
    "Tensor": torch.Tensor,
    "torch.nn.functional": torch.nn.functional,
    "torch.linalg": torch.linalg,
    "torch.fft": torch.fft,
    "torch.special": torch.special,
    "operator": operator,
    "einops": einops,
}


def _is_submodule(space, name):
    """Whether a name is a module that some other import brought, and so is no operation."""
    return name not in DENIED and isinstance(getattr(SPACES[space], name), types.ModuleType)


OF_TORCH = [
    f"{space}.{name}"
    for space in list(SPACES)[:6]
    for name in dir(SPACES[space])
    if name[0] != "_" and not _is_submodule(space, name)
]
PROPERTIES = [name for name in dir(torch.Tensor) if name[0] != "_" and not callable(getattr(torch.Tensor, name))]


def test_every_name_of_torch_is_allowed_or_denied_for_a_reason():
    """A name that torch brings with a new version fails here until operations.py allows it, or denied.py says why not."""
    left_out = [op for op in OF_TORCH if op not in ALLOWED and op.removeprefix("Tensor.") not in ATTRIBUTES]
    assert [op for op in left_out if not reason_against(op)] == []
    said = {op: f"is not an allowed operation: it {reason_against(op)}" for op in left_out}
    assert {op: why_refused(op) for op in left_out} == said


def test_every_attribute_of_a_tensor_is_allowed_or_denied_for_a_reason():
    """The same for what a tensor has besides methods."""
    said = {name: why_no_attribute(name) for name in PROPERTIES if name not in ATTRIBUTES}
    assert said == {name: f"it {DENIED.get(name)}" for name in said}


def _meant(op):
    space, _, name = op.rpartition(".")
    return getattr(SPACES[space], name)


def test_every_allowed_name_is_a_function():
    """What is allowed exists in the installed version, and is something to call."""
    found = {op: _meant(op) for op in ALLOWED - PROTOCOL}
    wrong = {op: f for op, f in found.items() if not callable(f) or isinstance(f, type | types.ModuleType)}
    assert wrong == {}


def test_no_denied_name_is_superfluous():
    """The denied list names nothing that torch does not have, or that is allowed wherever it is."""
    left_out = {op.rpartition(".")[2] for op in OF_TORCH if op not in ALLOWED}
    assert sorted(DENIED.keys() - left_out) == []


def test_protocol_has_every_operation_that_build_names():
    """Each name of an operation in `build` is of the protocol, and may run anywhere but the ones that are local."""
    named = {value for name, value in vars(build).items() if name.isupper() and isinstance(value, str)}
    named |= {*build.READS.values(), *build.SETS.values(), "attribute"}
    assert named == PROTOCOL
    assert {op for op in named if why_refused(op)} == LOCAL_ONLY == {"local.apply"}
    assert why_refused("local.apply") == "is a Python function: it runs locally only"


def test_kinds_of_operations_are_allowed_ones():
    """The lists of views, changes in place and random operations name allowed operations only."""
    assert VIEWS <= ALLOWED
    assert IN_PLACE <= ALLOWED
    assert RANDOM <= ALLOWED
    assert not IN_PLACE & VIEWS
    assert FACTS < ATTRIBUTES


def test_methods_with_a_trailing_underscore_change_in_place():
    """Torch's own sign of a change in place, and Python's augmented assignments, are all on that list."""
    augmented = {
        f"operator.{name}" for name in dir(operator) if name.startswith("i") and f"__{name}__" in dir(operator)
    }
    plain = {"operator.invert", "operator.index", "operator.is_", "operator.inv"}
    by_name = {op for op in ALLOWED if op.endswith("_") and op.startswith("Tensor.")}
    assert by_name | (augmented & ALLOWED) - plain | {"operator.setitem", "container.append"} == IN_PLACE


def test_what_takes_a_generator_is_random():
    """An operation that torch documents with a generator is on the list of those that need a seed."""
    of_torch = [op for op in ALLOWED - PROTOCOL if op.startswith(("torch.", "Tensor."))]
    signatures = {op: (_meant(op).__doc__ or "").strip().partition("\n")[0] for op in of_torch}
    assert {op for op, signature in signatures.items() if "generator=" in signature} <= RANDOM


@pytest.mark.parametrize("op", sorted(RANDOM))
def test_random_operation_needs_a_seed(op):
    """Without a seed, with something else as a generator, or with none: refused; with one: fine."""
    assert "needs generator=" in random_without_seed(op, {})
    assert "needs generator=" in random_without_seed(op, {"generator": None})
    assert "needs generator=" in random_without_seed(op, {"generator": 7})
    assert random_without_seed(op, {"generator": Seed(7)}) == ""


def test_generator_belongs_to_random_operations():
    """An operation that draws nothing takes no generator."""
    assert "draws no random numbers" in random_without_seed("torch.add", {"generator": Seed(7)})
    assert random_without_seed("torch.add", {}) == ""


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_dtypes_are_torch_s(name):
    """Every dtype on the list is one."""
    assert isinstance(getattr(torch, name), torch.dtype)


def test_no_name_is_denied_for_two_reasons():
    """Each denied name has one reason."""
    names = [name for text in BY_REASON.values() for name in text.split()]
    assert [name for name in names if names.count(name) > 1] == []
