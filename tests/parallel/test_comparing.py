"""From what ranks see of a tensor to its layout, without ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnsight_hpc.parallel.comparing import Whole, compared, equal, merged, whole_of
from nnsight_hpc.parallel.layout import Either, Hidden, Layout, Same
from nnsight_hpc.parallel.observing import seen

PRIMES = (101, 103)


def made(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def learnt(whole: torch.Tensor | int | None, *ranks: torch.Tensor | int):
    return compared(whole_of(whole), [seen(one) for one in ranks], PRIMES)


@st.composite
def cuts(draw):
    """A whole tensor with one of its dimensions, and how that is cut."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    sizes, copies = draw(st.lists(st.integers(1, 3), min_size=2, max_size=4)), draw(st.integers(1, 3))
    dim = draw(st.integers(0, len(shape) - 1))
    shape[dim] = sum(sizes)
    return made(*shape), dim, sizes, copies


@given(cuts())
def test_a_cut_is_found(cut):
    """Whatever dimension is cut, into whatever sizes, with neighbouring copies or none: sizes by rank, from the end."""
    whole, dim, sizes, copies = cut
    ranks = [part for part in whole.split(sizes, dim) for _ in range(copies)]
    expected = Layout(dim - whole.ndim, tuple(size for size in sizes for _ in range(copies)), copies=copies)
    assert expected == learnt(whole, *ranks)


@pytest.mark.parametrize("value", [made(2, 3), made(0), torch.tensor(float("nan")), torch.tensor([1, 2]), 7, True])
def test_what_is_equal_is_whole(value):
    """A tensor or number that is as in the unsharded model, and the same on all ranks, is whole; not-a-number, too."""
    assert learnt(value, value, value) is None
    assert compared(None, [seen(value)] * 2, PRIMES) is None


def test_rounding_is_no_difference():
    """Ranks whose additions went in another order hold one tensor; those of which one element is another do not."""
    value = made(1000).double()
    assert equal([seen(value), seen(value * (1 + 1e-7))])
    other = value.clone()
    other[17] += 3.0
    assert not equal([seen(value), seen(other)])
    assert not equal([seen(value), seen(value.roll(1))])
    assert not equal([seen(value), None])
    assert equal([None, None])


@pytest.mark.parametrize(
    ("whole", "ranks", "why"),
    [
        (made(2, 4), (made(2, 4), made(2, 4, seed=1)), "a part of a sum"),
        (torch.tensor([1, 2]), (torch.tensor([1, 2]), torch.tensor([1, 3])), "a part of a sum"),
        (None, (made(2), made(2, seed=1)), "is not known"),
        (8, (4, 4), "a number"),
        (made(2, 4), (made(2, 4, 1),) * 2, "3 dimensions"),
        (made(4, 4), (made(2, 2),) * 2, "along 2 dimensions"),
        (made(6), (made(2), made(2)), "do not make up the whole"),
        (made(4), (made(2), made(2, seed=1)) * 2, "do not make up the whole"),
        (made(PRIMES[0] * 4), (made(PRIMES[0] * 2),) * 2, "prompts or tokens"),
    ],
)
def test_what_cannot_be_put_together_is_hidden(whole, ranks, why):
    """Parts of sums, numbers of a rank's own, and cuts that sizes do not explain are told apart from layouts."""
    found = learnt(whole, *ranks)
    assert isinstance(found, Hidden)
    assert why in found.why


def test_a_tensor_that_a_rank_does_not_have():
    """A leaf that one rank lacks is hidden."""
    assert compared(Whole((2,)), [seen(made(2)), None], PRIMES) == Hidden("not every rank has it")


KNOWN = (None, Same(2), Layout(-1, (2, 2)), Layout(-1, (4, 4)), Either((Layout(-1, (1, 1)), Layout(-1, (2, 2)))))


@pytest.mark.parametrize("one", KNOWN)
@pytest.mark.parametrize("other", KNOWN)
def test_two_calls(one, other):
    """What two calls say of a leaf is put together, in whichever order they come; contradictions are hidden."""
    found = merged(one, other)
    assert isinstance(merged(Hidden("why"), one), Hidden)
    if one == other:
        assert one == found
    elif {one, other} == {None, Same(2)}:
        assert Same(2) == found
    elif None in {one, other} or Same(2) in {one, other}:
        assert isinstance(found, Hidden)
    else:
        layouts = {layout for part in (one, other) for layout in getattr(part, "layouts", (part,))}
        assert layouts == set(found.layouts)
