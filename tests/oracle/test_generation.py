"""Generation: every step's values and edits, against `model.generate` with plain hooks, bit for bit."""
# ruff: noqa: C408, PERF401, SIM117 - blocks are written as researchers write them

import pytest
import torch

from nnsight_hpc.wire.errors import HpcError, InvalidInput
from tests.devices import DEVICE
from tests.oracle.compare import same
from tests.oracle.degrees import every_degree, in_one_process
from tests.oracle.hooks import counting, output_hook, seeing

STEPS = 6


def _generate(subject, inputs, **kwargs):
    """The tokens of plain greedy generation."""
    settings = {"max_new_tokens": STEPS, "do_sample": False, "attention_mask": torch.ones_like(inputs), **kwargs}
    with torch.no_grad():
        return subject.module.generate(inputs, **settings)


def _seen(subject, inputs, **kwargs):
    with seeing(subject.module) as seen:
        _generate(subject, inputs, **kwargs)
    return seen


def test_result_is_the_tokens(lm):
    """`tracer.result` is what plain generation returns."""
    inputs = lm.inputs()
    with lm.model.generate(inputs, max_new_tokens=STEPS) as tracer:
        tokens = tracer.result.save()
    assert tokens.shape == (2, 5 + STEPS)
    assert same(tokens, _generate(lm, inputs))


def test_first_step_without_iter(lm):
    """A plain read in a generation is the first step's: the prompt."""
    inputs = lm.inputs()
    with lm.model.generate(inputs, max_new_tokens=STEPS):
        hidden = lm.at(1).output.save()
    assert same(hidden, _seen(lm, inputs).output(lm.path(1)))


def test_generation_stops_when_nothing_later_is_needed(lm):
    """A read of the first two steps runs two forwards, the second up to that block."""
    inputs = lm.inputs()
    with counting(lm.module) as ran, lm.model.generate(inputs, max_new_tokens=STEPS):
        lm.at(1).output.save()
        lm.at(1).next().output.save()
    assert ran.count(lm.path(1)) == 2
    assert ran.count(lm.path(2)) == 1


@every_degree
def test_every_step_by_for(lm):
    """`for step in tracer.iter[:]` with a list made in the block has an entry for each step."""
    inputs = lm.inputs()
    with lm.model.generate(inputs, max_new_tokens=STEPS) as tracer:
        states = [].save()
        for _step in tracer.iter[:]:
            states.append(lm.at(2).output)
    seen = _seen(lm, inputs)
    assert len(states) == STEPS
    assert same(list(states), seen.outputs[lm.path(2)])


def test_every_step_by_with(lm):
    """`with tracer.iter[:]` does the same as `for`."""
    inputs = lm.inputs()
    with lm.model.generate(inputs, max_new_tokens=STEPS) as tracer:
        states = tracer.list().save()
        with tracer.iter[:]:
            states.append(lm.head_envoy.output[:, -1].argmax(-1))
    expected = _generate(lm, inputs)[:, 5:]
    assert same(torch.stack(list(states), 1), expected)


def test_saved_name_in_iter_holds_the_last_step(lm):
    """Inside `iter`, a saved name is bound to the last step's value."""
    inputs = lm.inputs()
    with lm.model.generate(inputs, max_new_tokens=STEPS) as tracer:
        for _step in tracer.iter[:]:
            hidden = lm.at(2).output.save()
    assert same(hidden, _seen(lm, inputs).output(lm.path(2), STEPS - 1))


def test_list_of_python_gets_an_entry_each_step(lm):
    """A plain list, appended to in `iter` with saved values, has one entry each step."""
    inputs = lm.inputs()
    with lm.model.generate(inputs, max_new_tokens=STEPS) as tracer:
        states = list().save()
        for _step in tracer.iter[0:3]:
            states.append(lm.at(1).output.save())
    assert same(list(states), _seen(lm, inputs).outputs[lm.path(1)][:3])


@pytest.mark.parametrize(
    ("where", "steps"),
    [(slice(2, 5), [2, 3, 4]), (slice(None, 2), [0, 1]), (slice(4, None), [4, 5]), (slice(0, 6, 2), [0, 2, 4])],
)
def test_range_of_steps(lm, where, steps):
    """`tracer.iter[a:b]` shows the steps from a to before b."""
    inputs = lm.inputs()
    with lm.model.generate(inputs, max_new_tokens=STEPS) as tracer:
        states = tracer.list().save()
        with tracer.iter[where]:
            states.append(lm.head_envoy.output)
    calls = _seen(lm, inputs).outputs[lm.head]
    assert same(list(states), [calls[step] for step in steps])


