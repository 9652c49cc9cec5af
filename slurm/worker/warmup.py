"""Where the weights go, and one real forward before a worker says that it is ready.

A model that cannot run is found out here, and not by a user.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from nnsight_hpc.execution.bounds import check_ids
from nnsight_hpc.execution.estimate import check_memory
from nnsight_hpc.graph import capture_graph
from nnsight_hpc.models.devices import device_of
from nnsight_hpc.wire.errors import HpcError, ReplicaFailed

if TYPE_CHECKING:
    from nnsight_hpc.models import Loaded

_TOKENS = 4


def placement() -> dict[str, Any]:
    """The ``from_pretrained`` arguments that put the weights on the GPUs that Slurm gave us; none: on the CPU.

    Several GPUs of one process hold consecutive layers each (accelerate's ``device_map="auto"``).
    """
    gpus = torch.cuda.device_count()
    return {"device_map": "auto" if gpus > 1 else "cuda"} if gpus else {}


def first_forward(loaded: Loaded) -> None:
    """Run the model on a few tokens; raises `ReplicaFailed` with the model's own words when it cannot."""
    _refuse_wrong_ids(loaded.module)
    try:
        with torch.no_grad():
            loaded.module(input_ids=torch.zeros((1, _TOKENS), dtype=torch.long, device=device_of(loaded.module)))
        _estimate(loaded)
    except Exception as error:
        raise ReplicaFailed(
            "the model was loaded, but its first forward failed",
            where=loaded.identity.id,
            why=f"{type(error).__name__}: {error}",
        ) from error


def _refuse_wrong_ids(module: torch.nn.Module) -> None:
    """On a GPU, have embeddings look at ids before a kernel does: one that they do not have would end the worker."""
    for part in module.modules():
        if type(part) is torch.nn.Embedding and part.weight.is_cuda:
            part.register_forward_pre_hook(check_ids)


def _estimate(loaded: Loaded) -> None:
    """Estimate the memory of a small graph, so that no request waits for what torch imports and we build at the first."""
    graph = capture_graph({"output": "output"}, loaded.identity)
    inputs = dict.fromkeys(graph.tensor_names(), torch.zeros((1, _TOKENS), dtype=torch.long))
    with suppress(HpcError):  # the next request learns it, if it concerns it at all
        check_memory(graph, inputs, loaded.module)
