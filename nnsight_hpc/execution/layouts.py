"""Where in the values of a model its batch lies, learnt from one run on fake tensors with a batch of an unusual size.

A size says nothing by itself: a table of positions, a router's experts or a square matrix may be as long as the batch by
chance. The number of prompts in the fake run is a prime that no size of the model is a multiple of, so a dimension that is
one is the batch's. Fake tensors have no memory, however large the batch is. What is computed from the inputs is followed,
too: what has no dimension of the batch is the same for all prompts only if it does not depend on them; a sum over all
prompts belongs to none of them.

What is learnt is kept by the form of the call, without the sizes of batch and prompts, as long as the model stays as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from nnsight_hpc.execution.fake_memory import storage_of
from nnsight_hpc.execution.fake_model import STEPS, Call
from nnsight_hpc.execution.fake_tensors import UNKNOWN, objects_of
from nnsight_hpc.execution.rows import Common, Mask, Mixed, Part, Rule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from nnsight_hpc.execution.fake_model import Place, Recording, Twin
    from nnsight_hpc.graph.points import Point

Rules = tuple[Rule | None, ...]
"""What is known of each leaf of a nested value; None: nothing."""
_PRIMES = (1009, 1013, 1019, 1021, 1031, 1033, 1039, 1049)
_PLAIN = (torch.Tensor, torch.dtype, torch.device)
_SORTED = Mixed("inside of experts tokens are in the order of the experts")


class Layouts:
    """Of one model and form of call, where the batch lies in the value of each place."""

    def __init__(self, recording: Recording, rules: Mapping[Place, Rules], result: Rules) -> None:
        self._calls, self._rules, self._result = recording.calls, rules, result

    def at(self, point: Point) -> Rules | None:
        """The rules for the leaves of what stands at a point; None where the fake run did not come."""
        if point.kind == "result":
            return self._result
        place = point.module, "output" if point.kind in ("output", "skip") else "inputs", self._call(point)
        rules = self._rules.get(place)
        return rules[:1] if rules and point.kind == "input" else rules

    def _call(self, point: Point) -> int:
        """The call of the fake run that stands for one of the real run: later steps of a generation are as its last."""
        calls, steps = self._calls[point.module], self._calls[""]
        each = calls // steps
        if point.call < calls or not each:
            return point.call
        return (steps - 1) * each + point.call % each


class RowByRow:
    """The layouts of a model of plain layers one after the other, which keep all dimensions but the last."""

    def at(self, _point: Point) -> Rules:
        return (Part(0, tokens=False),)


_KEEP_ROWS = frozenset(
    {nn.Linear, nn.Embedding, nn.Identity, nn.Dropout, nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid}
)


def _keeps_rows(module: nn.Module) -> bool:
    """Whether a module is made of torch's own layers that treat each row alone; then nothing has to be learnt of it."""
    if type(module) is nn.LayerNorm:
        return len(module.normalized_shape) == 1
    return type(module) in _KEEP_ROWS or (type(module) is nn.Sequential and all(map(_keeps_rows, module.children())))


class _Followed:
    """The memory of what was computed from the inputs of a fake run."""

    def __init__(self, inputs: Any) -> None:
        self._memory = set(map(storage_of, _tensors(inputs)))

    def __call__(self, used: Iterable[torch.Tensor], made: Iterable[torch.Tensor]) -> None:
        """Take note of an operation that made some tensors of others."""
        read, written = set(map(storage_of, used)), set(map(storage_of, made))
        if read & self._memory:
            self._memory |= written
        else:
            self._memory -= written - read  # new memory at an address that was in use before

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return storage_of(tensor) in self._memory


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


class _Learnt:
    """What is learnt of a model by the form of the call, and the modules that it was learnt of."""

    def __init__(self, module: nn.Module) -> None:
        self._parts = [ref(part) for part in module.modules()]  # walking a model takes a millisecond
        self._children = self._now()
        self.layouts: dict[Any, Layouts | None] = {}
        self.row_by_row = RowByRow() if _keeps_rows(module) else None

    def holds(self) -> bool:
        """Whether the model has the same modules still."""
        return self._now() == self._children

    def _now(self) -> list[int | None]:
        """The identities of all modules that others hold; one that is gone leaves None."""
        parts = (part() for part in self._parts)
        return [n for part in parts for n in ([None] if part is None else map(id, part._modules.values()))]  # noqa: SLF001


_learnt: WeakKeyDictionary[nn.Module, _Learnt] = WeakKeyDictionary()


