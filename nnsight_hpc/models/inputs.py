"""What a researcher gives to a trace, as the keyword tensors that a causal language model takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def prepare_inputs(inputs: Any, tokenizer: Any = None) -> dict[str, torch.Tensor]:
    """``input_ids``, ``attention_mask`` and ``position_ids``, each ``[prompts, tokens]`` of int64, for a forward.

    Prompts of unequal length are padded on the left, with a mask and positions that leave the padding out. The tensors are
    new ones.

    Parameters
    ----------
    inputs
        A string, a list of strings, token ids as a list, a nested list, a tensor or numpy array (``[tokens]`` or
        ``[prompts, tokens]``), or a mapping such as a tokenizer returns.
    tokenizer
        Needed for strings.

    Raises
    ------
    InvalidInput
        Strings without a tokenizer, an empty prompt, or something that is none of the above.
    """
    if isinstance(inputs, str):
        inputs = [inputs]
    if hasattr(inputs, "keys"):
        return _from_mapping(inputs, tokenizer)
    if hasattr(inputs, "__array__") and not isinstance(inputs, torch.Tensor):
        inputs = _from_numpy(inputs)
    if isinstance(inputs, torch.Tensor):
        return _from_tensor(inputs if inputs.ndim == 2 else inputs[None])
    if isinstance(inputs, list | tuple) and inputs and all(isinstance(item, str) for item in inputs):
        if tokenizer is None:
            raise InvalidInput(
                "a prompt is text, and the model has no tokenizer", next="give tokenizer=…, or token ids"
            )
        return _from_rows(
            [torch.tensor(ids, dtype=torch.int64) for ids in tokenizer(list(inputs))["input_ids"]], tokenizer
        )
    if isinstance(inputs, list | tuple) and inputs:
        return _from_lists(inputs)
    if isinstance(inputs, list | tuple):
        raise InvalidInput("there is no prompt: the list of them is empty", next="give it at least one")
    raise InvalidInput(
        f"an input of type {type(inputs).__name__} is not a prompt",
        next="give a string, a list of strings, token ids, or what a tokenizer returns",
    )


def pad_left(prompts: Sequence[Mapping[str, torch.Tensor]], tokenizer: Any = None) -> list[dict[str, torch.Tensor]]:
    """Prepared prompts, ``[prompts, tokens, …]`` in each tensor, as long as the longest: padded on the left, and masked there.

    Raises
    ------
    InvalidInput
        A prompt has no mask that would leave the padding out.
    """
    if not all(_is_row_mask(prompt.get("attention_mask")) for prompt in prompts):
        raise InvalidInput("these prompts cannot be padded", why="the model has no mask [prompts, tokens] of them")
    lengths = [prompt["attention_mask"].shape[1] for prompt in prompts]
    filling = {"input_ids": _padding(tokenizer)}
    return [
        {name: _padded(tensor, max(lengths) - length, filling.get(name, 0)) for name, tensor in prompt.items()}
        for prompt, length in zip(prompts, lengths, strict=True)
    ]


def _is_row_mask(mask: Any) -> bool:
    return isinstance(mask, torch.Tensor) and mask.ndim == 2


def _padded(tensor: torch.Tensor, missing: int, filling: int) -> torch.Tensor:
    return torch.cat([tensor.new_full((len(tensor), missing, *tensor.shape[2:]), filling), tensor], 1)


def _padding(tokenizer: Any) -> int:
    """The token that stands where nothing is read."""
    return 0 if tokenizer is None or tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


def _from_numpy(inputs: Any) -> torch.Tensor:
    try:
        return torch.as_tensor(inputs, dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput("the token ids are not integers", why=str(error)) from None


def _from_tensor(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rows of one length, on the device that they lie on: to fetch them from a GPU would wait for all that it still does."""
    if ids.ndim != 2 or not ids.numel():
        return _from_rows(list(ids))  # it says what is wrong
    prompts, tokens = ids.shape
    return {
        "input_ids": ids.to(torch.int64, copy=True),
        "attention_mask": torch.ones_like(ids, dtype=torch.int64),
        "position_ids": torch.arange(tokens, device=ids.device).expand(prompts, -1).contiguous(),
    }


def _from_lists(inputs: Sequence[Any], tokenizer: Any = None) -> dict[str, torch.Tensor]:
    rows = inputs if isinstance(inputs[0], list | tuple) or bool(getattr(inputs[0], "ndim", False)) else [inputs]
    try:
        return _from_rows([torch.as_tensor(row, dtype=torch.int64) for row in rows], tokenizer)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput("the token ids are not integers", why=str(error)) from None


def _from_mapping(inputs: Mapping[str, Any], tokenizer: Any = None) -> dict[str, torch.Tensor]:
    rows = inputs.get("input_ids")
    if isinstance(rows, list) and len({len(row) if isinstance(row, list) else -1 for row in rows}) > 1:
        return _from_lists(rows, tokenizer)  # a tokenizer that was not told to pad
    try:
        given = {key: torch.as_tensor(value).clone() for key, value in inputs.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput("the inputs are not tensors", why=str(error)) from None
    if "input_ids" not in given:
        return given
    given = {key: value[None] if value.ndim == 1 else value for key, value in given.items()}
    mask = given.setdefault("attention_mask", torch.ones_like(given["input_ids"]))
    if mask.ndim == 2:
        given.setdefault("position_ids", _positions(mask))
    return given


def _from_rows(rows: Sequence[torch.Tensor], tokenizer: Any = None) -> dict[str, torch.Tensor]:
    if any(row.ndim != 1 for row in rows):
        raise InvalidInput(
            "a prompt is one row of token ids",
            why=f"the shapes here are {[list(row.shape) for row in rows]}",
            next="give a list of rows, or one tensor [prompts, tokens]",
        )
    longest = max((len(row) for row in rows), default=0)
    if not all(len(row) for row in rows) or not longest:
        raise InvalidInput("a prompt has no tokens", why=f"lengths are {[len(row) for row in rows]}")
    ids = torch.full((len(rows), longest), _padding(tokenizer), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = row
        mask[index, longest - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": _positions(mask)}


def _positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
