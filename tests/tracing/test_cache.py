"""`tracer.cache()`: what all modules returned, against hooks."""

import pytest
import torch

from nnsight_hpc.wire.errors import InvalidInput

PROMPT = "the tower is in the city of"


def test_by_path_and_by_attribute(lm):
    """Each module that was called has an entry with what it returned."""
    seen = {}
    handles = [
        module.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
        for name, module in lm.module.named_modules()
    ]
    with torch.no_grad():
        lm.module(**lm.tokenizer(PROMPT, return_tensors="pt"), use_cache=False)
    for handle in handles:
        handle.remove()
    with lm.trace(PROMPT) as tracer:
        cache = tracer.cache()
    assert set(cache.keys()) == set(seen)
    assert len(cache) == len(seen)
    torch.testing.assert_close(cache["model.layers.1"].output, seen["model.layers.1"])
    torch.testing.assert_close(cache.model.layers[2].mlp.output, seen["model.layers.2.mlp"])
    assert "model.layers" not in cache


def test_named_modules_inputs_and_dtype(lm):
    """Modules as envoys or paths; inputs on request; floating-point numbers in another dtype."""
    with lm.trace(PROMPT) as tracer:
        cache = tracer.cache([lm.model.layers[0], "lm_head"], include_inputs=True, dtype=torch.float64)
        given = lm.lm_head.input.save()
    assert list(cache) == ["model.layers.0", "lm_head"]
    assert cache.lm_head.input.dtype is torch.float64
    assert torch.equal(cache["lm_head"].inputs[0][0], given.double())


def test_what_the_model_passed_on(model, net, x):
    """A change in the block, also after the line of the cache, is in it."""
    with model.trace(x) as tracer:
        cache = tracer.cache(include_inputs=True, include_output=False)
        model[0].output = model[0].output * 0
    assert torch.equal(cache["1"].input, torch.zeros(3, 4))
    assert cache["1"].output is None


def test_invokes_and_generations(lm):
    """In an invoke the cache has its rows, in a generation a list with an item a step."""
    with lm.trace() as tracer:
        with tracer.invoke("one two"):
            first = tracer.cache()
        with tracer.invoke(["three four", "five six"]):
            second = tracer.cache()
    assert (len(first["lm_head"].output), len(second["lm_head"].output)) == (1, 2)
    with lm.generate(PROMPT, max_new_tokens=3) as tracer:
        cache = tracer.cache(["lm_head"])
    assert [len(logits) for logits in cache.lm_head.output] == [1, 1, 1]


@pytest.mark.parametrize("most", [1, 4])
def test_generation_that_ends_early_has_a_list(lm, most):
    """The steps that came are in a list, also where it is one: at the end of text, or as no more were asked for."""
    with lm.generate(PROMPT, max_new_tokens=1) as tracer:
        first = tracer.result[0, -1].save()
    with lm.generate(PROMPT, max_new_tokens=most, eos_token_id=int(first)) as tracer:
        cache = tracer.cache(["lm_head"], include_inputs=True)
        logits = lm.lm_head.output.save()
    assert len(cache.lm_head.output) == len(cache.lm_head.input) == 1
    assert torch.equal(cache.lm_head.output[0], logits)


def test_generation_of_unknown_length_is_refused(lm):
    """Where it is not known how many steps there may be, a cache would hold the first only: refused, with what to write."""
    with pytest.raises(InvalidInput, match="max_new_tokens"), lm.session():
        with lm.generate(PROMPT, max_new_tokens=2) as tracer:
            tokens = tracer.result
        with lm.generate(tokens, max_length=12) as tracer:
            tracer.cache(["lm_head"])


def test_all_rows_of_unequal_prompts(lm):
    """A cache outside of invokes has all rows, padded on the left as a list of prompts is."""
    with lm.trace() as tracer:
        cache = tracer.cache(["lm_head"])
        for prompt in ("one two", PROMPT):
            with tracer.invoke(prompt):
                pass
    with lm.trace(["one two", PROMPT]):
        expected = lm.lm_head.output.save()
    assert torch.equal(cache.lm_head.output, expected)


def test_before_the_end_it_is_empty(model, x):
    """In the block there is nothing to read yet, and a path that is not there says what is."""
    with pytest.raises(InvalidInput, match="when the block is over"), model.trace(x) as tracer:
        _ = tracer.cache()["0"]
    with model.trace(x) as tracer:
        cache = tracer.cache()
    with pytest.raises(AttributeError, match="it has"):
        _ = cache.encoder
