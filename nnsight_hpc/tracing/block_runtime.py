"""What rewritten code calls (as ``__rt__``) to learn whether a value decides, and to record it if so."""

from __future__ import annotations

import builtins
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from nnsight_hpc.graph.build import LOG
from nnsight_hpc.tracing import block_calls, block_loops
from nnsight_hpc.tracing.block_choices import Choices, Conditional, Managed
from nnsight_hpc.tracing.block_merge import UNBOUND, names_in, values_in
from nnsight_hpc.tracing.block_numbers import is_number
from nnsight_hpc.tracing.block_steps import StepLoop
from nnsight_hpc.tracing.block_unroll import Unrolling
from nnsight_hpc.tracing.control import Cond, Else, Loop
from nnsight_hpc.tracing.frames import write
from nnsight_hpc.tracing.value import Value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from nnsight_hpc.tracing.iteration import Steppings

_CONVERSIONS: dict[int, Callable[[Any], Any]] = {-1: lambda value: value, 115: str, 114: repr, 97: ascii}


class Runtime(Choices):
    """The state of one run of a rewritten block.

    Parameters
    ----------
    frame
        The researcher's, that the block belongs to.
    written
        The names of that frame that the block binds.
    bound
        All names that it binds other than as targets of loops.
    """

    unbound = UNBOUND
    many, ended = staticmethod(block_loops.many), staticmethod(block_loops.ended)
    star, listed, spread = block_calls.Star, staticmethod(block_calls.listed), staticmethod(block_calls.spread)
    check, of_python = staticmethod(block_calls.check), staticmethod(block_calls.of_python)

    def __init__(self, frame: FrameType, written: tuple[str, ...], bound: tuple[str, ...]) -> None:
        super().__init__(frame)
        self._frame, self._written, self._bound = frame, written, bound
        self._unrolling = Unrolling()
        self.kept, self.added = self._containers.keep, self._containers.added
        self.owner, self.added_to = self._containers.objects.owner, self._containers.objects.added_to

    def decides(self, item: Any) -> bool:
        """Whether what hangs on it is decided where the graph runs."""
        return type(item) is Value

    def iterable(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``range(…)``, ``enumerate(…)``, ``zip(…)``, ``reversed(…)``, whose arguments may be values."""
        known = [self._unrolling.of(argument) for argument in args]
        if function not in (enumerate, zip) or any(map(block_loops.over, known)):
            return block_loops.iterable(function, *args, **kwargs)
        return self._unrolling.joined(function, known, kwargs)

    def loop(
        self, items: Any, names: tuple[tuple[str, ...], ...], shared: bool
    ) -> block_loops.RecordedLoop | block_loops.PlainLoop:
        """A loop, as `names` the fields of `LoopNames`; `shared` if the items have a name of their own."""
        bound = block_loops.LoopNames(*names)
        items = self._unrolling.of(items)
        if type(items) is Loop and type(items.items) is Value:
            items = items.items
        if type(items) is Steps:
            return StepLoop(items.steps, items, bound)
        if getattr(type(items), "over_steps", False):
            return StepLoop(items, items, bound)
        over = block_loops.over(items)
        if over is None:
            return block_loops.PlainLoop(items, shared=shared)
        return block_loops.RecordedLoop(over, bound, self._containers)

    def gather(self) -> block_loops.Gather:
        return block_loops.Gather(self._containers, self._unrolling, self._open)

    def passes(self, manager: Any) -> Any:
        """The passes of ``with tracer.iter[…] as step:``, each as a manager; of any other manager itself, once."""
        if getattr(type(manager), "over_steps", False):
            return Steps(manager)
        if type(manager) is Loop and type(manager.items) is Value:
            return block_loops.Over(manager.items, lambda _turn, entry: nullcontext(entry))
        return [manager]

    def conditional(self, manager: Any, names: tuple[str, ...]) -> Conditional | Managed:
        """``tracer.cond(…)`` and ``.else_()``; another object whose method has such a name itself."""
        return Conditional(manager, names, self._containers) if isinstance(manager, Cond | Else) else Managed(manager)

    def print(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``print`` of values, and where a value decides, writes a line while the graph runs."""
        values = values_in(args)
        recorder = values[0].recorder if values else self._containers.objects.recorder
        if recorder is None or function is not builtins.print or "file" in kwargs:
            return function(*args, **kwargs)
        if not values:
            recorder.record(LOG, str(kwargs.get("sep", " ")).join(map(str, args)))
            return None
        parts = [part if values_in(part) else str(part).strip() for part in args]
        recorder.record(LOG, *[part for part in parts if type(part) is not str or part])
        return None

    def parts(self, *parts: Any) -> list[Any]:
        """A formatted string, in pieces where values are put into it."""
        pieces: list[Any] = [""]
        for part in parts:
            if type(part) is tuple and type(part[0]) is Value:
                pieces += [part[0], ""]
            else:
                pieces[-1] += part if type(part) is str else format(_CONVERSIONS[part[1]](part[0]), part[2])
        if len(pieces) == 1:
            return pieces
        stripped = [piece if type(piece) is Value else piece.strip() for piece in pieces]  # a space comes between parts
        return [piece for piece in stripped if type(piece) is Value or piece]

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A function that looks into what it is given, which may live where the graph runs."""
        return block_calls.called(function, args, kwargs)

    def share(self, name: str, value: Any) -> None:
        """Give a name of the researcher's frame its value now, where a function reads it."""
        write(self._frame, {name: value})

    def leave(self) -> None:
        """The rewritten code ends: its names are the researcher's again."""
        found = names_in(sys._getframe(1), self._written)  # noqa: SLF001 - the rewritten code
        if found:
            write(self._frame, {name: value for name, value in found.items() if value is not UNBOUND})

    def finish(self) -> None:
        """Record what is to be saved at the end of the block: lists that are to be filled, names of plain numbers."""
        self._containers.finish()
        for value in names_in(self._frame, self._bound).values():
            if type(value) is Value and value.saved is None and is_number(value.recorder.builder.nodes, value.node):
                value.saved = value.recorder.save(value)


class Steps:
    """The steps of ``with tracer.iter[…] as step:``, each as a manager that gives its number."""

    def __init__(self, steps: Steppings) -> None:
        self.steps = steps

    def __iter__(self) -> Iterator[nullcontext[int]]:
        return map(nullcontext, self.steps)
