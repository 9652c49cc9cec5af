"""Whose rows a tensor's dimensions are: learnt from a run on fakes, so that no size is taken for the batch by chance."""

import pytest
import torch
from torch import nn

from nnsight_hpc import LanguageModel, NNsight
from nnsight_hpc.execution import fake_model, layouts
from nnsight_hpc.execution.fake_model import twin_of
from tests.execution.conftest import hooked
from tests.oracle.architectures import INNER, make
from tests.oracle.hooks import seeing

WIDTH = 4


class Place(nn.Module):
    """Hands on what it is given; a place to look at."""

    def forward(self, value):
        return value


class Net(nn.Module):
    """A layer, and then what `make` makes of its output, at the module `place`; what is returned does not use it."""

    def __init__(self, make):
        super().__init__()
        self.first, self.place, self.last = nn.Linear(WIDTH, WIDTH), Place(), nn.Linear(WIDTH, WIDTH)
        self.table = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.make = make
        self.requires_grad_(requires_grad=False)

    def forward(self, x):
        hidden = self.first(x)
        placed = self.place(self.make(self, hidden))
        return self.last(hidden) + 0 * (placed[0] if isinstance(placed, tuple) else placed).sum()


class SequenceFirst(nn.Module):
    """A layer between two that see tokens first, then prompts."""

    def __init__(self):
        super().__init__()
        self.first, self.turned, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.requires_grad_(requires_grad=False)

    def forward(self, x):
        return self.last(torch.tanh(self.turned(self.first(x).transpose(0, 1))).transpose(0, 1))


def prompts(number, *shape):
    return torch.randn(number, *shape, generator=torch.Generator().manual_seed(number)).unsqueeze(1)


def at_place(net, batch):
    """What each of the prompts, one an invoke, sees at the module `place`, and what hooks see with it alone."""
    model, got, alone = NNsight(net), [], []
    with model.trace() as tracer:
        for each in batch:
            with tracer.invoke(each):
                got.append(model.place.output.save())
    for each in batch:
        with hooked(net.place, lambda _m, _i, output: alone.append(output.clone())):
            net(each)
    return got, alone


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda net, h: net.table + 0, (WIDTH, WIDTH)),  # as long as the batch of four
        (lambda net, h: net.table[None] * 2, (1, WIDTH, WIDTH)),
        (lambda net, h: torch.arange(h.shape[1])[:, None] * torch.ones(3), (WIDTH, 3)),  # positions: four tokens
        (lambda net, h: torch.ones(h.shape[-1]), (WIDTH,)),
    ],
)
def test_what_does_not_depend_on_the_prompts_is_whole(make, shape):
    """A table whose first dimension equals the batch by chance is the same for each of four prompts of four tokens."""
    torch.manual_seed(0)
    got, alone = at_place(Net(make), prompts(4, 4, WIDTH))
    assert [each.shape for each in got] == [shape] * 4
    assert all(torch.equal(*pair) for pair in zip(got, alone, strict=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda net, h: h.flatten(0, 1),  # tokens of all prompts in one dimension
        lambda net, h: h.transpose(0, 1),  # tokens first
        lambda net, h: h.flatten(0, 1)[None],  # tokens in the second dimension
        lambda net, h: h[:, -1][None].expand(4, -1, -1),  # layers, prompts: like the state of a recurrent network
        lambda net, h: h.sum(1),
        lambda net, h: h.permute(1, 2, 0),
    ],
)
@pytest.mark.parametrize("number", [2, 4])
def test_prompts_are_found_in_any_dimension(make, number):
    """Each prompt sees its own part, whichever dimension has the prompts; with four, all dimensions are of one size."""
    torch.manual_seed(0)
    got, alone = at_place(Net(make), prompts(number, 4, WIDTH))
    for one, expected in zip(got, alone, strict=True):
        assert one.shape == expected.shape
        torch.testing.assert_close(one, expected)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda net, h: h.sum((0, 1)), "from all prompts together"),
        (lambda net, h: h.sum(), "from all prompts together"),
        (lambda net, h: torch.stack([h.mean(0)] * h.shape[2]), "from all prompts together"),  # [4, 4, 4]
        (lambda net, h: h[:, -1] @ h[:, -1].T, "more than one of its dimensions"),
        (lambda net, h: torch.cat([h, h]), "other entries than one for each prompt"),
        (lambda net, h: h.flatten(), "other entries than one for each prompt"),
        (lambda net, h: net.table.clone().index_put_((torch.tensor(0),), h[0, 0]), "from all prompts together"),
    ],
)
def test_what_cannot_be_divided_is_refused(make, why):
    """A sum over prompts and a matrix of prompts by prompts belong to no prompt: they are not handed over whole."""
    with pytest.raises(ValueError, match=why):
        at_place(Net(make), prompts(4, 4, WIDTH))


