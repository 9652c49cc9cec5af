"""How MPI adds up tensors: the datatype and operation for each dtype, and the dtype in which half precision travels.

MPI knows no bfloat16 and no float16. Measured on an idle node, against MPI's own all-reduce of as many float32 numbers,
for 4 KiB to 16 MiB of bfloat16: casting to float32 and back takes 1.4 to 6 times as long (2 ranks; 4 ranks: 1.3 to 4),
an operation of our own on two-byte elements 1.6 down to 0.3 times (4 ranks: 1.9 to 0.3). But it rounds after each addition,
where the cast rounds once. Two ranks make one addition, so there both give the same bits: our own operation is for two
ranks, the cast for more. (Gathering all shards and adding them in float32 took 2 to 10 times as long; exchanging shards,
adding, and gathering the sums took 5 times as long for small tensors, and 1.1 times for large ones on 4 ranks: something to
come back to if half precision on CPUs with many ranks ever matters. On GPUs NCCL adds.)
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch.distributed import ReduceOp

from nnsight_hpc.parallel.mpi import MPI

_TYPES = {
    torch.float32: MPI.FLOAT,
    torch.float64: MPI.DOUBLE,
    torch.int8: MPI.INT8_T,
    torch.int16: MPI.INT16_T,
    torch.int32: MPI.INT32_T,
    torch.int64: MPI.INT64_T,
    torch.uint8: MPI.UINT8_T,
    torch.uint16: MPI.UINT16_T,
    torch.uint32: MPI.UINT32_T,
    torch.uint64: MPI.UINT64_T,
    torch.complex64: MPI.C_FLOAT_COMPLEX,
    torch.complex128: MPI.C_DOUBLE_COMPLEX,
}
_OPERATIONS = {
    ReduceOp.SUM: MPI.SUM,
    ReduceOp.AVG: MPI.SUM,
    ReduceOp.PRODUCT: MPI.PROD,
    ReduceOp.MIN: MPI.MIN,
    ReduceOp.MAX: MPI.MAX,
    ReduceOp.BAND: MPI.BAND,
    ReduceOp.BOR: MPI.BOR,
    ReduceOp.BXOR: MPI.BXOR,
}
_ON_TRUTH = {  # of bytes that are 0 or 1
    ReduceOp.SUM: MPI.MAX,
    ReduceOp.MAX: MPI.MAX,
    ReduceOp.BOR: MPI.MAX,
    ReduceOp.PRODUCT: MPI.MIN,
    ReduceOp.MIN: MPI.MIN,
    ReduceOp.BAND: MPI.MIN,
    ReduceOp.BXOR: MPI.BXOR,
}
_HALF = (torch.bfloat16, torch.float16)


class Arithmetic(NamedTuple):
    """How a reduction is done: the dtype in which numbers travel, and what MPI is told."""

    travels: torch.dtype
    datatype: MPI.Datatype
    operation: MPI.Op


@cache
def arithmetic(dtype: torch.dtype, operation: ReduceOp.RedOpType, ranks: int, *, on_host: bool) -> Arithmetic:
    """How tensors of `dtype` are reduced over `ranks` ranks.

    Raises
    ------
    TypeError
        There is no such reduction for this dtype.
    """
    table = _ON_TRUTH if dtype is torch.bool else _OPERATIONS
    if operation not in table:
        raise TypeError(f"{dtype} cannot be reduced with {operation} over MPI")
    if dtype is torch.bool:
        return Arithmetic(dtype, MPI.UINT8_T, table[operation])
    if dtype in _HALF and operation == ReduceOp.SUM and ranks == 2 and on_host:
        return Arithmetic(dtype, *_own_sum(dtype))
    travels = torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype
    if travels not in _TYPES:
        raise TypeError(f"{dtype} cannot be reduced over MPI")
    return Arithmetic(travels, _TYPES[travels], table[operation])


@cache
def _own_sum(dtype: torch.dtype) -> tuple[MPI.Datatype, MPI.Op]:
    def add(left: Any, right: Any, _: MPI.Datatype) -> None:
        if right.nbytes:  # an exception in here would end the job
            torch.frombuffer(right, dtype=dtype).add_(torch.frombuffer(left, dtype=dtype))

    return MPI.BYTE.Create_contiguous(dtype.itemsize).Commit(), MPI.Op.Create(add, commute=True)