def test_single_step(lm):
    """`tracer.iter[3]` is the fourth step only."""
    inputs = lm.inputs()
    with lm.model.generate(inputs, max_new_tokens=STEPS) as tracer:
        with tracer.iter[3]:
            hidden = lm.at(1).output.save()
            tokens = lm.head_envoy.output[:, -1].argmax(-1).save()
    assert same(hidden, _seen(lm, inputs).output(lm.path(1), 3))
    assert same(tokens, _generate(lm, inputs)[:, 5 + 3])


def test_list_of_steps(lm):
    """`tracer.iter[[0, 4]]` is these steps."""
    inputs = lm.inputs()
    with lm.model.generate(inputs, max_new_tokens=STEPS) as tracer:
        states = tracer.list().save()
        with tracer.iter[[0, 4]]:
            states.append(lm.at(1).output)
    calls = _seen(lm, inputs).outputs[lm.path(1)]
    assert same(list(states), [calls[0], calls[4]])


def test_next(lm):
    """`m.next()` is the module's next call, and again the one after it."""
    inputs, states = lm.inputs(), []
    with lm.model.generate(inputs, max_new_tokens=STEPS):
        states.append(lm.at(1).output.save())
        for _ in range(3):
            states.append(lm.at(1).next().output.save())
    assert same(states, _seen(lm, inputs).outputs[lm.path(1)][:4])


def test_step_is_a_number(lm):
    """The step's number can be computed with."""
    inputs = lm.inputs()
    with lm.model.generate(inputs, max_new_tokens=STEPS) as tracer:
        scaled = tracer.list().save()
        for step in tracer.iter[:]:
            scaled.append(lm.head_envoy.output[:, -1] * step)
    expected = [value[:, -1] * step for step, value in enumerate(_seen(lm, inputs).outputs[lm.head])]
    assert same(list(scaled), expected)


def test_edit_at_one_step(lm):
    """A change at step 2 alters what is generated from there on, as a hook on the third call does."""
    inputs = lm.inputs()
    with lm.model.generate(inputs, max_new_tokens=STEPS) as tracer:
        with tracer.iter[2]:
            lm.at(1).output[:] = -lm.at(1).output
        tokens = tracer.result.save()

    def third(value, call):
        return -value if call == 2 else None

    with output_hook(lm.module, lm.path(1), third):
        assert same(tokens, _generate(lm, inputs))


@every_degree
def test_edit_at_every_step(lm):
    """`tracer.all()` changes every step, and reads what its change made."""
    inputs = lm.inputs()
    with lm.model.generate(inputs, max_new_tokens=STEPS) as tracer:
        logits = tracer.list().save()
        with tracer.all():
            lm.at(1).output = lm.at(1).output * -1
            logits.append(lm.head_envoy.output)
        tokens = tracer.result.save()
    with output_hook(lm.module, lm.path(1), lambda value, _call: value * -1):
        assert same(tokens, _generate(lm, inputs))
        assert same(list(logits), _seen(lm, inputs).outputs[lm.head])
    assert not same(tokens, _generate(lm, inputs))


def test_edit_that_depends_on_an_earlier_step(lm):
    """The first step's activation is put into the last token of a later step."""
    inputs = lm.inputs()
    with lm.model.generate(inputs, max_new_tokens=STEPS) as tracer:
        start = lm.at(1).output[:, -1:]
        with tracer.iter[2:4]:
            lm.at(1).output = start
        tokens = tracer.result.save()
    first = _seen(lm, inputs).output(lm.path(1))[:, -1:]
    with output_hook(lm.module, lm.path(1), lambda _value, call: first if call in (2, 3) else None):
        assert same(tokens, _generate(lm, inputs))


def _ends_early(lm, inputs):
    """A token that plain generation makes at its third step, first seen there, so that it ends there."""
    new = _generate(lm, inputs)[0, 5:].tolist()
    step = next((i for i in range(1, STEPS - 1) if new[i] not in new[:i]), None)
    return (new[step], step) if step is not None else (None, None)


