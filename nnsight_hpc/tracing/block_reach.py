"""What Python objects the code of a block can come to by its names, and whether they have changed meanwhile.

Names of the code, of functions that it calls and of those that they call are followed: their globals and closures, entries
of containers, attributes of objects of the researcher's own classes. What belongs to libraries is not looked into.
"""

from __future__ import annotations

import functools
import operator
import random
import sys
import zlib
from collections import deque
from types import CellType, CodeType, FunctionType, GeneratorType, MethodType, ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from nnsight_hpc.tracing.block_source import inner_codes
from nnsight_hpc.tracing.block_templates import is_ours

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator
    from types import FrameType

    Held = list[tuple[str, Any]]

_MOST = 100_000
"""The most objects that are looked at; those near to the names come first."""
_ATOMS = (type(None), bool, int, float, complex, str, bytes, type(...), range, CodeType)
_CODE = (FunctionType, staticmethod, classmethod, property)
_ANY_ATTRIBUTE = frozenset({"getattr", "setattr", "vars", "__dict__", "attrgetter", "delattr"})
_MAKES = frozenset({"__init__", "__new__", "__post_init__"})
_NOTHING = object()


class Reach:
    """The objects that the code of a frame can come to, each with how it is reached.

    An attribute is followed if some of the code that is reached has its name.

    Parameters
    ----------
    rebound
        Names whose binding is not looked at: the code binds them itself.
    without
        A name that is not followed.
    """

    def __init__(self, frame: FrameType, rebound: Collection[str] = (), without: str = "") -> None:
        self._rebound = frozenset(rebound)
        self.paths: dict[int, str] = {}
        self.objects: list[Any] = []
        self._used: set[str] = set()
        self._unused: dict[str, Held] = {}  # attributes by name that no code has had yet
        self._level = [
            (name, item) for name, item in _named(frame) if name not in (without, ".0") and not is_ours(name)
        ]
        self._use(_names_of(frame.f_code))
        while self._level and len(self.objects) < _MOST:
            level, self._level = self._level, []
            for path, item in level:
                if id(item) not in self.paths and not isinstance(item, _ATOMS):
                    self.paths[id(item)] = path
                    self.objects.append(item)
                    self._follow(path, item)

    def _use(self, names: Iterable[str]) -> None:
        """Code has these names."""
        new = {*names} - self._used
        self._used |= new
        for name in self._unused.keys() if new & _ANY_ATTRIBUTE else new & self._unused.keys():
            self._level += self._unused[name]
            self._unused[name] = []

    def _follow(self, path: str, item: Any) -> None:
        if isinstance(item, dict):
            if not _all_atoms(dict.values(item)):
                self._level += [(f"{path}[{key!r}]", entry) for key, entry in dict.items(item)]
        elif isinstance(item, list | tuple | set | frozenset | deque):
            if not _all_atoms(item):
                self._level += [(f"{path}[{index}]", entry) for index, entry in enumerate(item)]
        elif isinstance(item, FunctionType) and _is_users(item.__module__):
            self._use(_names_of(item.__code__))
            self._level += [(f"{path} → {name}", held) for name, held in self._of_function(item)]
        elif (attributes := _attributes_of(item)) is not None:
            for name, held in attributes:
                known = name[:2] == "__" or name in self._used or self._used & _ANY_ATTRIBUTE
                (self._level if known else self._unused.setdefault(name, [])).append((f"{path}.{name}", held))
        else:
            self._level += [(path, held) for held in _parts(item)]

    def _of_function(self, function: FunctionType) -> Held:
        """The variables that a function of the researcher's shares with others, and what it keeps itself."""
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        names = function.__globals__
        used = [(name, names[name]) for name in _names_of(function.__code__) if name in names]
        defaults = [("its defaults", function.__defaults__)] if function.__defaults__ else []
        variables = [(name, held) for name, held in (*cells, *used) if name not in self._rebound]
        return [*variables, *defaults, *function.__dict__.items()]

    def states(self) -> dict[int, tuple[Any, ...]]:
        """What each of the objects holds now; they must be kept as long as this is compared."""
        return {id(item): state for item in self.objects if (state := self._state(item))}

    def changed(self, states: dict[int, tuple[Any, ...]]) -> Iterator[tuple[Any, str]]:
        """The objects that hold something else than they did, and how each is reached."""
        for item in self.objects:
            before = states.get(id(item))
            now = self._state(item) if before else ()
            if before and not (len(before) == len(now) and all(map(_unchanged, before, now))):
                yield item, self.paths[id(item)]

    def _state(self, item: Any) -> tuple[Any, ...]:
        """What an object holds, as objects; for arrays and tensors a number that changes with their content."""
        if isinstance(item, dict):
            return (dict, *dict.keys(item), *dict.values(item))
        if isinstance(item, list | set | deque):
            return (list, *item)
        if isinstance(item, FunctionType):
            return tuple(held for _, held in self._of_function(item)) if _is_users(item.__module__) else ()
        if isinstance(item, CellType):
            return (_contents(item),)
        if isinstance(item, GeneratorType):
            return (getattr(item.gi_frame, "f_lasti", -1),)
        attributes = _attributes_of(item)
        return _state_of_data(item) if attributes is None else (object, *(part for pair in attributes for part in pair))


