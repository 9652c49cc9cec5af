"""What rewritten code calls (as ``__rt__``) to learn whether a value decides, and to record it if so."""

from __future__ import annotations

import builtins
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from nnsight_hpc.graph.build import LOG
from nnsight_hpc.tracing import block_loops
from nnsight_hpc.tracing.block_choices import Choices
from nnsight_hpc.tracing.block_merge import UNBOUND, names_in, values_in
from nnsight_hpc.tracing.block_unroll import Unrolling
from nnsight_hpc.tracing.frames import write
from nnsight_hpc.tracing.lines import users_line
from nnsight_hpc.tracing.value import Value
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

_CONVERSIONS: dict[int, Callable[[Any], Any]] = {-1: lambda value: value, 115: str, 114: repr, 97: ascii}


class Runtime(Choices):
    """The state of one run of a rewritten block.

    Parameters
    ----------
    frame
        The researcher's, that the block belongs to.
    written
        The names of that frame that the block binds.
    """

    unbound = UNBOUND

    def __init__(self, frame: FrameType, written: tuple[str, ...]) -> None:
        super().__init__()
        self._frame, self._written = frame, written
        self._unrolling = Unrolling()
        self.kept, self.added = self._containers.keep, self._containers.added
        self.owner, self.added_to = self._containers.objects.owner, self._containers.objects.added_to

    def iterable(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``range(…)``, ``enumerate(…)``, ``zip(…)``, whose arguments may be values."""
        known = [self._unrolling.of(argument) for argument in args]
        if function not in (enumerate, zip) or any(map(block_loops.over, known)):
            return block_loops.iterable(function, *args, **kwargs)
        return self._unrolling.joined(function, known, kwargs)

    def loop(
        self,
        items: Any,
        targets: tuple[str, ...],
        variables: tuple[str, ...],
        first: tuple[str, ...],
        has_else: bool,
    ) -> block_loops.RecordedLoop | block_loops.PlainLoop:
        items = self._unrolling.of(items)
        over = block_loops.over(items)
        if over is None:
            return block_loops.PlainLoop(items)
        if has_else:
            raise InvalidInput(
                "`for … else` over a value cannot be recorded",
                where=str(users_line()),
                next="write what stands in the `else` after the loop: a loop over a value has no `break`",
            )
        return block_loops.RecordedLoop(over, targets, variables, first, self._containers)

    def gather(self) -> block_loops.Gather:
        return block_loops.Gather(self._containers, self._unrolling)

    def passes(self, manager: Any) -> Iterator[AbstractContextManager[Any]]:
        """The steps of ``with tracer.iter[…] as step:``, each as a manager; any other manager itself, once."""
        if getattr(type(manager), "over_steps", False):
            yield from map(nullcontext, manager)
        else:
            yield manager

    def print(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``print`` of values writes a line while the graph runs."""
        values = values_in(args)
        if not values or function is not builtins.print or "file" in kwargs:
            return function(*args, **kwargs)
        parts = [part if values_in(part) else str(part).strip() for part in args]
        values[0].recorder.record(LOG, *[part for part in parts if type(part) is not str or part])
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
        """A function that takes a list, which may live where the graph runs."""
        first = args[0]
        if type(first) is not Value:
            return function(*args, **kwargs)
        if function in (list, tuple):
            return first
        if function is sum:
            return block_loops.total(first, *args[1:], **kwargs)
        name = getattr(function, "__name__", "")
        if getattr(sys.modules.get("torch"), name, None) is function:
            return first.recorder.record(f"torch.{name}", *args, **kwargs)
        return function(*args, **kwargs)

    def share(self, name: str, value: Any) -> None:
        """Give a name of the researcher's frame its value now, where a function reads it."""
        write(self._frame, {name: value})

    def leave(self) -> None:
        """The rewritten code ends: its names are the researcher's again."""
        found = names_in(sys._getframe(1), self._written)  # noqa: SLF001 - the rewritten code
        if found:
            write(self._frame, {name: value for name, value in found.items() if value is not UNBOUND})

    def finish(self) -> None:
        """Record what is to be saved at the end of the block."""
        self._containers.finish()
