"""What stands at the place that the model is at, for nodes to read and set: a module's arguments, or its output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from nnsight_hpc.graph.nodes import map_leaves

if TYPE_CHECKING:
    from nnsight_hpc.execution.rows import Rows
    from nnsight_hpc.execution.view import Visit


def unshared(value: Any) -> Any:
    """A value inside of a forward with lists and dicts of its own: those there may be the model's, and last."""
    return map_leaves(value, lambda leaf: leaf) if type(value) in (list, dict, tuple) else value


class Moment(Protocol):
    """What stands at the place that the model is at."""

    def get(self, kind: str) -> Any: ...
    def set(self, kind: str, value: Any) -> None: ...


class Before:
    """The arguments of a module that is about to run. ``input`` is the first positional one, or else the first keyword's."""

    __slots__ = ("_within", "args", "changed", "kwargs", "skipped", "skipped_rows")

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, within: bool = False) -> None:
        self.args, self.kwargs = args, kwargs
        self._within = within
        self.changed = False
        self.skipped: list[Any] = []
        self.skipped_rows: list[tuple[Rows, Any]] = []

    def get(self, kind: str) -> Any:
        if self._within and kind == "inputs":
            return unshared((self.args, self.kwargs))
        if kind == "inputs":
            return self.args, self.kwargs
        return self.args[0] if self.args else next(iter(self.kwargs.values()), None)

    def set(self, kind: str, value: Any) -> None:
        self.changed = True
        if kind == "skip":
            self.skipped = [value]
        elif kind == "inputs":
            self.args, self.kwargs = value
        elif self.args:
            self.args = (value, *self.args[1:])
        else:
            self.kwargs = {**self.kwargs, next(iter(self.kwargs)): value}

    def skip_rows(self, rows: Rows, value: Any) -> None:
        """Some rows skip the module: it runs for the others, and theirs is replaced in its output. If all do, nothing runs."""
        self.skipped_rows.append((rows, value))
        whole = rows.joined(sorted(self.skipped_rows, key=lambda part: part[0].start))
        if whole is not None:
            self.skipped, self.skipped_rows = [whole], []

    @property
    def left(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model goes on with."""
        return self.args, self.kwargs


class ShardedBefore(Before):
    """As `Before`, where tensors are sharded: nodes see whole ones."""

    __slots__ = ("_visit",)

    def __init__(self, visit: Visit, args: tuple[Any, ...], kwargs: dict[str, Any], *, within: bool = False) -> None:
        super().__init__(args, kwargs, within=within)
        self._visit = visit

    def get(self, kind: str) -> Any:
        self._open()
        return super().get(kind)

    def set(self, kind: str, value: Any) -> None:
        if kind == "input":
            self._open()
        self._visit.seen |= kind == "inputs"
        super().set(kind, value)

    @property
    def left(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = self._visit.left((self.args, self.kwargs))
        return args, kwargs

    def _open(self) -> None:
        if not self._visit.seen:
            self.args, self.kwargs = self._visit.whole()
            self.changed = True


class After:
    """The output of a module, or of an operation within one, that has just run."""

    __slots__ = ("_within", "changed", "output")

    def __init__(self, output: Any, *, within: bool = False) -> None:
        self.output, self._within = output, within
        self.changed = False

    def get(self, _kind: str) -> Any:
        return unshared(self.output) if self._within else self.output

    def set(self, _kind: str, value: Any) -> None:
        if value is None and not self._within:
            raise TypeError("the output of a module cannot be set to None: to torch that means unchanged")
        self.output, self.changed = value, True

    @property
    def left(self) -> Any:
        """What the model goes on with."""
        return self.output


class ShardedAfter(After):
    """As `After`, where tensors are sharded: nodes see whole ones."""

    __slots__ = ("_visit",)

    def __init__(self, visit: Visit, output: Any, *, within: bool = False) -> None:
        super().__init__(output, within=within)
        self._visit = visit

    def get(self, kind: str) -> Any:
        if not self._visit.seen:
            self.output, self.changed = self._visit.whole(), True
        return super().get(kind)

    def set(self, kind: str, value: Any) -> None:
        self._visit.seen = True
        super().set(kind, value)

    @property
    def left(self) -> Any:
        return self._visit.left(self.output)
