"""The process group that torch.distributed, DTensor and transformers use: their names for the collectives over MPI.

It is registered as a backend ``mpi4py`` (torch's own ``mpi`` has to be compiled in). A group written in Python stands
for the whole group, on all devices. All its collectives are done when they return, so the `Work` that they give back is
nothing to wait for.

Newer versions of torch have other names for some methods; both names are there. Functional collectives, and with
them DTensor, come in through the ``_coalesced`` ones. See torch/csrc/distributed/c10d/PyProcessGroup.hpp.

There is no `send` and `recv`: between two ranks of many no word can be agreed on, so a fault would hang the other.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch.futures import Future

from nnsight_hpc.parallel.collectives import Collectives
from nnsight_hpc.parallel.nccl import InnerCollectives, nccl_backend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from nnsight_hpc.parallel.guard import Guard
    from nnsight_hpc.parallel.world import World

BACKEND = "mpi4py"


class Done(dist.Work):  # type: ignore[misc]  # mypy does not look into torch
    """Work that is done."""

    def __init__(self, result: object) -> None:
        super().__init__()
        self._result = result

    def wait(self, timeout: object = None) -> bool:  # noqa: ARG002 - torch's signature
        return True

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True

    def result(self) -> object:
        return self._result

    def get_future(self) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(self._result)
        return future


class MpiGroup(dist.ProcessGroup):  # type: ignore[misc]  # as above
    """The collectives of one communicator under torch's names. Creating and shutting it down is collective."""

    def __init__(self, collectives: Collectives) -> None:
        super().__init__(collectives.rank, collectives.size)
        self._collectives = collectives
        self._name = self._description = ""

    def __repr__(self) -> str:
        return f"MpiGroup(rank {self._collectives.rank} of {self._collectives.size})"

    # What torch asks of a group. The base class keeps names in its backends, of which this has none.

    def getBackendName(self) -> str:  # noqa: N802
        return BACKEND

    def getGroupName(self) -> str:  # noqa: N802
        return self._name

    def setGroupName(self, name: str) -> None:  # noqa: N802
        self._name = name

    def getGroupDesc(self) -> str:  # noqa: N802
        return self._description

    def setGroupDesc(self, description: str) -> None:  # noqa: N802
        self._description = description

    def shutdown(self) -> None:
        self._collectives.close()

    def abort(self) -> None:
        """Nothing: a collective over MPI cannot be given up."""

    # Collectives. The lists hold one tensor, or several that are treated one after another.

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> Done:
        for tensor in tensors:
            self._collectives.all_reduce(tensor, _operation(opts))
        return Done(tensors)

    allreduce_coalesced = allreduce

    def reduce(self, tensors: Sequence[Tensor], opts: Any) -> Done:
        for tensor in tensors:
            self._collectives.all_reduce(tensor, _operation(opts), root=opts.rootRank)
        return Done(tensors)

    def broadcast(self, tensors: Sequence[Tensor], opts: Any = None) -> Done:
        for tensor in tensors:
            self._collectives.broadcast(tensor, opts.rootRank if opts else 0)
        return Done(tensors)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Done:  # noqa: ARG002
        self._collectives.all_gather(output, input)
        return Done([output])

    def all_gather_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> Done:
        for output, block in zip(outputs, inputs, strict=True):
            self.all_gather_single(output, block, opts)
        return Done(outputs)

    def allgather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = None) -> Done:  # noqa: ARG002
        for blocks, block in zip(outputs, inputs, strict=True):
            self._collectives.all_gather_uneven(blocks, block)
        return Done(outputs)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Done:
        self._collectives.reduce_scatter(output, input, _operation(opts))
        return Done([output])

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> Done:
        for output, blocks in zip(outputs, inputs, strict=True):
            self.reduce_scatter_single(output, blocks, opts)
        return Done(outputs)

    def reduce_scatter(self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any = None) -> Done:
        for output, blocks in zip(outputs, inputs, strict=True):
            counts = [block.numel() for block in blocks]
            self._collectives.reduce_scatter(output, _flat(blocks), _operation(opts), counts)
        return Done(outputs)

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        received: Sequence[int] = (),
        sent: Sequence[int] = (),
        opts: Any = None,  # noqa: ARG002
    ) -> Done:
        counts = self._elements(output, received), self._elements(input, sent)
        self._collectives.all_to_all(output, input, *counts)
        return Done([output])

    def alltoall(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None) -> Done:  # noqa: ARG002
        received, sent = [one.numel() for one in outputs], [one.numel() for one in inputs]
        flat = outputs[0].new_empty(sum(received))
        self._collectives.all_to_all(flat, _flat(inputs), received, sent)
        for one, block in zip(outputs, flat.split(received), strict=True):
            one.detach().copy_(block.view(one.shape))
        return Done(outputs)

    def scatter(self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any) -> Done:
        for number, output in enumerate(outputs):
            self._collectives.scatter(output, inputs[number] if inputs else [], opts.rootRank)
        return Done(outputs)

    def gather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any) -> Done:
        for number, block in enumerate(inputs):
            self._collectives.gather(outputs[number] if outputs else [], block, opts.rootRank)
        return Done(outputs)

    def barrier(self, opts: Any = None) -> Done:  # noqa: ARG002
        self._collectives.barrier()
        return Done([])

    def _elements(self, tensor: Tensor, rows: Sequence[int]) -> list[int]:
        """How many elements each rank's rows have; alike when no numbers of rows are given."""
        if not rows:
            return [tensor.numel() // self._collectives.size] * self._collectives.size
        return [number * prod(tensor.shape[1:]) for number in rows]

    # The names before torch 2.13.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single


def form_group(world: World, guard: Guard) -> dist.ProcessGroup:
    """Make the default process group of torch.distributed from the world; collective.

    It must be there before a model is loaded: transformers would otherwise form one with gloo or NCCL. Subgroups
    (``new_group``, a mesh of several dimensions) become communicators of their own. `dist.destroy_process_group` ends it.
    """

    def create(options: Any, _: object) -> MpiGroup:
        return MpiGroup(_collectives(world, guard, options.global_ranks_in_group))

    dist.Backend.register_backend(BACKEND, create, extended_api=True, devices=["cpu", "cuda"])
    # Ranks find one another through MPI, so nothing is ever read from the store.
    dist.init_process_group(BACKEND, store=dist.HashStore(), rank=world.rank, world_size=world.size)
    return dist.group.WORLD


def _collectives(world: World, guard: Guard, ranks: Sequence[int]) -> Collectives:
    if len(ranks) in {0, world.size}:  # torch names no ranks for the default group
        comm = world.comm.Dup()
    else:
        members = world.comm.Get_group().Incl(list(ranks))
        comm = world.comm.Create_group(members, tag=crc32(repr(list(ranks)).encode()) % 2**15)
    if world.device.type == "cuda" and dist.is_nccl_available():
        return InnerCollectives(comm, guard, nccl_backend(comm), world.device)
    return Collectives(comm, guard)


def _operation(opts: Any) -> dist.ReduceOp.RedOpType:
    return opts.reduceOp.op if opts else dist.ReduceOp.SUM


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([one.detach().reshape(-1) for one in tensors])
