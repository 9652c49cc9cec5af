"""Programs as text, run twice: as plain Python on real tensors, and recorded in a block."""

import itertools
import linecache
import textwrap
from contextlib import nullcontext

import torch
from torch import nn

from nnsight_hpc import NNsight
from nnsight_hpc.tracing.value import Value

torch.manual_seed(0)
MODEL = NNsight(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
INPUTS = torch.tensor([[1.0, -2.0, 3.0, 0.5], [0.25, 1.0, -1.0, 2.0]])
_numbers = itertools.count()

_FRAME = """
def run(context, point, keep):
    with context:
        h = point()
{body}
        out = keep({results})
    return out
"""


def function_of(body, results, extra=None):
    """The program as a function whose source can be found."""
    text = _FRAME.format(body=textwrap.indent(textwrap.dedent(body).strip(), " " * 8), results=results)
    return compiled(text, extra)["run"]


def compiled(text, extra=None):
    """The names that a module of this text defines."""
    file = f"<program {next(_numbers)}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    names = {"torch": torch, "__name__": "program", **(extra or {})}
    exec(compile(text, file, "exec"), names)
    return names


def keep(*items):
    return tuple([_kept(item) for item in items])


def _kept(item):
    if type(item) is Value:
        return item.save()
    return type(item)(map(_kept, item)) if isinstance(item, list | tuple) else item


def eager(body, results, scale=1.0, extra=None):
    """What plain Python makes of it."""
    hidden = MODEL.module(INPUTS * scale).detach()
    return function_of(body, results, extra)(nullcontext(), hidden.clone, lambda *items: items)


def recorded(body, results, scale=1.0, extra=None):
    """What the block makes of it, and the context."""
    trace = MODEL.trace(INPUTS * scale)
    return function_of(body, results, extra)(trace, lambda: MODEL[1].output, keep), trace


def same(one, other):
    """Whether two results are equal, tensors entry by entry, nan being nan; a tuple of the worker may be a list."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        one, other = torch.as_tensor(one), torch.as_tensor(other)
        return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())
    if isinstance(one, list | tuple):
        return isinstance(other, list | tuple) and len(one) == len(other) and all(map(same, one, other))
    return one == other


def check(body, results, scale=1.0, extra=None, make=None):
    """`make` gives the names of the program's module anew for each of the two runs."""
    expected = eager(body, results, scale, make() if make else extra)
    actual, _ = recorded(body, results, scale, make() if make else extra)
    assert same(expected, actual), (expected, actual)
