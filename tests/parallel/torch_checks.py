"""What torch.distributed, functional collectives and DTensor do over the process group, against the same in one process."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.parallel.collective_checks import made


def mesh_of(rank):
    return init_device_mesh("cpu", (rank.world.size,))


def check_the_environment_is_that_of_torchrun(rank):
    """RANK, WORLD_SIZE and LOCAL_RANK are set, and torch.distributed says the same."""
    world = rank.world
    expected = (str(world.rank), str(world.size), str(world.local_rank))
    assert expected == tuple(os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    assert (world.rank, world.size, "mpi4py") == (dist.get_rank(), dist.get_world_size(), dist.get_backend())
    assert [*range(world.size)] == dist.get_process_group_ranks(dist.group.WORLD)


def check_functions_of_torch_distributed(rank):
    """Each function of torch.distributed that moves tensors gives what its documentation says."""
    me, size = rank.world.rank, rank.world.size
    inputs = [made(1, owner, (size, 4), torch.float32) for owner in range(size)]
    mine, total = inputs[me], torch.stack(inputs).sum(0)
    near = torch.testing.assert_close
    for work in (None, True):  # at once, and as work to wait for
        tensor = mine.clone()
        handle = dist.all_reduce(tensor, async_op=bool(work))
        assert work is None or (handle.wait() is True and handle.is_completed())
        near(tensor, total)
    tensor = mine.clone()
    dist.reduce(tensor, dst=size - 1)
    near(tensor, total if me == size - 1 else mine)
    tensor = mine.clone()
    dist.broadcast(tensor, src=size - 1)
    near(tensor, inputs[-1])
    blocks = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(blocks, mine)
    near(blocks, inputs)
    whole = torch.empty(size * size, 4)
    dist.all_gather_into_tensor(whole, mine)
    near(whole, torch.cat(inputs))
    row = torch.empty(1, 4)
    dist.reduce_scatter_tensor(row, mine)
    near(row[0], total[me])
    row = torch.empty(4)
    dist.reduce_scatter(row, [*mine.unbind()])
    near(row, total[me])
    output = torch.empty_like(mine)
    dist.all_to_all_single(output, mine)
    near(output, torch.stack([one[me] for one in inputs]))
    outputs = [*torch.empty_like(mine).unbind()]
    dist.all_to_all(outputs, [*mine.unbind()])
    near(torch.stack(outputs), output)
    gathered = [torch.empty_like(mine) for _ in range(size)] if me == 0 else None
    dist.gather(mine, gathered, dst=0)
    assert me != 0 or all(map(torch.equal, inputs, gathered))
    row = torch.empty(4)
    dist.scatter(row, [*inputs[0].unbind()] if me == 0 else None, src=0)
    near(row, inputs[0][me])
    dist.barrier()


def check_objects(rank):
    """Python objects are gathered and broadcast."""
    me, size = rank.world.rank, rank.world.size
    found = [None] * size
    dist.all_gather_object(found, {"rank": me, "text": "x" * me})
    assert [{"rank": owner, "text": "x" * owner} for owner in range(size)] == found
    said = [f"from {me}"]
    dist.broadcast_object_list(said, src=size - 1)
    assert [f"from {size - 1}"] == said


def check_point_to_point_is_refused(rank):
    """There is no send: torch says that the group has none, and the ranks go on."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        dist.send(torch.ones(1), (rank.world.rank + 1) % rank.world.size)
    dist.barrier()


def check_functional_collectives(rank):
    """Functional collectives, through which DTensor goes, give the same as in one process."""
    me, size = rank.world.rank, rank.world.size
    inputs = [made(2, owner, (2 * size, 3), torch.float32) for owner in range(size)]
    world, total, near = dist.group.WORLD, torch.stack(inputs).sum(0), torch.testing.assert_close
    near(functional.all_reduce(inputs[me], "sum", world).clone(), total)
    near(functional.all_reduce(inputs[me], "avg", world).clone(), total / size)
    near(
        functional.all_reduce_coalesced([inputs[me], inputs[me] + 1], "max", world)[1].clone(),
        torch.stack(inputs).amax(0) + 1,
    )
    near(functional.all_gather_tensor(inputs[me], 0, world).clone(), torch.cat(inputs))
    near(functional.all_gather_tensor(inputs[me], 1, world).clone(), torch.cat(inputs, 1))
    near(functional.all_gather_into_tensor_coalesced([inputs[me]], world)[0].clone(), torch.cat(inputs))
    near(functional.reduce_scatter_tensor(inputs[me], "sum", 0, world).clone(), total.chunk(size)[me])
    near(functional.broadcast(inputs[me], 1, world).clone(), inputs[1])
    blocks = functional.all_to_all_single(inputs[me], [2] * size, [2] * size, world).clone()
    near(blocks, torch.cat([one.chunk(size)[me] for one in inputs]))


def check_functional_collectives_are_differentiable(rank):
    """The gradient of an all-gather is the reduce-scatter of the gradients, and the other way round."""
    me, size = rank.world.rank, rank.world.size
    weights = [made(3, owner, (2 * size, 3), torch.float64) for owner in range(size)]
    x = made(4, me, (2, 3), torch.float64).requires_grad_()
    (functional.all_gather_tensor_autograd(x, 0, dist.group.WORLD) * weights[me]).sum().backward()
    torch.testing.assert_close(x.grad, torch.stack(weights).sum(0).chunk(size)[me])
    y = made(5, me, (2 * size, 3), torch.float64).requires_grad_()
    (functional.reduce_scatter_tensor_autograd(y, "sum", 0, dist.group.WORLD) * weights[me][:2]).sum().backward()
    torch.testing.assert_close(y.grad, torch.cat([one[:2] for one in weights]))


