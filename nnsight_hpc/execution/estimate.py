"""How much memory a graph will take, before it runs: refused where that is more than there is, with the estimate.

Nothing is run and nothing is allocated: see `estimate_walk` for what is counted, and `estimate_guard` for sizes that depend
on data, which are checked while the graph runs.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from nnsight_hpc.execution.estimate_budget import memory_budget
from nnsight_hpc.execution.estimate_guard import Guard
from nnsight_hpc.execution.estimate_walk import Walk
from nnsight_hpc.execution.estimate_watch import Watch
from nnsight_hpc.execution.fake_model import Twin, twin_of

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping

    import torch

    from nnsight_hpc.graph.nodes import Graph

__all__ = ["Guard", "check_memory"]

_KEPT = 128
_known: WeakKeyDictionary[Twin, OrderedDict[Any, Guard]] = WeakKeyDictionary()


def check_memory(
    graph: Graph,
    tensors: Mapping[str, torch.Tensor],
    module: torch.nn.Module,
    budget_bytes: int | None = None,
    *,
    cancelled: Callable[[], bool] | None = None,
) -> Guard:
    """Refuse a validated graph that would take more memory than there is, without running the model or taking memory.

    The result is kept by the graph's structure and the form of its tensors, with the values of those that are sizes: the same
    program on other prompts of the same length is checked once.

    Parameters
    ----------
    tensors
        The graph's tensor constants by name.
    budget_bytes
        Bytes that the graph may take besides the model; by default a share of what is free on the model's device.
    cancelled
        Asked before each node; None where nobody cancels.

    Returns
    -------
    Guard
        What is left to check while the graph runs: the nodes whose size depends on data.

    Raises
    ------
    InvalidGraph
        The estimate exceeds the budget; the message has both, and the node and user's line where that happens. Also where a
        module or parameter is not there.
    ExecutionFailed
        An operation cannot work on such shapes, as in a run.
    RequestCancelled
        `cancelled` said so.
    """
    twin = twin_of(module)
    budget = memory_budget(twin.device) if budget_bytes is None else budget_bytes
    known = _known.setdefault(twin, OrderedDict())
    form = _structure(graph), tuple((name, t.shape, t.dtype) for name, t in sorted(tensors.items()))
    sizes = tuple((name, t.item()) for name, t in sorted(tensors.items()) if t.numel() == 1)
    key: Hashable = (form, sizes) if (form, sizes) in known else form
    guard = known.get(key)
    if guard is None or guard.estimate > budget:
        twin.mode.asked = False
        guard = Guard(twin, *Walk(graph, tensors, module, budget).go(cancelled), budget)
        key = (form, sizes) if twin.mode.asked else form  # the values of tensors are asked for where they are sizes
        known[key] = guard
        if len(known) > _KEPT:
            known.popitem(last=False)
    known.move_to_end(key)
    return replace(guard, budget=budget, watch=Watch(twin.device, budget))


def _structure(graph: Graph) -> bytes:
    """A digest of what a graph computes: all but the user's lines. (``1`` and ``1.0`` differ in `repr`, not as keys.)"""
    digest = hashlib.blake2b(repr(sorted(graph.saves.items())).encode())
    for node in graph.nodes:
        digest.update(f"{node.op}{node.args!r}{dict(node.kwargs)!r}{node.block}\n".encode())
    return digest.digest()
