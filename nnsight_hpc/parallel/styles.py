"""Ways to split a module over the ranks that transformers does not have: Conv1D, heads counted in attributes, few kv heads.

A style of transformers says how a module's parameters are split before they are read (`shard_param`), and what its forward
does around the local part (`install_forward`). Plans name styles, so ours are registered under names when this is imported.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from nnsight_hpc.parallel.upstream import (
    ALL_PARALLEL_STYLES,
    TensorParallelLayer,
    all_reduce_backward,
    all_reduce_forward,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement


class Conv1DColumns(TensorParallelLayer):  # type: ignore[misc]  # mypy does not look into transformers
    """GPT-2's Conv1D, whose weight is [inputs, outputs], split by outputs.

    Parameters
    ----------
    split_factor
        How many parts lie one after another in the outputs (q, k, v); each is split by itself.
    """

    def __init__(self, split_factor: int = 1) -> None:
        self.split_factor = split_factor

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        last = module._parameters[param].ndim - 1  # noqa: SLF001 - as transformers does, here and below
        placement = Shard(last) if self.split_factor == 1 else _StridedShard(last, split_factor=self.split_factor)
        _distribute(module, param, mesh, [placement])

    def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> None:
        module.forward = partial(_conv1d_columns, module, mesh.get_group())


class Conv1DRows(TensorParallelLayer):  # type: ignore[misc]
    """Conv1D split by inputs: the ranks' outputs are added up, then the bias."""

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        _distribute(module, param, mesh, [Replicate() if param == "bias" else Shard(0)])

    def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> None:
        module.forward = partial(_conv1d_rows, module, mesh.get_group())


class LocalCount(TensorParallelLayer):  # type: ignore[misc]
    """An attention module that counts its heads, or their widths together, in an attribute."""

    def __init__(self, attribute: str) -> None:
        self._attribute = attribute

    def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> None:
        setattr(module, self._attribute, getattr(module, self._attribute) // mesh.size())


class FewHeads(TensorParallelLayer):  # type: ignore[misc]
    """The projection to keys or values where there are fewer heads than ranks: neighbouring ranks hold the same head.

    Parameters
    ----------
    heads
        How many heads there are; a divisor of the number of ranks.
    """

    def __init__(self, heads: int) -> None:
        self._heads = heads
        self._mesh: DeviceMesh | None = None

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        if module._parameters[param] is not None:  # noqa: SLF001
            self._mesh = self._mesh or self._two_dimensions(mesh)
            _distribute(module, param, self._mesh, [Shard(0), Replicate()])

    def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> None:
        module.forward = partial(_few_heads, module, mesh.get_group())

    def _two_dimensions(self, mesh: DeviceMesh) -> DeviceMesh:
        shape = self._heads, mesh.size() // self._heads
        return init_device_mesh(mesh.device_type, shape, mesh_dim_names=("heads", "copies"))


class GroupsOfFewHeads(TensorParallelLayer):  # type: ignore[misc]
    """The attention module above `FewHeads`: on a rank, all its query heads use one key and value head."""

    def __init__(self, heads: int, beneath: TensorParallelLayer | None) -> None:
        self._heads, self._beneath = heads, beneath

    def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> None:
        if hasattr(module, "num_key_value_groups"):  # not that of a hybrid's other layers
            module.num_key_value_groups = module.num_key_value_groups * self._heads // mesh.size()
        if self._beneath is not None:
            self._beneath.install_forward(module, mesh)


def _distribute(module: nn.Module, name: str, mesh: DeviceMesh, placements: Sequence[Placement]) -> None:
    """Put a DTensor in the place of a parameter; without memory, since it is on the meta device until it is read."""
    whole = module._parameters[name]  # noqa: SLF001
    split = distribute_tensor(whole, mesh, placements, src_data_rank=None)
    module._parameters[name] = torch.nn.Parameter(split, requires_grad=whole.requires_grad)  # noqa: SLF001


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _conv1d_columns(module: Any, group: Any, x: Tensor) -> Tensor:
    x = all_reduce_backward(x, group)
    weight = _local(module.weight)
    flat = torch.addmm(_local(module.bias), x.reshape(-1, x.shape[-1]), weight)
    return flat.view(*x.shape[:-1], weight.shape[-1])


def _conv1d_rows(module: Any, group: Any, x: Tensor) -> Tensor:
    total: Tensor = all_reduce_forward(x @ _local(module.weight), group)
    return total + _local(module.bias)


def _few_heads(module: Any, group: Any, x: Tensor) -> Tensor:
    bias = None if module.bias is None else _local(module.bias)
    return torch.nn.functional.linear(all_reduce_backward(x, group), _local(module.weight), bias)


ALL_PARALLEL_STYLES.register("conv1d_colwise", Conv1DColumns())
ALL_PARALLEL_STYLES.register("conv1d_packed_colwise", Conv1DColumns(split_factor=3))
ALL_PARALLEL_STYLES.register("conv1d_rowwise", Conv1DRows())
ALL_PARALLEL_STYLES.register("local_split_size", LocalCount("split_size"))
ALL_PARALLEL_STYLES.register("local_num_heads", LocalCount("num_heads"))
