"""The full view of models over the ranks, against the same models in one process, and against itself made wrong."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM

from nnsight_hpc.execution.fake_model import Call
from nnsight_hpc.execution.source import operations_of
from nnsight_hpc.models.load import load, module_tree, tree_of
from nnsight_hpc.parallel.layout import Either, Layout, Same
from nnsight_hpc.parallel.loading import load_parallel
from nnsight_hpc.parallel.plans import rules_for
from nnsight_hpc.parallel.upstream import ALL_PARALLEL_STYLES, DistributedConfig, TensorParallelLayer
from nnsight_hpc.parallel.view import ShardedView
from nnsight_hpc.wire.errors import InvalidGraph
from tests.parallel.families import FAMILIES as FAMILIES_OF_MODELS
from tests.parallel.loading_checks import saved
from tests.parallel.pairs import (
    ATTENTION,
    LONGER,
    assert_all_near,
    assert_edits_agree,
    assert_near,
    boundaries,
    collected,
    families,
    forward,
    gradients,
    names_in,
    operated,
    pair,
    prompt,
    sharded_in_layer,
    tensors,
    visited,
)

SHARDED = {
    "llama": 10,
    "qwen3": 14,
    "gemma2": 11,
    "mixtral": 7,
    "gpt_neox": 7,
    "gpt2": 6,
    "opt": 8,
    "qwen2_1_kv_head": 10,
    "llama_2_kv_heads": 10,
}
"""How many inputs and outputs of modules in a layer are sharded, or have a gradient that is."""


def check_layers_of_every_kind(rank):
    """What is learnt of the first layers holds for all: of a deep model whose first ones differ from the others."""
    folder = Path(tempfile.gettempdir()) / "models" / "deep"
    if rank.world.rank == 0:
        config = FAMILIES_OF_MODELS["qwen3_moe"]()
        config.num_hidden_layers, config.mlp_only_layers = 5, [0, 1]
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    rank.world.comm.Barrier()
    module = load_parallel(str(folder), rank.world, rank.guard).module
    reference, view = load(str(folder)).module, ShardedView(rank.world, module, module_tree(str(folder)))
    path = "model.layers.4.self_attn"
    view.prepare(Call((), {"input_ids": prompt()}), frozenset({f"{path}:attention_interface_0"}))
    places = [*boundaries(reference), (f"{path}:attention_interface_0", "output")]
    sharded = {place for place in places if view.sharded(*place)}
    assert {(f"{path}:attention_interface_0", "output"), ("model.layers.4.mlp.experts.act_fn", "output")} <= sharded
    assert {("model.layers.1.mlp.up_proj", "output"), (f"{path}.q_norm", "input")} <= sharded
    assert_all_near(collected(reference, None, places, forward), collected(module, view, places, forward))


def check_every_tensor_of_every_module_is_whole(rank):
    """Inputs and outputs of all modules, gathered, are those of one process; as many are sharded as are known to be."""
    for name in families(rank):
        both = pair(rank, name)
        places = boundaries(both.reference)
        assert SHARDED[name] == len(sharded_in_layer(both)), (name, sharded_in_layer(both))
        assert_all_near(
            collected(both.reference, None, places, forward), collected(both.module, both.view, places, forward)
        )


def check_edits_at_every_sharded_place(rank):
    """Edits at each sharded place of a layer, and where gradients alone are parts: logits and gradients of one process."""
    for name in LONGER[rank.world.size]:
        both = pair(rank, name)
        assert_edits_agree(both, sharded_in_layer(both))


def check_gradients_at_every_sharded_place(rank):
    """Gradients at each sharded place are whole, and changes of them go on backwards, as in one process."""
    for name in LONGER[rank.world.size]:
        both = pair(rank, name)
        for place in sharded_in_layer(both):
            expected, actual = gradients(both, None, place), gradients(both, both.view, place)
            assert len(expected) > 1, place
            assert expected.keys() == actual.keys(), place
            for key, tensor in expected.items():
                assert_near(tensor, actual[key], (name, place, key))


REFUSED = {
    "gpt2": {"split_1 input"},
    "opt": {"query_states_view_0 input", "key_states_view_0 input", "value_states_view_0 input"},
}
"""Operations that are given a number of a rank's own: how wide its part is, how many heads it has."""


