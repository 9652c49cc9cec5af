"""Several graphs in one forward of a model that is spread over processes: what is gathered, and what ends for whom."""

import pytest
import torch

from nnsight_hpc.execution.joint_view import JointView
from nnsight_hpc.execution.together import Task, run_together
from nnsight_hpc.wire.errors import ExecutionFailed, HpcError, InvalidGraph, RequestCancelled
from tests.oracle.architectures import make
from tests.oracle.hooks import hooks_of

SPLIT = ("model.layers.1.self_attn.q_proj", "output")


class Copies:
    """A view in one process: at one place values are copied to and fro, as if they were gathered and taken apart."""

    keeps = True

    def __init__(self, *, alike=True):
        self.calls, self._alike = [], alike

    def prepare(self, call, operations):
        pass

    def sharded(self, path, side):
        return (path, side) == SPLIT

    def whole(self, path, side, tree, *, root_only=False):
        self.calls.append(("whole", root_only))
        return tree.clone()

    def own(self, path, side, tree):
        self.calls.append(("own",))
        return tree.clone()

    def parameter(self, tensor):
        self.calls.append(("parameter",))
        return tensor.clone()

    def agree(self, number):
        return number if self._alike else number + 1


class Recorded:
    """A backend that runs nothing, and keeps the graphs."""

    remote = False

    def __init__(self):
        self.tasks = []

    def run(self, graph, tensors, model, **_local):
        self.tasks.append(Task(graph, tensors, None, lambda _line, _source: None, None))
        return dict.fromkeys(graph.saves)


@pytest.fixture(scope="module")
def subject():
    made = make("llama")
    yield made
    assert hooks_of(made.module) == []


@pytest.fixture
def tasks(subject):
    """The graphs that are traced in this test."""
    backend = Recorded()
    subject.model._backend = lambda **_where: backend
    return backend.tasks


def _traced(subject, change=None, seed=1):
    with subject.model.trace(subject.inputs(seed=seed)):
        queries = subject.at(1, "attention").q_proj.output
        if change == "in place":
            queries[:, -1] *= 2
        elif change == "replaced":
            subject.at(1, "attention").q_proj.output = queries * 3
        elif change == "fails":
            queries[7].save()
        queries.save()
        subject.head_envoy.output.save()


def test_what_several_look_at_is_gathered_once(subject, tasks):
    """Each has its rows of it, the model goes on with its own."""
    for seed in (1, 2, 3):
        with subject.model.trace(subject.inputs(seed=seed)):
            (subject.at(1, "attention").q_proj.output * 2).save()
    view = Copies()
    got = run_together(tasks, subject.module, view=view)
    assert view.calls == [("whole", False)]
    assert [value.shape for one in got for value in one.values()] == [(2, 5, 96)] * 3


def test_what_is_only_saved_is_gathered_for_the_root(subject, tasks):
    """And once more, everywhere, for one that computes with it."""
    for seed in (1, 2, 3):
        with subject.model.trace(subject.inputs(seed=seed)):
            queries = subject.at(1, "attention").q_proj.output
            (queries * 2 if seed == 3 else queries).save()
    view = Copies()
    run_together(tasks, subject.module, view=view)
    assert view.calls == [("whole", True), ("whole", False)]


@pytest.mark.parametrize("changes", [("in place", None, "replaced"), ("replaced", "replaced", "in place", None)])
def test_what_one_changes_is_not_gathered_again_for_the_next(subject, tasks, changes):
    """Each change is taken apart for the model, and all are as without a view."""
    for seed, change in enumerate(changes):
        _traced(subject, change, seed)
    view = Copies()
    got = run_together(tasks, subject.module, view=view)
    assert view.calls == [("whole", False), *[("own",)] * sum(map(bool, changes))]
    for one, expected in zip(got, run_together(tasks, subject.module), strict=True):
        assert all(torch.equal(one[name], value) for name, value in expected.items())


def test_an_error_of_an_operation_is_its_own(subject, tasks):
    """All processes meet it alike, and go on without that graph."""
    for change in (None, "fails", "in place"):
        _traced(subject, change)
    got = run_together(tasks, subject.module, view=Copies())
    assert [isinstance(one, ExecutionFailed) for one in got] == [False, True, False]


def _cancelled():
    return True


def _too_much(_line, _source):
    raise InvalidGraph("too much")


@pytest.mark.parametrize(
    ("own", "error"), [({"cancelled": _cancelled}, RequestCancelled), ({"log": _too_much}, InvalidGraph)]
)
def test_what_one_process_alone_may_know_ends_the_forward_for_all(subject, tasks, own, error):
    """A cancel, and what is counted or refused in the first process, is not known in the others."""
    for seed in (1, 2):
        with subject.model.trace(subject.inputs(seed=seed)) as tracer:
            tracer.log("line")
            subject.head_envoy.output.save()
    fields = {name: getattr(tasks[1], name) for name in ("graph", "tensors", "cancelled", "log", "guard")}
    tasks[1] = Task(**fields | own)
    with pytest.raises(error):
        run_together(tasks, subject.module, view=Copies())


def test_memory_that_runs_out_ends_the_forward_for_all(subject, tasks, monkeypatch):
    """One process may have less of it than the others."""

    def whole(*_args, **_options):
        raise torch.OutOfMemoryError

    for seed in (1, 2):
        _traced(subject, "in place", seed)
    view = Copies()
    monkeypatch.setattr(view, "whole", whole)
    with pytest.raises(MemoryError):
        run_together(tasks, subject.module, view=view)


def test_processes_that_did_different_things_use_nothing_of_it(subject, tasks):
    """A process whose graphs went another way than the first one's raises."""
    for seed in (1, 2):
        _traced(subject, None, seed)
    with pytest.raises(HpcError, match="did different things"):
        run_together(tasks, subject.module, view=Copies(alike=False))


def test_a_parameter_is_gathered_only_if_all_are_there(subject, tasks):
    """Some of the processes may have to gather it without the others, and would wait for one that went another way."""
    for seed in (1, 2):
        with subject.model.trace(subject.inputs(seed=seed)):
            (subject.head_envoy.output @ subject.head_envoy.weight).save()
    view = Copies(alike=False)
    with pytest.raises(HpcError, match="did different things"):
        run_together(tasks, subject.module, view=view)
    assert view.calls == []


def test_what_was_written_into_is_gathered_again():
    """Neither a part nor a whole that has changed since serves the next."""
    view, part = Copies(), torch.ones(2, 3)
    joint = JointView(view)
    whole = joint.whole("a", "output", part)
    assert joint.whole("a", "output", part) is whole
    assert joint.whole("a", "input", part) is not whole
    for changed in (joint.whole("a", "input", part), part):
        changed.add_(1)
        joint.whole("a", "input", part)
    assert view.calls == [("whole", False)] * 4
