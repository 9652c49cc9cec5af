"""Small random causal language models of eight architectures, built from configurations."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_COMMON = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": {**_COMMON, "num_key_value_heads": 2},
    "qwen3": {**_COMMON, "num_key_value_heads": 2, "head_dim": 8},
    "gemma2": {**_COMMON, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4},
    "mixtral": {**_COMMON, "num_key_value_heads": 2, "num_local_experts": 4},
    "gpt2": {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": _COMMON,
    "opt": {**_COMMON, "word_embed_proj_dim": 32, "ffn_dim": 48},
    "mamba": {"vocab_size": 100, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 2},
}


def causal_model(name, device="cpu"):
    """A model of that architecture, seeded; on the meta device it has no weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **CONFIGS[name], bos_token_id=0, eos_token_id=None, pad_token_id=1)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config)
    return model.eval().requires_grad_(requires_grad=False)
