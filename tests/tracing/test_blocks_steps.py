"""Loops over the steps of a generation that ends before the last of them: names are what they were at the last step reached."""

# ruff: noqa: B007, PERF401 - how blocks are written

import pytest
import torch

from nnsight_hpc import LanguageModel
from nnsight_hpc.wire.errors import InvalidInput

IDS = torch.tensor([[5, 6, 7, 8, 9]])
STEPS = 5


@pytest.fixture(scope="module")
def lm(tiny_llama):
    return LanguageModel(str(tiny_llama), dispatch=True)


@pytest.fixture(scope="module")
def logits(lm):
    """The logits of each step, and a token that comes at the third step and not before."""
    found = []
    with lm.generate(IDS, max_new_tokens=STEPS, min_new_tokens=STEPS) as tracer:
        for step in tracer.iter[:]:
            found.append(lm.lm_head.output[0, -1].save())
    return found


@pytest.fixture(params=["whole", "ends early"])
def options(request, logits):
    """Keywords of a generation, and how many steps it has."""
    if request.param == "whole":
        return {"max_new_tokens": STEPS, "min_new_tokens": STEPS}, STEPS
    tokens = [int(one.argmax()) for one in logits]
    last = next(i for i, token in enumerate(tokens) if i and token not in tokens[:i])
    return {"max_new_tokens": STEPS, "eos_token_id": tokens[last], "pad_token_id": 0}, last + 1


def _sums(logits, steps):
    return [one.sum() for one in logits[:steps]]


def test_sum_of_the_steps(lm, logits, options):
    """A sum, a counter and the last value that a loop leaves are those of the steps that the model reached."""
    keywords, steps = options
    total, count, seen, numbers, kinds = 0, 0, None, [], ["first"]
    with lm.generate(IDS, **keywords) as tracer:
        for step in tracer.iter[:]:
            here = lm.lm_head.output[0, -1].sum()
            total = total + here
            count += 1
            seen = here * 2
            numbers.append(step)
            kinds += ["later"] if step else ["zero"]
        total, mean, seen = total.save(), (total / count).save(), seen.save()
    sums = _sums(logits, steps)
    assert total == sum(sums)
    assert mean == sum(sums) / steps
    assert count == steps
    assert numbers == list(range(steps))
    assert kinds == ["first", "zero", *["later"] * (steps - 1)]
    assert seen == sums[-1] * 2


def test_saved_at_each_step(lm, logits, options):
    """A sum that is saved in the loop is that of the last step reached, and lists have an entry for each."""
    keywords, steps = options
    total, each, some = 0, [], 0
    with lm.generate(IDS, **keywords) as tracer:
        for step in tracer.iter[:]:
            total = (total + lm.lm_head.output[0, -1].sum()).save()
            each.append(total)
        for step in tracer.iter[1:]:
            some += lm.lm_head.output[0, -1].sum()
        some = some.save()
    sums = _sums(logits, steps)
    assert total == sum(sums)
    assert each == [sum(sums[: k + 1]) for k in range(steps)]
    assert some == sum(sums[1:])


def test_with_a_step(lm, logits, options):
    """`with tracer.iter[…]` and `tracer.all()` accumulate like the `for`; so does what stands in a branch there."""
    keywords, steps = options
    total, largest, count = 0, -1e9, 0
    with lm.generate(IDS, **keywords) as tracer:
        with tracer.all():
            here = lm.lm_head.output[0, -1].sum()
            total = total + here
            if here > largest:  # noqa: PLR1730 - what is tested
                largest = here
            count += 1
        total, largest = total.save(), largest.save()
    sums = _sums(logits, steps)
    assert (total, largest, count) == (sum(sums), max(sums), steps)


def test_a_break_at_a_step(lm, logits, options):
    """A loop over steps is left where a value says so, and at the latest with the generation."""
    keywords, steps = options
    sums = _sums(logits, steps)
    total = 0
    with lm.generate(IDS, **keywords) as tracer:
        for step in tracer.iter[:]:
            total = total + lm.lm_head.output[0, -1].sum()
            if lm.lm_head.output[0, -1].sum() == float(sums[1]):
                break
        total = total.save()
    assert total == sum(sums[:2])


def test_invokes(lm, logits):
    """Each invoke of a batch counts the steps of the generation."""
    counts, totals = [], []
    with lm.generate(max_new_tokens=3, min_new_tokens=3) as tracer:
        for _ in range(2):
            with tracer.invoke(IDS):
                total, count = 0, 0
                for step in tracer.iter[:]:
                    total = total + lm.lm_head.output[0, -1].sum()
                    count += 1
                totals.append(total.save())
                counts.append((count * torch.ones(1)).save())
    torch.testing.assert_close(totals, [sum(_sums(logits, 3))] * 2)
    assert counts == [3, 3]


def test_a_step_that_must_come(lm, logits, options):
    """A step by its number is an error where the generation ends before it."""
    keywords, steps = options
    if steps == STEPS:
        with lm.generate(IDS, **keywords) as tracer:
            for step in tracer.iter[-1]:
                last = lm.lm_head.output[0, -1].sum().save()
        assert last == logits[-1].sum()
        return
    with pytest.raises(Exception, match="ended before") as caught, lm.generate(IDS, **keywords) as tracer:
        for step in tracer.iter[-1]:
            last = lm.lm_head.output[0, -1].sum().save()
    assert "tracer.iter[:]" in str(caught.value)


def test_unsaved_name_of_a_step(lm, options):
    """A name that is bound in the loop and not saved says so after the block."""
    keywords, _ = options
    with lm.generate(IDS, **keywords) as tracer:
        for step in tracer.iter[:]:
            here = lm.lm_head.output[0, -1]
    with pytest.raises(InvalidInput, match="not saved"):
        _ = here + 1


def test_calls_within_a_forward(lm):
    """Where no generation runs, a value that was made at no later call is that of the last call that came."""
    with lm.trace(IDS) as tracer:
        total = 0
        for step in tracer.iter[:3]:
            total = total + lm.model.layers[0].output.sum()
        total = total.save()
    with lm.trace(IDS):
        once = lm.model.layers[0].output.sum().save()
    assert total == once
