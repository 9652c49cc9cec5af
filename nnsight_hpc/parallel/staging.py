"""Memory that MPI can touch: a tensor's own where it is contiguous and MPI can reach it, else a copy.

A GPU's memory is reached by a CUDA-aware MPI library only; with any other, data passes through pinned host memory, which
PyTorch keeps for reuse. MPI knows nothing of CUDA streams, so what is computed must be finished before MPI reads it.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

import torch

from nnsight_hpc.parallel.mpi import MPI

_MPIX_GPU_SUPPORT_CUDA = 0  # mpi.h of MPICH 4


class Staged:
    """A tensor, and the contiguous memory that stands for it while MPI works.

    Parameters
    ----------
    tensor
        Of any shape, strides, dtype and device.
    fill
        Whether MPI reads it; else the memory's content does not matter before MPI writes it.

    Attributes
    ----------
    memory
        A contiguous tensor of the same shape and dtype; the tensor itself where that will do.
    """

    def __init__(self, tensor: torch.Tensor, *, fill: bool = True) -> None:
        self._tensor = tensor = tensor.detach()
        reachable = not tensor.is_cuda or cuda_aware()
        if reachable and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
            self.memory = tensor
        else:
            self.memory = torch.empty(
                tensor.shape,
                dtype=tensor.dtype,
                device=tensor.device if reachable else "cpu",
                pin_memory=not reachable,
            )
            if fill:
                self.memory.copy_(tensor)  # waits for the stream where it leaves the GPU
        if tensor.is_cuda and reachable:
            torch.cuda.current_stream(tensor.device).synchronize()

    def bring_back(self) -> None:
        """Put what MPI wrote into the tensor."""
        if self.memory is not self._tensor:
            self._tensor.copy_(self.memory, non_blocking=True)


@cache
def cuda_aware() -> bool:
    """Whether MPI can be given a GPU's memory, as the library itself says; NNSIGHT_HPC_CUDA_AWARE=0 or 1 overrules it.

    Open MPI: MPIX_Query_cuda_support; MPICH 4: MPIX_GPU_query_support; Cray MPICH: MPICH_GPU_SUPPORT_ENABLED.
    """
    said = os.environ.get("NNSIGHT_HPC_CUDA_AWARE") or os.environ.get("MPICH_GPU_SUPPORT_ENABLED")
    if said is not None:
        return said == "1"
    library = ctypes.CDLL(MPI.__file__)  # its symbols and those of the libmpi that it is linked to
    if hasattr(library, "MPIX_Query_cuda_support"):
        return bool(library.MPIX_Query_cuda_support())
    if hasattr(library, "MPIX_GPU_query_support"):
        supported = ctypes.c_int(0)
        library.MPIX_GPU_query_support(_MPIX_GPU_SUPPORT_CUDA, ctypes.byref(supported))
        return bool(supported.value)
    return False
