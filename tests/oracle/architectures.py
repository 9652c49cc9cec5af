"""Small random models of the architectures that every row of the API is checked on, and where their parts are.

Each is made in milliseconds: four blocks of width 48, a vocabulary of 97, float32, evaluation mode, seeded. It lies on the
device of the tests, and so do its inputs. Numbers of heads and widths divide by 2, 3 and 4, the numbers of ranks that they
are split over; Qwen3 has one key/value head, which is fewer than ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from nnsight_hpc import LanguageModel, NNsight
from tests.devices import DEVICE
from tests.oracle.on_ranks import OnRanks, RanksBackend

VOCABULARY = 97
WIDTH = 48
INNER = 96
BLOCKS = 4


@dataclass(frozen=True)
class Architecture:
    """Where the parts of a model are. A path with ``{}`` is a block's; None: the model has no such part."""

    name: str
    make: Callable[[], nn.Module]
    block: str
    head: str
    norm: str
    mlp: str | None = None
    attention: str | None = None
    flattened: tuple[str, ...] = ()
    """Modules whose values have batch times tokens as their first dimension."""
    first_block: int = 0


@dataclass
class Subject:
    """A model under test, wrapped and plain, with its inputs; the plain module is what the oracle hooks."""

    architecture: Architecture
    module: nn.Module = field(repr=False)
    model: NNsight = field(repr=False)
    language: bool
    ranks: RanksBackend | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.architecture, name)

    def path(self, index: int, part: str = "block") -> str:
        """The path of block `index`, or of a part of it."""
        return getattr(self.architecture, part).format(index + self.first_block)

    @property
    def heads(self) -> tuple[int, int]:
        """How many attention heads there are, and how wide each is."""
        config = self.module.config
        number = config.num_attention_heads
        return number, getattr(config, "head_dim", config.hidden_size // number)

    @property
    def head_envoy(self) -> Any:
        """The envoy of the head, whose output the tests compare: every change before it shows there."""
        return self.model.get(self.architecture.head)

    def at(self, index: int, part: str = "block") -> Any:
        """The envoy of block `index`, or of a part of it."""
        return self.model.get(self.path(index, part))

    def inputs(self, seed: int = 1, rows: int = 2, tokens: int = 5) -> torch.Tensor:
        """Token ids, or for a module that is no language model numbers, of that many rows."""
        generator = torch.Generator().manual_seed(seed)
        if self.language:
            return torch.randint(3, VOCABULARY, (rows, tokens), generator=generator).to(DEVICE)
        return torch.randn(rows, WIDTH, generator=generator).to(DEVICE)

    def run(self, inputs: torch.Tensor, **kwargs: Any) -> Any:
        """Plain PyTorch: the module called as its own documentation says."""
        if not self.language:
            return self.module(inputs)
        return self.module(input_ids=inputs, **{**_described(inputs), "use_cache": False, **kwargs})

    def logits(self, inputs: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """What comes out of the head (Gemma 2 squashes it once more afterwards)."""
        found: list[torch.Tensor] = []
        head = self.module.get_submodule(self.architecture.head)
        handle = head.register_forward_hook(lambda _module, _args, output: found.append(output))
        try:
            with torch.no_grad():
                self.run(inputs, **kwargs)
        finally:
            handle.remove()
        return found[0]


def _described(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    mask = torch.ones_like(ids)
    return {
        "attention_mask": mask,
        "position_ids": torch.arange(ids.shape[1], device=ids.device).expand_as(ids).contiguous(),
    }


def _sequential() -> nn.Module:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH))

    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH), *(block() for _ in range(BLOCKS)), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)
    )


_COMMON = {"vocab_size": VOCABULARY, "tie_word_embeddings": False}
_NEOX_LIKE = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 12,
    **_COMMON,
}
_LLAMA_LIKE = {"head_dim": 8, **_NEOX_LIKE}
_GROUPED = {**_LLAMA_LIKE, "head_dim": 4, "num_attention_heads": 24, "num_key_value_heads": 12}


