"""Steps of a generation: ``for step in tracer.iter[2:5]`` is unrolled; in it the points of the model are those of the step."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, NoReturn

from nnsight_hpc.graph.build import GENERATE, INVOKE, READS
from nnsight_hpc.tracing.lines import users_line
from nnsight_hpc.tracing.value import Value
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from nnsight_hpc.tracing.context import Trace

    Steps = int | slice | Sequence[int]


class Iterations:
    """``tracer.iter``, to be indexed."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def __getitem__(self, steps: Steps) -> Steppings:
        return Steppings(self._trace, _chosen(steps, self._trace), optional=not isinstance(steps, int))


class Steppings:
    """Chosen steps, each a plain ``int`` in a ``for``.

    What a step that never comes would have given is absent; a single step that is named must come.
    """

    over_steps = True
    """`block_run` turns ``with tracer.iter[…] as step:`` into a loop over what has this."""

    def __init__(self, trace: Trace, steps: Sequence[int], *, optional: bool) -> None:
        self._trace, self._steps, self._optional = trace, steps, optional

    @property
    def may_not_come(self) -> bool:
        """Whether the model may end before the step that is being recorded."""
        return self._optional and (self._trace.step != 0 or self._generation() is None)

    def point(self) -> Value | None:
        """What the model has if it comes to the step that is being recorded; None where nothing tells that."""
        trace, forward = self._trace, self._generation()
        if forward is None or trace.stopped:
            return None
        options = {"call": trace.step, "optional": True}
        block = trace.recorder.outside_loops(trace.outer)
        return trace.recorder.append(READS["inputs"], (Value(trace.recorder, forward), ""), options, block)

    def _generation(self) -> int | None:
        """The node of the generation whose steps these are; None where one forward calls a module several times."""
        if self._trace.where is None:
            return None
        nodes = self._trace.recorder.builder.nodes
        node = nodes[self._trace.where.node]
        forward = node.args[0].id if node.op == INVOKE else node.id
        return forward if nodes[forward].op == GENERATE else None

    def __iter__(self) -> Iterator[int]:
        trace = self._trace
        repeats, outer = trace.recorder.repeats, (trace.step, trace.optional)
        repeats.begin()
        try:
            for step in self._steps:
                if trace.stopped:
                    break
                trace.step, trace.optional = step, self._optional
                repeats.step()
                yield step
        finally:
            trace.step, trace.optional = outer
            repeats.end()

    def __enter__(self) -> NoReturn:
        raise InvalidInput(
            "the source of this block cannot be had, and without it a `with` runs only once",
            where=str(users_line()),
            next="write `for step in tracer.iter[…]:`",
        )

    def __exit__(self, *_: object) -> None: ...


def _chosen(steps: Steps, trace: Trace) -> Sequence[int]:
    if isinstance(steps, slice):
        if trace.steps is not None:
            return range(*steps.indices(trace.steps))
        if steps.stop is None or min(steps.start or 0, steps.stop) < 0:
            raise InvalidInput(
                "how often the model will run is not known here",
                where=str(users_line()),
                next="name the last step, as in tracer.iter[:3], or use model.generate(…, max_new_tokens=…)",
            )
        return range(*steps.indices(steps.stop))
    chosen = [steps] if isinstance(steps, int) else [operator.index(step) for step in steps]
    if any(step < 0 for step in chosen):
        if trace.steps is None:
            raise InvalidInput("a step is counted from the first one, 0", where=str(users_line()))
        chosen = [step % trace.steps for step in chosen]
    return chosen
