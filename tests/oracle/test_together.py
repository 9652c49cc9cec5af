"""Requests that share a forward on ranks: each gives what it gives alone on them, and what hooks on the whole model say.

What is compared with the same ranks may differ by `TOLERANCE`, as in one process: matrices of other shapes are summed in
another order.
"""

from functools import partial

import pytest
import torch

from nnsight_hpc.execution.values import save_tensors, unpack_values
from nnsight_hpc.wire.errors import ExecutionFailed, from_report
from nnsight_hpc.wire.frames import pack
from tests.oracle.architectures import make
from tests.oracle.compare import same, within_tolerances
from tests.oracle.degrees import Place, every_degree
from tests.oracle.hooks import changed, seeing
from tests.oracle.on_ranks import RanksBackend
from tests.parallel.replica import Question

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
LLAMA = Place("llama", 2)
SPREAD = (LLAMA, Place("gpt2", 2), Place("mixtral", 2), Place("qwen3", 3))
"""Heads in groups; queries, keys and values in one; experts; one key/value head that several ranks have."""


class Sharing:
    """A backend that runs each graph alone on the ranks, keeps what it gave, and runs them again together."""

    remote = True

    def __init__(self, place, replicas, folder, view="ShardedView"):
        self._replica = partial(replicas.of, place.ranks)
        self._asking = {"model": str(folder / place.name), "view": view, "counted": True}
        self._alone = RanksBackend(self._replica, folder / place.name, view=view)
        self.frames, self.alone = [], []

    def run(self, graph, tensors, model, **_where):
        self.frames.append(pack(graph.to_json().encode(), save_tensors(tensors)))
        self.alone.append(self._alone.run(graph, tensors, model))
        return self.alone[-1]

    def together(self, *numbers, **options):
        """What the graphs with these numbers (by default all) give, or their errors; and how often the model ran.

        Parameters
        ----------
        options
            Those of a `Question`.
        """
        frames = [self.frames[number] for number in numbers or range(len(self.frames))]
        answers = self._replica().ask_together(Question(**self._asking, **options), frames)
        self.cancelled = [answer.cancelled for answer, _ in answers]
        self.said = [answer.said for answer, _ in answers]
        return [_given(*answer) for answer in answers], answers[0][0].ran.count("")

    def check(self):
        """All as alone, in one forward."""
        got, forwards = self.together()
        assert forwards == 1
        for one, expected in zip(got, self.alone, strict=True):
            _as_alone(one, expected)


def _given(answer, result):
    return from_report(answer.error) if answer.error else unpack_values(result) if result else {}


def _as_alone(got, expected):
    assert not isinstance(got, Exception), got
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, **TOLERANCE)


def _params(*spread):
    return [pytest.param(place, id=str(place), marks=pytest.mark.ranks) for place in spread]


@pytest.fixture(params=_params(*SPREAD))
def spread(request, replicas, saved):
    """A model on ranks, with what is traced in this test."""
    return _sharing(request.param, replicas, saved)


@pytest.fixture(params=_params(LLAMA))
def grouped(request, replicas, saved):
    """As `spread`, for what does not depend on the architecture."""
    return _sharing(request.param, replicas, saved)


def _sharing(place, replicas, saved, **options):
    return make(place.name, Sharing(place, replicas, saved, **options))


def _first(value):
    return value[0] if isinstance(value, tuple) else value


def _split(subject, block=1):
    """The modules of a block whose outputs are tensors with prompts and tokens; some of them are split over ranks."""
    inputs = subject.inputs()
    with seeing(subject.module) as seen:
        subject.run(inputs)
    shape = inputs.shape
    return [path for path in seen.inside(subject.path(block)) if seen.output(path).shape[:-1] == shape]


@every_degree
def test_each_as_alone_and_as_hooks_say(spread):
    """What each of several changes at every module of a block has the effect that hooks on its prompts alone have."""
    batch = [spread.inputs(seed=seed, rows=rows) for seed, rows in ((1, 1), (2, 2), (3, 1))]
    paths, logits = _split(spread), []

    def change(value, factor):
        value[:, -1, [1, -2]] *= factor

    for factor, inputs in enumerate(batch, start=2):
        with spread.model.trace(inputs):
            for path in paths:
                output = spread.model.get(path).output
                output[:, -1, [1, -2]] *= factor
            logits.append(spread.head_envoy.output.save())
    spread.ranks.check()
    for factor, (inputs, got) in enumerate(zip(batch, logits, strict=True), start=2):
        with changed(spread.module, dict.fromkeys(paths, partial(change, factor=factor))), within_tolerances():
            assert same(got, spread.logits(inputs))


@pytest.mark.parametrize("kind", ["output", "input"])
def test_every_module_of_a_block_shows_each_its_own(spread, kind):
    """Also where ranks hold parts: of queries, of heads, of neurons."""
    paths = _split(spread)
    for seed in (1, 2):
        with spread.model.trace(spread.inputs(seed=seed, rows=seed)):
            for path in paths:
                getattr(spread.model.get(path), kind).save()
    spread.ranks.check()


