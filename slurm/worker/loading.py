"""Loading the pool's model: its small files are handed out, its weights are read, and it answers one forward."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from nnsight_hpc.models import Loaded
    from nnsight_hpc.slurm.worker.control import Control
    from nnsight_hpc.slurm.worker.model import Model
    from nnsight_hpc.slurm.worker.team import Team
    from nnsight_hpc.wire.places import Places
    from nnsight_hpc.wire.pools import PoolSpec

logger = logging.getLogger(__name__)


def load_model(spec: PoolSpec, control: Control, places: Places, team: Team | None) -> Model:
    """The model of a pool, ready to serve; `control` hears how far it is.

    Raises
    ------
    Drained
        The worker is to end.
    HpcError
        The model cannot be loaded, or cannot run.
    """
    from nnsight_hpc.models.factory import identify_weights  # noqa: PLC0415 - torch takes seconds; register before
    from nnsight_hpc.slurm.worker.skeleton import publish  # noqa: PLC0415

    begun = time.monotonic()
    control.leave_if_draining()
    if spec.factory is None:
        control.identified(publish(spec, places.model_copy(control.replica)))
        model = team.lead(spec, control) if team else _load_alone(spec, control)
    elif team is None:
        control.identified(identify_weights(spec.model))
        model = _load_made(spec, spec.factory, control)
    else:
        raise InvalidInput(
            "a factory's module is held by one rank", where=f"pool {spec.name}", next="set tp = 1, and more replicas"
        )
    logger.info("%s is ready to serve after %.1f s", spec.model, time.monotonic() - begun)
    return model


def _load_made(spec: PoolSpec, factory: str, control: Control) -> Model:
    """A module of the pool's owner's own; whether it runs is known only where its factory gives an example of its inputs."""
    from nnsight_hpc.models.factory import load_factory  # noqa: PLC0415 - as in load_model
    from nnsight_hpc.slurm.worker.model import Alone  # noqa: PLC0415
    from nnsight_hpc.slurm.worker.node_cache import local_copy  # noqa: PLC0415
    from nnsight_hpc.slurm.worker.warmup import device, example_forward  # noqa: PLC0415

    weights = Path(spec.model).expanduser()
    if spec.node_cache is not None and weights.is_dir():
        weights = local_copy(weights, spec.node_cache, moved=control.copying, leave=control.draining.is_set)
    loaded, example = load_factory(factory, str(weights), dtype=spec.dtype, device=device(), progress=control.loading)
    example_forward(loaded, example)
    return Alone(as_asked_for(spec, loaded))


def _load_alone(spec: PoolSpec, control: Control) -> Model:
    from nnsight_hpc.models import load  # noqa: PLC0415 - as in load_model
    from nnsight_hpc.models.load import find_folder  # noqa: PLC0415
    from nnsight_hpc.slurm.worker.model import Alone  # noqa: PLC0415
    from nnsight_hpc.slurm.worker.node_cache import local_copy  # noqa: PLC0415
    from nnsight_hpc.slurm.worker.warmup import first_forward, placement  # noqa: PLC0415

    folder = find_folder(spec.model, spec.revision)
    if spec.node_cache is not None:
        folder = local_copy(folder, spec.node_cache, moved=control.copying, leave=control.draining.is_set)
    loaded = as_asked_for(spec, load(str(folder), dtype=spec.dtype, progress=control.loading, **placement()))
    first_forward(loaded)
    return Alone(loaded)


def as_asked_for(spec: PoolSpec, loaded: Loaded) -> Loaded:
    """What was loaded from some folder, under the name that the pool gives it."""
    identity = msgspec.structs.replace(loaded.identity, id=spec.model, revision=spec.revision)
    return replace(loaded, identity=identity)
