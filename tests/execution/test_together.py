"""Several graphs in one forward: each gives what it gives alone, whatever the others do.

Alone the matrices have other shapes, and float32 sums come out in another order: `TOLERANCE` says by how much. Within one
forward what others do changes not a bit.
"""

from __future__ import annotations

import pytest
import torch

from nnsight_hpc.execution import run_graph
from nnsight_hpc.execution.together import Task, run_together
from nnsight_hpc.graph.cobatch import batch_key
from nnsight_hpc.wire.errors import ExecutionFailed, RequestCancelled
from tests.oracle.architectures import LANGUAGE, make
from tests.oracle.hooks import changed, counting, hooks_of, seeing

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}


class Recorded:
    """A backend that runs graphs alone, and keeps them with what they gave."""

    remote = False

    def __init__(self):
        self.tasks, self.alone = [], []

    def run(self, graph, tensors, model, **_local):
        log = []
        self.tasks.append(Task(graph, tensors, None, lambda line, _source: log.append(line), None))
        self.alone.append(run_graph(graph, tensors, model.module, log=log.append))
        return self.alone[-1]


@pytest.fixture(scope="module", params=LANGUAGE)
def any_lm(request):
    return _recording(make(request.param))


@pytest.fixture(scope="module")
def llama():
    return _recording(make("llama"))


@pytest.fixture(autouse=True)
def _no_hook_stays(request):
    yield
    for name in {"any_lm", "llama"} & {*request.fixturenames}:
        assert hooks_of(request.getfixturevalue(name).module) == []


def _recording(subject):
    subject.model._backend = lambda **_where: subject.backend
    return subject


@pytest.fixture
def recorded(request):
    """What was traced in this test."""
    subject = request.getfixturevalue(next(n for n in ("any_lm", "llama") if n in request.fixturenames))
    subject.backend = Recorded()
    return subject.backend


def _first(value):
    return value[0] if isinstance(value, tuple) else value


def _scaled(subject, inputs, factor, *, block=1):
    """Scale what a block gives, in place, and save the next block's output and the logits."""
    with subject.model.trace(inputs):
        hidden = _first(subject.at(block).output)
        hidden[:, -1] *= factor
        _first(subject.at(block + 1).output).save()
        subject.head_envoy.output.save()


def _check(got, alone):
    """Each as alone: the same names, the same values."""
    for one, expected in zip(got, alone, strict=True):
        assert not isinstance(one, Exception), one
        assert one.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(one[name], value, **TOLERANCE)


def test_each_as_alone_in_one_forward(any_lm, recorded):
    """Graphs that change and save, with one or several rows, run the model once and give what each gives alone."""
    for seed, rows in ((1, 1), (2, 2), (3, 1)):
        _scaled(any_lm, any_lm.inputs(seed=seed, rows=rows), 1.0 + seed)
    with counting(any_lm.module) as ran:
        got = run_together(recorded.tasks, any_lm.module)
    assert ran.count("") == 1
    _check(got, recorded.alone)


def test_each_as_plain_hooks_say(any_lm, recorded):
    """The logits of each are those of plain PyTorch hooks on its prompt alone."""
    batch = [any_lm.inputs(seed=seed, rows=1) for seed in (1, 2, 3)]
    for factor, inputs in enumerate(batch, start=2):
        _scaled(any_lm, inputs, float(factor))

    def scale(value, factor):
        _first(value)[:, -1] *= factor

    for factor, (inputs, one) in enumerate(
        zip(batch, run_together(recorded.tasks, any_lm.module), strict=True), start=2
    ):
        with changed(any_lm.module, {any_lm.path(1): lambda value, f=factor: scale(value, f)}):
            expected = any_lm.logits(inputs)
        torch.testing.assert_close([*one.values()][-1], expected, **TOLERANCE)