def test_change_of_what_is_the_same_for_all_is_refused():
    """One of several invokes cannot set a table, nor change it or a part of it in place; one for all rows can."""
    net = Net(lambda net, h: net.table + 0)
    model, batch = NNsight(net), prompts(4, 4, WIDTH)
    for change in ("set", "in place", "part"):
        with pytest.raises(ValueError, match="is the same for all invokes"), model.trace() as tracer:
            for each in batch:
                with tracer.invoke(each):
                    if change == "set":
                        model.place.output = model.place.output * 2
                    elif change == "in place":
                        model.place.output[:] = 0
                    else:
                        model.place.output[0].mul_(2)
    with model.trace() as tracer:
        for each in batch[1:]:
            with tracer.invoke(each):
                pass
        with tracer.invoke():
            model.place.output[:] = 3
        with tracer.invoke(batch[0]):
            seen = model.place.output.save()
    assert torch.equal(seen, torch.full((WIDTH, WIDTH), 3.0))


@pytest.mark.parametrize("how", ["set", "in place", "gradient"])
def test_rows_are_set_in_any_dimension(how):
    """An invoke sets, changes in place and differentiates its rows where tokens come first, bit for bit as hooks do."""
    torch.manual_seed(0)
    net, batch = SequenceFirst(), prompts(3, 3, WIDTH)
    model, whole = NNsight(net), torch.cat([*batch])
    with model.trace() as tracer:
        for index, each in enumerate(batch):
            with tracer.invoke(each):
                if index == 1 and how == "set":
                    model.turned.output = model.turned.output * 2
                elif index == 1 and how == "in place":
                    model.turned.output[:, :, 0] = 0
                elif index == 1:
                    grad = model.turned.output.grad.save()
        with tracer.invoke():
            out = model.output.save()
            if how == "gradient":
                (out * out).sum().backward()

    def change(_module, _inputs, output):
        if how == "set":
            return torch.cat([output[:, :1], output[:, 1:2] * 2, output[:, 2:]], 1)
        output[:, 1, 0] = 0
        return output

    if how == "gradient":
        hidden = net.turned(net.first(whole).transpose(0, 1)).requires_grad_()
        (net.last(torch.tanh(hidden).transpose(0, 1)) ** 2).sum().backward()
        torch.testing.assert_close(grad, hidden.grad[:, 1:2])
    else:
        with hooked(net.turned, change):
            assert torch.equal(out, net(whole))


