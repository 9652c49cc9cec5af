"""The models of `tracing.py`, each with its inputs and the places that the cases touch."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from collections.abc import Callable

LAYERS = 12
TOKENS = 16
VOCABULARY = 1000


@dataclass
class Subject:
    """One model: unwrapped, wrapped by the library, and what both are called with.

    `layers` and `head` find the blocks and the last module from the root of either.
    """

    plain: nn.Module
    wrapped: Any
    inputs: dict[str, torch.Tensor]
    layers: Callable[[Any], Any]
    head: Callable[[Any], Any]
    language: bool

    @property
    def depth(self) -> int:
        return len(self.layers(self.plain))


def build(name: str, wrap: Callable[[nn.Module, Any], Any], smollm2: str) -> Subject:
    """The subject of that name: ``gpt2 768``, ``gpt2 64``, ``mlp`` or ``smollm2``; random ones with seed 0."""
    torch.manual_seed(0)
    if name == "mlp":
        module = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(LAYERS))).eval()
        module.requires_grad_(requires_grad=False)
        inputs = {"input": torch.randn(8, 64)}
        return Subject(module, wrap(copy.deepcopy(module), None), inputs, lambda m: m, lambda m: m[-1], language=False)
    if name == "smollm2":
        module, tokenizer = AutoModelForCausalLM.from_pretrained(smollm2), AutoTokenizer.from_pretrained(smollm2)
        places = attrgetter("model.layers")
    else:
        width = int(name.split()[1])
        module, tokenizer = GPT2LMHeadModel(_gpt2(width)), _tokenizer()
        places = attrgetter("transformer.h")
    module.eval().requires_grad_(requires_grad=False)
    ids = torch.randint(3, VOCABULARY, (1, TOKENS))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    wrapped = wrap(copy.deepcopy(module), tokenizer)
    return Subject(module, wrapped, inputs, places, attrgetter("lm_head"), language=True)


def _gpt2(width: int) -> GPT2Config:
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=128,
        n_embd=width,
        n_layer=LAYERS,
        n_head=max(4, width // 64),
        bos_token_id=1,
        eos_token_id=None,  # generation runs to its end
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", bos_token="w1", pad_token="w2")
