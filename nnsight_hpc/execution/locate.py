"""Modules and parameters of a model by their paths in a graph; what is not there is refused with near names."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from nnsight_hpc.wire.errors import InvalidGraph

if TYPE_CHECKING:
    import torch

    from nnsight_hpc.graph.nodes import Node


def find_module(root: torch.nn.Module, path: str, node: Node) -> torch.nn.Module:
    """The module at `path`, which `node` names; raises `InvalidGraph` at its line where there is none."""
    module: torch.nn.Module | None = root
    for name in path.split(".") if path else ():
        module = module._modules.get(name) if module is not None else None  # noqa: SLF001 - get_submodule takes 11 us
    if module is not None:
        return module
    try:
        return root.get_submodule(path)
    except AttributeError:
        raise _not_there(
            f"the model has no module {path!r}", path, [name for name, _ in root.named_modules()], node
        ) from None


def find_parameter(root: torch.nn.Module, node: Node) -> torch.Tensor:
    """The parameter or buffer that a node names, detached. The schedule sees to it that nothing changes it in place."""
    path = ".".join(part for part in node.args if part)
    try:
        return root.get_parameter(path).detach()
    except AttributeError:
        pass
    try:
        return root.get_buffer(path).detach()
    except AttributeError:
        names = [name for name, _ in (*root.named_parameters(), *root.named_buffers())]
        raise _not_there(f"the model has no parameter {path!r}", path, names, node) from None


def _not_there(what: str, path: str, names: list[str], node: Node) -> InvalidGraph:
    near = difflib.get_close_matches(path, names, n=3, cutoff=0.5)
    return InvalidGraph(
        what,
        where=str(node.source or f"node {node.id}"),
        next=f"did you mean {', '.join(near)}?" if near else "print(model) shows what it has",
    )
