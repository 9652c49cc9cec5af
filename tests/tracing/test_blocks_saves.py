"""What control flow in a block leaves in the researcher's names: saved values, lists, steps of a generation, printed lines."""

# ruff: noqa: PERF401, B007 - how blocks are written

import pytest
import torch

from nnsight_hpc import LanguageModel
from nnsight_hpc.tracing.value import Value
from nnsight_hpc.wire.errors import InvalidInput
from tests.tracing.programs import INPUTS, MODEL

HIDDEN = MODEL.module(INPUTS).detach()


@pytest.fixture(scope="module")
def lm(tiny_llama):
    return LanguageModel(str(tiny_llama), dispatch=True)


@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_saves_in_both_branches(scale):
    """A name that is saved in both branches is bound to the one that was taken, as it was where it was saved."""
    with MODEL.trace(INPUTS * scale):
        h = MODEL[1].output.clone()
        if h[0, 0] > 0:
            y = h.save()
            h[:] = 0
        else:
            y = (h * 2).save()
    hidden = MODEL.module(INPUTS * scale)
    assert torch.equal(y, hidden if hidden[0, 0] > 0 else hidden * 2)


@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_save_in_one_branch(scale):
    """A name that is saved in one branch, and was a number before, is bound to what it is then."""
    y = z = 7
    with MODEL.trace(INPUTS * scale):
        h = MODEL[1].output
        if h[0, 0] > 0:
            y = h.save()
            only = h.save()
        else:
            z = h.save()
    taken = bool(MODEL.module(INPUTS * scale)[0, 0] > 0)
    assert [type(v) is torch.Tensor for v in (y, z)] == [taken, not taken]
    assert (z if taken else y) == 7
    assert type(only) is (torch.Tensor if taken else Value)
    if not taken:
        with pytest.raises(Exception, match="never made"):
            only + 1


@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_list_filled_in_branches(scale):
    """A list holds what the branch that was taken put into it."""
    found = []
    with MODEL.trace(INPUTS * scale):
        h = MODEL[1].output
        if h[0, 0] > 0:
            found.append(h.save())
            found.append((h + 1).save())
        else:
            found.append((h * 2).save())
    hidden = MODEL.module(INPUTS * scale)
    expected = [hidden, hidden + 1] if hidden[0, 0] > 0 else [hidden * 2]
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("outer", [True, False])
def test_list_filled_in_one_branch(taken, outer):
    """A list that only one branch appends to, once, has the entry if that was taken, and else none."""
    kept = []
    alias = kept
    with MODEL.trace(INPUTS):
        if not outer:
            kept = []
        t = MODEL[1].output.sum()
        if t * 0 > (-1 if taken else 1):
            kept.append((t + 1).save())
    assert kept == ([HIDDEN.sum() + 1] if taken else [])
    assert alias == (kept if outer else [])


@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_list_of_before_filled_in_branches(scale):
    """Lists have entries as they were where they were saved, before the branch or in it, and by `+=` as well."""
    found, added, earlier = [], [], []
    with MODEL.trace(INPUTS * scale):
        h = MODEL[1].output.clone()
        first = h[0].clone().save()
        earlier.append((h * 2).save())
        if h[0, 0] > 0:
            found.append(first)
            added += [h.save()]
            earlier.append((h * 3).save())
            h[:] = 0
    hidden = MODEL.module(INPUTS * scale)
    taken = bool(hidden[0, 0] > 0)
    assert [len(found), len(added), len(earlier)] == ([1, 1, 2] if taken else [0, 0, 1])
    expected = [hidden[0], hidden, hidden * 2, hidden * 3] if taken else [hidden * 2]
    assert all(map(torch.equal, [*found, *added, *earlier], expected))


def test_saved_list_of_before_that_is_changed_later():
    """An entry of before the branch that is saved and then changed in place is in the list as it was saved."""
    found = []
    with MODEL.trace(INPUTS):
        h = MODEL[1].output.clone()
        found.append(h.save())
        if h[0, 0] < 9:
            found.append((h + 1).save())
        h[:] = 0
    assert all(map(torch.equal, found, [HIDDEN, HIDDEN + 1]))