def check_operations_inside_attention_are_whole(rank):
    """Queries, keys and values after rotation, what the attention function gives: all operations of a forward."""
    for name in LONGER[rank.world.size]:
        both = pair(rank, name)
        names = names_in(both.reference, both.attention)
        both.view.prepare(Call((), {"input_ids": prompt()}), frozenset(f"{both.attention}:{one}" for one in names))
        expected, _ = operated(both.reference, None, both.attention, names)
        actual, refused = operated(both.module, both.view, both.attention, names)
        assert REFUSED.get(name, set()) == refused, (name, refused)
        expected = {key: tensor for key, tensor in expected.items() if f"{key[0]} {key[1]}" not in refused}
        assert_all_near(expected, actual)
        assert any(both.view.sharded(f"{both.attention}:{one}", "output") for one in names), name


def check_edits_of_operations(rank):
    """Edits of what the attention function gets and gives: logits and gradients of one process."""
    for name in LONGER[rank.world.size]:
        both, inner = pair(rank, name), f"{ATTENTION.get(name, 'model.layers.1.self_attn')}:attention_interface_0"
        both.view.prepare(Call((), {"input_ids": prompt()}), frozenset({inner}))
        assert_edits_agree(both, [(inner, "input"), (inner, "output")])
        for side in ("input", "output"):
            expected, actual = (gradients(both, view, (inner, side)) for view in (None, both.view))
            assert expected.keys() == actual.keys()
            for key, tensor in expected.items():
                assert_near(tensor, actual[key], (name, side, key))


def check_operations_nested_in_the_attention_function(rank):
    """Operations of the function that attention calls; with a mask it repeats keys before it goes on, and without not."""
    for name in ("llama", "llama_2_kv_heads")[: 1 if rank.world.size == 3 else 2]:
        both = pair(rank, name)
        inside = operations_of(both.reference.get_submodule(both.attention), ("attention_interface_0",))
        names = [f"attention_interface_0:{operation.name}" for operation in inside]
        both.view.prepare(Call((), {"input_ids": prompt()}), frozenset(f"{both.attention}:{one}" for one in names))
        mask = torch.ones_like(prompt())
        mask[0, :3] = 0
        for given in (None, mask):
            run = partial(forward, attention_mask=given)
            expected, _ = operated(both.reference, None, both.attention, names, run)
            actual, refused = operated(both.module, both.view, both.attention, names, run)
            assert refused <= {"attention_interface_0:repeat_kv_0 input", "attention_interface_0:repeat_kv_1 input"}
            assert_all_near({key: t for key, t in expected.items() if f"{key[0]} {key[1]}" not in refused}, actual)
        known = [
            part
            for place, parts in both.view._learning.places.items()
            if names[0].partition(":")[0] in place[0]
            for part in parts.values()
        ]
        assert any(isinstance(part, Either) for part in known) == (name == "llama_2_kv_heads")


def check_operations_of_replaced_forwards_are_refused(rank):
    """Inside of a module whose forward tensor parallelism has replaced there is nothing to see, and that is said."""
    both = pair(rank, "llama")
    for path in (f"{both.attention}.q_proj", f"{both.layer}.mlp.down_proj"):
        with pytest.raises(InvalidGraph, match=rf"no operation F_linear_0 of {path} in a model that is spread"):
            both.view.prepare(Call((), {"input_ids": prompt()}), frozenset({f"{path}:F_linear_0"}))


def check_parameters_are_whole(rank):
    """Every parameter of every family is that of one process, bit for bit."""
    for name in families(rank):
        both = pair(rank, name)
        expected = dict(both.reference.named_parameters())
        for path, parameter in both.module.named_parameters():
            whole = both.view.parameter(parameter)
            assert type(whole) in {torch.Tensor, nn.Parameter}
            assert torch.equal(expected.pop(path), whole), (name, path)
        assert not expected


def check_a_gather_for_the_root_alone(rank):
    """What is only kept is gathered to rank 0; elsewhere it has its shape, and no memory."""
    for name, path in (("llama", "mlp.act_fn"), ("gpt2", "attn.c_attn"), ("gemma2", "self_attn.q_proj")):
        both, found = pair(rank, name), []
        place = (f"{both.layer}.{path}", "output")

        def keep(tree, both=both, place=place, found=found):
            found.append(both.view.whole(*place, tree, root_only=True))
            return tree

        with visited(both.module, None, place, keep):
            forward(both.module)
        (expected,) = (t for key, t in collected(both.reference, None, [place], forward).items() if key[3])
        if rank.world.rank == 0:
            assert_near(expected, found[0])
        else:
            assert (expected.shape, expected.dtype) == (found[0].shape, found[0].dtype)
            assert expected.element_size() == found[0].untyped_storage().nbytes()