def test_heads_and_neurons_are_set_by_each_for_itself(grouped):
    """Inputs of row-split modules and outputs of column-split ones are replaced by one, changed by another, read by a third."""
    attention, mlp = grouped.at(1, "attention"), grouped.at(2, "mlp")
    with grouped.model.trace(grouped.inputs(seed=1)):
        attention.q_proj.output = attention.q_proj.output.flip(-1)
        mlp.down_proj.input = mlp.down_proj.input * 3
        grouped.head_envoy.output.save()
    with grouped.model.trace(grouped.inputs(seed=2)):
        attention.q_proj.output[:, :, :5] = 1.0
        attention.o_proj.input.view(2, 5, 24, 4)[:, :, [0, 23]] = 0.0
        grouped.head_envoy.output.save()
    with grouped.model.trace(grouped.inputs(seed=3)):
        attention.q_proj.output.save()
        mlp.down_proj.input[:, :, 7].save()
        grouped.head_envoy.output.save()
    grouped.ranks.check()


@pytest.mark.ranks
def test_parameters_are_whole_for_each(replicas, saved):
    """Also those that neighbouring ranks have copies of."""
    subject = _sharing(SPREAD[-1], replicas, saved)
    for seed in (1, 2):
        with subject.model.trace(subject.inputs(seed=seed)):
            keys = subject.at(1, "attention").k_proj
            (keys.input @ keys.weight.T - keys.output).save()
    subject.ranks.check()


def test_others_change_not_a_bit(grouped):
    """Whether another's heads are made to be NaN or left alone, a request's own values are the same bits."""
    for factor in (1.0, float("nan")):
        for own, scale in ((1, 3.0), (2, factor)):
            with grouped.model.trace(grouped.inputs(seed=own)):
                grouped.at(1, "attention").o_proj.input[:, -1] *= scale
                grouped.head_envoy.output.save()
    (quiet, _), (loud, forwards) = grouped.ranks.together(0, 1), grouped.ranks.together(2, 3)
    assert forwards == 1
    assert all(torch.equal(a, b) for a, b in zip(quiet[0].values(), loud[0].values(), strict=True))
    assert torch.isnan(next(iter(loud[1].values()))[:, -1]).all()


def test_an_error_is_its_own(grouped):
    """A request that fails at a split module fails on all ranks, with the error that it has alone; the others share on."""
    _query(grouped, seed=1, entry=95)
    with pytest.raises(IndexError):
        _query(grouped, seed=2, entry=96)
    _query(grouped, seed=3, entry=0)
    (first, failed, last), forwards = grouped.ranks.together()
    assert forwards == 2  # the one that failed is told what it meets alone
    assert isinstance(failed, ExecutionFailed)
    assert "index 96 is out of bounds" in failed.what
    for one, expected in zip((first, last), grouped.ranks.alone, strict=True):
        _as_alone(one, expected)


def _query(subject, seed, entry):
    """Save one entry of the queries, of which each rank has some, and the logits."""
    with subject.model.trace(subject.inputs(seed=seed)):
        subject.at(1, "attention").q_proj.output[..., entry].save()
        subject.head_envoy.output.save()


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("view", "error", "why"),
    [("FailsOnOneRank", ValueError, "no query projection"), ("NoMemoryOnOneRank", MemoryError, "not enough memory")],
)
def test_an_error_on_one_rank_alone_is_its_own_too(replicas, saved, view, error, why):
    """Where one rank fails, and the others do not, nobody gets a value of that forward; the others get theirs alone."""
    subject = _sharing(LLAMA, replicas, saved, view=view)
    for seed in (1, 2):
        with subject.model.trace(subject.inputs(seed=seed)):
            subject.at(1).output.save()
    with pytest.raises(error, match=why):
        _query(subject, seed=3, entry=0)
    (first, second, failed), forwards = subject.ranks.together()
    assert forwards == 4
    assert why in failed.what
    for one, expected in zip((first, second), subject.ranks.alone, strict=True):
        _as_alone(one, expected)


def test_a_cancelled_one_ends_the_forward_and_the_others_share_the_next(grouped):
    """Who is cancelled while the model runs is, on all ranks; the others are as alone, and say their lines once."""
    for seed in (1, 2, 3):
        with grouped.model.trace(grouped.inputs(seed=seed)) as tracer:
            tracer.log("begun", grouped.at(0, "attention").q_proj.output.shape[0])
            grouped.head_envoy.output.save()
    (first, _, last), forwards = grouped.ranks.together(cancelled=1, after=grouped.path(1))
    assert forwards == 2
    assert grouped.ranks.cancelled == [False, True, False]
    assert grouped.ranks.said == [("begun 2",), (), ("begun 2",)]
    _as_alone(first, grouped.ranks.alone[0])
    _as_alone(last, grouped.ranks.alone[2])


def test_conditions_and_logs_are_each_ones_own(grouped):
    """Each takes its own branch of a condition on split values, and says its own line once."""
    for seed in range(4):
        with grouped.model.trace(grouped.inputs(seed=seed, rows=1)) as tracer:
            queries = grouped.at(1, "attention").q_proj.output
            if queries[0, -1, 0] > 0:
                queries[:, -1] *= 2
                tracer.log("more", seed)
            else:
                queries[:, -1] *= -3
                tracer.log("less", seed)
            grouped.head_envoy.output.save()
    grouped.ranks.check()
    assert {line.split()[0] for said in grouped.ranks.said for line in said} == {"more", "less"}
    assert [[line.split()[-1] for line in said] for said in grouped.ranks.said] == [[str(seed)] for seed in range(4)]
