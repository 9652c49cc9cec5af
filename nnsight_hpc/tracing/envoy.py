"""A mirror of the model's module tree: what stands for a module in a block."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from nnsight_hpc.graph.build import CALL, PARAMETER, READS, SETS
from nnsight_hpc.tracing.context import current_trace

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from nnsight_hpc.tracing.context import Trace
    from nnsight_hpc.tracing.value import Value


class Envoy:
    """A module of the model, by its path. Its children are attributes or indices, as in the model.

    Inside a trace ``output``, ``input`` (the first argument) and ``inputs`` (arguments, keywords) are values that can be
    read, replaced by assignment, and changed in place; parameters (``weight``) are values to read; a call runs the module
    on a value.
    """

    def __init__(self, module: torch.nn.Module, path: str = "") -> None:
        self._module, self._path = module, path

    @property
    def output(self) -> Any:
        return self._read("output")

    @output.setter
    def output(self, value: Any) -> None:
        self._set("output", value)

    @property
    def input(self) -> Any:
        return self._read("input")

    @input.setter
    def input(self, value: Any) -> None:
        self._set("input", value)

    @property
    def inputs(self) -> Any:
        return self._read("inputs")

    @inputs.setter
    def inputs(self, value: Any) -> None:
        self._set("inputs", value)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and not hasattr(type(self), name):
            raise AttributeError(
                f"{name!r} cannot be set on {self._path or 'the model'}; set its output, input or inputs"
            )
        super().__setattr__(name, value)

    def get(self, path: str) -> Envoy:
        """The module at a path below this one, also one that is named like a point: ``model.get("layers.3.mlp")``."""
        envoy = self
        for part in path.split("."):
            child = envoy._module._modules.get(part)  # noqa: SLF001 - torch's own table of children
            envoy = getattr(envoy, part) if child is None else envoy._child(part, child)
        return envoy

    def __call__(self, *args: Any, **kwargs: Any) -> Value:
        return self._trace().recorder.record(CALL, self._path, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        children = dict(self._module.named_children())
        if name in children:
            return self._child(name, children[name])
        own = {**dict(self._module.named_parameters(recurse=False)), **dict(self._module.named_buffers(recurse=False))}
        if name in own:
            return self._trace().recorder.record(PARAMETER, self._path, name)
        near = difflib.get_close_matches(name, [*children, *own, "output", "input", "inputs"], n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise AttributeError(f"{self._path or 'the model'} ({type(self._module).__name__}) has no {name!r}{hint}")

    def __getitem__(self, index: int | slice) -> Any:
        names = [name for name, _ in self._module.named_children()]
        if isinstance(index, slice):
            return [self.get(name) for name in names[index]]
        return self.get(names[index])

    def __iter__(self) -> Iterator[Envoy]:
        return iter(self[:])

    def __len__(self) -> int:
        return len(list(self._module.children()))

    def __dir__(self) -> list[str]:
        names = [name for name, _ in self._module.named_children()]
        return sorted({*super().__dir__(), *names, *dict(self._module.named_parameters(recurse=False))})

    def __repr__(self) -> str:
        return repr(self._module)

    def _child(self, name: str, module: torch.nn.Module) -> Envoy:
        return Envoy(module, f"{self._path}.{name}" if self._path else name)

    def _trace(self) -> Trace:
        return current_trace(self._path)

    def _read(self, kind: str) -> Any:
        trace = self._trace()
        place = (self._path, kind)
        if place not in trace.values:
            trace.values[place] = trace.recorder.record(READS[kind], trace.forward, self._path)
        return trace.values[place]

    def _set(self, kind: str, value: Any) -> None:
        trace = self._trace()
        if (
            value is None or trace.values.get((self._path, kind)) is not value
        ):  # `m.output *= 2` assigns what it changed already
            trace.recorder.record(SETS[kind], trace.forward, self._path, value)
            for stale in ("output",) if kind == "output" else ("input", "inputs"):
                trace.values.pop((self._path, stale), None)