@pytest.mark.parametrize("kind", ["output", "input"])
def test_every_module_shows_each_its_own_or_nothing(any_lm, recorded, kind):
    """Of every module a graph sees what it sees alone, or is refused: never another's rows."""
    batch = [any_lm.inputs(seed=seed, rows=seed) for seed in (1, 2)]
    with seeing(any_lm.module) as seen:
        any_lm.run(batch[0])
    refused = []
    for path in (path for path in dict.fromkeys(seen.order) if path):
        recorded.tasks.clear()
        recorded.alone.clear()
        for inputs in batch:
            with any_lm.model.trace(inputs):
                getattr(any_lm.model.get(path), kind).save()
        for one, expected in zip(run_together(recorded.tasks, any_lm.module), recorded.alone, strict=True):
            if isinstance(one, Exception):
                refused.append(path)
            else:
                torch.testing.assert_close([*one.values()], [*expected.values()], **TOLERANCE)
    assert [path for path in refused if "experts" not in path] == []


def test_others_change_not_a_bit(llama, recorded):
    """Whether another's rows are made to be NaN or left alone, a graph's own values are the same bits."""
    for factor in (1.0, float("nan")):
        _scaled(llama, llama.inputs(seed=1), 3.0)
        _scaled(llama, llama.inputs(seed=2), factor)
    quiet, loud = (run_together(recorded.tasks[first : first + 2], llama.module) for first in (0, 2))
    assert all(torch.equal(quiet[0][name], loud[0][name]) for name in quiet[0])
    assert torch.isnan([*loud[1].values()][-1][:, -1]).all()


def test_an_error_is_its_own(llama, recorded):
    """A graph that fails while it runs has its error; the others are done in that same forward."""
    _scaled(llama, llama.inputs(seed=1, rows=1), 2.0)
    with pytest.raises(ExecutionFailed, match="7"), llama.model.trace(llama.inputs(seed=2, rows=1)):
        _first(llama.at(1).output)[7].save()
    _scaled(llama, llama.inputs(seed=3, rows=1), 4.0)
    with counting(llama.module) as ran:
        first, failed, last = run_together(recorded.tasks, llama.module)
    assert ran.count("") == 1
    assert isinstance(failed, ExecutionFailed)
    _check([first, last], recorded.alone)


def test_a_cancelled_one_ends_and_the_others_do_not(llama, recorded):
    """Who is cancelled at a module's boundary is; the others are as alone."""
    for seed in (1, 2, 3):
        _scaled(llama, llama.inputs(seed=seed), 2.0)
    tasks = [*recorded.tasks]
    tasks[1] = Task(tasks[1].graph, tasks[1].tensors, lambda: True, print, None)
    got = run_together(tasks, llama.module)
    assert isinstance(got[1], RequestCancelled)
    _check([got[0], got[2]], [recorded.alone[0], recorded.alone[2]])


def test_the_forward_ends_when_all_have_what_they_need(llama, recorded):
    """Blocks run as long as one graph looks at them, and none after that."""
    for block in (0, 2):
        with llama.model.trace(llama.inputs(seed=block)):
            llama.at(block).output.save()
    with counting(llama.module) as ran:
        got = run_together(recorded.tasks, llama.module)
    assert [ran.count(llama.path(block)) for block in range(4)] == [1, 1, 1, 0]
    _check(got, recorded.alone)


def test_a_module_that_one_calls_shows_nothing_to_others(llama, recorded):
    """A graph that puts a hidden state through the head does not have others see that as the head's output."""
    with llama.model.trace(llama.inputs(seed=1)):
        llama.head_envoy(_first(llama.at(1).output)).save()
    with llama.model.trace(llama.inputs(seed=2)):
        llama.head_envoy.output.save()
    _check(run_together(recorded.tasks, llama.module), recorded.alone)


