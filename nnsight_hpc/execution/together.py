"""Several graphs in one forward of the model, each with its own rows of the batch, as if its prompts were alone.

Every graph has a run and hooks of its own; at each point it is shown its rows, and what it sets is put in their place. What
goes wrong in one ends that one only. Whatever cannot be the same as alone is refused here, and to be run alone: a prompt with
padding (a mask for one changes how all are computed), a change of what all rows have in common, a value of which it is
not certain where the rows are, a call of a module that keeps a state.

In a model that is spread over several processes all of them do this alike. There only such an error of a graph is its own of
which it is certain that all have it; any other ends the forward for all graphs, in all processes.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nnsight_hpc.execution.arguments import arguments_of
from nnsight_hpc.execution.batch import Batch
from nnsight_hpc.execution.changes import Changes
from nnsight_hpc.execution.fake_model import Call
from nnsight_hpc.execution.interleave import Interleaver, Left
from nnsight_hpc.execution.joint_view import JointView
from nnsight_hpc.execution.layouts import shown
from nnsight_hpc.execution.locate import find_module
from nnsight_hpc.execution.order import check_order
from nnsight_hpc.execution.own_rows import OwnMoment, OwnRows, Whole
from nnsight_hpc.execution.run import Run, complete
from nnsight_hpc.execution.shared import Shared
from nnsight_hpc.graph.build import CALL
from nnsight_hpc.wire.errors import ExecutionFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from nnsight_hpc.execution.estimate import Guard
    from nnsight_hpc.execution.moments import Moment
    from nnsight_hpc.execution.shared_guard import SharedGuard
    from nnsight_hpc.execution.steps import Step
    from nnsight_hpc.execution.stops import Stop
    from nnsight_hpc.execution.view import FullView
    from nnsight_hpc.graph.nodes import Graph


@dataclass(frozen=True)
class Task:
    """A graph that is to share a forward; the fields are `run_graph`'s."""

    graph: Graph
    tensors: Mapping[str, torch.Tensor]
    cancelled: Callable[[], bool] | None
    log: Callable[[str, str], None]
    guard: Guard | SharedGuard | None


def run_together(
    tasks: Sequence[Task], module: torch.nn.Module, *, view: FullView | None = None
) -> list[dict[str, Any] | Exception]:
    """What each graph saves, or what went wrong with it; the others are not touched by that.

    All graphs have one key (`graph.cobatch`). The model is as before afterwards, as after `run_graph`. An exception other than
    `RequestCancelled` says nothing of how the graph does alone, which is to be tried. A graph equals itself run alone but for
    the last bits: matrices of other shapes are summed in another order.

    Parameters
    ----------
    view
        As in `run_graph`; all processes have the same graphs in the same order. Who cancels, logs and guards may differ.

    Raises
    ------
    Exception
        With a view: something went wrong that may have done so in this process alone, a cancelled graph among it. It has to
        end the forward in the others, too. Nothing is known of any graph then.
    """
    changes, before = Changes(), torch.is_grad_enabled()
    try:
        with torch.set_grad_enabled(False):
            company = _Company(module, changes, view)
            company.go(tasks)
    except BaseException:  # as in `run_graph`
        changes.undo()
        torch.set_grad_enabled(before)
        raise
    return [member.result for member in company.members]


class _Company:
    """The members of one forward, and the batch that they make up.

    Attributes
    ----------
    firing
        Whether some member's nodes run just now: a module that they call is not the forward.
    """

    def __init__(self, module: torch.nn.Module, changes: Changes, view: FullView | None) -> None:
        self.module, self.changes = module, changes
        self.view = None if view is None else JointView(view)
        self.members: list[_Member] = []
        self.firing = False

    def go(self, tasks: Sequence[Task]) -> None:
        self.members = [_Member(task, self) for task in tasks]
        if present := self.present:
            self._forward(present)
        for member in self.members:
            member.end()
        if self.view is not None:
            self.view.check_alike(*(member.outcome for member in self.members))

    def isolates(self, error: Exception) -> bool:
        """Whether an error is one graph's alone: the same in each process, which goes on without that graph."""
        if self.view is None:
            return True
        return isinstance(error, ExecutionFailed | ValueError) and not isinstance(error, MemoryError)

    @property
    def present(self) -> list[_Member]:
        return [member for member in self.members if member.present]

    def _forward(self, members: Sequence[_Member]) -> None:
        first = 0
        with ExitStack() as stack:
            stack.callback(self.changes.undo)
            try:
                kwargs = _joined([member.given for member in members])
                whole = Whole(Batch(self.module, Call((), kwargs, generate=False)))
                for member in members:
                    first = member.sit(whole, first, stack)
                output = self.module(**kwargs)
                for member in self.present:
                    member.returned(output)
            except Left:
                pass
            except Exception as error:
                if self.view is not None:
                    raise
                for member in self.present:  # whose fault it is, each finds out alone
                    member.fail(error)


