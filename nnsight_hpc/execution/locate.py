"""Modules and parameters of a model by their paths in a graph; what is not there is refused with near names."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

import torch

from nnsight_hpc.wire.errors import InvalidGraph

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nnsight_hpc.graph.nodes import Node


def find_module(root: torch.nn.Module, path: str, node: Node) -> torch.nn.Module:
    """The module at `path`, which `node` names; raises `InvalidGraph` at its line where there is none.

    Only registered modules are found: by a property that gives another one a path would lead out of what it seems to name.
    """
    module = _module_at(root, path)
    if module is not None:
        return module
    names = [name for name, _ in root.named_modules()]
    raise _not_there(f"the model has no module {path!r}", path, names, node)


def find_parameter(root: torch.nn.Module, node: Node) -> torch.Tensor:
    """The parameter or buffer that a node names, detached. The schedule sees to it that nothing changes it in place."""
    path = ".".join(part for part in node.args if part)
    owner, _, name = path.rpartition(".")
    module = _module_at(root, owner)
    for table in () if module is None else (module._parameters, module._buffers):  # noqa: SLF001
        if (found := table.get(name)) is not None:
            return found.detach()
    names = [name for name, _ in (*root.named_parameters(), *root.named_buffers())]
    raise _not_there(f"the model has no parameter {path!r}", path, names, node)


def layers_of(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The elements of the outermost lists of modules in a model."""
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList | torch.nn.Sequential):
            yield from child.children()
        else:
            yield from layers_of(child)


def _module_at(root: torch.nn.Module, path: str) -> torch.nn.Module | None:
    module: torch.nn.Module | None = root
    for name in path.split(".") if path else ():
        module = module._modules.get(name) if module is not None else None  # noqa: SLF001 - get_submodule takes 11 us
    return module


def _not_there(what: str, path: str, names: list[str], node: Node) -> InvalidGraph:
    near = difflib.get_close_matches(path, names, n=3, cutoff=0.5)
    return InvalidGraph(
        what,
        where=str(node.source or f"node {node.id}"),
        next=f"did you mean {', '.join(near)}?" if near else "print(model) shows what it has",
    )
