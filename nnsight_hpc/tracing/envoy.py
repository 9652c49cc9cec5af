"""A mirror of the model's module tree: what stands for a module in a block."""
# ruff: noqa: SLF001 - torch's own tables of children, parameters and buffers, and parts of one tree

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Any

import torch

from nnsight_hpc.graph.build import CALL, PARAMETER
from nnsight_hpc.tracing.attachments import Attachment
from nnsight_hpc.tracing.current import current_recorder, current_trace, trace_now
from nnsight_hpc.tracing.lines import users_line
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Self

    from nnsight_hpc.tracing.models import NNsight
    from nnsight_hpc.tracing.points import Points
    from nnsight_hpc.tracing.source import SourceEnvoy
    from nnsight_hpc.tracing.value import Value


class Envoy:
    """A module of the model, by its path. Its children are attributes or indices, as in the model.

    Inside a trace ``output``, ``input`` (the first argument) and ``inputs`` (arguments, keywords) are values that can be
    read, replaced by assignment, and changed in place; parameters (``weight``) are values to read; a call runs the module
    on a value. A module of the researcher can be attached under a new name (``m.sae = module``) and called on values, too.
    """

    def __init__(self, module: torch.nn.Module, path: str = "", root: NNsight | None = None) -> None:
        self._module, self._path, self._root = module, path, root
        self._children: dict[str, Envoy] = {}
        self._hint()

    @property
    def output(self) -> Any:
        trace = trace_now.get()  # what `_points` does, without its calls: nothing is read more often
        trace = trace if trace is not None and trace.model is self._root else self._points()
        return trace.read(self._path, "output")

    @output.setter
    def output(self, value: Any) -> None:
        self._points().set(self._path, "output", value)

    @property
    def input(self) -> Any:
        return self._points().read(self._path, "input")

    @input.setter
    def input(self, value: Any) -> None:
        self._points().set(self._path, "input", value)

    @property
    def inputs(self) -> Any:
        return self._points().read(self._path, "inputs")

    @inputs.setter
    def inputs(self, value: Any) -> None:
        self._points().set(self._path, "inputs", value)

    @property
    def source(self) -> SourceEnvoy:
        """The operations inside the module's forward: print it for a list."""
        from nnsight_hpc.tracing.source import SourceEnvoy  # noqa: PLC0415 - it reads and rewrites source: rarely needed

        if trace_now.get() is not None:
            self._points()
        return SourceEnvoy(self)

    def skip(self, value: Any) -> None:
        """Do not run the module in this forward; `value` is its output."""
        self._points().skip(self._path, value)

    def next(self, calls: int = 1) -> Self:
        """From here on the points of this module, and of those in it, are those of a later call during a generation."""
        self._points().later(self._path, calls)
        return self

    def get(self, path: str) -> Envoy:
        """The module at a path below this one, also one that is named like a point: ``model.get("layers.3.mlp")``."""
        envoy = self
        for part in path.split("."):
            child = envoy._module._modules.get(part)
            envoy = getattr(envoy, part) if child is None else envoy._child(part, child)
        return envoy

    def parameters(self) -> Iterator[Any]:
        """The parameters of the module and of those in it: values inside a block, torch's own outside."""
        return (parameter for _, parameter in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        """As `parameters`, with their names."""
        recorder = current_recorder(self._model)
        for name, parameter in self._module.named_parameters():
            path, _, last = f"{self._path}.{name}".lstrip(".").rpartition(".")
            yield name, parameter if recorder is None else recorder.record(PARAMETER, path, last)

    def __call__(self, *args: Any, **kwargs: Any) -> Value:
        return self._points().recorder.record(CALL, self._path, *args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or hasattr(type(self), name):
            super().__setattr__(name, value)
        elif isinstance(value, torch.nn.Module) and name not in self._module._modules:
            self._model.attached[self._path, name] = value
        else:
            raise AttributeError(
                f"{name!r} cannot be set on {self._path or 'the model'}; set its output, input or inputs, "
                "or attach a module under a new name"
            )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        module = self._module
        if (child := module._modules.get(name)) is not None:
            return self._child(name, child)
        if module._parameters.get(name) is not None or module._buffers.get(name) is not None:
            return self._parameter(name)
        if (attached := self._model.attached.get((self._path, name))) is not None:
            return Attachment(attached, self._below(name))
        if (old := self._aliases().get(name)) is not None:
            return self.get(old)
        plain = getattr(module, name, None)
        if plain is not None and not callable(plain) and not isinstance(plain, torch.Tensor):
            return plain  # its configuration and other data
        known = [*module._modules, *module._parameters, *module._buffers, *self._aliases(), "output", "input", "inputs"]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise AttributeError(f"{self._path or 'the model'} ({type(module).__name__}) has no {name!r}{hint}")

    def __getitem__(self, index: int | slice) -> Any:
        children = self._module._modules
        names = list(children)
        if isinstance(index, slice):
            return [self.get(name) for name in names[index]]
        try:
            name = names[index]
        except IndexError:
            raise IndexError(f"{self._path or 'the model'} has {len(names)} modules, and none at {index}") from None
        child = children[name]
        return self.get(name) if child is None else self._child(name, child)

    def __iter__(self) -> Iterator[Envoy]:
        return iter(self[:])

    def __len__(self) -> int:
        return len(self._module._modules)

    def __dir__(self) -> list[str]:
        attached = [name for path, name in self._model.attached if path == self._path]
        own = [*self._module._modules, *self._module._parameters, *self._module._buffers]
        return sorted({*super().__dir__(), *own, *attached, *self._aliases()})

    def __repr__(self) -> str:
        return repr(self._module)

    @property
    def _model(self) -> NNsight:
        """The model that this is a part of."""
        assert self._root is not None, "a model is its own root"
        return self._root

    def _hint(self) -> None:
        """Methods that hide a module of their name say how it is reached."""
        for name in self._module._modules:
            if callable(getattr(type(self), name, None)):
                self.__dict__[name] = _Method(getattr(type(self), name).__get__(self), self._below(name))

    def _points(self) -> Points:
        """The trace that is being recorded, which must be one of this model."""
        return current_trace(self._path, self._model)

    def _parameter(self, name: str) -> Value:
        if trace_now.get() is None:
            path = self._below(name)
            attribute = re.sub(r"\.(\d+)", r"[\1]", f"model.module.{path}")
            raise InvalidInput(
                f"{path} has values only while the model runs",
                where=str(users_line()),
                next=f"use it inside a `with model.trace(…):` block; outside of one, {attribute} is the tensor",
            )
        return self._points().recorder.record(PARAMETER, self._path, name)

    def _below(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name

    def _child(self, name: str, module: torch.nn.Module) -> Envoy:
        known = self._children.get(name)
        if known is None or known._module is not module:
            known = self._children[name] = Envoy(module, self._below(name), self._model)
        return known

    def _aliases(self) -> dict[str, str]:
        """The researcher's names for modules below this one: the path from here by the new name."""
        return {new: old for old, new in self._model.renamed.items() if _holds(self._module, old)}


class _Method:
    """A method of an envoy whose name a module of the model has, too."""

    def __init__(self, method: Callable[..., Any], path: str) -> None:
        self._method, self._path = method, path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._method(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        own = self.__dict__.get("_path", "")
        raise AttributeError(
            f"{own.rpartition('.')[2]!r} is a method of every envoy here; the module of that name is model.get({own!r}), "
            "and rename={…} gives it another name"
        )


def _holds(module: torch.nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True
