"""The form of the protocol's own operations: which arguments each takes, and what its references must refer to."""

from __future__ import annotations

import keyword
import re
from typing import TYPE_CHECKING, Any

from nnsight_hpc.graph.build import (
    APPEND,
    BACKWARD,
    CALL,
    CARRIED,
    CHECK,
    COLLECT,
    ELSE,
    END,
    FINAL,
    FORWARDS,
    GENERATE,
    IF,
    INVOKE,
    ITEM,
    LEAVE,
    LENGTH,
    LOOP,
    MERGE,
    NEXT,
    PARAMETER,
    RANGE,
    REACHED,
    READ_GRAD,
    READS,
    RESULT,
    SAVE,
    SET_GRAD,
    SETS,
    SKIP,
)
from nnsight_hpc.graph.nodes import Ref
from nnsight_hpc.graph.operations import why_forbidden

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from nnsight_hpc.graph.blocks import Blocks
    from nnsight_hpc.graph.nodes import Node

_MODULE = re.compile(r"([A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*)?\Z")
_PLACE = re.compile(r"([A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*)?(:[A-Za-z0-9_]+){0,4}\Z")
WHERE = FORWARDS | {INVOKE}
"""What points refer to first."""
_WITH_VALUE = frozenset({*SETS.values(), SKIP})
POINTS = frozenset({*READS.values(), *_WITH_VALUE, RESULT, INVOKE})
"""Operations whose first argument is a forward, or rows of one."""
MOST_CALLS = 1_000_000

_GENERATE_KEYWORDS = """
    input_ids attention_mask position_ids inputs_embeds max_new_tokens min_new_tokens max_length min_length do_sample seed
    temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty no_repeat_ngram_size bad_words_ids
    suppress_tokens begin_suppress_tokens forced_bos_token_id forced_eos_token_id eos_token_id pad_token_id bos_token_id
    use_cache num_beams length_penalty early_stopping num_return_sequences return_dict_in_generate output_scores output_logits
"""
GENERATE_KEYWORDS = frozenset(_GENERATE_KEYWORDS.split())
"""What a graph may ask of ``generate``: numbers and token ids; nothing that names code, a file or another model."""


def protocol_problems(node: Node, blocks: Blocks) -> Iterable[str]:
    """What is wrong with the arguments of a node, if it is of the protocol itself."""
    check = _CHECKS.get(node.op)
    return check(node, blocks) if check else ()


def is_plain(name: str) -> bool:
    """Whether a name may be a keyword or an attribute in a graph."""
    return name.isidentifier() and not keyword.iskeyword(name) and not name.startswith("_")


def _has(node: Node, *kinds: type | tuple[type, ...], keywords: Iterable[str] = ()) -> bool:
    """Whether a node has positional arguments of these types, in this number, and no other keywords."""
    return (
        len(node.args) == len(kinds)
        and all(
            isinstance(a, kind) and not (kind is int and isinstance(a, bool))
            for a, kind in zip(node.args, kinds, strict=True)
        )
        and set(node.kwargs) <= set(keywords)
    )


def _is(kind: str | frozenset[str], ref: Any, blocks: Blocks) -> bool:
    return isinstance(ref, Ref) and (
        blocks.op(ref.id) in kind if isinstance(kind, frozenset) else blocks.op(ref.id) == kind
    )


def _at_point(node: Node, blocks: Blocks) -> Iterator[str]:
    """``(where, module path[, value], call=0, optional=False)``."""
    with_value = node.op in _WITH_VALUE
    kinds = (Ref, str, object) if with_value else (Ref, str)
    if not _has(node, *kinds, keywords=("call", "optional")):
        yield (
            "does not have the arguments (forward, module path"
            + (", value)" if with_value else ")")
            + ", call, optional"
        )
        return
    if not _is(WHERE, node.args[0], blocks):
        yield f"belongs to node {node.args[0].id}, which is no forward pass"
    if not _PLACE.match(node.args[1]):
        yield f"has the module path {node.args[1][:80]!r}"
    call = node.kwargs.get("call", 0)
    if not isinstance(call, int) or isinstance(call, bool) or not 0 <= call <= MOST_CALLS:
        yield f"takes as call an integer from 0 to {MOST_CALLS}"
    if not isinstance(node.kwargs.get("optional", False), bool):
        yield "takes as optional true or false"


def _invoke(node: Node, blocks: Blocks) -> Iterator[str]:
    if not _has(node, Ref, int, int) or not _is(FORWARDS, node.args[0], blocks):
        yield "does not have the arguments (forward, first row, row after the last)"
    elif not 0 <= node.args[1] < node.args[2] <= MOST_CALLS:
        yield f"has the rows {node.args[1]} to {node.args[2]}"


def _result(node: Node, blocks: Blocks) -> Iterator[str]:
    if not _has(node, Ref) or not _is(WHERE, node.args[0], blocks):
        yield "does not have one argument, a forward pass"