def _causal(name: str, **settings: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(**settings)
    classes = (f"{name}ForCausalLM", f"{name}LMHeadModel")
    cls = next(getattr(transformers, each) for each in classes if hasattr(transformers, each))
    module = cls(config)
    module.generation_config.eos_token_id = None  # a test that wants an end names its token
    module.generation_config.pad_token_id = 0
    return module


def _spread(module: nn.Module) -> nn.Module:
    """Weights so large that blocks matter: fresh models are nearly the identity, and errors would hide."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return module.eval().requires_grad_(requires_grad=False)


_LLAMA_PATHS = {
    "block": "model.layers.{}",
    "mlp": "model.layers.{}.mlp",
    "attention": "model.layers.{}.self_attn",
    "norm": "model.norm",
    "head": "lm_head",
}

ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("sequential", _sequential, "{}", "6", "5", mlp="{}.0", first_block=1),
        Architecture("llama", partial(_causal, "Llama", **_GROUPED), **_LLAMA_PATHS),
        Architecture("qwen3", partial(_causal, "Qwen3", num_key_value_heads=1, **_LLAMA_LIKE), **_LLAMA_PATHS),
        Architecture(
            "gemma2",
            partial(_causal, "Gemma2", num_key_value_heads=12, sliding_window=4, **_LLAMA_LIKE),
            **_LLAMA_PATHS,
        ),
        Architecture(
            "mixtral",
            partial(_causal, "Mixtral", num_local_experts=4, **_GROUPED),
            flattened=("model.layers.1.mlp.experts", "model.layers.1.mlp.gate"),
            **_LLAMA_PATHS,
        ),
        Architecture(
            "gpt2",
            partial(
                _causal, "GPT2", n_embd=WIDTH, n_layer=BLOCKS, n_head=12, bos_token_id=1, eos_token_id=2, **_COMMON
            ),
            block="transformer.h.{}",
            mlp="transformer.h.{}.mlp",
            attention="transformer.h.{}.attn",
            norm="transformer.ln_f",
            head="lm_head",
        ),
        Architecture(
            "gpt_neox",
            partial(_causal, "GPTNeoX", rotary_pct=0.5, **_NEOX_LIKE),
            block="gpt_neox.layers.{}",
            mlp="gpt_neox.layers.{}.mlp",
            attention="gpt_neox.layers.{}.attention",
            norm="gpt_neox.final_layer_norm",
            head="lm_head",
        ),
        Architecture(
            "opt",
            partial(
                _causal,
                "OPT",
                hidden_size=WIDTH,
                word_embed_proj_dim=WIDTH,
                ffn_dim=INNER,
                num_hidden_layers=BLOCKS,
                num_attention_heads=12,
                **_COMMON,
            ),
            block="model.decoder.layers.{}",
            mlp="model.decoder.layers.{}.fc2",
            attention="model.decoder.layers.{}.self_attn",
            norm="model.decoder.final_layer_norm",
            head="lm_head",
            flattened=("model.decoder.layers.1.fc1", "model.decoder.layers.1.fc2"),
        ),
        Architecture(
            "mamba",
            partial(_causal, "Mamba", hidden_size=WIDTH, num_hidden_layers=BLOCKS, state_size=4, **_COMMON),
            block="backbone.layers.{}",
            mlp="backbone.layers.{}.mixer",
            norm="backbone.norm_f",
            head="lm_head",
        ),
    )
}
LANGUAGE = tuple(name for name in ARCHITECTURES if name != "sequential")
ATTENTION = tuple(name for name, a in ARCHITECTURES.items() if a.attention)
FLATTENED = tuple(name for name, a in ARCHITECTURES.items() if a.flattened)


def bare(name: str, device: str = "cpu") -> nn.Module:
    """The plain module of that architecture; on the meta device it has no weights."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        return _spread(ARCHITECTURES[name].make())


def make(name: str, ranks: RanksBackend | None = None) -> Subject:
    """A fresh model of that architecture, wrapped; its traces run on `ranks`, if there are any."""
    module, language = bare(name).to(DEVICE), name in LANGUAGE
    wrapped = OnRanks(module, ranks) if ranks else LanguageModel(module) if language else NNsight(module)
    return Subject(ARCHITECTURES[name], module, wrapped, language, ranks)