def check_what_is_read_is_a_copy(rank):
    """A tensor that was gathered, or taken apart, shares no memory with the model's."""
    layout = Layout(-1, (2,) * rank.world.size)
    local = torch.ones(3, 2)
    whole = layout.whole(local)
    own = layout.own(whole)
    local.zero_()
    assert torch.equal(torch.ones(3, 2 * rank.world.size), whole)
    whole.zero_()
    assert torch.equal(torch.ones(3, 2), own)


def check_rank_0_decides(rank):
    """The number of rank 0 is that of all, and so is its decision."""
    view = pair(rank, "llama").view
    for number in (True, False, 2**32 - 1):
        assert view.agree(number if rank.world.rank == 0 else not number) == number
    assert view.keeps == (rank.world.rank == 0)


def generated(model: nn.Module) -> torch.Tensor:
    return model.generate(prompt(), max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(prompt()))


def check_generation_with_a_cache(rank):
    """At each step of a generation, sharded places and the cache's keys and values are those of one process."""
    for name in LONGER[rank.world.size][::2]:
        both = pair(rank, name)
        update = next(one for one in names_in(both.reference, both.attention) if one.endswith("_update_0"))
        place = f"{both.attention}:{update}"
        call = Call((prompt(),), {"max_new_tokens": 4}, generate=True)
        both.view.prepare(call, frozenset({place}))
        places = [*sharded_in_layer(both), (place, "output"), ("lm_head", "output")]
        expected, actual = (
            collected(one, view, places, generated) for one, view in ((both.reference, None), (both.module, both.view))
        )
        assert {0, 1, 2, 3} == {key[2] for key in expected}
        assert {prompt().shape[1] + step for step in range(4)} == {
            t.shape[-2] for key, t in expected.items() if key[0] == place and key[3]
        }
        assert_all_near(expected, actual)


def check_other_forms_of_a_call(rank):
    """What only some calls bring is learnt when it is asked for: attention weights, embeddings in place of tokens."""
    both = pair(rank, "gemma2")
    run = partial(_called, output_attentions=True, output_hidden_states=True)
    kwargs = {"inputs_embeds": torch.zeros(2, 9, 48), "output_attentions": True, "output_hidden_states": True}
    assert not both.view.sharded("", "output")
    both.view.prepare(Call((), kwargs), frozenset())
    assert both.view.sharded("", "output")
    places = boundaries(both.reference)
    expected, actual = (
        collected(one, view, places, run) for one, view in ((both.reference, None), (both.module, both.view))
    )
    assert any("attentions" in key[3] for key in expected if not key[0])
    assert_all_near(expected, actual)
    kwargs = {"output_attentions": True, "return_dict_in_generate": True, "max_new_tokens": 3, "do_sample": False}
    both.view.prepare(Call((prompt(),), kwargs, generate=True), frozenset())
    expected = tensors(both.reference.generate(prompt(), **kwargs))
    actual = tensors(both.view.whole("", "output", both.module.generate(prompt(), **kwargs)))
    assert any("attentions" in key for key in expected)
    assert_all_near(expected, actual)
    assert both.view.whole("", "output", prompt()).equal(prompt())


def _called(model: nn.Module, **kwargs) -> None:
    embedded = model.get_input_embeddings()(prompt()).detach()
    with torch.no_grad():
        model(inputs_embeds=embedded, **kwargs)


class _Unreduced(TensorParallelLayer):
    """A row-parallel layer whose outputs are added up later, by the module around it."""

    def shard_param(self, module, param, mesh):
        whole = module._parameters[param]
        module._parameters[param] = nn.Parameter(distribute_tensor(whole, mesh, [Shard(-1)], src_data_rank=None))

    def install_forward(self, module, mesh):
        module.forward = lambda x: nn.functional.linear(x, module.weight.to_local())