def test_end_by_eos(lm):
    """When the end token comes early, `iter[:]` has as many steps as there were."""
    for seed in range(1, 20):
        inputs = lm.inputs(seed=seed, rows=1)
        token, step = _ends_early(lm, inputs)
        if token is not None:
            break
    with lm.model.generate(inputs, max_new_tokens=STEPS, eos_token_id=token) as tracer:
        states = tracer.list().save()
        for _step in tracer.iter[:]:
            states.append(lm.head_envoy.output)
        tokens = tracer.result.save()
    assert same(tokens, _generate(lm, inputs, eos_token_id=token))
    assert len(states) == step + 1 < STEPS
    assert same(list(states), _seen(lm, inputs, eos_token_id=token).outputs[lm.head])


def test_step_that_never_comes_says_why(lm):
    """A single step beyond the end is an error that names the module."""
    with pytest.raises(HpcError) as caught, lm.model.generate(lm.inputs(), max_new_tokens=2) as tracer:
        with tracer.iter[4]:
            lm.at(1).output.save()
    assert lm.path(1) in str(caught.value)


@in_one_process("refused while it is recorded: nothing is sent")
def test_sampling_needs_a_seed(llama):
    """Sampling without a seed is refused, with what to write."""
    with (
        pytest.raises(InvalidInput, match="seed"),
        llama.model.generate(llama.inputs(), max_new_tokens=2, do_sample=True) as tracer,
    ):
        tracer.result.save()


def _random_states():
    """The states of the random generators of the CPU and of every GPU."""
    return [torch.random.get_rng_state(), *torch.cuda.get_rng_state_all()]


def test_sampling_with_a_seed_is_repeatable(lm):
    """The same seed gives the same tokens, another one others; torch's own random state is not touched."""
    inputs, found = lm.inputs(rows=1), []
    states = _random_states()
    for seed in (1, 1, 2):
        with lm.model.generate(inputs, max_new_tokens=8, do_sample=True, temperature=2.0, seed=seed) as tracer:
            found.append(tracer.result.save())
    assert same(found[0], found[1])
    assert not same(found[0], found[2])
    assert same(_random_states(), states)


def test_invokes_in_a_generation(lm):
    """Each invoke of a generation sees its own rows at every step, and its own tokens."""
    batch = [lm.inputs(seed=seed, rows=seed) for seed in (1, 2)]
    results, states = [], []
    with lm.model.generate(max_new_tokens=STEPS) as tracer:
        for inputs in batch:
            with tracer.invoke(inputs):
                mine = tracer.list().save()
                with tracer.iter[:]:
                    mine.append(lm.head_envoy.output[:, -1])
                results.append(tracer.result.save())
                states.append(mine)
    whole = torch.cat(batch)
    expected, calls = _generate(lm, whole), _seen(lm, whole).outputs[lm.head]
    assert same(torch.cat(results), expected)
    for step in range(STEPS):
        assert same(torch.cat([mine[step] for mine in states]), calls[step][:, -1])


def test_prompts_of_unequal_length_in_a_generation(lm):
    """A padded list of prompts generates what each prompt generates alone."""
    prompts = [[5, 17, 31], [9, 80, 44, 3, 60, 12, 7]]
    with lm.model.generate(prompts, max_new_tokens=STEPS) as tracer:
        tokens = tracer.result.save()
    for row, prompt in enumerate(prompts):
        alone = _generate(lm, torch.tensor([prompt], device=DEVICE))
        assert tokens[row, -STEPS:].tolist() == alone[0, -STEPS:].tolist()


def test_invokes_of_unequal_length_in_a_generation(lm):
    """Invokes of different lengths each generate what they generate alone."""
    prompts, results = [[5, 17, 31], [9, 80, 44, 3, 60, 12, 7]], []
    with lm.model.generate(max_new_tokens=STEPS) as tracer:
        for prompt in prompts:
            with tracer.invoke([prompt]):
                results.append(tracer.result.save())
    for prompt, tokens in zip(prompts, results, strict=True):
        assert tokens[0, -STEPS:].tolist() == _generate(lm, torch.tensor([prompt], device=DEVICE))[0, -STEPS:].tolist()