class _Member:
    """One graph in company: its run, its hooks, and what becomes of it.

    Attributes
    ----------
    given
        What it calls the model with.
    present
        Whether it looks at the rest of the forward.
    """

    def __init__(self, task: Task, company: _Company) -> None:
        self._graph, self._company = task.graph, company
        self._error: Exception | None = None
        self.present = False
        with self._isolated():
            self._begin(task, company)

    def _begin(self, task: Task, company: _Company) -> None:
        schedule = complete(task.graph, task.tensors, local=False)
        _check_calls(task.graph, company.module)
        if schedule.gradients or any(tensor.requires_grad for tensor in task.tensors.values()):
            raise ValueError("gradients are computed for one graph at a time")
        view, changes = company.view, company.changes
        shared = Shared(company.module, task.tensors, task.cancelled, task.log, (), False, changes, view)
        self._run = Run(schedule, shared, task.guard)
        check_order(schedule, shared.tensors, company.module)
        self._run.run_ready()
        self._step = schedule.step_of(schedule.forwards[0])
        if not self._run.begins(self._step):
            raise ValueError("it does not come to its forward")
        self._hooks = _Hooks(self._run, self._step, self, company)
        _, self.given = self._hooks.arguments(self._step)
        _check_prompt(self.given, company.module)
        self.present = self._hooks.left_to_see()

    @property
    def result(self) -> dict[str, Any] | Exception:
        return self._error or self._run.saved_by(self._graph)

    @property
    def outcome(self) -> str:
        """Its error's name, if any."""
        return type(self._error).__name__ if self._error else ""

    @contextmanager
    def _isolated(self) -> Iterator[None]:
        """What goes wrong is this graph's alone."""
        try:
            yield
        except Exception as error:
            if not self._company.isolates(error):
                raise
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """It has ended so; what its calls held in memory, others may need."""
        self._error, self.present = error.with_traceback(None), False

    def sit(self, whole: Whole, first: int, stack: ExitStack) -> int:
        """Take the rows of the whole from `first` on; the row after the last."""
        last = first + shown((), self.given)[0]
        self._hooks.rows = OwnRows(whole, first, last, self._run.shared.common)
        with self._isolated():
            self._hooks.attach(Call((), self.given, generate=False), stack)
        return last

    def fire(self, fire: Callable[[Moment, Stop], None], moment: Moment, stop: Stop) -> None:
        """Run what waits for a stop; the forward goes on, whatever happens."""
        try:
            with self._isolated():
                fire(moment, stop)
        except Left:
            self.present = False

    def returned(self, output: Any) -> None:
        with self._isolated():
            self._hooks.returned(output)

    def end(self) -> None:
        """Run what is left when the forward is over."""
        if self._error is None:
            with self._isolated():
                self._hooks.leave()
                self._run.passed(self._step)
                self._run.check_done()


class _Hooks(Interleaver):
    """The hooks of a member, which are shown its rows."""

    rows: OwnRows

    def __init__(self, run: Run, step: Step, member: _Member, company: _Company) -> None:
        super().__init__(run, step.number, arguments_of(step.node), whole=False)
        self._member, self._company = member, company

    def _elsewhere(self) -> bool:
        return self._company.firing or not self._member.present or super()._elsewhere()

    def _fire(self, moment: Moment, stop: Stop) -> None:
        self._company.firing = True
        try:
            self._member.fire(super()._fire, OwnMoment(moment, self.rows, stop.points[0]), stop)
        finally:
            self._company.firing = False
        if not self._company.present:
            raise Left


def _joined(given: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The calls of all members as one, whose rows are theirs in their order."""
    return {
        name: torch.cat([each[name] for each in given]) if isinstance(value, torch.Tensor) else value
        for name, value in given[0].items()
    }


def _check_calls(graph: Graph, module: torch.nn.Module) -> None:
    """Raise `ValueError` where a graph calls a module that may keep something of it, as a table of positions does."""
    for node in graph.nodes:
        if node.op == CALL and any(True for _ in find_module(module, node.args[0], node).buffers()):
            raise ValueError(f"it calls {node.args[0] or 'the model'}, which has a state")


def _check_prompt(given: dict[str, Any], module: torch.nn.Module) -> None:
    """Raise `ValueError` for a prompt that changes how others' are computed: padded, of other positions, of unknown words."""
    mask, positions, ids = (given.get(name) for name in ("attention_mask", "position_ids", "input_ids"))
    if mask is not None and not mask.all():
        raise ValueError("its prompt is padded")
    if positions is not None and not (positions == torch.arange(positions.shape[1], device=positions.device)).all():
        raise ValueError("its tokens are not in their usual positions")
    words = len(module.get_input_embeddings().weight)
    if ids is not None and not ((ids >= 0) & (ids < words)).all():
        raise ValueError("it has ids that the model has no words for")
