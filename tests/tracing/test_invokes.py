"""Several inputs in one trace: each sees its own rows, and those of one length run as one batch."""

import pytest
import torch

from nnsight_hpc.graph.build import FORWARD, INVOKE
from nnsight_hpc.wire.errors import InvalidInput

SHORT, LONG, ALSO_LONG = "one two", "the tower is in the city", "rome is in the capital of"


def _ops(tracer, op):
    return [node for node in tracer.graph.nodes if node.op == op]


def _logits(lm, prompt):
    with lm.trace(prompt):
        found = {"logits": lm.lm_head.output.save()}
    return found["logits"]


def test_each_invoke_sees_its_own_rows(lm):
    """Values of an invoke are those of its prompt alone (atol 1e-5: other matrix shapes), whatever the others' lengths are."""
    found = []
    with lm.trace() as tracer:
        for prompt in (SHORT, LONG, ALSO_LONG):
            with tracer.invoke(prompt):
                found.append(lm.lm_head.output.save())
    for prompt, logits in zip((SHORT, LONG, ALSO_LONG), found, strict=True):
        torch.testing.assert_close(logits, _logits(lm, prompt), atol=1e-5, rtol=1e-5)


def test_inputs_of_one_length_share_a_forward(lm):
    """Two lengths are two forwards, and each has the rows of its invokes."""
    with lm.trace() as tracer:
        for prompt in (SHORT, LONG, [ALSO_LONG, LONG]):
            with tracer.invoke(prompt):
                lm.lm_head.output.save()
    forwards = _ops(tracer, FORWARD)
    assert [tracer.graph.tensors[f.kwargs["input_ids"].name].shape for f in forwards] == [(1, 2), (3, 6)]
    assert [node.args[1:] for node in _ops(tracer, INVOKE)] == [(0, 1), (0, 1), (1, 3)]


def test_change_in_one_invoke_does_not_reach_the_other(model, net, x):
    """Rows that one invoke sets and changes in place stay its own."""
    with model.trace() as tracer:
        with tracer.invoke(x):
            model[0].output[:] = 0
            changed = model.output.save()
        with tracer.invoke(x):
            plain = model.output.save()
    torch.testing.assert_close(changed, net[2](torch.zeros(3, 4)))
    torch.testing.assert_close(plain, net(x))


def test_value_of_one_invoke_in_another(lm):
    """Activation patching in one trace equals a hook that sets what another run gave."""
    seen = {}
    layer = lm.module.model.layers[0]
    handle = layer.register_forward_hook(lambda _m, _i, out: seen.update(out=out.clone()))
    _logits_of_module(lm, LONG)
    handle.remove()
    handle = layer.register_forward_hook(lambda _m, _i, out: out.index_copy(1, torch.tensor([5]), seen["out"][:, -1:]))
    expected = _logits_of_module(lm, ALSO_LONG)
    handle.remove()
    with lm.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(LONG):
            clean = lm.model.layers[0].output[:, -1]
            barrier()
        with tracer.invoke(ALSO_LONG):
            barrier()
            lm.model.layers[0].output[:, -1] = clean
            logits = lm.lm_head.output.save()
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def _logits_of_module(lm, prompt):
    ids = lm.tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return lm.module(ids, use_cache=False).logits


def test_invoke_without_inputs_shows_all_rows(model, net, x):
    """The rows of every invoke so far and to come, in their order."""
    with model.trace() as tracer:
        with tracer.invoke(x[:1]):
            pass
        with tracer.invoke():
            every = model.output.save()
        with tracer.invoke(x[1:]):
            pass
    torch.testing.assert_close(every, net(x))