def check_a_part_of_a_sum_is_refused(rank):
    """A tensor whose shape is whole, and of which each rank has a part of a sum, is neither shown nor set."""
    ALL_PARALLEL_STYLES.register("unreduced", _Unreduced())
    folder = saved(rank, "llama")
    plan = rules_for(tree_of(AutoConfig.from_pretrained(folder)), rank.world.size)
    plan |= {"model.layers.*.mlp.down_proj": "unreduced", "model.layers.*.mlp": "all_reduce"}
    config = DistributedConfig(tp_size=rank.world.size, tp_plan=plan)
    module = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config).eval().requires_grad_(False)
    view, path = ShardedView(rank.world, module, module_tree(folder)), "model.layers.1.mlp"
    assert_near(forward(pair(rank, "llama").reference), forward(module))
    with torch.no_grad():
        assert not view.sharded(path, "output")
        assert view.sharded(f"{path}.down_proj", "output")
    for method in (view.whole, view.own):
        with pytest.raises(InvalidGraph, match=f"the output of {path}.down_proj cannot be read or set") as raised:
            method(f"{path}.down_proj", "output", torch.ones(2, 9, 48))
        assert "a part of a sum" in raised.value.why


def check_what_was_never_seen_is_refused(rank):
    """A tensor where none was when layouts were learnt, or of another size, is not taken for whole."""
    view = pair(rank, "llama").view
    path = "model.layers.1.self_attn"
    for tree in ((torch.ones(1), torch.ones(1)), (torch.ones(2, 9, 48), None, torch.ones(1))):
        with pytest.raises(InvalidGraph, match=f"the output of {path} cannot be read or set"):
            view.whole(path, "output", tree)
    with pytest.raises(ValueError, match="entries in dimension -1, where"):
        view.whole(f"{path}.q_proj", "output", torch.ones(1, 3, 5))
    with pytest.raises(ValueError, match="where the model has 48"):
        view.own(f"{path}.q_proj", "output", torch.ones(1, 3, 5))


def check_a_wrong_layout_is_noticed(rank):
    """The negative control: with one layout made wrong, what is read and what comes of an edit differ from one process."""
    for name, path in (("gpt2", "transformer.h.1.attn.c_attn"), ("llama", "model.layers.1.self_attn.q_proj")):
        both = pair(rank, name)
        leaves = both.view._learning.places[path, "output"]
        right = leaves[""]
        leaves[""] = replace(right, packed=1 if right.packed > 1 else 2)
        try:
            with pytest.raises(AssertionError):
                assert_all_near(
                    *(
                        collected(m, v, [(path, "output")], forward)
                        for m, v in ((both.reference, None), (both.module, both.view))
                    )
                )
            with pytest.raises(AssertionError):
                assert_edits_agree(both, [(path, "output")])
        finally:
            leaves[""] = right


def check_layouts(rank):
    """For any dimension, sizes, parts and copies: gathering and cutting are each other's inverse, and differentiable twice."""
    size, me, random = rank.world.size, rank.world.rank, torch.Generator().manual_seed(3)

    def number(low, high):
        return int(torch.randint(low, high, (1,), generator=random))

    for _ in range(20):
        copies = number(1, 3) if size % 2 == 0 else 1
        packed, dim = number(1, 4), -number(1, 4)
        each = [packed * number(0 if packed == 1 else 1, 4) for _ in range(size // copies)]
        layout = Layout(dim, tuple(one for one in each for _ in range(copies)), packed, copies)
        shape = [2, 3, 4]
        shape[dim] = layout.total
        full = torch.randn(shape, generator=random, dtype=torch.float64)
        parts = full.chunk(packed, dim)
        start, length = sum(each[: me // copies]) // packed, each[me // copies] // packed
        local = torch.cat([part.narrow(dim, start, length) for part in parts], dim)
        assert torch.equal(local, layout.own(full))
        assert torch.equal(full, layout.whole(local))
        kept = layout.whole(local, root_only=True)
        assert kept.shape == full.shape
        assert me or torch.equal(full, kept)
        if full.numel():
            assert_differentiable_twice(layout, full)
    assert_differentiable_twice(Same(size), full=torch.randn(3, generator=random, dtype=torch.float64))


def assert_differentiable_twice(layout, full: torch.Tensor) -> None:
    """Through own and whole, the first and second gradients of a function of the whole are those without them."""
    found = []
    for through in (lambda x: x**2, lambda x: layout.whole(layout.own(x) ** 2)):
        x = full.clone().requires_grad_()
        (first,) = torch.autograd.grad((through(x) ** 3 * full).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first**2).sum(), x)
        found.append((first.detach(), second))
    torch.testing.assert_close(found[1], found[0])