def _generate(node: Node, _blocks: Blocks) -> Iterator[str]:
    if node.args:
        yield "takes keywords only"
    if unknown := sorted(set(node.kwargs) - GENERATE_KEYWORDS):
        yield f"has the keyword {unknown[0]!r}, which is not allowed; allowed are {', '.join(sorted(GENERATE_KEYWORDS))}"
    if node.kwargs.get("do_sample") and not isinstance(node.kwargs.get("seed"), int):
        yield "draws random numbers without an explicit seed: give seed=, an integer"
    for key in ("max_new_tokens", "max_length", "num_beams", "num_return_sequences"):
        if not isinstance(node.kwargs.get(key, 1), int | None) or (node.kwargs.get(key) or 1) > MOST_CALLS:
            yield f"takes as {key} an integer up to {MOST_CALLS}"


def _backward(node: Node, _blocks: Blocks) -> Iterator[str]:
    if not _has(node, Ref, keywords=("gradient", "retain_graph", "create_graph")):
        yield "does not have the arguments (loss, gradient, retain_graph, create_graph)"
    elif not all(isinstance(node.kwargs.get(key, False), bool) for key in ("retain_graph", "create_graph")):
        yield "takes as retain_graph and create_graph true or false"


def _gradient(node: Node, blocks: Blocks) -> Iterator[str]:
    kinds = (Ref,) if node.op == READ_GRAD else (Ref, object)
    backward = node.kwargs.get("backward")
    if not _has(node, *kinds, keywords=("backward",)):
        yield "does not have the arguments (value" + (")" if node.op == READ_GRAD else ", gradient)")
    elif backward is not None and not _is(BACKWARD, backward, blocks):
        yield "belongs to a node that is no backward pass"


def _parameter(node: Node, _blocks: Blocks) -> Iterator[str]:
    if not _has(node, str, str) or not all(_MODULE.match(part) for part in node.args):
        yield "does not have the arguments (module path, name)"


def _call(node: Node, _blocks: Blocks) -> Iterator[str]:
    if not node.args or not isinstance(node.args[0], str) or not _MODULE.match(node.args[0]):
        yield "does not have the arguments (module path, …)"


def _one_node(node: Node, _blocks: Blocks) -> Iterator[str]:
    if not _has(node, Ref):
        yield "does not have one argument, a node"


def _one_value(node: Node, _blocks: Blocks) -> Iterator[str]:
    if not _has(node, object):
        yield "does not have one argument"


def _attribute(node: Node, _blocks: Blocks) -> Iterator[str]:
    if not _has(node, Ref, str):
        yield "does not have the arguments (node, name)"
    elif not is_plain(node.args[1]):
        yield f"asks for the attribute {node.args[1][:80]!r}; private names are not allowed"
    elif reason := why_forbidden(node.args[1]):
        yield f"asks for the attribute {node.args[1]!r}: {reason}"


def _setitem(node: Node, _blocks: Blocks) -> Iterator[str]:
    if not _has(node, Ref, object, object):
        yield "does not have the arguments (node, index, value)"


def _append(node: Node, _blocks: Blocks) -> Iterator[str]:
    if not _has(node, Ref, object):
        yield "does not have the arguments (list, value)"


def _range(node: Node, _blocks: Blocks) -> Iterator[str]:
    if not 1 <= len(node.args) <= 3 or node.kwargs or not all(isinstance(a, int | Ref) for a in node.args):
        yield "does not have the arguments ([start,] stop[, step])"


def _check(node: Node, _blocks: Blocks) -> Iterator[str]:
    if not node.args or node.kwargs:
        yield "does not have the arguments (condition, part of the message, …)"


def _refers_to(kind: str, *others: type) -> Callable[[Node, Blocks], Iterator[str]]:
    """A check that the first argument is a node of that operation, and that others follow."""

    def check(node: Node, blocks: Blocks) -> Iterator[str]:
        if not _has(node, Ref, *others) or not _is(kind, node.args[0], blocks):
            yield f"does not have {1 + len(others)} arguments, the first a {kind}"

    return check


_CHECKS: dict[str, Callable[[Node, Blocks], Iterator[str]]] = {
    **dict.fromkeys((*READS.values(), *_WITH_VALUE), _at_point),
    INVOKE: _invoke,
    RESULT: _result,
    GENERATE: _generate,
    BACKWARD: _backward,
    READ_GRAD: _gradient,
    SET_GRAD: _gradient,
    PARAMETER: _parameter,
    CALL: _call,
    SAVE: _one_node,
    "attribute": _attribute,
    "operator.setitem": _setitem,
    APPEND: _append,
    RANGE: _range,
    LEAVE: _one_value,
    CHECK: _check,
    REACHED: _one_node,
    LENGTH: _one_value,
    IF: _one_value,
    ELSE: _refers_to(IF),
    MERGE: _refers_to(IF, object, object),
    LOOP: _one_value,
    ITEM: _refers_to(LOOP),
    CARRIED: _refers_to(LOOP, object),
    NEXT: _refers_to(CARRIED, object),
    END: _refers_to(LOOP),
    FINAL: _refers_to(END, Ref),
    COLLECT: _refers_to(END, Ref),
}
