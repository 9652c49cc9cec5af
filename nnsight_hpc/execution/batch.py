"""The batch of a forward while it runs: how many rows and tokens the model has, and where in its values they are."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from nnsight_hpc.execution.fake_model import Call, Twin, twin_of
from nnsight_hpc.execution.layouts import Layouts, RowByRow, layouts_of, shown
from nnsight_hpc.execution.rows import Part, Rows, Rule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from nnsight_hpc.graph.points import Point

_ROWS = Part(0, tokens=False)
_EACH = Part(0, tokens=None)


class Batch:
    """The batch of one forward or generation.

    Parameters
    ----------
    module, call
        The model, and what it is called with.
    operations
        The operations inside of forwards that are looked at: ``path.of.module:operation``.
    twin
        Gives the model without its weights, on which layouts are learnt when they are first needed.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        call: Call,
        operations: frozenset[str] = frozenset(),
        twin: Callable[[], Twin] | None = None,
    ) -> None:
        self._module, self._call, self._operations = module, call, operations
        self._twin = twin or (lambda: twin_of(module))
        self._given, self.tokens = shown(call.args, call.kwargs)
        self.rows = self._given

    @cached_property
    def layouts(self) -> Layouts | RowByRow | None:
        """Where the rows are at each point; to be asked for the first time while the model is as it always is."""
        return layouts_of(self._module, self._call, self._operations, self._twin)

    def look(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The model is called with these: in a generation with other tokens at each step, and perhaps with more rows."""
        self.rows, self.tokens = shown(args, kwargs)

    def part(self, start: int, stop: int, point: Point) -> Rows | None:
        """Some prompts' rows of what stands at a point; None where these are all.

        A beam search has several rows for each prompt, one after the other.
        """
        if stop > self._given:
            raise ValueError(f"the invoke has rows up to {stop}, and the batch has {self._given}")
        if stop - start == self._given:
            return None
        if self.rows % self._given:
            raise ValueError(f"the model runs on {self.rows} rows, which cannot be divided among {self._given} prompts")
        if point.kind == "result" and self._call.generate:
            return Rows(start, stop, self._given, None, lambda leaves: [_EACH] * len(leaves))
        each = self.rows // self._given
        return Rows(start * each, stop * each, self.rows, self.tokens, lambda leaves: self._rules(point, leaves))

    def _rules(self, point: Point, leaves: Sequence[Any]) -> Sequence[Rule | None]:
        """Where the rows are in each leaf of what stands at a point; None where only its size can tell."""
        if all(self._plain(leaf.shape) for leaf in leaves if isinstance(leaf, torch.Tensor)):
            return (_ROWS,) * len(leaves)
        rules = None if self.layouts is None else self.layouts.at(point)
        return rules if rules is not None and len(rules) == len(leaves) else (None,) * len(leaves)

    def _plain(self, shape: Sequence[int]) -> bool:
        """Whether a shape can be nothing but prompts, tokens, and as many numbers each as the model is wide, or words it has.

        Nothing in the model must be as long as the batch. What is learnt on fakes says the same of such shapes, and takes
        the time of some forwards.
        """
        widths, sizes = _sizes_of(self._module)
        return (
            len(shape) == 3
            and shape[0] == self.rows != shape[1]
            and shape[1] in (self.tokens, 1)
            and shape[2] in widths
            and self.rows not in sizes
        )


_known_sizes: WeakKeyDictionary[torch.nn.Module, tuple[frozenset[int], frozenset[int]]] = WeakKeyDictionary()


def _sizes_of(module: torch.nn.Module) -> tuple[frozenset[int], frozenset[int]]:
    """The width and the number of words of a language model, none of another model; and all numbers in its configuration."""
    if module not in _known_sizes:
        _known_sizes[module] = frozenset(_widths(module)), frozenset(_numbers(getattr(module, "config", None)))
    return _known_sizes[module]


def _widths(module: torch.nn.Module) -> Iterator[int]:
    for get in ("get_input_embeddings", "get_output_embeddings"):
        weight = getattr(getattr(module, get, lambda: None)(), "weight", None)
        yield from weight.shape if isinstance(weight, torch.Tensor) else ()


def _numbers(config: Any) -> Iterator[int]:
    for name, value in vars(config).items() if hasattr(config, "__dict__") else ():
        if type(value) is int and not name.endswith("_token_id"):
            yield value
        elif isinstance(value, list | tuple):
            yield from (item for item in value if type(item) is int)
        elif hasattr(value, "to_dict"):
            yield from _numbers(value)