def test_a_module_with_a_state_is_not_called_among_others(llama, recorded):
    """Who calls the table of positions, which may grow by that and stay so, is not run with the others."""
    with llama.model.trace(llama.inputs(seed=1)):
        hidden = llama.at(0).output
        llama.model.model.rotary_emb(hidden, torch.arange(400)[None])[0].save()
    _scaled(llama, llama.inputs(seed=2), 2.0)
    called, other = run_together(recorded.tasks, llama.module)
    assert isinstance(called, ValueError)
    _check([other], recorded.alone[1:])


def test_invokes_of_one_among_others(llama, recorded):
    """A graph with several invokes has them within its own rows."""
    _scaled(llama, llama.inputs(seed=1), 2.0)
    with llama.model.trace() as tracer:
        with tracer.invoke(llama.inputs(seed=2, rows=1)):
            source = _first(llama.at(1).output)[:, 0].clone()
        with tracer.invoke(llama.inputs(seed=3, rows=2)):
            _first(llama.at(1).output)[:, 0] = source
            llama.head_envoy.output.save()
    assert len({batch_key(t.graph, _shapes(t), exclusive=False).key for t in recorded.tasks}) == 1
    _check(run_together(recorded.tasks, llama.module), recorded.alone)


def _shapes(task):
    return {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in task.tensors.items()}


def test_the_result_has_own_rows_only(llama, recorded):
    """The model's result shows each its own logits."""
    for seed in (1, 2):
        with llama.model.trace(llama.inputs(seed=seed, rows=seed)):
            llama.model.output.logits.save()
    _check(run_together(recorded.tasks, llama.module), recorded.alone)


@pytest.mark.parametrize("odd", ["padded", "positions", "unknown"])
def test_an_odd_prompt_is_left_out(llama, recorded, odd):
    """A prompt with padding, of other positions or of unknown words is not run with the others, who are as alone."""
    for seed in (1, 2, 3):
        _scaled(llama, llama.inputs(seed=seed), 2.0)
    tasks = [*recorded.tasks]
    tensors = {name: tensor.clone() for name, tensor in tasks[1].tensors.items()}
    of_forward = next(node for node in tasks[1].graph.nodes if node.op == "model.forward").kwargs
    name, value = {"padded": ("attention_mask", 0), "positions": ("position_ids", 3), "unknown": ("input_ids", 10**6)}[
        odd
    ]
    tensors[of_forward[name].name][0, 0] = value
    tasks[1] = Task(tasks[1].graph, tensors, None, print, None)
    got = run_together(tasks, llama.module)
    assert isinstance(got[1], ValueError)
    _check([got[0], got[2]], [recorded.alone[0], recorded.alone[2]])


def test_a_value_of_another_form_is_refused(llama, recorded):
    """What cannot stand beside the others' rows is refused: alone it may be another's business."""
    _scaled(llama, llama.inputs(seed=1), 2.0)
    with llama.model.trace(llama.inputs(seed=2)):
        llama.at(1).output = _first(llama.at(1).output)[:, :, None].sum(2).double().float()[:, :1].expand(2, 5, 48) * 2
        llama.at(2).output.save()
    with llama.model.trace(llama.inputs(seed=3)):
        llama.at(0).output = _first(llama.at(0).output)[:1]
        llama.at(0).output.save()
    first, second, third = run_together(recorded.tasks, llama.module)
    _check([first, second], recorded.alone[:2])
    assert isinstance(third, ExecutionFailed)


def test_an_error_of_the_model_is_everybodys_to_try_alone(llama, recorded):
    """Where the model itself fails nobody is blamed: who has all that it needs is done, the others get the error."""
    with llama.model.trace(llama.inputs(seed=1)):
        llama.at(0).output.save()
    _scaled(llama, llama.inputs(seed=2), 2.0)

    def fail(_value):
        raise RuntimeError("not enough memory")

    with changed(llama.module, {llama.path(3): fail}):
        done, failed = run_together(recorded.tasks, llama.module)
    _check([done], recorded.alone[:1])
    assert isinstance(failed, RuntimeError)
