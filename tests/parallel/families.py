"""Small random models of every family that is split over ranks in the tests.

Twelve heads, so that they can be split over 2, 3 and 4 ranks; random biases and norms, too; vocabularies that nothing divides.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import transformers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

VOCABULARY = 503
_OLD = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "hidden_size": 48,
    "max_position_embeddings": 64,
}
_STD = {"initializer_range": 0.15}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_NEW = {**_OLD, **_STD, "num_key_value_heads": 12, "intermediate_size": 96}
_EXPERTS = {"num_experts_per_tok": 2}

FAMILIES: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": partial(transformers.LlamaConfig, **_NEW),
    "llama_tied": partial(transformers.LlamaConfig, **_NEW, tie_word_embeddings=True),
    "llama_2_kv_heads": partial(transformers.LlamaConfig, **_NEW | {"num_key_value_heads": 2}),
    "qwen2_1_kv_head": partial(transformers.Qwen2Config, **_NEW | {"num_key_value_heads": 1}),
    "qwen2": partial(transformers.Qwen2Config, **_NEW),
    "qwen3": partial(transformers.Qwen3Config, **_NEW, head_dim=16),
    "mixtral": partial(transformers.MixtralConfig, **_NEW, **_EXPERTS, num_local_experts=5),
    "qwen3_moe": partial(
        transformers.Qwen3MoeConfig, **_NEW, **_EXPERTS, head_dim=16, num_experts=5, moe_intermediate_size=48
    ),
    "gemma2": partial(transformers.Gemma2Config, **_NEW, head_dim=8, sliding_window=8),
    "phi3": partial(transformers.Phi3Config, **_NEW, **_SPECIAL),
    "gpt_neox": partial(transformers.GPTNeoXConfig, **_OLD, **_STD, intermediate_size=192),
    "gpt2": partial(
        transformers.GPT2Config,
        **_STD | _SPECIAL,
        vocab_size=VOCABULARY,
        n_embd=48,
        n_layer=2,
        n_head=12,
        n_positions=64,
    ),
    "opt": partial(transformers.OPTConfig, **_OLD, ffn_dim=192, word_embed_proj_dim=48, init_std=0.15),
}


def save(name: str, folder: Path) -> Path:
    """The model of a family, as `save_pretrained` writes it."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[name]())
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder
