"""The page about placement on several nodes says what its script calculates, and what a real layer does."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture" / "scale.md").read_text("utf-8")
pytestmark = pytest.mark.slow
_TABLES = re.findall(r"<!-- placement\.py (.*?) -->\n\n((?:\|.*\n|\n(?=\|))+)", PAGE)


@pytest.fixture(scope="module")
def placement():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module("placement")


def _llama(layers, **sizes):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=64, num_hidden_layers=layers, **sizes)
    return LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(requires_grad=False)


def _kept(model, tokens):
    """Bytes that autograd keeps of a forward, beside the weights."""
    import torch

    seen = {}

    def keep(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    inputs = torch.randn(1, tokens, model.config.hidden_size, dtype=torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(inputs_embeds=inputs, use_cache=False)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    return sum(tensor.untyped_storage().nbytes() for place, tensor in seen.items() if place not in weights)


@pytest.mark.parametrize(("words", "table"), _TABLES, ids=[words for words, _ in _TABLES])
def test_tables_are_those_of_the_script(placement, words, table):
    """Each table of the page is what the script prints for the words above it."""
    assert placement.main(shlex.split(words)) == table


def test_page_has_its_tables():
    """The page shows the parts of one degree, and degrees of two models on two networks."""
    assert [words.split()[0] for words, _ in _TABLES] == ["llama-3.1-405b"] * 3 + ["llama-3.1-70b"]


def test_weights_of_a_rank_by_hand(placement):
    """What the script takes from transformers' sharding is what the sizes of a Llama give."""
    h, i, vocabulary, layers, kv, tp = 16384, 53248, 128256, 126, 1024, 16
    split = 2 * h * h + 3 * h * i
    rank = 2 * (2 * vocabulary * h // tp + layers * (split // tp + 2 * kv * h // 8 + 2 * h) + h)
    assert rank == placement.shard("llama-3.1-405b", tp).rank


@pytest.mark.parametrize("sizes", [(256, 832, 2), (512, 832, 2), (256, 1664, 8)])
def test_memory_that_a_gradient_keeps(sizes):
    """A layer keeps 12 h + 6 i + 4 k bytes a token in one process, and a few for norms and heads."""
    h, i, kv = sizes
    heads = {"num_attention_heads": 8, "num_key_value_heads": kv}
    few, more = (_kept(_llama(n, hidden_size=h, intermediate_size=i, **heads), 64) for n in (2, 3))
    assert (more - few) / 64 == pytest.approx(12 * h + 6 * i + 4 * kv * h // 8, rel=0.01)


def test_kernels_that_a_layer_starts():
    """A layer of transformers' Llama runs the page's number of operations that are no views, for one token."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from transformers import DynamicCache

    class Count(TorchDispatchMode):
        started = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.started += not function.is_view and function is not torch.ops.aten._unsafe_view.default
            return function(*args, **(kwargs or {}))

    def started(layers):
        model = _llama(layers, hidden_size=64, intermediate_size=128, num_attention_heads=8, num_key_value_heads=2)
        cache = DynamicCache(config=model.config)
        model(torch.ones(1, 8, dtype=torch.long), past_key_values=cache)
        with Count() as count:
            model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
        return count.started

    with torch.no_grad():
        per_layer = started(3) - started(2)
    assert f"starts {per_layer} kernels for a token" in " ".join(PAGE.split())