def test_all_rows_of_unequal_prompts_are_one_padded_batch(lm):
    """With an invoke for all rows there is one forward: that of the prompts as a list, in the order of the invokes."""
    found, prompts = [], (SHORT, LONG, "rome is")
    with lm.trace(list(prompts)):
        expected = lm.lm_head.output.save()
        mask = lm.inputs[1]["attention_mask"].save()
    for last in (True, False):
        with lm.trace() as tracer:
            for prompt in prompts[: 3 if last else 1]:
                with tracer.invoke(prompt):
                    found.append(lm.lm_head.output.save())
            with tracer.invoke():
                every, masks = lm.lm_head.output.save(), lm.inputs[1]["attention_mask"].save()
            for prompt in prompts[3 if last else 1 :]:
                with tracer.invoke(prompt):
                    found.append(lm.lm_head.output.save())
        assert len(_ops(tracer, FORWARD)) == 1
        assert torch.equal(every, expected)
        assert torch.equal(masks, mask)
        assert torch.equal(torch.cat(found[-3:]), expected)


def test_prompts_in_a_padded_batch_are_as_alone(lm):
    """Each prompt's tokens give what the prompt alone gives (atol 1e-5: other matrix shapes), whatever is padded beside it."""
    with lm.trace() as tracer:
        for prompt in (SHORT, LONG, [ALSO_LONG, "rome"]):
            with tracer.invoke(prompt):
                pass
        with tracer.invoke():
            logits = lm.lm_head.output.save()
    for row, prompt in zip(logits, (SHORT, LONG, ALSO_LONG, "rome"), strict=True):
        alone = _logits(lm, prompt)[0]
        torch.testing.assert_close(row[-len(alone) :], alone, atol=1e-5, rtol=1e-5)


def test_values_cross_in_a_padded_batch(lm):
    """Prompts of unequal length that share a forward hand values to each other in both directions."""
    first, second = lm.model.layers[0], lm.model.layers[1]
    with lm.trace() as tracer:
        with tracer.invoke(SHORT):
            mine = first.output[:, -1]
        with tracer.invoke(LONG):
            second.output[:, -1] = mine
            theirs = first.output[:, -1]
        with tracer.invoke(SHORT):
            second.output[:, -1] = theirs
        with tracer.invoke():
            logits = lm.lm_head.output[:, -1].save()
    seen = {}
    handle = lm.module.model.layers[0].register_forward_hook(lambda _m, _i, out: seen.update(out=out[:, -1].clone()))
    hidden = []
    for prompt in (SHORT, LONG):
        _logits_of_module(lm, prompt)
        hidden.append(seen["out"])
    handle.remove()
    for row, (prompt, new) in enumerate(((SHORT, None), (LONG, hidden[0]), (SHORT, hidden[1]))):

        def put(_module, _inputs, out, new=new):
            if new is not None:
                out[:, -1] = new

        handle = lm.module.model.layers[1].register_forward_hook(put)
        expected = _logits_of_module(lm, prompt)[0, -1]
        handle.remove()
        torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=1e-5)


def test_generation_of_all_rows_is_padded(lm):
    """What a padded batch generates is what each prompt alone generates."""
    with lm.generate(max_new_tokens=3) as tracer:
        for prompt in (SHORT, LONG):
            with tracer.invoke(prompt):
                pass
        with tracer.invoke():
            tokens = tracer.result.save()
    for row, prompt in zip(tokens, (SHORT, LONG), strict=True):
        with lm.generate(prompt, max_new_tokens=3) as tracer:
            alone = tracer.result.save()
        assert torch.equal(row[-alone.shape[1] :], alone[0])


def test_edits_hold_once_in_a_padded_batch(lm):
    """An edit of the model is applied once to each row, though each length had a forward of its own before."""
    with lm.edit() as edited:
        edited.model.layers[0].output = edited.model.layers[0].output * 2
    with lm.session():
        with edited.trace() as tracer:
            for prompt in (SHORT, LONG):
                with tracer.invoke(prompt):
                    pass
            with tracer.invoke():
                every = edited.lm_head.output.save()
        with lm.trace(SHORT):
            plain = lm.lm_head.output.save()
    with edited.trace([SHORT, LONG]):
        expected = edited.lm_head.output.save()
    assert torch.equal(every, expected)
    assert torch.equal(plain, _logits(lm, SHORT))