def test_state_of_a_recurrent_network_is_cut_by_its_second_dimension():
    """Of an LSTM, which returns states of [layers, prompts, width], each prompt sees its own."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True).requires_grad_(requires_grad=False))
    model, batch, got = NNsight(net), prompts(2, 3, WIDTH), []
    with model.trace() as tracer:
        for each in batch:
            with tracer.invoke(each):
                got.append(model[0].output.save())
    for one, each in zip(got, batch, strict=True):
        output, (hidden, cell) = net[0](each)
        for part, expected in ((one[0], output), (one[1][0], hidden), (one[1][1], cell)):
            assert part.shape == expected.shape
            torch.testing.assert_close(part, expected)


class Routed(nn.Module):
    """Experts of which each gets the tokens that chose it; a run on fakes cannot tell how many those are."""

    def __init__(self):
        super().__init__()
        self.first, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.requires_grad_(requires_grad=False)

    def forward(self, x):
        hidden = self.first(x).flatten(0, 1)
        chosen, out = self.gate(hidden).argmax(-1), torch.zeros_like(hidden)
        for index, expert in enumerate(self.experts):
            out[chosen == index] = expert(hidden[chosen == index])
        return out.view_as(x)


def test_model_that_needs_data_is_judged_by_size_or_refused():
    """Without a run on fakes, sizes that leave no doubt are cut, and an expert's own tokens are refused."""
    torch.manual_seed(0)
    net, batch = Routed(), prompts(2, 3, WIDTH)
    model, got = NNsight(net), []
    with model.trace() as tracer:
        for each in batch:
            with tracer.invoke(each):
                got += [model.first.output.save(), model.gate.output.save()]
    assert layouts._learnt[net].layouts.popitem()[1] is None
    for index, each in enumerate(batch):
        torch.testing.assert_close(got[2 * index], net.first(each))
        torch.testing.assert_close(got[2 * index + 1], net.gate(net.first(each)).flatten(0, 1))
    x = _two_for_an_expert(net)
    with pytest.raises(ValueError, match="may be the batch of 2, or tokens of any prompts"), model.trace() as tracer:
        for each in x[:, None]:
            with tracer.invoke(each):
                model.experts[0].output.save()
    with pytest.raises(ValueError, match="which of its dimensions is the batch of 4"), model.trace() as tracer:
        for each in prompts(4, 4, WIDTH):
            with tracer.invoke(each):
                model.first.output.save()


def _two_for_an_expert(net):
    """Two prompts of three tokens of which two in all choose the first expert: as many as there are prompts."""
    for seed in range(1000):
        x = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(seed))
        if int((net.gate(net.first(x)).argmax(-1) == 0).sum()) == 2:
            return x
    raise AssertionError


def test_experts_of_transformers_are_refused_inside():
    """Tokens sorted by expert are in no prompt's order, and as many as tokens where each chooses one: refused."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=1,
    )
    lm = LanguageModel(MixtralForCausalLM(config).eval())
    with lm.trace() as tracer:
        for ids in ([1, 2, 3], [4, 5, 6]):
            with tracer.invoke(ids):
                routed = lm.model.layers[0].mlp.gate.output.save()
    assert routed[0].shape == (3, 4)
    with pytest.raises(ValueError, match="in the order of the experts"), lm.trace() as tracer:
        for ids in ([1, 2, 3], [4, 5, 6]):
            with tracer.invoke(ids):
                lm.model.layers[0].mlp.experts.act_fn.output.save()


def test_positions_of_gpt2_are_whole():
    """Where no position ids are given, GPT-2's positions have one row for all prompts, of any number and length."""
    subject = make("gpt2")
    model = NNsight(subject.module)
    for number in (1, 2, 4, 5):
        batch = [subject.inputs(seed=seed, rows=1, tokens=4) for seed in range(number)]
        with model.trace() as tracer:
            for ids in batch:
                with tracer.invoke(input_ids=ids, use_cache=False):
                    positions = model.transformer.wpe.output.save()
        with seeing(subject.module) as seen:
            subject.module(batch[0], use_cache=False)
        assert torch.equal(positions, seen.output("transformer.wpe"))


def _invokes(lm, batch, point):
    got = []
    with lm.trace() as tracer:
        for ids in batch:
            with tracer.invoke(ids):
                got.append(point(lm).output.save())
    return got


def test_layouts_are_learnt_once():
    """Blocks of a language model need no run on fakes; for other points there is one, for all lengths and batches."""
    subject = make("llama")
    lm, module = subject.model, subject.module
    _invokes(lm, [subject.inputs(seed=s, rows=3, tokens=7) for s in range(3)], lambda m: m.model.layers[1])
    _invokes(lm, [subject.inputs(seed=s, rows=3, tokens=7) for s in range(3)], lambda m: m.lm_head)
    assert module not in layouts._learnt
    for number, tokens in ((2, 5), (3, 6), (5, 2)):
        batch = [subject.inputs(seed=s, rows=1, tokens=tokens) for s in range(number)]
        got = _invokes(lm, batch, lambda m: m.model.layers[0].mlp.gate_proj)
        assert [each.shape for each in got] == [(1, tokens, INNER)] * number
    assert len(layouts._learnt[module].layouts) == 1
    assert twin_of(module).runs == 1