def test_list_of_one_pass():
    """A list that a loop over a value makes anew in each pass does not stop the trace."""
    with MODEL.trace(INPUTS):
        total = 0
        for row in MODEL[1].output:
            items = []
            if row[0] < 9:
                items.append(row.save())
                items.append((row * 2).save())
            total = total + items[1]
        total = total.save()
    assert torch.equal(total, (HIDDEN * 2).sum(0))


def test_list_filled_in_a_loop():
    """A list of before the block, filled and saved in a loop over a value, is the same list and has an entry each pass."""
    found, more, last = [], [torch.zeros(1)], None
    alias = found
    with MODEL.trace(INPUTS):
        for row in MODEL[1].output:
            found.append(row.save())
            more.append((row * 2).save())
            more.append((row * 3).save())
            last = (row + 1).save()
    assert alias is found
    assert torch.equal(torch.stack(found), HIDDEN)
    assert torch.equal(last, HIDDEN[-1] + 1)
    assert torch.equal(torch.stack(more[1:]), torch.stack([HIDDEN[0] * 2, HIDDEN[0] * 3, HIDDEN[1] * 2, HIDDEN[1] * 3]))


def test_entries_of_a_loop_that_are_not_saved():
    """A list or dict of before that is filled without a save has as many entries, and each says that it was not saved."""
    found, more, named = [], [torch.zeros(1)], {}
    with MODEL.trace(INPUTS):
        for row in MODEL[1].output:
            found.append(row)
            if row[0] > 5:
                more.append(row)
            named["b"] = row
        total = torch.stack(found).sum(0).save()
    assert torch.equal(total, HIDDEN.sum(0))
    assert (len(found), len(more), list(named)) == (2, 1, ["b"])
    assert more == [torch.zeros(1)]
    for entry in (*found, named["b"]):
        with pytest.raises(InvalidInput, match=r"not saved(.|\n)*\.save\(\)"):
            _ = entry + 1


@pytest.mark.parametrize("taken", [True, False])
def test_plain_numbers(taken):
    """Names of numbers and strings that a value chooses or counts need no save, as in Python."""
    n, kind, last = 0, "none", None
    with MODEL.trace(INPUTS):
        h = MODEL[1].output
        if h.sum() * 0 < (1 if taken else -1):
            kind, n = "big", n + 1
        for i, row in enumerate(h):
            if row[0] > -5:
                n += 1
                last = i
        size = len(h)
        tensor = h.sum() if n > 0 else n
    assert (n, kind, last, size) == ((3, "big", 1, 2) if taken else (2, "none", 1, 2))
    assert type(tensor) is Value


def test_comprehension_of_saves():
    """A comprehension over a value whose entries are saved is a list of tensors."""
    with MODEL.trace(INPUTS):
        rows = [(row * 2).save() for row in MODEL[1].output]
        some = [row.save() for row in MODEL[1].output if row[0] > 0.5]
    assert torch.equal(torch.stack(rows), HIDDEN * 2)
    assert len(some) == int((HIDDEN[:, 0] > 0.5).sum())


@pytest.mark.parametrize("make", ["list().save()", "[].save()"])
def test_saved_list(make):
    """`list().save()` keeps what is in the list when the block ends."""
    names = {"MODEL": MODEL, "INPUTS": INPUTS}
    text = f"""
with MODEL.trace(INPUTS):
    kept = {make}
    for k in [0, 1].copy():
        kept.append(MODEL[k].output)
    named = dict().save()
    named["a"] = (kept[1], 3)
    looped = list().save()
    for row in kept[1]:
        looped.append(row)
    late = []
    late.append(kept[0] + 1)
    late.save()
"""
    from tests.tracing.programs import compiled

    found = compiled(text, names)
    assert torch.equal(found["kept"][1], HIDDEN)
    assert torch.equal(found["named"]["a"][0], HIDDEN)
    assert torch.equal(torch.stack(found["looped"]), HIDDEN)
    assert torch.equal(found["late"][0], found["kept"][0] + 1)