def check_dtensor_redistributes_between_all_placements(rank):
    """A DTensor keeps its value through every placement, for lengths that do not divide by the ranks, too."""
    mesh, near = mesh_of(rank), torch.testing.assert_close
    for shape in ((12, 8), (5, 7), (1, 3)):
        full = made(6, 0, shape, torch.float32)
        for first in (Shard(0), Shard(1), Replicate()):
            tensor = distribute_tensor(full, mesh, [first])
            for second in (Shard(0), Shard(1), Replicate()):
                near(tensor.redistribute(placements=[second]).full_tensor(), full)
        parts = [made(7, owner, shape, torch.float32) for owner in range(rank.world.size)]
        for second in (Shard(0), Shard(1), Replicate()):
            partial = DTensor.from_local(parts[rank.world.rank], mesh, [Partial()])
            near(partial.redistribute(placements=[second]).full_tensor(), torch.stack(parts).sum(0))


def check_dtensor_computes_and_differentiates(rank):
    """Products of sharded matrices and their gradients equal those in one process."""
    mesh = mesh_of(rank)
    a, b = (made(8 + n, 0, (12, 12), torch.float64) for n in range(2))
    for left, right in ((Shard(0), Replicate()), (Replicate(), Shard(1)), (Shard(1), Shard(0))):
        ours = [distribute_tensor(one, mesh, [p]).requires_grad_() for one, p in ((a, left), (b, right))]
        theirs = [one.clone().requires_grad_() for one in (a, b)]
        for one, other in (ours, theirs):
            (torch.relu(one @ other) ** 2).sum().backward()
        for mine, reference in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine.grad.full_tensor(), reference.grad)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x):
        return self.down(nn.functional.silu(self.up(x)))


def check_tensor_parallel_module(rank):
    """A column- and row-parallel MLP gives the outputs and all gradients of one process, in bfloat16 too."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        torch.manual_seed(0)
        reference = Mlp().to(dtype)
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallel = parallelize_module(copy.deepcopy(reference), mesh_of(rank), plan)
        x, y = (made(10, 0, (2, 5, 8), dtype).requires_grad_() for _ in range(2))
        outputs = reference(x), parallel(y)
        for output in outputs:
            output.float().pow(2).mean().backward()
        torch.testing.assert_close(outputs[1], outputs[0], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(y.grad, x.grad, rtol=tolerance, atol=tolerance)
        for mine, theirs in zip(parallel.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad, rtol=tolerance, atol=tolerance)


def check_replicated_module(rank):
    """Distributing a module gives every rank the first one's parameters."""
    torch.manual_seed(rank.world.rank)
    module = distribute_module(nn.Linear(3, 3), mesh_of(rank))
    torch.manual_seed(0)
    torch.testing.assert_close(module.weight.full_tensor(), nn.Linear(3, 3).weight)


def check_subgroups(rank):
    """A group of some ranks reduces among them, in its own order, while the others do something else."""
    me, size = rank.world.rank, rank.world.size
    some = [0, size - 1]
    group, alone = dist.new_group(some), [dist.new_group([one]) for one in range(size)][me]
    tensor = torch.tensor([float(me)])
    if me in some:
        dist.all_reduce(tensor, group=group)
        assert [float(sum(some))] == tensor.tolist()
        whole = torch.empty(2)
        dist.all_gather_into_tensor(whole, torch.tensor([float(me)]), group=group)
        assert [float(one) for one in some] == whole.tolist()
        dist.broadcast(whole, src=size - 1, group=group)
    dist.all_reduce(tensor, group=alone)
    assert [float(sum(some)) if me in some else float(me)] == tensor.tolist()
    dist.barrier()
    if me in some:
        dist.destroy_process_group(group)
    dist.destroy_process_group(alone)
    dist.barrier()


def check_meshes_of_two_dimensions(rank):
    """On a mesh of two dimensions each dimension has its own groups (as key/value heads fewer than ranks need it)."""
    size = rank.world.size
    if size % 2:
        return
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("kv", "copy"))
    full = made(12, 0, (4, 6), torch.float64)
    tensor = distribute_tensor(full, mesh, [Shard(0), Replicate()]).requires_grad_()
    assert tensor.to_local().shape == (2, 6)
    torch.testing.assert_close(tensor.full_tensor(), full)
    (tensor.full_tensor() * full).sum().backward()
    torch.testing.assert_close(tensor.grad.full_tensor(), full)
    ours = torch.tensor([float(rank.world.rank)])
    dist.all_reduce(ours, group=mesh["copy"].get_group())
    row = range(size)[rank.world.rank // (size // 2) * (size // 2) :][: size // 2]
    assert [float(sum(row))] == ours.tolist()


def check_groups_can_be_formed_again(rank):
    """After all groups are destroyed, the world can form new ones."""
    from nnsight_hpc.parallel import form_group

    dist.destroy_process_group()
    assert not dist.is_initialized()
    rank.group = form_group(rank.world, rank.guard)
    check_functions_of_torch_distributed(rank)
