"""Tensors' memory as MPI takes it: an address, a count and a datatype.

By address, since that takes 0.4 us for any dtype and device, where a NumPy view takes 6 and knows no bfloat16.
"""

from __future__ import annotations

from functools import cache
from math import gcd
from typing import TYPE_CHECKING

from nnsight_hpc.parallel.mpi import MPI

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

LARGEST = 2**31 - 1
"""MPI before version 4 counts elements in a C int."""
_UNIT = 2**20


def raw(memory: torch.Tensor, blocks: int = 1) -> list[object]:
    """All bytes of a contiguous tensor, as so many blocks of one size."""
    datatype = _bytes(_unit_of([memory.nbytes // blocks]))
    return [MPI.buffer.fromaddress(memory.data_ptr(), memory.nbytes), datatype]  # mpi4py counts, for one block or many


def parts(memory: torch.Tensor, sizes: Sequence[int]) -> list[object]:
    """All bytes of a contiguous tensor, as blocks of these sizes in bytes."""
    unit = _unit_of(sizes)
    return [MPI.buffer.fromaddress(memory.data_ptr(), memory.nbytes), [size // unit for size in sizes], _bytes(unit)]


def typed(memory: torch.Tensor, datatype: MPI.Datatype) -> list[object]:
    """All elements of a contiguous tensor, as numbers to calculate with."""
    return [MPI.buffer.fromaddress(memory.data_ptr(), memory.nbytes), datatype]


def _unit_of(sizes: Sequence[int]) -> int:
    """How many bytes one element stands for, so that all can be counted."""
    return 1 if sum(sizes) <= LARGEST else gcd(*sizes, _UNIT)


@cache
def _bytes(unit: int) -> MPI.Datatype:
    return MPI.BYTE if unit == 1 else MPI.BYTE.Create_contiguous(unit).Commit()
