"""The researcher's frames: which of their names get the real values after a block, and writing names into a running frame.

A context's caller may be a wrapper (``contextlib.ExitStack``, a ``@contextmanager`` of the researcher's): names are then
looked for in the wrapper and in the frame that uses it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dis
import functools
import sys
from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from types import CodeType, FrameType

T = TypeVar("T")
_WRITES_THROUGH = sys.version_info >= (3, 13)  # PEP 667
_GENERATOR = contextlib._GeneratorContextManager  # noqa: SLF001 - its frames are told by their code
if not _WRITES_THROUGH:
    _to_fast = ctypes.pythonapi.PyFrame_LocalsToFast
    _to_fast.argtypes, _to_fast.restype = (ctypes.py_object, ctypes.c_int), None
_MOST = 1024
_stores: dict[int, tuple[CodeType, tuple[str, ...]]] = {}
"""The globals that code assigns to, by the id of the code object, which is held so that it stays its own."""
_RUNS_GENERATOR = (_GENERATOR.__enter__.__code__, _GENERATOR.__exit__.__code__)


class Entries(tuple[Any, ...]):
    """What stands in the place of one entry of a list or tuple: any number of entries; in a dict, none removes the key."""

    __slots__ = ()


DROP = Entries()


def named(frame: FrameType, kind: type[T]) -> list[tuple[str, T]]:
    """What is of type `kind` in the frame's names and in the lists, tuples and dicts under them, with how it is reached."""
    found: list[tuple[str, T]] = []
    seen: set[int] = set()

    def look(places: Iterable[tuple[Any, Any]], path: str) -> None:
        for key, item in places:
            if type(item) is kind:
                found.append((f"{path}[{key!r}]" if path else key, item))
            elif _plain(type(item)) is not None and id(item) not in seen:
                seen.add(id(item))
                look(_places(item), f"{path}[{key!r}]" if path else key)

    for names in _namespaces(frame):
        look(names.items(), "")
    return found


def bind(frame: FrameType, kind: type[T], replace: Callable[[T, str], Any]) -> None:
    """Put what `replace` makes of each value of type `kind` in its place: a name of the frame, or a place in its containers.

    Parameters
    ----------
    replace
        Called with the value and ``name``, ``list``, ``tuple`` or ``dict``, where it stands. For an entry of a container
        it may return `Entries`.
    """
    walk = _Walk(kind, replace)
    for names in _namespaces(frame):
        if new := walk.changes(names.items(), "name"):
            names.write(new)


def write(frame: FrameType, names: Mapping[str, Any]) -> None:
    """Give names of a running function their values; of a module or class, too."""
    frame.f_locals.update(names)
    if not _WRITES_THROUGH:
        _to_fast(frame, 0)


def outer_of_wrapper(frame: FrameType) -> FrameType | None:
    """The frame with the ``with`` statement for which `frame` runs a ``@contextmanager`` function; None for other frames."""
    back = frame.f_back
    return back.f_back if back is not None and back.f_code in _RUNS_GENERATOR else None


class _Locals:
    def __init__(self, frame: FrameType) -> None:
        self._frame = frame

    def items(self) -> list[tuple[str, Any]]:
        return list(self._frame.f_locals.items())

    def write(self, names: Mapping[str, Any]) -> None:
        write(self._frame, names)


class _Globals:
    """The globals that a function declares as such and assigns to."""

    def __init__(self, frame: FrameType) -> None:
        self._globals, self._names = frame.f_globals, _assigned_globals(frame.f_code)

    def items(self) -> list[tuple[str, Any]]:
        return [(name, self._globals[name]) for name in self._names if name in self._globals]

    def write(self, names: Mapping[str, Any]) -> None:
        self._globals.update(names)


def _namespaces(frame: FrameType) -> Iterator[_Locals | _Globals]:
    """The names of the frame that opened a block, and of those around it that it opened the block for."""
    while True:
        if frame.f_globals is not contextlib.__dict__:
            yield _Locals(frame)
            if _assigned_globals(frame.f_code) and frame.f_locals is not frame.f_globals:
                yield _Globals(frame)
            outer = outer_of_wrapper(frame)
        else:
            outer = frame.f_back
        if outer is None:
            return
        frame = outer


def _assigned_globals(code: CodeType) -> tuple[str, ...]:
    known = _stores.get(id(code))
    if known is None:
        if len(_stores) >= _MOST:
            _stores.clear()
        found = {i.argval: None for i in dis.get_instructions(code) if i.opname == "STORE_GLOBAL"}
        known = _stores[id(code)] = code, tuple(found)
    return known[1]


class _Walk:
    """Replaces values of one type in containers: lists, dicts and deques are changed in place, tuples made anew."""

    def __init__(self, kind: type[T], replace: Callable[[T, str], Any]) -> None:
        self._kind, self._replace = kind, replace
        self._seen: dict[int, tuple[Any, Any]] = {}

    def changes(self, places: Iterable[tuple[Any, Any]], place: str) -> dict[Any, Any]:
        """What is to stand in places of one namespace or container, as far as it is something else."""
        kind, replace, changed = self._kind, self._replace, {}
        for key, item in places:
            if type(item) is kind:
                new = replace(item, place)
            elif _plain(type(item)) is None:
                continue  # of a corpus's strings none is kept
            else:
                new = self._through(item)
            if new is not item:
                changed[key] = new
        return changed

    def _through(self, value: Any) -> Any:
        """What is to stand in the place of a container."""
        if id(value) in self._seen:
            return self._seen[id(value)][1]
        self._seen[id(value)] = value, value
        plain = _plain(type(value))
        changed = self.changes(
            _places(value), "name" if hasattr(value, "_make") else "list" if plain is deque else plain.__name__
        )
        result = _changed(value, changed) if changed else value
        self._seen[id(value)] = value, result
        return result


def _places(container: Any) -> Iterable[tuple[Any, Any]]:
    """The keys or indices of a container and what stands there, never as a subclass of its own shows them."""
    plain = _plain(type(container))
    return dict.items(container) if plain is dict else enumerate(plain.__iter__(container))


def _plain_of(kind: type) -> Any:
    """The plain container (list, tuple, dict, deque) that `kind` is or extends; None for others, whose places stay as they are.

    Of tuples only named ones can be made anew with other entries.
    """
    if issubclass(kind, tuple):
        return tuple if kind is tuple or hasattr(kind, "_make") else None
    return next((plain for plain in (list, dict, deque) if issubclass(kind, plain)), None)


_plain: Callable[[type], Any] = functools.lru_cache(maxsize=4096)(_plain_of)


def _changed(value: Any, changed: Mapping[Any, Any]) -> Any:
    """The container with new entries at the keys or indices of `changed`."""
    if isinstance(value, dict):
        for key, item in changed.items():
            if type(item) is Entries:
                del value[key]
            else:
                value[key] = item
        return value
    entries: list[Any] = []
    for index, item in enumerate(value):
        new = changed.get(index, item)
        entries += new if type(new) is Entries else [new]
    if isinstance(value, tuple):
        return value._make(entries) if hasattr(value, "_make") else tuple(entries)
    value.clear()
    value.extend(entries)
    return value
