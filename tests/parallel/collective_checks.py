"""Every collective, over MPI and by an inner backend, against the same calculated in one process from all ranks' inputs.

The inner backend here is gloo; on GPUs it is NCCL, behind the very same code.
"""

from __future__ import annotations

from datetime import timedelta
from functools import cache
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch.distributed import ReduceOp

from nnsight_hpc.parallel.collectives import Collectives
from nnsight_hpc.parallel.nccl import InnerCollectives, nccl_backend, shared_store

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WHOLE = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
BYTES = (*FLOATS, *WHOLE, torch.bool, torch.complex64, torch.float8_e4m3fn)
OF_GLOO = (*FLOATS, torch.int8, torch.int32, torch.int64, torch.uint8)
SHAPES = ((1,), (7,), (3, 5), (2, 0, 4), (4, 33, 2))
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@cache
def over_mpi(world, guard):
    return Collectives(world.comm.Dup(), guard)


@cache
def by_inner(world, guard):
    comm = world.comm.Dup()
    if world.device.type == "cuda":
        return InnerCollectives(comm, guard, nccl_backend(comm), world.device)
    gloo = dist.ProcessGroupGloo(shared_store(comm), world.rank, world.size, timedelta(seconds=60))
    return InnerCollectives(comm, guard, gloo, torch.device("cpu"))


def both(rank):
    if rank.group is None:  # ranks that share a GPU: NCCL refuses them
        return (over_mpi(rank.world, rank.guard),)
    return over_mpi(rank.world, rank.guard), by_inner(rank.world, rank.guard)


