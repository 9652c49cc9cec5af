"""Nested values with a name for each leaf, the same for a call with positional arguments and one with keywords."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """The names of the positional parameters of a module's forward; tensor parallelism may have replaced the one it runs."""
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = inspect.signature(type(module).forward).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)[1:]


def named_leaves(tree: Any, arguments: Sequence[str] | None = None) -> tuple[list[tuple[str, Any]], Any]:
    """The leaves of a nested value with their names, and what `joined` needs to put such leaves together again.

    Parameters
    ----------
    arguments
        For a pair of arguments and keywords: the names of positional parameters, as far as they are known.
    """
    found, form = tree_flatten_with_path(tree)
    if arguments is None:
        return [(keystr(path), leaf) for path, leaf in found], form
    return [(_argument(path, arguments), leaf) for path, leaf in found], form


def joined(leaves: Sequence[Any], form: Any) -> Any:
    """The nested value of some leaves."""
    return tree_unflatten([*leaves], form)


def mapped(tree: Any, function: Callable[[str, Any], Any], arguments: Sequence[str] | None = None) -> Any:
    """The nested value in which `function` of its name and itself stands for each leaf."""
    leaves, form = named_leaves(tree, arguments)
    return joined([function(name, leaf) for name, leaf in leaves], form)


def _argument(path: tuple[Any, ...], arguments: Sequence[str]) -> str:
    """A name for what stands in a pair of arguments and keywords."""
    pair, which, *within = path
    name = which.idx if pair.idx == 0 else which.key
    if pair.idx == 0 and name < len(arguments):
        name = arguments[name]
    return f"{name}{keystr(tuple(within))}"
