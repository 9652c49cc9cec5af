"""The first layers of a deep model."""

from __future__ import annotations

import pytest
import torch
import transformers

from nnsight_hpc.models.load import tree_of
from nnsight_hpc.parallel.depth import first_layers, shortened
from tests.parallel.families import FAMILIES


def tree(family: str, **changes) -> torch.nn.Module:
    config = FAMILIES[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    return tree_of(config)


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (tree("llama", num_hidden_layers=9), 2),
        (tree("gpt2", n_layer=9), 2),
        (tree("qwen3_moe", num_hidden_layers=9, mlp_only_layers=[0, 1, 2]), 4),
        (tree("qwen3_moe", num_hidden_layers=6, mlp_only_layers=[5]), 6),
        (tree("mixtral", num_hidden_layers=5), 2),
    ],
)
def test_layers_until_no_new_kind_comes(model, layers):
    """Two layers stand for all that are alike, and as many as it takes to have one of each kind."""
    assert layers == first_layers(model)


def test_a_short_model_runs_and_is_whole_again():
    """A model without its later layers runs, as one does that was made so; afterwards nothing is missing, also on errors."""
    torch.manual_seed(0)
    config = FAMILIES["llama"]()
    config.num_hidden_layers = 4
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids, names = torch.arange(6)[None], [name for name, _ in model.named_modules()]
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states[2]
        with shortened(model, 2):
            assert not any("layers.2" in name for name, _ in model.named_modules())
            hidden = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(model.model.norm(expected), hidden[2])
    with pytest.raises(RuntimeError, match="on purpose"), shortened(model, 2):
        raise RuntimeError("on purpose")
    assert names == [name for name, _ in model.named_modules()]
