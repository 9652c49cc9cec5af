"""Collectives on tensors over one MPI communicator, each after a word of the guard.

Sums are calculated by MPI (`arithmetic`); everything else moves bytes, whatever the dtype. All memory is allocated before the
word, so that a rank that has none left can say so; the lock is held for the call, since one thread uses MPI at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.distributed import ReduceOp

from nnsight_hpc.parallel.arithmetic import arithmetic
from nnsight_hpc.parallel.buffers import LARGEST, parts, raw, typed
from nnsight_hpc.parallel.mpi import MPI
from nnsight_hpc.parallel.staging import Staged
from nnsight_hpc.parallel.words import Operation, Step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from nnsight_hpc.parallel.guard import Guard


class Collectives:
    """The collectives of one communicator, which it owns. Creating it is collective, as is each method.

    Tensors may have any strides and lie on any device; where not said otherwise, dtype and shape are the same on all
    ranks. All methods wait until they are done.
    """

    def __init__(self, comm: MPI.Intracomm, guard: Guard) -> None:
        self.rank, self.size = comm.rank, comm.size
        self._comm, self._guard, self._lock = comm, guard, guard.progress.lock
        self._channel, self._number = guard.open(comm)

    def close(self) -> None:
        """Free the communicators."""
        self._guard.close(self._channel)
        self._comm.Free()

    def agree(self, operation: Operation, length: int = 0, itemsize: int = 0) -> None:
        """Exchange the word for what comes next; see `Guard.before`."""
        self._guard.before(Step(operation, length, itemsize, self._number), self._channel)

    def barrier(self) -> None:
        self.agree(Operation.BARRIER)
        with self._lock:
            self._comm.Barrier()

    def all_reduce(self, tensor: Tensor, operation: ReduceOp.RedOpType, root: int | None = None) -> None:
        """Reduce over the ranks, in place; with `root`, only that rank's tensor changes."""
        changes = root in {None, self.rank}
        staged = Staged(tensor if changes else tensor.clone())
        how = arithmetic(tensor.dtype, operation, self.size, on_host=not staged.memory.is_cuda)
        travelling = _as(staged.memory, how.travels)
        self.agree(Operation.ALL_REDUCE, travelling.numel(), travelling.itemsize)
        for piece in _pieces(travelling):
            with self._lock:
                self._comm.Allreduce(MPI.IN_PLACE, typed(piece, how.datatype), op=how.operation)
        if changes:
            self._finish(staged, travelling, operation)

    def reduce_scatter(
        self, output: Tensor, input: Tensor, operation: ReduceOp.RedOpType, counts: Sequence[int] | None = None
    ) -> None:
        """Reduce `input` over the ranks, and keep this rank's block of it: `counts` elements each, or all alike."""
        counts = counts or [output.numel()] * self.size
        _check_fit(input, sum(counts), output)
        _check_fit(output, counts[self.rank], input)
        source, target = Staged(input), Staged(output, fill=False)
        how = arithmetic(input.dtype, operation, self.size, on_host=not source.memory.is_cuda)
        sent, memory = _as(source.memory, how.travels), target.memory
        received = memory if memory.dtype is how.travels else torch.empty_like(memory, dtype=how.travels)
        self.agree(Operation.REDUCE_SCATTER, sent.numel(), sent.itemsize)
        with self._lock:
            buffers = typed(sent, how.datatype), typed(received, how.datatype)
            self._comm.Reduce_scatter(*buffers, counts, op=how.operation)
        self._finish(target, received, operation)

    def broadcast(self, tensor: Tensor, root: int) -> None:
        """Copy the tensor of rank `root` to all."""
        staged = Staged(tensor, fill=self.rank == root)
        self.agree(Operation.BROADCAST, tensor.numel(), tensor.itemsize)
        with self._lock:
            self._comm.Bcast(raw(staged.memory), root=root)
        staged.bring_back()

    def all_gather(self, output: Tensor, input: Tensor) -> None:
        """Put the `input` of all ranks into `output`, one after another along its first dimension."""
        _check_fit(output, input.numel() * self.size, input)
        within = input.untyped_storage().data_ptr() == output.untyped_storage().data_ptr()  # MPI wants the two apart
        source, target = Staged(input.clone() if within else input), Staged(output, fill=False)
        self.agree(Operation.ALL_GATHER, input.numel(), input.itemsize)
        with self._lock:
            self._comm.Allgather(raw(source.memory), raw(target.memory, self.size))
        target.bring_back()

    def all_gather_uneven(self, outputs: Sequence[Tensor], input: Tensor) -> None:
        """Put the `input` of each rank into one of `outputs`; shapes may differ between ranks."""
        _check_fit(input, outputs[self.rank].numel(), outputs[self.rank])
        sizes = [one.nbytes for one in outputs]
        source, target = Staged(input), Staged(_room_for(outputs, input), fill=False)
        self.agree(Operation.ALL_GATHER, sum(sizes), 1)
        with self._lock:
            self._comm.Allgatherv(raw(source.memory), parts(target.memory, sizes))
        _deal(target, outputs)

    def gather(self, outputs: Sequence[Tensor], input: Tensor, root: int) -> None:
        """Put the `input` of each rank into one of `outputs` on rank `root` (empty elsewhere); shapes are alike."""
        for one in outputs:
            _check_fit(one, input.numel(), input)
        source, target = Staged(input), Staged(_room_for(outputs, input), fill=False)
        self.agree(Operation.GATHER, input.numel(), input.itemsize)
        with self._lock:
            self._comm.Gather(raw(source.memory), raw(target.memory, self.size) if outputs else None, root=root)
        _deal(target, outputs)

    def scatter(self, output: Tensor, inputs: Sequence[Tensor], root: int) -> None:
        """Put one of the `inputs` of rank `root` (empty elsewhere) into each rank's `output`; shapes are alike."""
        for one in inputs:
            _check_fit(one, output.numel(), output)
        source, target = Staged(_flat(inputs, output)), Staged(output, fill=False)
        self.agree(Operation.SCATTER, output.numel(), output.itemsize)
        with self._lock:
            self._comm.Scatter(raw(source.memory, self.size) if inputs else None, raw(target.memory), root=root)
        target.bring_back()

    def all_to_all(self, output: Tensor, input: Tensor, received: Sequence[int], sent: Sequence[int]) -> None:
        """Send a block of `input` to each rank, and put what each sends into `output`; blocks are so many elements."""
        _check_fit(output, sum(received), input)
        _check_fit(input, sum(sent), output)
        source, target = Staged(input), Staged(output, fill=False)
        sizes = [[count * input.itemsize for count in counts] for counts in (sent, received)]
        self.agree(Operation.ALL_TO_ALL)
        with self._lock:
            self._comm.Alltoallv(parts(source.memory, sizes[0]), parts(target.memory, sizes[1]))
        target.bring_back()

    def _finish(self, staged: Staged, travelling: Tensor, operation: ReduceOp.RedOpType) -> None:
        """Make an average of a sum where that is wanted, round to the tensor's dtype, put it where it belongs."""
        if operation == ReduceOp.AVG:
            whole = not (travelling.is_floating_point() or travelling.is_complex())
            travelling.div_(self.size, rounding_mode="trunc" if whole else None)
        if travelling is not staged.memory:
            staged.memory.copy_(travelling)
        staged.bring_back()


