"""What a pool's description must be like, apart from what the batch system says to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnsight_hpc.daemon.policy import spec_problems
from nnsight_hpc.slurm.batch.options import time_limit
from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.names import check_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from nnsight_hpc.wire.pools import PoolSpec

_REASONS = {"tp": ": each node has a rank", "gpus_per_node": ": each rank has a GPU of its own, or none has"}


def check_spec(spec: PoolSpec, name: str) -> None:
    """Raise `InvalidInput` with all that is wrong with a spec; what Slurm allows, its executor checks."""
    check_name(name, of="pool")
    problems = [] if spec.name == name else [f"it is named {spec.name}, but was sent as {name}"]
    least = {"nodes": 1, "tp": max(1, spec.nodes), "gpus_per_node": _gpus_needed(spec)}
    for field, smallest in least.items():
        if (given := getattr(spec, field)) < smallest:
            problems.append(f"{field} is {given}, and must be at least {smallest}{_REASONS.get(field, '')}")
    if not spec.model:
        problems.append("it names no model")
    checks: tuple[Callable[[], object], ...] = (
        lambda: spec.least,
        lambda: spec.idle_seconds,
        lambda: time_limit(spec.time),
    )
    problems += [problem for check in checks if (problem := _problem(check))]
    problems += spec_problems(spec)
    if problems:
        raise InvalidInput(f"pool {name} cannot be as it is described", why="\n".join(problems))


def _problem(check: Callable[[], object]) -> str:
    try:
        check()
    except InvalidInput as error:
        return "; ".join(filter(None, [error.what, error.why, error.next]))
    return ""


def _gpus_needed(spec: PoolSpec) -> int:
    """GPUs that a node must have; several ranks never share one, and a single process may have any number."""
    return spec.ranks_per_node if spec.nodes > 0 and spec.tp > 1 and spec.gpus_per_node else 0
