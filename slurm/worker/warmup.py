"""Where the weights go, and one real forward before a worker says that it is ready.

A model that cannot run is found out here, and not by a user.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from nnsight_hpc.execution.bounds import check_ids
from nnsight_hpc.graph import capture_graph
from nnsight_hpc.graph.nodes import map_leaves
from nnsight_hpc.models.devices import device_of
from nnsight_hpc.slurm.worker.model import Program
from nnsight_hpc.wire.errors import ReplicaFailed

if TYPE_CHECKING:
    from nnsight_hpc.models import Loaded
    from nnsight_hpc.models.factory import Example

_TOKENS = 4
logger = logging.getLogger(__name__)


def placement() -> dict[str, Any]:
    """The ``from_pretrained`` arguments that put the weights on the GPUs that Slurm gave us; none: on the CPU.

    Several GPUs of one process hold consecutive layers each (accelerate's ``device_map="auto"``).
    """
    gpus = torch.cuda.device_count()
    return {"device_map": "auto" if gpus > 1 else "cuda"} if gpus else {}


def device() -> torch.device:
    """Where a module goes that is no language model: the first GPU that Slurm gave us, or the CPU."""
    return torch.device("cuda" if torch.cuda.device_count() else "cpu")


def first_forward(loaded: Loaded) -> None:
    """Run a language model on a few tokens; raises `ReplicaFailed` with the model's own words when it cannot."""
    ids = torch.zeros((1, _TOKENS), dtype=torch.long)
    example_forward(loaded, ((), {"input_ids": ids}))


def example_forward(loaded: Loaded, example: Example | None) -> None:
    """Run a module on an example of its inputs, if there is one; raises `ReplicaFailed` with its own words when it cannot."""
    module = loaded.module
    _refuse_wrong_ids(module)
    if example is None:
        logger.warning("no forward was tried: the factory gives no example of inputs (return module, (x,))")
        return
    own = device_of(module)
    args, kwargs = map_leaves(example, lambda leaf: leaf.to(own) if isinstance(leaf, torch.Tensor) else leaf)
    try:
        with torch.no_grad():
            module(*args, **kwargs)
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


def small_program(loaded: Loaded) -> Program:
    """A request for a language model that asks for its output."""
    graph = capture_graph({"output": "output"}, loaded.identity)
    return Program(graph, dict.fromkeys(graph.tensor_names(), torch.zeros((1, _TOKENS), dtype=torch.long)))
