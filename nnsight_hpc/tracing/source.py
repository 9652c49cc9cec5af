"""What stands for the operations inside a module's forward: ``m.source``."""

from __future__ import annotations

import difflib
import textwrap
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from nnsight_hpc.execution.source import source_of
from nnsight_hpc.tracing.context import current_trace
from nnsight_hpc.wire.errors import InvalidGraph

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

    from nnsight_hpc.execution.source import Source
    from nnsight_hpc.tracing.envoy import Envoy
    from nnsight_hpc.tracing.points import Points


class SourceEnvoy:
    """The operations of a module's forward as attributes; printed, the forward's text with their names in the margin.

    Raises `AttributeError` with near names for an operation that is not there, and `InvalidGraph` where there is no
    source. Operations of a function that only a run of the model shows are believed here and checked when it runs.
    """

    __slots__ = ("_envoy", "_nested")

    def __init__(self, envoy: Envoy, nested: tuple[str, ...] = ()) -> None:
        self._envoy, self._nested = envoy, nested

    def __getattr__(self, name: str) -> OperationEnvoy:
        if name.startswith("__"):
            raise AttributeError(name)
        source = self._read()
        names = [operation.name for operation in source.operations] if source else [name]
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(names) or 'none'}"
            raise AttributeError(f"the source of {self._path} has no operation {name!r}; {hint}")
        return OperationEnvoy(self._envoy, (*self._nested, name))

    def __iter__(self) -> Iterator[OperationEnvoy]:
        """The operations in the order in which they run."""
        return (getattr(self, operation.name) for operation in self._known().operations)

    def __dir__(self) -> list[str]:
        source = self._read()
        return sorted({*super().__dir__(), *(operation.name for operation in (source.operations if source else ()))})

    def __repr__(self) -> str:
        source = self._known()
        return "\n".join([f"{self._path}  ({source.file}:{source.line})", *_listing(source)])

    @property
    def _path(self) -> str:
        return ":".join([self._envoy._path, *self._nested]) or "the model"  # noqa: SLF001 - parts of one thing

    def _read(self) -> Source | None:
        return source_of(self._envoy._module, self._nested)  # noqa: SLF001

    def _known(self) -> Source:
        source = self._read()
        if source is None:
            raise InvalidGraph(
                f"the source of {self._path} cannot be listed",
                why="the function that is called there is known only while the model runs",
                next="operations of it can be named all the same; they are checked when the model runs",
            )
        return source


class OperationEnvoy:
    """An operation inside a forward: its ``output``, ``input`` and ``inputs`` are values, as a module's are in a trace."""

    __slots__ = ("_envoy", "_names", "_path")

    def __init__(self, envoy: Envoy, names: tuple[str, ...]) -> None:
        self._envoy, self._names = envoy, names
        self._path = ":".join([envoy._path, *names])  # noqa: SLF001 - a part of it

    @property
    def output(self) -> Any:
        """What the operation returns."""
        return self._trace().read(self._path, "output")

    @output.setter
    def output(self, value: Any) -> None:
        self._trace().set(self._path, "output", value)

    @property
    def input(self) -> Any:
        """Its first argument."""
        return self._trace().read(self._path, "input")

    @input.setter
    def input(self, value: Any) -> None:
        self._trace().set(self._path, "input", value)

    @property
    def inputs(self) -> Any:
        """Its arguments: (positional ones, keywords)."""
        return self._trace().read(self._path, "inputs")

    @inputs.setter
    def inputs(self, value: Any) -> None:
        self._trace().set(self._path, "inputs", value)

    def skip(self, value: Any) -> None:
        """Do not run the operation; `value` is its output."""
        self._trace().skip(self._path, value)

    def next(self, calls: int = 1) -> Self:
        """The operation at a later call: in a loop of its forward, or at a later step of a generation."""
        self._trace().later(self._path, calls)
        return self

    @property
    def source(self) -> SourceEnvoy:
        """The operations inside the function that this one calls; printing it lists them."""
        return SourceEnvoy(self._envoy, self._names)

    def __repr__(self) -> str:
        source = source_of(self._envoy._module, self._names[:-1])  # noqa: SLF001
        operations = {operation.name: operation for operation in (source.operations if source else ())}
        found = operations.get(self._names[-1])
        return f"{self._path}  ({source.file}:{found.line}: {found.text})" if source and found else self._path

    def _trace(self) -> Points:
        return current_trace(self._path, self._envoy._model)  # noqa: SLF001 - parts of one thing


def _listing(source: Source) -> Iterator[str]:
    """The lines of a source with their numbers in the file, and in the margin the operations that begin there."""
    names = defaultdict(list)
    for operation in source.operations:
        names[operation.line].append(operation.name)
    margin = max((len(operation.name) for operation in source.operations), default=0)
    lines = textwrap.dedent(source.text).splitlines()
    digits = len(str(source.line + len(lines)))
    for number, line in enumerate(lines, source.line):
        first, *others = names.get(number, [""])
        yield f"{first:>{margin}} {'->' if first else '  '} {number:>{digits}} {line}".rstrip()
        yield from (f"{name:>{margin}} -> {'+':>{digits}}" for name in others)
