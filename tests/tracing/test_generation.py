"""Generation: its steps as calls of the modules, its tokens as the result."""

import pytest
import torch

from nnsight_hpc.graph.build import GENERATE
from nnsight_hpc.wire.errors import InvalidInput

PROMPT = "the tower is in the city of"


def _plain(lm, steps, path="lm_head"):
    """Plain PyTorch: the tokens of a greedy generation, and what a hook sees at each step."""
    seen = []
    handle = lm.module.get_submodule(path).register_forward_hook(lambda _m, _i, out: seen.append(out))
    tokens = lm.module.generate(**lm.tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=steps, do_sample=False)
    handle.remove()
    return tokens, seen


def test_result_is_the_tokens(lm):
    """`tracer.result` is what the model's own generate returns."""
    with lm.generate(PROMPT, max_new_tokens=3) as tracer:
        tokens = tracer.result.save()
    assert torch.equal(tokens, _plain(lm, 3)[0])


@pytest.mark.parametrize(
    ("choose", "steps"),
    [
        (lambda t: t.iter[:], [0, 1, 2, 3]),
        (lambda t: t.all(), [0, 1, 2, 3]),
        (lambda t: t.iter[1:3], [1, 2]),
        (lambda t: t.iter[2], [2]),
        (lambda t: t.iter[[0, 3]], [0, 3]),
        (lambda t: t.iter[-1], [3]),
    ],
    ids=["all steps", "all", "slice", "one", "list", "last"],
)
def test_steps(lm, choose, steps):
    """A `for` over chosen steps yields plain integers, and points are those of that step."""
    seen = _plain(lm, 4)[1]
    at, logits = [], []
    with lm.generate(PROMPT, max_new_tokens=4) as tracer:
        for step in choose(tracer):
            at.append(step)
            logits.append(lm.lm_head.output.save())
    assert at == steps
    for step, got in zip(steps, logits, strict=True):
        torch.testing.assert_close(got, seen[step])


def test_change_at_a_step(lm):
    """A change at one step leaves the tokens before it, and gives what a hook at that call gives."""
    calls = []

    def hook(_m, _i, out):
        calls.append(None)
        return torch.roll(out, 1, dims=-1) if len(calls) == 2 else out

    handle = lm.module.lm_head.register_forward_hook(hook)
    expected = lm.module.generate(**lm.tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=4, do_sample=False)
    handle.remove()
    with lm.generate(PROMPT, max_new_tokens=4) as tracer:
        for _ in tracer.iter[1]:
            lm.lm_head.output = torch.roll(lm.lm_head.output, 1, dims=-1)
        tokens = tracer.result.save()
    assert torch.equal(tokens, expected)
    assert not torch.equal(tokens, _plain(lm, 4)[0])


def test_next_is_a_later_call(lm):
    """`m.next()` counts calls of that module, and of those in it."""
    seen = _plain(lm, 3)[1]
    with lm.generate(PROMPT, max_new_tokens=3):
        first = lm.lm_head.output.save()
        third = lm.lm_head.next(2).output.save()
        hidden = lm.model.next().layers[0].output.save()
    torch.testing.assert_close(first, seen[0])
    torch.testing.assert_close(third, seen[2])
    assert hidden.shape == (1, 1, 32)


def _end_after(lm, tokens):
    """The tokenizer's end token is what the model generates as its n-th token."""
    return {"eos_token_id": _plain(lm, tokens)[0][0, -1].item(), "pad_token_id": 2}


def test_steps_that_never_come_are_left_out(lm):
    """A generation that ends early gives a list as long as it was, and a name has the last step that was."""
    seen = _plain(lm, 2)[1]
    logits = []
    with lm.generate(PROMPT, max_new_tokens=6, **_end_after(lm, 2)) as tracer:
        for _ in tracer.iter[:]:
            logits.append(lm.lm_head.output.save())
            last = lm.lm_head.output.save()
    assert len(logits) == 2
    torch.testing.assert_close(last, seen[1])


def test_two_saves_in_one_step_do_not_stand_for_one_another(lm):
    """Where a step never came, each entry of a dict has its own last value, not its neighbour's."""
    layers = {}
    with lm.generate(PROMPT, max_new_tokens=6, **_end_after(lm, 2)) as tracer:
        for _ in tracer.iter[:]:
            for index in range(2):
                hidden = lm.model.layers[index].output.save()
                layers.setdefault(index, []).append(hidden)
    torch.testing.assert_close(hidden, _plain(lm, 2, "model.layers.1")[1][1])
    assert [len(found) for found in layers.values()] == [2, 2]


def test_lengths_that_differ_generate_apart(lm):
    """Invokes of two lengths are two generations; each equals its prompt alone."""
    with lm.generate(max_new_tokens=3) as tracer:
        with tracer.invoke(PROMPT):
            long = tracer.result.save()
        with tracer.invoke("one two"):
            short = tracer.result.save()
    assert torch.equal(long, _plain(lm, 3)[0])
    assert short.shape == (1, 5)
    assert [node.kwargs["max_new_tokens"] for node in tracer.graph.nodes if node.op == GENERATE] == [3, 3]


def test_max_length_counts_the_prompt(lm):
    """`max_length` becomes the number of new tokens that it leaves."""
    with lm.generate(PROMPT, max_length=10) as tracer:
        steps = list(tracer.iter[:])
        tokens = tracer.result.save()
    assert steps == [0, 1, 2]
    assert tokens.shape == (1, 10)


def test_sampling_needs_a_seed(lm):
    """With a seed the same tokens are drawn again; without one nothing runs."""
    tokens = []
    for seed in (3, 3, 4):
        with lm.generate(PROMPT, max_new_tokens=12, do_sample=True, seed=seed) as tracer:
            drawn = tracer.result.save()
        tokens.append(drawn)
    assert torch.equal(tokens[0], tokens[1])
    assert not torch.equal(tokens[0], tokens[2])
    with pytest.raises(InvalidInput, match="needs a seed"):
        lm.generate(PROMPT, do_sample=True)


def test_open_steps_of_a_trace_are_refused(lm):
    """A plain trace does not say how often its modules run; steps that are counted are fine."""
    with pytest.raises(InvalidInput, match="not known"), lm.trace(PROMPT) as tracer:
        list(tracer.iter[:])
    with lm.trace(PROMPT) as tracer:
        steps = list(tracer.iter[:2])
        lm.lm_head.output.save()
    assert steps == [0, 1]


def test_a_module_that_generates_nothing(model):
    """A plain module has no generate."""
    with pytest.raises(InvalidInput, match="generates nothing"):
        model.generate(torch.ones(1, 4))


def test_stop(lm):
    """After `tracer.stop()` nothing can be read, and what was read before is there."""
    with lm.trace(PROMPT) as tracer:
        hidden = lm.model.layers[0].output.save()
        tracer.stop()
    assert hidden.shape == (1, 7, 32)
    with pytest.raises(InvalidInput, match="not reached"), lm.trace(PROMPT) as tracer:
        tracer.stop()
        lm.model.layers[0].output.save()
    with lm.generate(PROMPT, max_new_tokens=4) as tracer:
        steps = []
        for step in tracer.iter[:]:
            steps.append(step)
            hidden = lm.model.layers[0].output.save()
            if step == 1:
                tracer.stop()
    assert steps == [0, 1]
    assert hidden.shape == (1, 1, 32)
