"""A recorded graph once more, with the same or with other inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nnsight_hpc.graph.build import FORWARDS
from nnsight_hpc.graph.nodes import Graph, Node, TensorRef, leaves
from nnsight_hpc.tracing.constants import Constants
from nnsight_hpc.tracing.lines import users_line
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import NoReturn

    import torch

    from nnsight_hpc.tracing.backend import Backend
    from nnsight_hpc.tracing.models import NNsight


def rerun(
    model: NNsight,
    graph: Graph,
    backend: Backend,
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    tensors: Mapping[str, torch.Tensor],
) -> dict[str, Any]:
    """Run `graph`; its one forward gets `inputs` (arguments, keywords), if any, in place of what was recorded.

    So do its tensor constants get `tensors`, by name.
    """
    if foreign := sorted(tensors.keys() - graph.tensor_names()):
        raise InvalidInput(
            f"the graph has no tensor {foreign[0]!r}",
            where=str(users_line()),
            next=f"it has {', '.join(sorted(graph.tensor_names())) or 'none'}; print(graph) shows where each is used",
        )
    tensors = {**graph.tensors, **tensors}
    if not any(inputs):
        _check(graph, tensors)
        return backend.run(graph, tensors, model)
    forwards = [node for node in graph.nodes if node.op in FORWARDS]
    if len(forwards) != 1:
        raise InvalidInput(
            f"the graph has {len(forwards)} forwards, and inputs are given for one",
            where=str(users_line()),
            next="run it without inputs, as it was recorded",
        )
    forward, added = _with_inputs(model, forwards[0], *inputs)
    nodes = tuple(forward if node.id == forward.id else node for node in graph.nodes)
    new = replace(graph, nodes=nodes)
    names = new.tensor_names()
    given = {name: t for name, t in {**tensors, **added}.items() if name in names}
    _check(new, given)
    return backend.run(new, given, model)


def _check(graph: Graph, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse a graph whose tensor constants are not all there."""
    missing = sorted(graph.tensor_names() - tensors.keys())
    if missing:
        raise InvalidInput(
            f"the graph needs tensors that are not given: {', '.join(missing)}",
            where=str(users_line()),
            why="a graph's document names its tensor constants (prompts, steering vectors) and does not hold them",
            next=f"model.run(graph, …, tensors={{{missing[0]!r}: …}}); tracer.graph.tensors has them where it was recorded",
        )


def _with_inputs(
    model: NNsight, node: Node, inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Node, dict[str, torch.Tensor]]:
    """The forward with other inputs, and their tensors; options that are no tensors stay."""
    kept = {
        name: value for name, value in node.kwargs.items() if not any(isinstance(x, TensorRef) for x in leaves(value))
    }
    args, keywords = model.prepare(node.op, inputs, {**kept, **kwargs})
    constants = Constants(attached=True, prefix="input")
    encoded = constants.encode((args, keywords), _refused)
    return replace(node, args=encoded[0], kwargs=encoded[1]), constants.tensors


def _refused(leaf: Any) -> NoReturn:
    raise InvalidInput(f"an object of type {type(leaf).__name__} cannot be an input", where=str(users_line()))