def made(seed: int, owner: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What rank `owner` puts in: the same wherever it is made."""
    generator = torch.Generator("cpu").manual_seed(1000 * seed + owner)
    if dtype in (torch.bool, *WHOLE):
        values = torch.randint(0, 2 if dtype is torch.bool else 5, shape, generator=generator, device="cpu")
    else:
        values = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return values.to(dtype).to(torch.get_default_device())


def reduced(values: list[torch.Tensor], operation) -> torch.Tensor:
    """The reduction in one process, in double precision, rounded once."""
    wide = [v.double() if v.is_floating_point() else v.long() for v in values]
    result = wide[0]
    for other in wide[1:]:
        if operation in (ReduceOp.SUM, ReduceOp.AVG):
            result = result + other
        elif operation == ReduceOp.PRODUCT:
            result = result * other
        else:
            result = (torch.maximum if operation == ReduceOp.MAX else torch.minimum)(result, other)
    if operation == ReduceOp.AVG:
        result = result / len(values)
    return result.to(values[0].dtype)


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype is expected.dtype
    tolerance = TOLERANCE.get(expected.dtype, 0)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=4 * tolerance)


def check_all_reduce_of_every_dtype_shape_and_operation(rank):
    """An all-reduce gives the sum, average, product, minimum and maximum, rounded once, for each dtype and shape."""
    world = rank.world
    operations = (ReduceOp.SUM, ReduceOp.AVG, ReduceOp.PRODUCT, ReduceOp.MIN, ReduceOp.MAX)
    for seed, (dtype, shape, operation) in enumerate(product(FLOATS + WHOLE, SHAPES, operations)):
        if operation == ReduceOp.AVG and dtype in WHOLE:
            continue
        inputs = [made(seed, owner, shape, dtype) for owner in range(world.size)]
        expected = reduced(inputs, operation)
        for collectives in both(rank):
            if isinstance(collectives, InnerCollectives) and (operation == ReduceOp.AVG or dtype not in OF_GLOO):
                continue
            tensor = inputs[world.rank].clone()
            collectives.all_reduce(tensor, operation)
            assert_near(tensor, expected)


def check_half_precision_sums_are_rounded_once(rank):
    """A bfloat16 sum over MPI is bitwise the double-precision sum rounded to bfloat16, whatever the number of ranks."""
    inputs = [made(77, owner, (4096,), torch.bfloat16) for owner in range(rank.world.size)]
    tensor = inputs[rank.world.rank].clone()
    over_mpi(rank.world, rank.guard).all_reduce(tensor, ReduceOp.SUM)
    exact = torch.stack(inputs).float().sum(0).bfloat16()
    assert torch.equal(exact, tensor)


def check_reductions_are_the_same_bits_on_all_ranks(rank):
    """What ranks get from an all-reduce is bitwise the same on all of them, for long tensors too."""
    for dtype, length in product(FLOATS, (5, 1000, 300_001)):
        tensor = made(5, rank.world.rank, (length,), dtype)
        over_mpi(rank.world, rank.guard).all_reduce(tensor, ReduceOp.SUM)
        others = rank.world.comm.allgather(tensor)
        assert all(torch.equal(other, tensor) for other in others)


def check_bool_and_bits(rank):
    """Truth values reduce as or, and, exclusive or; whole numbers by their bits."""
    collectives, size = over_mpi(rank.world, rank.guard), rank.world.size
    values = [made(9, owner, (64,), torch.bool) for owner in range(size)]
    counts = torch.stack(values).sum(0)
    expected = {
        **dict.fromkeys((ReduceOp.SUM, ReduceOp.MAX, ReduceOp.BOR), counts > 0),
        **dict.fromkeys((ReduceOp.PRODUCT, ReduceOp.MIN, ReduceOp.BAND), counts == size),
        ReduceOp.BXOR: counts % 2 == 1,
    }
    for operation, result in expected.items():
        for dtype in (torch.bool, torch.uint8) if operation not in (ReduceOp.SUM, ReduceOp.PRODUCT) else (torch.bool,):
            tensor = values[rank.world.rank].to(dtype, copy=True)
            collectives.all_reduce(tensor, operation)
            assert torch.equal(result.to(dtype), tensor), (operation, dtype)


def check_averages_of_whole_numbers_are_cut_off(rank):
    """An average of whole numbers is a whole number, toward zero."""
    tensor = torch.tensor([-7, 7]) * (rank.world.rank + 1)
    over_mpi(rank.world, rank.guard).all_reduce(tensor, ReduceOp.AVG)
    total = 7 * sum(range(1, rank.world.size + 1))
    assert [-(total // rank.world.size), total // rank.world.size] == tensor.tolist()


def check_a_reduction_to_one_rank_changes_no_other(rank):
    """With a root, only that rank's tensor becomes the sum."""
    for collectives, root in product(both(rank), range(rank.world.size)):
        inputs = [made(3, owner, (6, 5), torch.float32) for owner in range(rank.world.size)]
        tensor = inputs[rank.world.rank].clone()
        collectives.all_reduce(tensor, ReduceOp.SUM, root=root)
        assert_near(tensor, reduced(inputs, ReduceOp.SUM) if rank.world.rank == root else inputs[rank.world.rank])


def check_reduce_scatter_of_even_and_uneven_blocks(rank):
    """A reduce-scatter gives each rank its block of the sum, of one size or of sizes of their own."""
    size = rank.world.size
    for collectives, dtype, counts in product(both(rank), FLOATS, ([6] * size, [3 * n for n in range(size)])):
        inputs = [made(11, owner, (sum(counts),), dtype) for owner in range(size)]
        expected = reduced(inputs, ReduceOp.SUM).split(counts)[rank.world.rank]
        output = torch.full_like(expected, 9)
        uneven = counts if counts[0] == 0 else None
        if uneven and isinstance(collectives, InnerCollectives):
            continue  # gloo has none
        collectives.reduce_scatter(output, inputs[rank.world.rank].clone(), ReduceOp.SUM, uneven)
        assert_near(output, expected)


def check_a_reduce_scatter_can_average(rank):
    """An average over ranks is scattered, also in half precision."""
    size = rank.world.size
    for dtype in FLOATS:
        inputs = [made(12, owner, (size, 5), dtype) for owner in range(size)]
        output = torch.empty(5, dtype=dtype)
        over_mpi(rank.world, rank.guard).reduce_scatter(output, inputs[rank.world.rank], ReduceOp.AVG)
        assert_near(output, reduced(inputs, ReduceOp.AVG)[rank.world.rank])


def check_broadcast_of_every_dtype_from_every_rank(rank):
    """A broadcast copies the bytes of the root's tensor, of any dtype."""
    for collectives, dtype, root in product(both(rank), BYTES, range(rank.world.size)):
        if isinstance(collectives, InnerCollectives) and dtype not in OF_GLOO:
            continue
        tensor = made(13, rank.world.rank, (5, 3), dtype)
        collectives.broadcast(tensor, root)
        assert_bytes(made(13, root, (5, 3), dtype), tensor)


def check_all_gather_of_every_dtype_and_shape(rank):
    """An all-gather puts the ranks' bytes one after another."""
    for collectives, dtype, shape in product(both(rank), BYTES, SHAPES):
        if isinstance(collectives, InnerCollectives) and dtype not in OF_GLOO:
            continue
        output = torch.empty((rank.world.size, *shape), dtype=dtype)
        collectives.all_gather(output, made(14, rank.world.rank, shape, dtype))
        assert_bytes(torch.stack([made(14, owner, shape, dtype) for owner in range(rank.world.size)]), output)


def check_all_gather_within_one_tensor(rank):
    """The input of an all-gather may be this rank's part of the output."""
    output = torch.zeros(rank.world.size, 4)
    output[rank.world.rank] = made(15, rank.world.rank, (4,), torch.float32)
    over_mpi(rank.world, rank.guard).all_gather(output, output[rank.world.rank])
    assert_bytes(torch.stack([made(15, owner, (4,), torch.float32) for owner in range(rank.world.size)]), output)


def check_all_gather_of_uneven_shards(rank):
    """Shards may have a shape of their own on each rank, an empty one too."""
    for dtype in BYTES:
        expected = [made(16, owner, (owner, 3), dtype) for owner in range(rank.world.size)]
        outputs = [torch.empty_like(one) for one in expected]
        over_mpi(rank.world, rank.guard).all_gather_uneven(outputs, expected[rank.world.rank].clone())
        assert [*map(same_bytes, expected, outputs)] == [True] * rank.world.size


def check_gather_and_scatter_for_every_root(rank):
    """A gather brings all to the root, a scatter takes it apart again."""
    for collectives, dtype, root in product(both(rank), (torch.float32, torch.int64), range(rank.world.size)):
        expected = [made(17, owner, (2, 3), dtype) for owner in range(rank.world.size)]
        at_root = rank.world.rank == root
        gathered = [torch.zeros_like(one) for one in expected] if at_root else []
        collectives.gather(gathered, expected[rank.world.rank].clone(), root)
        assert not at_root or all(map(torch.equal, expected, gathered))
        output = torch.zeros_like(expected[0])
        collectives.scatter(output, gathered, root)
        assert torch.equal(expected[rank.world.rank], output)


def check_all_to_all_of_even_and_uneven_blocks(rank):
    """Each rank gets its block from every other, of sizes that differ from pair to pair."""
    me, size = rank.world.rank, rank.world.size
    for collectives, even in product(both(rank), (True, False)):
        counts = [[3 if even else (2 * a + b) % 4 for b in range(size)] for a in range(size)]
        sent = [made(18, owner, (sum(counts[owner]),), torch.bfloat16) for owner in range(size)]
        expected = torch.cat([sent[owner].split(counts[owner])[me] for owner in range(size)])
        output, received = torch.empty_like(expected), [counts[owner][me] for owner in range(size)]
        collectives.all_to_all(output, sent[me].clone(), received, counts[me])
        assert_bytes(expected, output)


def check_tensors_with_gaps(rank):
    """Transposed, sliced and expanded tensors work as contiguous ones, and nothing beside them changes."""
    me, size = rank.world.rank, rank.world.size
    for collectives in both(rank):
        inputs = [made(19, owner, (6, 8), torch.float32) for owner in range(size)]
        whole = inputs[me].clone()
        collectives.all_reduce(whole[1::2, 2:5].t(), ReduceOp.SUM)
        expected = inputs[me].clone()
        expected[1::2, 2:5] = reduced([one[1::2, 2:5] for one in inputs], ReduceOp.SUM)
        assert_near(whole, expected)
        output = torch.zeros(4, size).t()
        collectives.all_gather(output, inputs[me][0, ::2])
        assert_bytes(torch.stack([one[0, ::2] for one in inputs]), output.contiguous())
        whole = inputs[me].clone()
        collectives.broadcast(whole[:, 1], 0)
        assert_bytes(torch.cat([inputs[me][:, :1], inputs[0][:, 1:2], inputs[me][:, 2:]], 1), whole)


def check_a_conjugated_view_is_gathered_as_it_reads(rank):
    """A lazily conjugated tensor is sent with its values, not with the bytes that it is a view of."""
    values = [made(20, owner, (3,), torch.complex64) for owner in range(rank.world.size)]
    output = torch.empty(rank.world.size, 3, dtype=torch.complex64)
    over_mpi(rank.world, rank.guard).all_gather(output, values[rank.world.rank].conj())
    assert torch.equal(torch.stack(values).conj(), output)


def check_what_cannot_be_reduced_is_refused(rank):
    """An average of truth values and a sum of strings of bits are refused on all ranks, which then go on."""
    collectives = over_mpi(rank.world, rank.guard)
    for tensor, operation in ((torch.ones(2).bool(), ReduceOp.AVG), (torch.ones(2), ReduceOp.PREMUL_SUM)):
        with pytest.raises(TypeError, match="cannot be reduced"):
            collectives.all_reduce(tensor, operation)
    check_all_gather_within_one_tensor(rank)


def check_sizes_that_do_not_fit_are_refused(rank):
    """Outputs too small or of another dtype are refused on all ranks before MPI could write beyond them."""
    collectives, size, me = over_mpi(rank.world, rank.guard), rank.world.size, rank.world.rank
    two, more = torch.zeros(2), torch.zeros(2 * size)
    short = [torch.zeros(2) for _ in range(size)]
    for call in (
        lambda: collectives.all_gather(torch.zeros(2 * size - 1), two),
        lambda: collectives.all_gather(more.int(), two),
        lambda: collectives.all_gather_uneven(short, torch.zeros(3)),
        lambda: collectives.reduce_scatter(torch.zeros(3), more, ReduceOp.SUM),
        lambda: collectives.reduce_scatter(two, more, ReduceOp.SUM, [1] * me + [3] + [2] * (size - me - 1)),
        lambda: collectives.all_to_all(more, more, [2] * size, [3] * size),
        lambda: collectives.all_to_all(two, more, [2] * size, [2] * size),
        lambda: collectives.gather([torch.zeros(1)] * size, two, me),
        lambda: collectives.scatter(two, [torch.zeros(1)] * size, me),
    ):
        with pytest.raises(ValueError, match=r"a tensor of .* elements of .*, where .* are needed"):
            call()
    check_all_gather_within_one_tensor(rank)


def check_blocks_beyond_what_a_c_int_counts(rank):
    """Sizes that MPI cannot count in bytes are counted in larger units, which together are all bytes."""
    from nnsight_hpc.parallel.buffers import parts, raw

    class Large:
        def __init__(self, nbytes):
            self.nbytes = nbytes

        def data_ptr(self):
            return 4096

    for size, blocks in ((2**31 - 1, 1), (2**31, 1), (3 * 2**34, 1), (2**33 + 2**20, 2), (6 * 5_000_000_000, 6)):
        unit = raw(Large(size), blocks)[1].Get_size()
        assert size // blocks % unit == 0
        assert size // blocks // unit <= 2**31 - 1
    _, counts, datatype = parts(Large(3 * 2**33), [2**33, 2**34])
    assert [count * datatype.Get_size() for count in counts] == [2**33, 2**34]


def check_closing_gives_the_communicators_back(rank):
    """Closed collectives free what they had, the inner backend's threads and connections too."""
    for collectives in both(rank):
        collectives.close()


def assert_bytes(expected: torch.Tensor, actual: torch.Tensor) -> None:
    assert same_bytes(expected, actual), (expected, actual)


def same_bytes(expected: torch.Tensor, actual: torch.Tensor) -> bool:
    as_bytes = [one.contiguous().reshape(-1).view(torch.uint8) for one in (expected, actual)]
    return expected.shape == actual.shape and expected.dtype is actual.dtype and torch.equal(*as_bytes)
