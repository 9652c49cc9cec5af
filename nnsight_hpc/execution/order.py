"""Whether a graph needs a later layer's value in an earlier layer, found out before the model runs.

In which order a model calls its modules is not written anywhere. The order in which they are registered raises a suspicion;
a run of the model on fake tensors confirms it. What cannot be confirmed is left to the run, which refuses it when it gets
there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnsight_hpc.execution.failures import out_of_order
from nnsight_hpc.execution.fake import Shadow
from nnsight_hpc.graph.build import FORWARDS

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from nnsight_hpc.execution.schedule import Schedule
    from nnsight_hpc.graph.points import Point


def check_order(schedule: Schedule, tensors: Mapping[str, torch.Tensor], module: torch.nn.Module) -> None:
    """Raise `InvalidGraph`, naming both modules, where what happens at one point needs a value of a later one."""
    if not schedule.crossings or module in schedule.in_order:
        return
    places: dict[int, dict[tuple[str, str, int], int]] = {}
    for node, point, needed in schedule.crossings:
        if not _may_come_later(needed, point, module):
            continue
        if point.forward not in places:
            places[point.forward] = _places(point.forward, schedule, tensors, module)
        if _comes_later(needed, point, places[point.forward]):
            raise out_of_order(schedule.step_of(node).node, point, needed)
    schedule.in_order.add(module)


def _may_come_later(needed: Point, point: Point, module: torch.nn.Module) -> bool:
    """Whether, in the order in which modules are registered, `needed` comes after `point`."""
    if needed.call != point.call:
        return needed.call > point.call
    parent: torch.nn.Module | None = module
    parts, others = (_parts(p.module) for p in (needed, point))
    for part, other in zip(parts, others, strict=False):
        if part != other:
            names = list(parent._modules) if parent is not None else []  # noqa: SLF001 - torch's own table of children
            return part in names and other in names and names.index(part) > names.index(other)
        parent = parent._modules.get(part) if parent is not None else None  # noqa: SLF001
    if len(parts) == len(others):
        return needed.kind == "output" and point.kind != "output"
    return needed.kind == "output" if len(parts) < len(others) else point.kind != "output"


def _parts(path: str) -> list[str]:
    return path.partition(":")[0].split(".") if path else []


def _comes_later(needed: Point, point: Point, places: Mapping[tuple[str, str, int], int]) -> bool:
    """Whether a run on fake tensors comes to `needed` after `point`."""
    later, earlier = (
        places.get((p.module, "output" if p.kind == "output" else "inputs", p.call)) for p in (needed, point)
    )
    return later is not None and earlier is not None and later > earlier


def _places(
    forward: int, schedule: Schedule, tensors: Mapping[str, torch.Tensor], module: torch.nn.Module
) -> dict[tuple[str, str, int], int]:
    """The points of a forward with their order in a run on fake tensors; none where there can be no such run."""
    shadow = Shadow(module, strict=False)
    step = schedule.step_of(forward)
    try:
        for number in (*([] if not step.needs else range(forward)), forward):
            if (earlier := schedule.steps[number]) and (number == forward or earlier.node.op not in FORWARDS):
                shadow.node(earlier.node, tensors)
        passage = shadow.passage(forward)
    except Exception:  # noqa: BLE001 - what is wrong with it the run will say
        return {}
    if passage is None or passage.recording is None:
        return {}
    return {place: number for number, place in enumerate(passage.recording.points)}
