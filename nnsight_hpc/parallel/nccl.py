"""Collectives between GPUs by NCCL, behind the same word as those over MPI.

The word travels over MPI, on the host, before a collective is put on the GPU's stream; so no rank enters one that a peer will
never join. Tensors on the host still go over MPI. The ranks find one another through a store on the first of them, whose
address they learn over MPI: no MASTER_ADDR, no rendezvous of torchrun.

An error of NCCL or CUDA itself comes after the word, cannot be agreed on, and ends the process: after ten minutes at most, by
the watchdog of torch's ProcessGroupNCCL.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from nnsight_hpc.parallel.collectives import Collectives
from nnsight_hpc.parallel.words import Operation
from nnsight_hpc.wire.errors import Unreachable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from nnsight_hpc.parallel.guard import Guard
    from nnsight_hpc.parallel.mpi import MPI

_ANY = "0.0.0.0"  # noqa: S104 - the other nodes of the job connect to it
_PATIENCE = timedelta(seconds=30)


class InnerCollectives(Collectives):
    """Collectives that a backend of torch does for tensors on its device, and MPI for all others.

    When a method returns, the current stream waits for the result, the host does not.

    Parameters
    ----------
    inner
        The backend, over the ranks of `comm`.
    device
        Where its tensors lie.
    """

    def __init__(self, comm: MPI.Intracomm, guard: Guard, inner: dist.Backend, device: torch.device) -> None:
        super().__init__(comm, guard)
        self._inner, self._device = inner, device.type
        # Backends connect at their first collective: seconds that no request should pay, errors that none should meet.
        inner.allreduce([torch.ones(1, device=device)]).wait()

    def close(self) -> None:
        self._inner.shutdown()
        super().close()

    def all_reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType, root: int | None = None) -> None:
        if not self._takes(tensor):
            return super().all_reduce(tensor, operation, root)
        changes = root in {None, self.rank}
        dense = _dense(tensor) if changes else tensor.detach().clone(memory_format=torch.contiguous_format)
        self.agree(Operation.ALL_REDUCE, tensor.numel(), tensor.itemsize)
        self._inner.allreduce([dense], operation).wait()
        if changes:
            _return(dense, tensor)
        return None

    def reduce_scatter(
        self, output: Tensor, input: Tensor, operation: dist.ReduceOp.RedOpType, counts: Sequence[int] | None = None
    ) -> None:
        if not self._takes(input):
            return super().reduce_scatter(output, input, operation, counts)
        counts = counts or [output.numel()] * self.size
        dense, blocks = _dense(output), [*_dense(input).view(-1).split([*counts])]
        self.agree(Operation.REDUCE_SCATTER, input.numel(), input.itemsize)
        self._inner.reduce_scatter(dense.view(-1), blocks, operation).wait()
        return _return(dense, output)

    def broadcast(self, tensor: Tensor, root: int) -> None:
        if not self._takes(tensor):
            return super().broadcast(tensor, root)
        dense = _dense(tensor)
        self.agree(Operation.BROADCAST, tensor.numel(), tensor.itemsize)
        self._inner.broadcast(dense, root).wait()
        return _return(dense, tensor)

    def all_gather(self, output: Tensor, input: Tensor) -> None:
        if not self._takes(input):
            return super().all_gather(output, input)
        dense, source = _dense(output), _dense(input)
        self.agree(Operation.ALL_GATHER, input.numel(), input.itemsize)
        self._inner._allgather_base(dense.view(-1), source.view(-1)).wait()  # noqa: SLF001 - it has no other name before torch 2.13
        return _return(dense, output)

    def all_gather_uneven(self, outputs: Sequence[Tensor], input: Tensor) -> None:
        if not self._takes(input):
            return super().all_gather_uneven(outputs, input)
        dense, source = [*map(_dense, outputs)], _dense(input)
        self.agree(Operation.ALL_GATHER, sum(one.numel() for one in outputs), input.itemsize)
        self._inner.allgather(dense, source).wait()
        return _return_all(dense, outputs)

    def gather(self, outputs: Sequence[Tensor], input: Tensor, root: int) -> None:
        if not self._takes(input):
            return super().gather(outputs, input, root)
        dense, source = [*map(_dense, outputs)], _dense(input)
        self.agree(Operation.GATHER, input.numel(), input.itemsize)
        self._inner.gather(dense, source, root).wait()
        return _return_all(dense, outputs)

    def scatter(self, output: Tensor, inputs: Sequence[Tensor], root: int) -> None:
        if not self._takes(output):
            return super().scatter(output, inputs, root)
        dense, sources = _dense(output), [*map(_dense, inputs)]
        self.agree(Operation.SCATTER, output.numel(), output.itemsize)
        self._inner.scatter(dense, sources, root).wait()
        return _return(dense, output)

    def all_to_all(self, output: Tensor, input: Tensor, received: Sequence[int], sent: Sequence[int]) -> None:
        if not self._takes(input):
            return super().all_to_all(output, input, received, sent)
        dense, source = _dense(output), _dense(input).view(-1)
        self.agree(Operation.ALL_TO_ALL)
        self._inner.alltoall_base(dense.view(-1), source, [*received], [*sent]).wait()
        return _return(dense, output)

    def _takes(self, tensor: Tensor) -> bool:
        return bool(tensor.device.type == self._device)


def nccl_backend(comm: MPI.Intracomm) -> dist.Backend:
    """NCCL over the ranks of a communicator; collective."""
    return dist.ProcessGroupNCCL(shared_store(comm), comm.rank, comm.size, dist.ProcessGroupNCCL.Options())


def shared_store(comm: MPI.Intracomm) -> dist.Store:
    """A store that the first rank of a communicator keeps and all reach; collective.

    Raises
    ------
    Unreachable
        The first rank's node cannot be reached under its name.
    """
    server = dist.TCPStore(_ANY, 0, None, is_master=True, wait_for_workers=False) if comm.rank == 0 else None
    host, port = comm.bcast((socket.gethostname(), server.port) if server else None)
    if server:
        return server
    try:
        return dist.TCPStore(host, port, None, is_master=False, timeout=_PATIENCE)
    except dist.DistError as error:
        raise Unreachable(
            f"the ranks on {socket.gethostname()} cannot reach {host}, port {port}",
            where=f"the store with which NCCL starts, on {host}",
            why=str(error).split("\n", 1)[0],
            next="the nodes of a job must reach one another by TCP under the names that hostname prints",
        ) from None


def _dense(tensor: Tensor) -> Tensor:
    """The tensor without gaps: itself, or a copy."""
    return tensor.detach().contiguous()


def _return(dense: Tensor, tensor: Tensor) -> None:
    """Put what came in the place of `_dense`'s copy, if it is one."""
    if dense.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(dense)


def _return_all(dense: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    for one, tensor in zip(dense, tensors, strict=True):
        _return(one, tensor)
