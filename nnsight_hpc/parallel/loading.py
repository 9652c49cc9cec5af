"""Loading a model split over the ranks: every rank reads its slices from the files, and nothing else.

transformers replaces the parameters by DTensors without memory, and reads into each what belongs to this rank, out of files
that are mapped into memory. What a plan does not name (norms, biases that are added after a sum) is whole on every rank.
Reading mapped files needs no memory of its own; `disable_mmap` would cost a rank the whole model.
"""

from __future__ import annotations

import logging
import re
import time
from importlib.metadata import version
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoConfig

from nnsight_hpc.models.load import (
    Loaded,
    dtype_of,
    find_folder,
    identify,
    load_tokenizer,
    read_weights,
    size_of,
    tree_of,
)
from nnsight_hpc.parallel.checks import check_equal
from nnsight_hpc.parallel.degree import check_degree
from nnsight_hpc.parallel.plans import cannot_split, rules_for
from nnsight_hpc.parallel.tally import Tally
from nnsight_hpc.parallel.upstream import ALL_PARALLEL_STYLES, DistributedConfig, TensorParallelLayer, style_of
from nnsight_hpc.wire.errors import Incompatible, ReplicaFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from nnsight_hpc.parallel.guard import Guard
    from nnsight_hpc.parallel.world import World
    from nnsight_hpc.wire.messages import ModelIdentity

logger = logging.getLogger(__name__)


def load_parallel(
    model: str,
    world: World,
    guard: Guard,
    *,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    progress: Callable[[list[int], int], None] | None = None,
    replicated: bool = False,
) -> Loaded:
    """Load a model over all ranks of the world; collective, after `form_group`, and not within `Guard.run`.

    Parameters
    ----------
    model, dtype, revision
        As for `models.load`.
    progress
        Called on rank 0, from the thread that calls this, with the bytes of the model's files that each rank has done
        with, and how many there are in all. A rank has done with a tensor when it has read its slice of it.
    replicated
        Load it whole on every rank: for families that cannot be split.

    Returns
    -------
    Loaded
        Its module's parameters are DTensors where they are split. Its forward, and hooks on it, see this rank's part.

    Raises
    ------
    NotFound, InvalidInput
        As `models.load`; or the model cannot be split over so many ranks.
    Incompatible
        The ranks found different models; or transformers did not split what it was told to.
    ReplicaFailed
        A rank has not the memory for its part.
    """
    folder, identity = guard.run(lambda: _find(model, revision))
    check_equal(world, {"model": identity.fingerprint, "dtype": str(dtype)}, "the ranks found different models")
    begun, total = time.monotonic(), size_of(folder)
    tell = progress or (lambda _done, _total: None)
    tally = Tally(world, guard.progress, lambda shares: tell([int(share * total) for share in shares], total))

    def load() -> Loaded:
        with tally:
            module = _read(folder, dtype, world, tally.report, split=world.size > 1 and not replicated)
            tokenizer = load_tokenizer(folder)
        return Loaded(module, tokenizer, identity)

    try:
        loaded = guard.run(load)
    finally:
        tally.close()
    held, seconds = held_bytes(loaded.module), time.monotonic() - begun
    logger.info("%s holds %d MB of %d MB after %.1f s", world.name(world.rank), held >> 20, total >> 20, seconds)
    return loaded


def held_bytes(module: nn.Module) -> int:
    """Bytes of parameters in this process's memory."""
    return sum(p.to_local().nbytes if isinstance(p, DTensor) else p.nbytes for p in module.parameters())


def _find(model: str, revision: str | None) -> tuple[Path, ModelIdentity]:
    folder = find_folder(model, revision)
    return folder, identify(model, folder, revision)


def _read(
    folder: Path, dtype: str | torch.dtype, world: World, report: Callable[[float], None], *, split: bool
) -> nn.Module:
    try:
        if not split:
            return read_weights(folder, dtype, report, device_map={"": world.device})
        config = AutoConfig.from_pretrained(folder)
        config.dtype = config.dtype if dtype == "auto" else dtype_of(dtype)
        check_degree(config, world.size)
        rules = rules_for(tree_of(config), world.size)
        distributed = DistributedConfig(tp_size=world.size, tp_plan=rules)
        module = read_weights(folder, dtype, report, distributed_config=distributed)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ReplicaFailed(
            "there is not the memory for this rank's part of the model",
            where=f"{world.name(world.rank)}, {world.device}",
            why=str(error),
            next="use more ranks, nodes with more memory, or fewer ranks a node",
        ) from error
    split_names = _check_split(module, rules, world.device)
    _check_conversions(module, split_names)
    return module


def _check_split(module: nn.Module, rules: Mapping[str, str], device: torch.device) -> list[str]:
    """The names of the parameters that the rules split, once it is sure that they are.

    An interface of transformers that moved may leave them whole without a word.

    Raises
    ------
    Incompatible
        No parameter is split, or one that should be is whole or larger than this rank's part, or on another device.
    """
    splitting = {path: name for path, name in rules.items() if _splits(name)}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    planned = [name for name in parameters if style_of(name, splitting)]
    faults = [f"{name} is whole" for name in planned if not _is_split(parameters[name])]
    faults += [f"{name} is on {one.device}" for name, one in parameters.items() if one.device != device]
    if faults or not planned:
        raise Incompatible(
            "transformers did not split the model as its plan says",
            where=f"version {version('transformers')}",
            why="\n".join(faults[:10]) or "it has no parameter that the plan names",
            next="install a version of transformers that nnsight-hpc allows",
        )
    return planned


def _check_conversions(module: Any, split: list[str]) -> None:
    """Refuse weights that lie in one tensor of the files: transformers slices it before it cuts the weights apart.

    Each rank would then hold other rows than its own, and the results were wrong. (Seen with `hrm_text` in 5.23.)
    """
    for conversion in module._weight_conversions:  # noqa: SLF001 - of those that were used
        patterns = [re.sub(r"\\\d+", ".*", target) for target in conversion.target_patterns]
        fused = [name for name in split if any(re.search(pattern, name) for pattern in patterns)]
        if len(patterns) > 1 and fused:
            why = f"their files hold {', '.join(conversion.target_patterns)} in one tensor"
            raise cannot_split(module.config, why)


def _splits(style: str) -> bool:
    return type(ALL_PARALLEL_STYLES[style]).shard_param is not TensorParallelLayer.shard_param


def _is_split(parameter: Tensor) -> bool:
    """Whether a parameter is this rank's part; a bias may be whole, where it is added after a sum."""
    if not isinstance(parameter, DTensor):
        return False
    local, most = parameter.to_local().numel(), parameter.numel()
    for ranks, placement in zip(parameter.device_mesh.shape, parameter.placements, strict=True):
        if hasattr(placement, "dim"):
            length = parameter.shape[placement.dim]
            most = most // length * ceil(length / ranks)
    return parameter.ndim == 1 or (any(hasattr(p, "dim") for p in parameter.placements) and local <= most)