def test_steps_of_a_generation(lm):
    """`with tracer.iter[…] as step:` runs its block for each step, as the `for` does."""
    seen, tokens, others = [], [], []
    with lm.generate("the tower is in", max_new_tokens=3) as tracer:
        with tracer.iter[1:3] as step:
            seen.append(step)
            tokens.append(lm.lm_head.output[0, -1].argmax(-1).save())
        with tracer.all() as step:
            last = lm.lm_head.output[0, -1].save()
        out = tracer.result.save()
    with lm.generate("the tower is in", max_new_tokens=3) as tracer:
        for step in tracer.iter[1:3]:
            others.append(lm.lm_head.output[0, -1].argmax(-1).save())
    assert seen == [1, 2]
    assert tokens == others == [out[0, -2], out[0, -1]]
    assert last.argmax(-1) == out[0, -1]


def test_patching_where_a_value_says_so(lm):
    """A set in a branch changes the model when the branch is taken, and only then."""
    plain, changed = [], []
    for threshold, logits in ((1e9, plain), (-1e9, changed)):
        with lm.trace("the tower is in"):
            if lm.model.layers[0].output.sum() > threshold:
                lm.model.layers[1].output[:] = 0
            logits.append(lm.lm_head.output.save())
    with lm.trace("the tower is in"):
        untouched = lm.lm_head.output.save()
    with lm.trace("the tower is in"):
        lm.model.layers[1].output[:] = 0
        zeroed = lm.lm_head.output.save()
    assert torch.equal(plain[0], untouched)
    assert torch.equal(changed[0], zeroed)


def test_points_read_in_a_loop(lm):
    """Points of the model that are read in the body of a loop over a value are read once, and each pass sees them."""
    with lm.trace("the tower is in"):
        total = 0
        for position in range(lm.model.layers[0].output.shape[1]):
            total = total + lm.model.layers[0].output[0, position] * position
        total = total.save()
        hidden = lm.model.layers[0].output.save()
    assert torch.allclose(total, sum(hidden[0, k] * k for k in range(hidden.shape[1])))


def test_invokes_in_a_rewritten_block(lm):
    """Invokes of a block with control flow see their own rows, and a plain `for` over prompts unrolls."""
    prompts, sums = ["the tower is in", "the city of light is"], []
    with lm.trace() as tracer:
        for prompt in prompts:
            with tracer.invoke(prompt):
                h = lm.model.layers[1].output
                sums.append((h if h.sum() > 0 else -h).sum().save())
    for prompt, found in zip(prompts, sums, strict=True):
        with lm.trace(prompt):
            alone = lm.model.layers[1].output.sum().abs().save()
        assert torch.allclose(found, alone, rtol=1e-4, atol=1e-4)


def test_print(capsys):
    """Printing a value writes it while the model runs; printing anything else is Python's own."""
    with MODEL.trace(INPUTS):
        print("recording", 3, sep="-")
        h = MODEL[1].output
        if h[0, 0] > -5:
            print("sum", h.sum().abs() * 0)
        else:
            print("not", h)
        for row in h:
            print(f"row {row[0] * 0} of {2:03d}!")
    assert capsys.readouterr().out.splitlines()[:2] == ["recording-3", "sum tensor(0.)"]


def test_print_where_a_value_decides(capsys):
    """What a branch or loop prints is printed when it is run, as often as that is, also where it is plain text."""
    with MODEL.trace(INPUTS):
        h = MODEL[1].output
        if h.sum() < 1e9:
            print("taken", 1, sep="-")
        else:
            print("not taken")
        for row in h:
            print("pass")
        for k in [1].copy():
            print("plain")
    assert capsys.readouterr().out.splitlines() == ["plain", "taken-1", "pass", "pass"]


def test_log_of_a_formatted_string(capsys):
    """A formatted string in a log has the value that the run gives."""
    with MODEL.trace(INPUTS) as tracer:
        tracer.log(f"zero: {MODEL[1].output.sum().abs() * 0}", 5)
    assert capsys.readouterr().out == "zero: tensor(0.) 5\n"


def test_scan():
    """Under scan the same block is recorded, and shapes are known in it."""
    with MODEL.scan(INPUTS):
        h = MODEL[1].output
        if h.sum() > 0:
            y = h[:, :2]
        else:
            y = h[:, 2:]
        shape = y.shape
    assert tuple(shape) == (2, 2)
