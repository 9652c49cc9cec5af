"""``tracer.cache()``: what many modules were given and returned, by path and by attribute, once the block is over."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nnsight_hpc.execution.values import Absent, converted
from nnsight_hpc.graph.build import READS
from nnsight_hpc.tracing.current import current_trace
from nnsight_hpc.tracing.lines import users_line
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

    from nnsight_hpc.tracing.context import Trace


@dataclass(frozen=True)
class Entry:
    """What one module returned, and what it was given (arguments, keywords); in a generation lists with an item a step."""

    output: Any = None
    inputs: Any = None

    @property
    def input(self) -> Any:
        """The first argument; in a generation a list."""
        return [_first(call) for call in self.inputs] if isinstance(self.inputs, list) else _first(self.inputs)


def _first(inputs: Any) -> Any:
    if inputs is None:
        return None
    args, kwargs = inputs
    return args[0] if args else next(iter(kwargs.values()), None)


class Cache:
    """The entries by module path: ``cache["model.layers.0"].output``, ``cache.model.layers[0].output``.

    Modules that the model did not call have none.
    """

    def __init__(
        self, trace: Trace, modules: Iterable[Any] | None, kinds: tuple[str, ...], *, device: Any, dtype: Any
    ) -> None:
        self._trace, self._kinds, self._to = trace, kinds, {"device": device, "dtype": dtype}
        self._where, self._line = trace.where, str(users_line())
        names = [name for name, _ in trace.model.origin._module.named_modules()]  # noqa: SLF001 - the tree
        self._paths = names if modules is None else [_path(module, trace) for module in modules]
        self._saves: dict[tuple[str, str], list[int]] = {}
        self._entries: dict[str, Entry] | None = None

    def record(self) -> None:
        """Read and save every point: at the end of the block, so that it is what the model passed on."""
        trace, recorder = self._trace, self._trace.recorder
        where = trace.all_rows() if self._where is None else self._where
        if trace.generates and trace.steps is None:
            raise InvalidInput(
                "a cache holds every step of a generation, and how many there may be is not known here",
                where=self._line,
                next="give max_new_tokens=…",
            )
        for call in range(trace.steps or 1):
            options = {"call": call, "optional": True} if call else {"optional": True}
            for path in self._paths:
                for kind in self._kinds:
                    value = recorder.append(READS[kind], (where, path), options, recorder.block)
                    save = recorder.save(value)
                    recorder.names[save] = f"cache.{path}.{kind}" + (f", call {call}" if call else "")
                    self._saves.setdefault((path, kind), []).append(save)

    def keys(self) -> list[str]:
        """The paths of the modules that were called, in the order of the model."""
        return list(self._made())

    def __getitem__(self, path: str) -> Entry:
        made = self._made()
        if path not in made:
            near = difflib.get_close_matches(str(path), made, n=3, cutoff=0.5)
            hint = (
                f"did you mean {', '.join(map(repr, near))}?"
                if near
                else f"it has {', '.join(map(repr, made)) or 'none'}"
            )
            raise KeyError(f"the cache has no module {path!r}; {hint}")
        return made[path]

    def values(self) -> list[Entry]:
        """The entries, in the order of `keys`."""
        return list(self._made().values())

    def items(self) -> list[tuple[str, Entry]]:
        """Paths and entries, in the order of `keys`."""
        return list(self._made().items())

    def __contains__(self, path: str) -> bool:
        return path in self._made()

    def __iter__(self) -> Iterator[str]:
        return iter(self._made())

    def __len__(self) -> int:
        return len(self._made())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(_Place(self, ""), name)

    def __repr__(self) -> str:
        return f"<cache of {len(self._paths)} modules>" if self._entries is None else f"<cache of {', '.join(self)}>"

    def _made(self) -> dict[str, Entry]:
        if self._entries is None:
            results = self._trace.recorder.results
            if not self._saves or not all(save in results for saves in self._saves.values() for save in saves):
                raise InvalidInput("the cache is filled when the block is over", where=str(users_line()))
            made = {(path, kind): self._calls(path, kind) for path in self._paths for kind in self._kinds}
            reached = [path for path in self._paths if any(made[path, kind] for kind in self._kinds)]
            shown = list if self._trace.generates else _only
            self._entries = {path: Entry(**{kind: shown(made[path, kind]) for kind in self._kinds}) for path in reached}
        return self._entries

    def _calls(self, path: str, kind: str) -> list[Any]:
        """What stood at a point at each call that the model made."""
        found = (self._trace.recorder.results[save] for save in self._saves[path, kind])
        return [converted(value, self._moved) for value in found if not isinstance(value, Absent)]

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._to["device"], self._to["dtype"] if tensor.is_floating_point() else None)


class _Place:
    """A module of the cache on the way to its entry: attributes and indices as in the model."""

    def __init__(self, cache: Cache, path: str) -> None:
        self._cache, self._path = cache, path

    def __getattr__(self, name: str) -> Any:
        if name in ("output", "inputs", "input") and self._path in self._cache:
            return getattr(self._cache[self._path], name)
        path = f"{self._path}.{name}" if self._path else name
        if not any(key == path or key.startswith(path + ".") for key in self._cache):
            raise AttributeError(f"the cache has no {path!r}; it has {', '.join(self._cache) or 'no module'}")
        return _Place(self._cache, path)

    def __getitem__(self, index: int | str) -> Any:
        return getattr(self, str(index))


def _path(module: Any, trace: Trace) -> str:
    """The path of a module that is given as an envoy or by its path."""
    if isinstance(module, str):
        return trace.model.get(module)._path if module else ""  # noqa: SLF001 - an envoy's place
    current_trace(module._path, module._model)  # noqa: SLF001 - refuses one of another model
    return str(module._path)  # noqa: SLF001


def _only(calls: list[Any]) -> Any:
    return calls[0] if calls else None
