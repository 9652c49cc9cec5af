"""Over how many ranks a model can be split: known from its configuration, before any weight is read, and without MPI.

Every rank is to hold the same share, so what a plan splits must divide by the number of ranks: heads, the widths between
two projections (of each expert, where there are experts: experts themselves are not handed out). Keys and values of fewer
heads than ranks are held in copies. Vocabularies may be of any size: the last rank then holds less of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from nnsight_hpc.models.load import tree_of
from nnsight_hpc.parallel.plans import kv_heads, plan_of
from nnsight_hpc.parallel.upstream import replace_layer_number_by_wildcard, style_of
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn

_DIMENSIONS = {  # style: (which dimension of a weight it splits, of how many parts one after another)
    "colwise": (-2, 1),
    "packed_colwise": (-2, 2),
    "rowwise": (-1, 1),
    "packed_rowwise": (-1, 2),
    "rowwise_rep": (-1, 1),
    "rowwise_split_input": (-1, 1),
    "embedding_colwise": (-1, 1),
    "conv1d_colwise": (-1, 1),
    "conv1d_packed_colwise": (-1, 3),
    "conv1d_rowwise": (0, 1),
}
_COPIED = (".k_proj.weight", ".v_proj.weight")
_ALIGNMENT = 16
"""Bytes, of `torch.nn.functional.grouped_mm`."""
_BY_HEADS = ("q_proj", "q_b_proj", "kv_b_proj", "query_key_value", "c_attn")


class Need(NamedTuple):
    """Something of `size` that the ranks share out; `copies`: where there are more ranks, several may hold the same."""

    what: str
    size: int
    copies: bool = False

    def fits(self, degree: int) -> bool:
        return self.size % degree == 0 or (self.copies and degree % self.size == 0)


def check_degree(config: Any, degree: int) -> None:
    """Refuse a number of ranks over which the model cannot be split.

    Parameters
    ----------
    config
        A configuration of transformers.

    Raises
    ------
    InvalidInput
        It does not fit, with those that do; or the family of the model cannot be split.
    """
    if degree == 1:
        return
    tree = tree_of(config)
    needs = [*_needs(tree, plan_of(tree))]
    misfits = [need.what for need in needs if not need.fits(degree)]
    if misfits:
        most = min(need.size for need in needs if not need.copies)
        fitting = [d for d in range(1, most + 1) if all(need.fits(d) for need in needs)]
        raise InvalidInput(
            f"the model cannot be split over {degree} ranks",
            why=f"{', '.join(misfits)} cannot be shared out evenly",
            next=f"use one of these numbers of ranks: {', '.join(map(str, fitting))}",
        )


def _needs(tree: nn.Module, plan: Mapping[str, str]) -> Iterator[Need]:
    config: Any = tree.config.get_text_config()
    if any(path.endswith(_BY_HEADS) and plan[path] in _DIMENSIONS for path in plan):
        yield Need(f"{config.num_attention_heads} attention heads", config.num_attention_heads)
    numbers = kv_heads(tree, plan)
    for number in sorted(numbers):
        yield Need(f"{number} key and value heads", number, copies=True)
    widths: dict[tuple[int, int], str] = {}
    for name, parameter in tree.named_parameters():
        pattern, style = replace_layer_number_by_wildcard(name), style_of(name, plan)
        if style in _DIMENSIONS and parameter.ndim > 1 and not (numbers and pattern.endswith(_COPIED)):
            dimension, parts = _DIMENSIONS[style]
            width = parameter.shape[dimension] // parts
            widths.setdefault((width, _step(parameter, width)), pattern)
    for (width, step), pattern in widths.items():
        steps = f", in steps of {step}," if step > 1 else ""
        yield Need(f"the width {width} of {pattern}{steps}", width // step)


def _step(parameter: Tensor, width: int) -> int:
    """Of what a rank's width must be a multiple: experts are multiplied by a kernel that reads rows of whole 16 bytes."""
    step = _ALIGNMENT // parameter.dtype.itemsize
    return step if parameter.ndim > 2 and width % step == 0 else 1
