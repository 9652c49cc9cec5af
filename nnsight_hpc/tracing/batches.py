"""The rows of one forward: invokes whose inputs have the same form are given to the model together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nnsight_hpc.graph.nodes import leaves, map_leaves
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nnsight_hpc.tracing.recorder import Recorder
    from nnsight_hpc.tracing.value import Value

Part = tuple[tuple[Any, ...], dict[str, Any]]
_PLAIN = frozenset({type(None), bool, int, float, complex, str})


class Batch:
    """A forward node, and the inputs and rows that its invokes have given so far; further ones must have its `form`, if any.

    Attributes
    ----------
    parts
        The inputs, arguments and keywords, of each invoke.
    invokes
        Where the values of each are: the nodes that name their rows.
    nodes
        The forward and the edits of the model that were recorded for it.
    """

    def __init__(self, forward: Value, form: Any) -> None:
        self.forward, self.form, self.rows = forward, form, 0
        self.parts: list[Part] = []
        self.invokes: list[Value] = []
        self.nodes = range(0)

    def inputs(self, recorder: Recorder) -> Part:
        """All that was given, as arguments of one call; their tensors are constants of the recording from now on."""
        joined: Part = self.parts[0] if len(self.parts) == 1 else _joined(self.parts)
        for leaf in leaves(joined):
            if isinstance(leaf, torch.Tensor):
                recorder.adopt(leaf)
        return joined

    @property
    def steps(self) -> int | None:
        """At most so many tokens are generated."""
        steps: int | None = self.parts[0][1].get("max_new_tokens")
        return steps


def own(part: Part, given: Part, recorder: Recorder) -> Part:
    """Prepared inputs in which tensors that the researcher has given are as they are now; what was made of them is ours."""
    args, kwargs = part
    if any(type(value) in (list, tuple, dict) for value in (*args, *kwargs.values())):
        kept: Part = map_leaves(part, lambda leaf: recorder.kept(leaf) if isinstance(leaf, torch.Tensor) else leaf)
        return kept
    theirs = {id(value) for value in (*given[0], *given[1].values()) if isinstance(value, torch.Tensor)}
    if theirs.isdisjoint(map(id, (*args, *kwargs.values()))):
        return part
    new = {id(value): recorder.kept(value) for value in (*args, *kwargs.values()) if id(value) in theirs}
    return tuple(new.get(id(value), value) for value in args), {k: new.get(id(v), v) for k, v in kwargs.items()}


def merge(batches: Sequence[Batch], recorder: Recorder, padded: Callable[[Sequence[Part]], list[Part]]) -> Batch:
    """Give the first forward the inputs of all, `padded` to one form, in the order of the invokes; the others are left out.

    Raises `InvalidInput` for inputs that padding does not give one form.
    """
    first, *others = batches
    shares = [share for batch in batches for share in zip(batch.invokes, batch.parts, strict=True)]
    shares.sort(key=lambda share: share[0].node)
    first.parts, first.rows = padded([part for _, part in shares]), 0
    form = form_of(first.parts[0])[0]
    for (where, _), part in zip(shares, first.parts, strict=True):
        own_form, rows = form_of(part)
        if rows is None or own_form != form:
            raise InvalidInput("these inputs are no batch", why="they differ in more than the length of their prompts")
        start, first.rows = first.rows, first.rows + rows
        recorder.replace(where, (first.forward, start, first.rows), {})
    for other in others:
        recorder.leave_out(other.nodes)
    return first


def form_of(inputs: Any) -> tuple[Any, int | None]:
    """What inputs must have in common to be given to the model together (None: nothing will do), and how many rows they are.

    That is their nesting, everything in them that is no tensor, and of tensors all but the first dimension.
    """
    rows: set[int] = set()
    try:
        form = _form(inputs, rows)
    except TypeError:
        return None, None
    return (form, rows.pop()) if len(rows) == 1 else (None, None)


def holds_objects(value: Any) -> bool:
    """Whether something in a nested value is neither a tensor nor plain: an object that may keep what is done to it."""
    return any(type(leaf) not in _PLAIN and not isinstance(leaf, torch.Tensor) for leaf in leaves(value))


def _form(value: Any, rows: set[int]) -> Any:
    """The form of a nested value; the first dimensions of its tensors are added to `rows`."""
    kind = type(value)
    if kind in _PLAIN:
        return kind, value
    if isinstance(value, torch.Tensor) and value.ndim:
        first, *others = value.shape
        rows.add(first)
        return "tensor", others, value.dtype, value.device
    if kind is list or kind is tuple:
        return kind, [_form(item, rows) for item in value]
    if isinstance(value, dict):
        return dict, [(key, _form(item, rows)) for key, item in value.items()]
    raise TypeError("whether two of these are equal is not known")


def _joined(parts: Sequence[Any]) -> Any:
    """Values of one form as one of that form, their tensors joined along the first dimension."""
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(parts)
    if isinstance(first, list | tuple):
        return type(first)([_joined(items) for items in zip(*parts, strict=True)])
    if isinstance(first, dict):
        return {key: _joined([part[key] for part in parts]) for key in first}
    return first