@pytest.mark.parametrize("how", ["no invoke before", "scan", "other options", "other names", "no language model"])
def test_all_rows_that_are_no_batch_are_refused(lm, model, x, how):
    """Rows that no padding makes one batch are refused with the reason, at the line that asks for all."""
    if how == "no language model":
        with pytest.raises(InvalidInput, match="differ in more"), model.trace() as tracer:
            for inputs in (x, x[0]):
                with tracer.invoke(inputs):
                    pass
            with tracer.invoke():
                pass
        return
    why = {
        "no invoke before": "there are none",
        "scan": "in its own length",
        "other options": "differ in more",
        "other names": "differ in more",
    }
    with pytest.raises(InvalidInput, match=why[how]) as caught, lm.trace(scan=how == "scan") as tracer:
        for prompt in (SHORT, LONG) if how != "no invoke before" else ():
            options = {"use_cache": True} if how == "other options" else {"token_type_ids": torch.zeros(1, 6).long()}
            with tracer.invoke(prompt, **(options if how.startswith("other") and prompt == LONG else {})):
                pass
        with tracer.invoke():
            pass
    assert "tracer.invoke()" in str(caught.value)


@pytest.mark.parametrize("others", [0, 1])
def test_inputs_are_those_at_the_invoke(model, net, x, others):
    """A tensor that is changed in the block after it was given is what it was at its invoke."""
    expected, given = net(x), x.clone()
    with model.trace() as tracer:
        with tracer.invoke(given):
            seen = model.output.save()
        given.zero_()
        for _ in range(others):
            with tracer.invoke(given):
                zeros = model.output.save()
    torch.testing.assert_close(seen, expected)
    if others:
        torch.testing.assert_close(zeros, net(torch.zeros_like(x)))


def test_dict_of_an_invoke_is_as_it_was(lm):
    """The same for what a tokenizer returns."""
    given = dict(lm.tokenizer(LONG, return_tensors="pt"))
    with lm.trace() as tracer:
        with tracer.invoke(given):
            logits = lm.lm_head.output.save()
        given["input_ids"].zero_()
    assert torch.equal(logits, _logits(lm, LONG))


def test_result_of_an_invoke(model, net, x):
    """`tracer.result` has the rows of its invoke."""
    with model.trace() as tracer:
        with tracer.invoke(x[:1]):
            first = tracer.result.save()
        with tracer.invoke(x[1:]):
            others = tracer.result.save()
    torch.testing.assert_close(torch.cat([first, others]), net(x))


@pytest.mark.parametrize(
    "how", ["no inputs at all", "invoke in an invoke", "invoke beside inputs", "outside of invokes"]
)
def test_what_has_no_rows_is_refused(model, x, how):
    """A trace needs inputs from one place, and points need rows."""
    with pytest.raises(InvalidInput), model.trace(*((x,) * (how == "invoke beside inputs"))) as tracer:
        if how == "invoke in an invoke":
            with tracer.invoke(x), tracer.invoke(x):
                pass
        if how == "invoke beside inputs":
            with tracer.invoke(x):
                pass
        if how == "outside of invokes":
            with tracer.invoke(x):
                pass
            model.output.save()


def test_inputs_that_cannot_share_run_alone(model, net, x):
    """Inputs of another dtype or with other options are a forward of their own."""
    with model.trace() as tracer:
        with tracer.invoke(x):
            first = model.output.save()
        with tracer.invoke(x[0]):
            second = model.output.save()
    assert len(_ops(tracer, FORWARD)) == 2
    assert torch.equal(first, net(x))
    torch.testing.assert_close(second, net(x[0]))


def test_value_of_a_session_is_an_input(model, net, x):
    """What an earlier trace gave is what a later trace is called with."""
    with model.session():
        with model.trace(x):
            hidden = model[0].output
        with model.trace() as tracer, tracer.invoke(hidden):
            out = model.output.save()
    assert torch.equal(out, net(net[0](x)))


def test_tokens_of_a_generation_are_a_prompt(lm):
    """In a session, what was generated is what the next trace reads."""
    with lm.session():
        with lm.generate(SHORT, max_new_tokens=3) as tracer:
            tokens = tracer.result.save()
        with lm.trace(tokens):
            logits = lm.lm_head.output.save()
    torch.testing.assert_close(logits, lm.module(tokens, use_cache=False).logits)