def test_plain_layers_one_after_the_other_need_no_run_on_fakes():
    """Of torch's own layers it is known that rows stay rows; as many prompts as the layers are wide are told apart."""
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.GELU(), nn.LayerNorm(WIDTH)), nn.Linear(WIDTH, WIDTH))
    model, batch, got = NNsight(net.requires_grad_(requires_grad=False)), prompts(4, WIDTH), []
    with model.trace() as tracer:
        for each in batch:
            with tracer.invoke(each):
                got.append(torch.stack([model[1][1].output, model[2].input]).save())
    assert net not in fake_model._twins
    for one, each in zip(got, batch, strict=True):
        torch.testing.assert_close(one, net[:2](each).expand(2, -1, -1))


def test_batch_as_long_as_something_of_the_model_is_learnt():
    """A batch as large as the number of heads is not taken for granted, not even at a block."""
    subject = make("llama")
    heads = subject.module.config.num_attention_heads
    batch = [subject.inputs(seed=s, rows=1, tokens=7) for s in range(heads)]
    _invokes(subject.model, batch, lambda m: m.model.layers[1])
    assert len(layouts._learnt[subject.module].layouts) == 1


@pytest.mark.parametrize("how", ["skip", "source"])
def test_layouts_are_learnt_of_the_model_as_it_is(how):
    """Where a run replaces forwards, what is learnt then is that of the model's own: as many prompts and tokens as heads."""
    subject = make("llama")
    lm, got = subject.model, []
    number = subject.module.config.num_attention_heads
    batch = [subject.inputs(seed=seed, rows=1, tokens=number) for seed in range(number)]
    with lm.trace() as tracer:
        for index, ids in enumerate(batch):
            with tracer.invoke(ids):
                block = lm.model.layers[1]
                if how == "skip" and index == 0:
                    block.skip(block.input)
                heads = block.self_attn.source.attention_interface_0.output[0] if how == "source" else block.input
                got.append((heads.save(), lm.model.layers[2].mlp.gate_proj.output.save()))
    own = {name for name, part in twin_of(subject.module).module.named_modules() if "forward" in vars(part)}
    assert own == set()
    for index, (ids, (heads, gate)) in enumerate(zip(batch, got, strict=True)):
        with seeing(subject.module) as seen:
            subject.run(ids)
        if how == "source":
            expected = seen.input("model.layers.1.self_attn.o_proj").view(1, number, number, -1)
            torch.testing.assert_close(heads, expected, atol=1e-5, rtol=1e-5)
        if how == "source" or index:
            torch.testing.assert_close(gate, seen.output("model.layers.2.mlp.gate_proj"), atol=1e-5, rtol=1e-5)


def test_layouts_are_learnt_again_where_modules_are_replaced():
    """A model whose modules were exchanged is another one."""
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), Place())
    model, batch = NNsight(net), prompts(4, 4, WIDTH)

    def last():
        with model.trace() as tracer:
            for each in batch:
                with tracer.invoke(each):
                    got = model[1].output.save()
        return got

    assert last().shape == (1, 4, WIDTH)
    net[1] = Turn()
    assert last().shape == (4, 1, WIDTH)


class Turn(nn.Module):
    """Puts tokens first."""

    def forward(self, value):
        return value.transpose(0, 1)


def test_scan_shows_the_same_rows():
    """What `scan` says of an invoke's values is what a run gives."""
    net, batch = Net(lambda net, h: (net.table + 0, h.transpose(0, 1))), prompts(4, 4, WIDTH)
    model, seen = NNsight(net), []
    for kind in ("scan", "run"):
        with model.trace(scan=kind == "scan") as tracer:
            for each in batch:
                with tracer.invoke(each):
                    table, turned = model.place.output
                    if kind == "scan":
                        seen.append((table.shape, turned.shape))
                    table, turned = table.save(), turned.save()
        seen.append((table.shape, turned.shape))
    assert set(seen) == {((WIDTH, WIDTH), (4, 1, WIDTH))}