def _parts(item: Any) -> Iterable[Any]:
    """What an object of Python's own refers to."""
    if isinstance(item, MethodType):
        return (item.__self__, item.__func__)
    if isinstance(item, functools.partial):
        return (item.func, item.args, item.keywords)
    if isinstance(item, staticmethod | classmethod):
        return (item.__func__,)
    if isinstance(item, property):
        return (item.fget, item.fset)
    return (_contents(item),) if isinstance(item, CellType) else ()


def _attributes_of(item: Any) -> Held | None:
    """The attributes of what is the researcher's: a module, a class, an object of one; None for anything else.

    Those of a class that make an object of it go by its name; its other special methods by none that code has.
    """
    kind = type(item)
    if isinstance(item, ModuleType):
        return [pair for pair in vars(item).items() if pair[0][:2] != "__"] if _is_users(item.__name__) else None
    if isinstance(item, type):
        if not _is_users(item.__module__):
            return None
        named = [(item.__name__ if name in _MAKES else name, held) for name, held in vars(item).items()]
        return [(name, held) for name, held in named if isinstance(held, _CODE) or name[:2] != "__"]
    if not isinstance(item, SimpleNamespace) and not _is_users(kind.__module__):
        return None
    slots = [name for base in kind.__mro__ for name in _slots(base)]
    found = [(name, held) for name in slots if (held := getattr(item, name, _NOTHING)) is not _NOTHING]
    classes = [("__class__", base) for base in kind.__mro__ if _is_users(base.__module__)]
    return [*getattr(item, "__dict__", {}).items(), *found, *classes]


def random_state() -> tuple[Any, ...]:
    """The states of the process's random generators."""
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    of_torch = b"" if torch is None else torch.default_generator.get_state().numpy().tobytes()
    of_numpy = () if numpy is None else numpy.random.get_state()[1:3]
    return random.getstate(), of_torch, *(part.tobytes() if hasattr(part, "tobytes") else part for part in of_numpy)


def _state_of_data(item: Any) -> tuple[Any, ...]:
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and isinstance(item, torch.Tensor):
        return () if item.is_inference() else (torch.Tensor, item._version)  # noqa: SLF001 - public, in torch's own words
    if numpy is not None and isinstance(item, numpy.ndarray):
        return (numpy.ndarray, 0 if item.dtype.hasobject else zlib.crc32(numpy.ascontiguousarray(item).data))
    if type(item).__module__ == "itertools" and type(item).__name__ == "count":
        return (repr(item),)
    return (operator.length_hint(item, 0),) if type(item).__name__.endswith("iterator") else ()


def _unchanged(before: Any, now: Any) -> bool:
    return before is now or (type(before) is type(now) and type(before) in (int, str) and before == now)


def _named(frame: FrameType) -> Held:
    """The names that the code of a frame uses, as far as they are bound."""
    own, globals_ = frame.f_locals, frame.f_globals
    local = own if own is not globals_ else {}
    used = [name for name in _names_of(frame.f_code) if name not in local and name in globals_]
    return [*local.items(), *((name, globals_[name]) for name in used)]


@functools.lru_cache(maxsize=4096)
def _names_of(code: CodeType) -> tuple[str, ...]:
    """The names of globals, attributes and modules in code, and in that of functions in it."""
    found = dict.fromkeys(code.co_names)
    for inner in inner_codes(code):
        found |= dict.fromkeys(_names_of(inner))
    return tuple(found)


@functools.lru_cache(maxsize=4096)
def _slots(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if not name.startswith("__"))


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that is not bound yet
        return None


def _all_atoms(items: Iterable[Any]) -> bool:
    return {*map(type, items)}.issubset(_ATOMS)


@functools.lru_cache(maxsize=4096)
def _is_users(module: str | None) -> bool:
    """Whether a module is neither Python's nor an installed one."""
    root = (module or "").partition(".")[0]
    if root in sys.stdlib_module_names or root in ("nnsight_hpc", "torch", "numpy", "transformers", "einops"):
        return False
    file = getattr(sys.modules.get(root), "__file__", None) or ""
    return "site-packages" not in file and "dist-packages" not in file
