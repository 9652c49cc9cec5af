"""Which module is split how: the plans of transformers, plans for families that it has none for, and what both leave out.

A plan maps patterns of paths (``model.layers.*.mlp.up_proj``; of modules, or of parameters) to names of styles. It is read
off the module tree without weights, so that a model can be refused before anything is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnsight_hpc.parallel.styles import FewHeads, GroupsOfFewHeads
from nnsight_hpc.parallel.upstream import ALL_PARALLEL_STYLES, replace_layer_number_by_wildcard, style_of
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

_GPT2 = {
    "transformer.wte": "embedding_rowwise",
    "transformer.h.*.attn": "local_split_size",
    "transformer.h.*.attn.c_attn": "conv1d_packed_colwise",
    "transformer.h.*.attn.c_proj": "conv1d_rowwise",
    "transformer.h.*.mlp.c_fc": "conv1d_colwise",
    "transformer.h.*.mlp.c_proj": "conv1d_rowwise",
    "lm_head": "colwise_gather_output",
}
_OPT = {
    "model.decoder.embed_tokens": "embedding_rowwise",
    "model.decoder.layers.*.self_attn": "local_num_heads",
    "model.decoder.layers.*.self_attn.q_proj": "colwise",
    "model.decoder.layers.*.self_attn.k_proj": "colwise",
    "model.decoder.layers.*.self_attn.v_proj": "colwise",
    "model.decoder.layers.*.self_attn.out_proj": "rowwise",
    "model.decoder.layers.*.fc1": "colwise",
    "model.decoder.layers.*.fc2": "rowwise",
    "lm_head": "colwise_gather_output",
}
_OURS = {"gpt2": _GPT2, "opt": _OPT, "gpt_neox": {"gpt_neox.embed_in": "embedding_rowwise"}}
"""By `model_type`; rules beside those of transformers, where it has some."""


def plan_of(tree: nn.Module) -> dict[str, str]:
    """The plan for a model, for any degree, from its module tree.

    Raises
    ------
    InvalidInput
        There is none.
    """
    config: Any = tree.config
    plan = {**tree.tp_plan, **_OURS.get(config.model_type, {})}
    if not plan.keys() - {"lm_head"}:
        raise cannot_split(config, "neither transformers nor nnsight-hpc has a tensor-parallel plan for them")
    return plan


def cannot_split(config: Any, why: str) -> InvalidInput:
    """The refusal of a model for its family."""
    return InvalidInput(
        f"models of the family {config.model_type!r} cannot be split over ranks",
        why=why,
        next="run it in one process (over several GPUs if need be), or whole on every rank: replicated of the pool",
    )


def rules_for(tree: nn.Module, degree: int) -> dict[str, str]:
    """The plan for a model and a degree that fits: keys and values of fewer heads than ranks are laid out in copies.

    Raises
    ------
    InvalidInput
        The layers have different numbers of such heads.
    """
    plan = plan_of(tree)
    numbers = kv_heads(tree, plan)
    if not numbers or degree <= min(numbers):
        return plan
    if len(numbers) > 1:
        raise InvalidInput(
            f"the model cannot be split over {degree} ranks",
            why=f"its layers have {' and '.join(map(str, sorted(numbers)))} key and value heads",
            next=f"use at most {min(numbers)} ranks",
        )
    # Registered anew for each model: a style keeps the mesh that it made, which ends with the process group.
    (heads,) = numbers
    name, few = f"{heads}_heads", _keys_and_values(tree, plan)
    ALL_PARALLEL_STYLES.register(name, FewHeads(heads))
    rules = plan | dict.fromkeys(few.values(), name)
    for attention in {path.rpartition(".")[0] for path in few.values()}:
        beneath = plan.get(attention, "")
        rules[attention] = f"{beneath or 'attention'}_of_{name}"
        ALL_PARALLEL_STYLES.register(rules[attention], GroupsOfFewHeads(heads, ALL_PARALLEL_STYLES.get(beneath)))
    return rules


def kv_heads(tree: nn.Module, plan: Mapping[str, str]) -> set[int]:
    """How many key and value heads there are where they are split; families differ, and layers of one may."""
    config: Any = tree.config
    text = config.get_text_config()
    modules: dict[str, Any] = dict(tree.named_modules())
    found = set()
    for path in _keys_and_values(tree, plan):
        attention, _, projection = path.rpartition(".")
        if projection == "k_proj":  # values may be wider than keys
            width = getattr(modules[attention], "head_dim", None) or text.hidden_size // text.num_attention_heads
            found.add(modules[path].out_features // width)
    return found


def _keys_and_values(tree: nn.Module, plan: Mapping[str, str]) -> dict[str, str]:
    """The projections whose outputs are split by key and value heads, and their patterns."""
    found = {path: replace_layer_number_by_wildcard(path) for path, _ in tree.named_modules()}
    return {
        path: pattern
        for path, pattern in found.items()
        if path.endswith((".k_proj", ".v_proj")) and plan.get(pattern) == "colwise"
    }


def packed(module: nn.Module, path: str) -> int:
    """How many parts lie one after another in the split output of a module of a loaded model; 1 where it is plain.

    It cannot be seen from shapes: a rank's slice holds a slice of each part.
    """
    style = style_of(path, module.tp_plan, is_weight=False)
    return getattr(ALL_PARALLEL_STYLES[style], "split_factor", 1) if style else 1