def layouts_of(
    module: nn.Module, call: Call, operations: frozenset[str], twin: Callable[[], Twin]
) -> Layouts | RowByRow | None:
    """The layouts of such a call of a model; None where the model does not run on fakes, or is given an object of a person's.

    Parameters
    ----------
    operations
        Operations inside of forwards that are looked at, too: ``path.of.module:operation``.
    twin
        Gives the model without its weights, where something has to be learnt.
    """
    if any(not isinstance(leaf, _PLAIN) for leaf in objects_of((call.args, call.kwargs))):
        return None
    known = _learnt.get(module)
    if known is None or not known.holds():
        known = _learnt[module] = _Learnt(module)
    if known.row_by_row:
        return known.row_by_row
    batch, tokens = shown(call.args, call.kwargs)
    key = operations, _form(call, batch, tokens)
    if key not in known.layouts:
        known.layouts[key] = _learn(twin(), call, batch, operations)
    return known.layouts[key]


def _form(call: Call, batch: int, tokens: int | None) -> Any:
    """What calls have in common of which one is learnt from the other."""

    def sizes(tensor: torch.Tensor) -> Any:
        names = {tokens: "tokens"} if tokens and tokens > 1 else {}
        first = ["batch" if size == batch else size for size in tensor.shape[:1]]
        return *first, *(names.get(size, size) for size in tensor.shape[1:]), tensor.dtype

    values = tree_map_only(torch.Tensor, sizes, (call.args, call.kwargs))
    return call.generate, repr(values)


def _learn(twin: Twin, call: Call, batch: int, operations: frozenset[str]) -> Layouts | None:
    """Run the model on fakes, with another batch."""
    given = call.args, {name: value for name, value in call.kwargs.items() if name != "seed"}
    prime = _prime(twin.module, given)

    def other(tensor: torch.Tensor) -> torch.Tensor:
        shape = (prime, *tensor.shape[1:]) if tensor.shape[:1] == (batch,) else tensor.shape
        return torch.empty(shape, dtype=tensor.dtype, device=twin.device)

    largest = twin.mode.largest
    with twin.active():
        args, kwargs = tree_map_only(torch.Tensor, other, given)
        if call.generate:
            kwargs["max_new_tokens"] = STEPS + 1
        followed = twin.mode.follow = _Followed((args, kwargs))
        try:
            recording = twin.rerun(Call(args, kwargs, call.generate), {}, operations)
            return _layouts(recording, prime, followed, twin.module) if recording.calls[""] else None
        except Exception:  # noqa: BLE001 - a model may ask for data, or not take another batch; then sizes have to do
            return None
        finally:
            twin.mode.follow, twin.mode.largest = None, largest


def _prime(module: nn.Module, given: Any) -> int:
    """A number of prompts that no other size is a multiple of."""
    sizes = {size for tensor in (*module.parameters(), *_tensors(given)) for size in tensor.shape}
    return next(prime for prime in _PRIMES if all(size % prime for size in sizes if size))


def _layouts(recording: Recording, prime: int, followed: _Followed, module: nn.Module) -> Layouts:
    steps = [shown(*inputs) for (path, kind, _), inputs in recording.points.items() if not path and kind == "inputs"]
    rules: dict[Place, Rules] = {}
    for place, value in recording.points.items():
        each = max(recording.calls[place[0]] // len(steps), 1)
        rows, tokens = steps[min(place[2] // each, len(steps) - 1)]
        rules[place] = tuple(_rule(leaf, prime, rows, tokens, followed) for leaf in tree_leaves(value))
    for path, part in module.named_modules():
        if hasattr(part, "_apply_gate"):  # transformers' experts, which may run in another way than their fakes
            inside = [place for place in rules if place[0].startswith((f"{path}.", f"{path}:"))]
            rules |= {place: (_SORTED,) * len(rules[place]) for place in inside}
    result = tuple(_rule(leaf, prime, *steps[0], followed) for leaf in tree_leaves(recording.result))
    return Layouts(recording, rules, result)


def shown(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int | None]:
    """How many rows a model is given, and how many tokens each (None: a row is a vector): of its token ids or first tensor."""
    named = [kwargs.get("input_ids"), *args, *kwargs.values()]
    tensor = next((value for value in named if isinstance(value, torch.Tensor) and value.ndim), None)
    if tensor is None:
        return 1, None
    tokens = tensor.ndim > 2 or (tensor.ndim == 2 and not tensor.is_floating_point())
    return len(tensor), tensor.shape[1] if tokens else None


def _rule(leaf: Any, prime: int, rows: int, tokens: int | None, followed: _Followed) -> Rule | None:
    if leaf is UNKNOWN:  # the one thing that a fake run does not show
        return Mask()
    if not isinstance(leaf, torch.Tensor):
        return None
    dims = [dim for dim, size in enumerate(leaf.shape) if size and size % prime == 0]
    if not dims:
        return Mixed("it is computed from all prompts together") if leaf in followed else Common()
    if len(dims) > 1:
        return Mixed("more than one of its dimensions has all prompts")
    size = leaf.shape[dims[0]]
    if size == rows or (tokens and size == rows * tokens):
        return Part(dims[0], tokens=size != rows)
    return Mixed(f"its dimension {dims[0]} has other entries than one for each prompt or token")
