"""What is used of the inside of transformers' tensor parallelism; the one place that imports it.

It is young, and moves with minor versions: a name that is gone is told as a version that does not fit.
"""

from __future__ import annotations

from importlib.metadata import version

from nnsight_hpc.wire.errors import Incompatible

try:
    from transformers.distributed import DistributedConfig
    from transformers.distributed.parallel_utils import (
        ALL_PARALLEL_STYLES,
        _AllReduceBackward,
        _AllReduceForward,
        _get_parameter_plan,
        replace_layer_number_by_wildcard,
    )
    from transformers.distributed.tensor_parallel import TensorParallelLayer
except ImportError as error:
    raise Incompatible(
        f"transformers {version('transformers')} cannot split a model over ranks in the way that nnsight-hpc builds on",
        why=str(error),
        next="pip install 'nnsight-hpc[worker]', which asks for the versions that can",
    ) from None

all_reduce_backward = _AllReduceBackward.apply
"""``(tensor, group)``: as it is; its gradient is added up over the ranks."""
all_reduce_forward = _AllReduceForward.apply
"""``(tensor, group)``: added up over the ranks, in place; its gradient as it is."""
style_of = _get_parameter_plan
"""``(name, plan, is_weight=True)``: the style that a plan names for a parameter, or its module; None where it names none."""

__all__ = [
    "ALL_PARALLEL_STYLES",
    "DistributedConfig",
    "TensorParallelLayer",
    "all_reduce_backward",
    "all_reduce_forward",
    "replace_layer_number_by_wildcard",
    "style_of",
]
