"""Models that tests share: a tiny random Llama with a real tokenizer, and the real SmolLM2-135M."""

import fcntl
from pathlib import Path

import pytest

CACHE = Path(__file__).parent.parent / ".cache"
"""As `$XDG_CACHE_HOME` it holds the model where the demonstration looks for it, too."""
WORDS = (
    *("the", "a", "of", "in", "city", "tower", "is", "capital", "paris", "rome", "berlin"),
    *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
)


def save_tiny_llama(folder: Path, *, seed: int = 0, layers: int = 3, dtype: str = "float32") -> Path:
    """A random Llama of `layers` blocks and width 32, with a word-level tokenizer, as `save_pretrained` writes it."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """The folder of a tiny random Llama."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M, converted once for a checkout (about half a minute)."""
    from nnsight_hpc.models.smollm2 import prepare

    CACHE.mkdir(exist_ok=True)
    with (CACHE / "conversion").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests that run side by side may want it at the same time
        return prepare(CACHE / "nnsight-hpc" / "models" / "SmolLM2-135M-Instruct")