def _check_fit(tensor: Tensor, elements: int, other: Tensor) -> None:
    """Refuse sizes with which MPI would write beyond a tensor's memory."""
    if tensor.numel() != elements or tensor.dtype is not other.dtype:
        raise ValueError(
            f"a tensor of {tensor.numel()} elements of {tensor.dtype}, where {elements} of {other.dtype} are needed"
        )


def _as(memory: Tensor, dtype: torch.dtype) -> Tensor:
    return memory if memory.dtype is dtype else memory.to(dtype)  # `to` takes 2 us to do nothing


def _pieces(memory: Tensor) -> Sequence[Tensor]:
    return (memory,) if memory.numel() <= LARGEST else memory.view(-1).split(LARGEST)


def _flat(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """All elements one after another; none when there are no tensors."""
    return torch.cat([one.detach().reshape(-1) for one in tensors]) if tensors else like.new_empty(0)


def _room_for(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """Memory for all elements of some tensors."""
    return like.new_empty(sum(one.numel() for one in tensors))


def _deal(flat: Staged, tensors: Sequence[Tensor]) -> None:
    """Take apart what `_room_for` made room for."""
    blocks = flat.memory.split([one.numel() for one in tensors])
    for one, block in zip(tensors, blocks, strict=True):
        one.detach().copy_(block.view(one.shape))
