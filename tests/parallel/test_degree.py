"""Over how many ranks a model can be split, from its configuration alone."""

import subprocess
import sys
from functools import partial

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from nnsight_hpc.models.load import tree_of
from nnsight_hpc.parallel.degree import check_degree
from nnsight_hpc.parallel.plans import kv_heads, plan_of, rules_for
from nnsight_hpc.wire.errors import InvalidInput
from tests.parallel.families import FAMILIES
from tests.parallel.ranks import ROOT

SMALL = {"vocab_size": 101, "num_hidden_layers": 1}
llama = partial(transformers.LlamaConfig, **SMALL)


def fitting(config, degrees=range(1, 65)) -> list[int]:
    return [degree for degree in degrees if fits(config, degree)]


def fits(config, degree: int) -> bool:
    try:
        check_degree(config, degree)
    except InvalidInput:
        return False
    return True


@settings(deadline=None)
@given(
    kv_heads=st.integers(1, 8),
    group=st.integers(1, 6),
    inner=st.integers(1, 12).map(lambda n: 12 * n),
    degree=st.integers(2, 60),
)
def test_what_must_divide(kv_heads, group, inner, degree):
    """Heads and inner width divide by the degree, and kv heads and degree one by the other; else those that do are named."""
    heads = kv_heads * group
    config = llama(
        hidden_size=8 * heads, num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=inner
    )
    allowed = [
        d for d in range(1, heads + 1) if heads % d == 0 and inner % d == 0 and (kv_heads % d == 0 or d % kv_heads == 0)
    ]
    if degree in allowed:
        check_degree(config, degree)
    else:
        with pytest.raises(InvalidInput) as caught:
            check_degree(config, degree)
        assert caught.value.next == f"use one of these numbers of ranks: {', '.join(map(str, allowed))}"


def test_what_does_not_fit_is_said():
    """SmolLM2's nine heads and three key and value heads go over three ranks; two are refused with the reasons."""
    smollm2 = llama(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536)
    assert fitting(smollm2) == [1, 3]
    with pytest.raises(InvalidInput) as caught:
        check_degree(smollm2, 2)
    assert str(caught.value) == (
        "the model cannot be split over 2 ranks\n"
        "  why: 9 attention heads, 3 key and value heads cannot be shared out evenly\n"
        "  next: use one of these numbers of ranks: 1, 3"
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name):
    """The families that are run over 2, 3 and 4 ranks fit them, but for two key and value heads on three."""
    assert fitting(FAMILIES[name](), (1, 2, 3, 4)) == ([1, 2, 4] if name == "llama_2_kv_heads" else [1, 2, 3, 4])


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, [1, 2, 3, 6]), (torch.bfloat16, [1, 3])])
def test_the_width_of_experts_must_keep_its_alignment(dtype, expected):
    """Of experts 24 wide a rank holds rows of whole 16 bytes; how many experts there are does not matter."""
    sizes = {"num_attention_heads": 12, "hidden_size": 96, "num_key_value_heads": 12, "head_dim": 8, **SMALL}
    config = transformers.Qwen3MoeConfig(**sizes, num_experts=5, moe_intermediate_size=24, dtype=dtype)
    assert fitting(config) == expected


def test_the_width_of_experts_is_named():
    """An inner width of experts that does not divide is told by its path."""
    config = transformers.MixtralConfig(
        **SMALL, hidden_size=64, num_attention_heads=8, num_key_value_heads=8, intermediate_size=36
    )
    with pytest.raises(InvalidInput, match=r"the width 36 of model\.layers\.\*\.mlp\.experts\.\w+, in steps of 4"):
        check_degree(config, 8)


def test_a_vocabulary_may_be_of_any_size():
    """A prime number of tokens is no reason to refuse."""
    assert fitting(llama(hidden_size=64, num_attention_heads=8, num_key_value_heads=8, intermediate_size=64)) == [
        1,
        2,
        4,
        8,
    ]


@pytest.mark.parametrize("config", [transformers.FalconConfig, transformers.MambaConfig, transformers.BloomConfig])
def test_a_family_without_a_plan(config):
    """It is refused, with what can be done instead; one rank needs no plan."""
    check_degree(config(num_hidden_layers=1), 1)
    with pytest.raises(InvalidInput, match="cannot be split over ranks") as caught:
        check_degree(config(num_hidden_layers=1), 2)
    assert config.model_type in caught.value.what
    assert "replicated of the pool" in caught.value.next


def test_few_heads_follow_the_plan_of_the_model():
    """Keys and values are held in copies where the model's own plan splits them, and nowhere else."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, **SMALL}
    plain = rules_for(tree_of(transformers.Qwen2Config(**sizes)), 4)
    assert plain["model.layers.*.self_attn.k_proj"] == plain["model.layers.*.self_attn.v_proj"] == "2_heads"
    assert plain["model.layers.*.self_attn"] == "attention_of_2_heads"
    assert plain["model.layers.*.self_attn.q_proj"] == "colwise"
    assert rules_for(tree_of(transformers.Qwen2Config(**sizes)), 2)["model.layers.*.self_attn.k_proj"] == "colwise"
    gathered = transformers.Olmo2Config(**sizes)
    assert rules_for(tree_of(gathered), 4)["model.layers.*.self_attn.k_proj"] == "colwise_gather_output"


def test_layers_with_different_numbers_of_key_and_value_heads():
    """Every number must fit; more ranks than the fewest are refused, since one layer would need copies and another none."""
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64, "head_dim": 8, "v_head_dim": 8}
    config = transformers.MiMoV2FlashConfig(
        **SMALL | {"num_hidden_layers": 2},
        **sizes,
        n_routed_experts=4,
        num_experts_per_tok=2,
        layer_types=["full_attention", "sliding_attention"],
    )
    tree = tree_of(config)
    assert kv_heads(tree, plan_of(tree)) == {2, 4}
    assert rules_for(tree, 2) == plan_of(tree)
    with pytest.raises(InvalidInput, match="split over 4 ranks") as caught:
        rules_for(tree, 4)
    assert caught.value.why == "its layers have 2 and 4 key and value heads"


def test_layers_without_key_and_value_heads():
    """A hybrid whose layers at hand have no such attention gets no rules for it."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 32, "head_dim": 8}
    tree = tree_of(transformers.Qwen3NextConfig(**SMALL, **sizes, num_experts=4, layer_types=["linear_attention"]))
    assert rules_for(tree, 4) == plan_of(tree)


def test_a_transformers_of_another_version():
    """Where transformers has not the interface that is built on, importing what loads says so, with what to install."""
    code = (
        "import sys; sys.modules['transformers.distributed.parallel_utils'] = None; import nnsight_hpc.parallel.loading"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT, check=False
    )
    assert "Incompatible: transformers " in done.stderr
    assert "pip install 'nnsight-hpc[worker]'" in done.stderr
