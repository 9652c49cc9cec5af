"""Calls of a model as layouts are learnt from them: small ones, and what makes one differ from a usual one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map_only

from nnsight_hpc.execution.fake_model import STEPS, Call
from nnsight_hpc.execution.layouts import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    Form = frozenset[tuple[str, str]]

_USUAL = frozenset(
    {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}
)
"""Arguments that bring no tensor to any place that is not there in the usual call."""
_SHOWN = frozenset({"output_attentions", "output_hidden_states"})
"""What a generation hands on to the model, beside its own settings."""
MASK = "attention_mask"


def usual(model: nn.Module, rows: int, tokens: int) -> Call:
    """A forward of a language model, of so many prompts and tokens, in which every usual argument has to do something."""
    device = next(model.parameters()).device
    ids = (
        torch.arange(rows * tokens, device=device).view(rows, tokens) * 7919 % model.config.get_text_config().vocab_size
    )
    return Call((), {"input_ids": ids, MASK: _padded(ids), "use_cache": True})


def form_of(call: Call, parameters: Sequence[str]) -> Form:
    """The arguments of a call for which its places may have other tensors than those of the usual one; none, mostly.

    Parameters
    ----------
    parameters
        The names of the positional parameters of the model's forward.
    """
    names = ["input_ids"] if call.generate else parameters
    given = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    return frozenset(
        (name, _kind(value)) for name, value in given.items() if _matters(name, value, generate=call.generate)
    )


def small(call: Call, rows: int, tokens: int) -> Call:
    """A call of the same form with so many prompts and tokens; a generation makes `STEPS` tokens."""
    prompts, words = shown(call.args, call.kwargs)

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        for dim, size in enumerate(tensor.shape):
            if dim == 0 and size == prompts:
                tensor = _repeated(tensor, dim, rows)
            elif size == words and (dim == 1 or tensor.ndim == 4):
                tensor = _repeated(tensor, dim, tokens)
        return tensor.detach()

    left_out = {"past_key_values", "seed", "max_length", "min_length"} if call.generate else {"past_key_values"}
    given = call.args, {name: value for name, value in call.kwargs.items() if name not in left_out}
    args, kwargs = tree_map_only(torch.Tensor, cut, given)
    if isinstance(kwargs.get(MASK), torch.Tensor) and kwargs[MASK].ndim == 2:
        kwargs[MASK] = _padded(kwargs[MASK].new_ones(rows, tokens))
    if call.generate:
        kwargs |= {"max_new_tokens": STEPS, "min_new_tokens": STEPS}
    return Call(args, kwargs, call.generate)


def _repeated(tensor: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    """The first entries of a dimension, again and again if there are fewer."""
    return tensor.index_select(dim, torch.arange(length, device=tensor.device) % tensor.shape[dim])


def _padded(like: torch.Tensor) -> torch.Tensor:
    """A mask with one token of padding, at the end: no query is left without a token to look at, and no mask is left out."""
    mask = torch.ones_like(like)
    mask[0, -1] = 0
    return mask


def _matters(name: str, value: Any, *, generate: bool) -> bool:
    if name in _USUAL or value is None or value is False:
        return False
    return not generate or name in _SHOWN or isinstance(value, torch.Tensor)


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.ndim} dimensions of {value.dtype}"
    return repr(value) if isinstance(value, bool | str) else type(value).__name__
