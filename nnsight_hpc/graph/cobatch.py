"""Which requests may share one forward: decided by their graphs and the shapes of their tensors, before any model is there.

Rows of a language model do not see one another, so what several people ask of prompts of one length can be computed in one
batch, of which each graph is shown its own rows. Only what has a single forward, and looks at it between modules, is taken:
generations, gradients, skipped modules and the inside of a module's forward run alone.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

from nnsight_hpc.graph.build import BACKWARD, FORWARD, GENERATE, READ_GRAD, READS, SET_GRAD, SETS, SKIP
from nnsight_hpc.graph.nodes import TensorRef
from nnsight_hpc.graph.operations import LOCAL_ONLY
from nnsight_hpc.graph.points import AT_A_MODULE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nnsight_hpc.graph.nodes import Graph, Node

    Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
    """The dtype (as safetensors names it: ``I64``) and the shape of each tensor constant, by its name."""

_IDS = ("input_ids", "inputs_embeds")
_OF_PROMPTS = frozenset({*_IDS, "attention_mask", "position_ids", "token_type_ids"})
"""Arguments of a language model with one row for each prompt and one column for each of its tokens."""
_SETTINGS = frozenset({"use_cache", "output_hidden_states", "output_attentions", "return_dict", "logits_to_keep"})
_ALONE = LOCAL_ONLY | {GENERATE, BACKWARD, READ_GRAD, SET_GRAD, "Tensor.requires_grad_", SKIP}
_ALL_ARGUMENTS = frozenset({READS["inputs"], SETS["inputs"]})
"""They show what a model makes for all prompts at once: masks, tables of positions, caches."""


class BatchKey(NamedTuple):
    """What a scheduler needs to know of a request that may share a forward.

    Attributes
    ----------
    key
        Equal for those that may share one.
    rows
        How many prompts it has.
    tokens
        How many tokens: rows times their length.
    """

    key: str
    rows: int
    tokens: int


def batch_key(graph: Graph, shapes: Shapes, *, exclusive: bool) -> BatchKey | None:
    """With which requests a validated graph may share a forward; None: with none.

    Parameters
    ----------
    exclusive
        Whether its owner wants it to run alone.
    """
    forwards = [node for node in graph.nodes if node.op == FORWARD]
    if exclusive or len(forwards) != 1 or not all(map(_may_share, graph.nodes)):
        return None
    form = _form(forwards[0], shapes)
    if form is None:
        return None
    rows, length = next(shape[:2] for name, (_, shape) in form if name in _IDS)
    model = graph.model.fingerprint or (graph.model.id, graph.model.revision)
    same = repr((model, [(name, dtype, shape[1:]) for name, (dtype, shape) in form]))
    return BatchKey(hashlib.sha256(same.encode()).hexdigest()[:32], rows, rows * length)


def _may_share(node: Node) -> bool:
    """Whether a node looks at nothing but what modules are given and give, each row by itself."""
    inside = node.op in AT_A_MODULE and len(node.args) > 1 and ":" in node.args[1]
    return node.op not in _ALONE and node.op not in _ALL_ARGUMENTS and not inside


def _form(forward: Node, shapes: Shapes) -> list[tuple[str, tuple[str, tuple[int, ...]]]] | None:
    """What the calls of two forwards have in common that may be one: their arguments by name, with dtypes and shapes.

    None where it is not known of an argument that it is one of prompts, or the same for all.
    """
    form: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, value in forward.kwargs.items():
        if name in _OF_PROMPTS and isinstance(value, TensorRef) and value.name in shapes:
            form[name] = shapes[value.name]
        elif name in _SETTINGS and isinstance(value, bool | int | None):
            form[name] = repr(value), ()
        else:
            return None
    sizes = {shape[:2] for name, (_, shape) in form.items() if name in _OF_PROMPTS}
    whole = len(sizes) == 1 and all(len(size) == 2 and min(size) > 0 for size in sizes)
    if forward.args or forward.block is not None or not whole or form.keys().isdisjoint(_IDS):
        return None
    return sorted(form.items())
