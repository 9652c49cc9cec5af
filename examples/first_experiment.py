"""A first experiment: predictions, an intervention on neurons, and activation patching, on a resident model.

    nnsight-hpc up smol --model MODEL --wait
    python -m nnsight_hpc.examples.first_experiment --model MODEL --pool smol

With ``--local`` the same code runs in this process, without a pool.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from nnsight_hpc import LanguageModel

if TYPE_CHECKING:
    from collections.abc import Sequence

PARIS = "The Eiffel Tower is in the city of"
ROME = "The Colosseum is in the city of"
LAYER = 27
"""The block whose neurons are set; late enough that they write to the prediction directly."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the model's folder or id")
    parser.add_argument("--pool", default=None, help="the pool to run on; by default the one with the same weights")
    parser.add_argument("--local", action="store_true", help="run in this process")
    parser.add_argument("--out", type=Path, default=Path(), help="where the heat map is written")
    options = parser.parse_args()
    lm = LanguageModel(options.model)
    where = {"remote": not options.local} | ({} if options.local else {"pool": options.pool})
    predictions(lm, where)
    neurons = city_neurons(lm, where)
    intervention(lm, neurons, where)
    the_paper_s_snippet(lm, neurons, where)
    picture = activation_patching(lm, options.out, where)
    print(f"The heat map of activation patching is in {picture}")


def predictions(lm: LanguageModel, where: dict[str, Any]) -> None:
    """What the model says about two cities."""
    table = Table("prompt", "next token", title="Predictions")
    for prompt in (PARIS, ROME):
        with lm.trace(prompt, **where):
            token = lm.lm_head.output[0, -1].argmax().save()
        table.add_row(prompt, repr(lm.tokenizer.decode(token)))
    Console().print(table)


def city_neurons(lm: LanguageModel, where: dict[str, Any]) -> torch.Tensor:
    """The neurons of one MLP that write most of "Rome minus Paris" into the residual stream, from the weights alone."""
    paris, rome = (lm.tokenizer.encode(f" {city}")[0] for city in ("Paris", "Rome"))
    with lm.trace(PARIS, **where):
        direction = lm.lm_head.weight[rome] - lm.lm_head.weight[paris]
        neurons = (direction @ lm.model.layers[LAYER].mlp.down_proj.weight).topk(12).indices.save()
    return neurons  # noqa: RET504 - names are bound when the block ends, so not from inside of it


def intervention(lm: LanguageModel, neurons: torch.Tensor, where: dict[str, Any]) -> None:
    """Setting these neurons changes the answer."""
    with lm.session(**where):
        with lm.trace(PARIS):
            before = lm.lm_head.output[0, -1].softmax(-1).topk(5).save()
        with lm.trace(PARIS):
            lm.model.layers[LAYER].mlp.down_proj.input[:, -1, neurons] = 10
            after = lm.lm_head.output[0, -1].softmax(-1).topk(5).save()
    table = Table("before", "probability", "after", "probability ", title="Twelve neurons set to 10")
    for row in zip(*(_top(lm, top) for top in (before, after)), strict=True):
        table.add_row(*(cell for pair in row for cell in pair))
    Console().print(table)
    print(f"Prompt: {PARIS!r}; layer {LAYER}, neurons {neurons.tolist()}")


def _top(lm: LanguageModel, top: Sequence[torch.Tensor]) -> list[tuple[str, str]]:
    values, indices = top
    return [(repr(lm.tokenizer.decode(i)), f"{v:.3f}") for v, i in zip(values.tolist(), indices.tolist(), strict=True)]


def the_paper_s_snippet(lm: LanguageModel, neurons: torch.Tensor, where: dict[str, Any]) -> None:
    """The example of the nnsight paper (arXiv:2407.14561), with its own lines."""
    with lm.trace("The Eiffel Tower is in the city of", **where):
        lm.model.layers[LAYER].mlp.down_proj.input[:, -1, neurons] = 10
        out = lm.output.save()

    last = out["logits"][:, -1].argmax()
    prediction = lm.tokenizer.decode(last)
    print(f"The snippet of the nnsight paper predicts {prediction!r}")


def activation_patching(lm: LanguageModel, folder: Path, where: dict[str, Any]) -> Path:
    """Where the answer is: put the residual stream of one prompt, place by place, into the other.

    Each trace patches one layer, at a different position in each row of a batch; all of them are one request.
    """
    clean, corrupted = (lm.tokenizer.encode(prompt) for prompt in _same_length(lm))
    paris, rome = (lm.tokenizer.encode(f" {city}")[0] for city in ("Paris", "Rome"))
    positions = torch.arange(len(clean))
    effects, states = [], []
    with lm.session(**where):
        with lm.trace([clean]):
            states = [layer.output for layer in lm.model.layers]
            logits = lm.lm_head.output[0, -1]
            best = (logits[paris] - logits[rome]).save()
        with lm.trace([corrupted]):
            logits = lm.lm_head.output[0, -1]
            worst = (logits[paris] - logits[rome]).save()
        for index, state in enumerate(states):
            with lm.trace([corrupted] * len(clean)):
                lm.model.layers[index].output[positions, positions] = state[0]
                logits = lm.lm_head.output[:, -1]
                effects.append((logits[:, paris] - logits[:, rome]).save())
    restored = (torch.stack(effects) - worst) / (best - worst)
    return _heat_map(restored, [lm.tokenizer.decode(token) for token in corrupted], folder / "activation_patching.png")


def _same_length(lm: LanguageModel) -> tuple[str, str]:
    """Two prompts of the same number of tokens, one about each city."""
    clean, corrupted = PARIS, ROME
    while len(lm.tokenizer.encode(clean)) < len(lm.tokenizer.encode(corrupted)):
        clean = f"So {clean}"
    while len(lm.tokenizer.encode(corrupted)) < len(lm.tokenizer.encode(clean)):
        corrupted = f"So {corrupted}"
    return clean, corrupted


def _heat_map(restored: torch.Tensor, tokens: Sequence[str], file: Path) -> Path:
    import matplotlib as mpl  # noqa: PLC0415 - a second

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(8, 7), layout="constrained")
    image = axes.imshow(restored.float(), aspect="auto", origin="lower", cmap="RdBu", vmin=-1, vmax=1)
    axes.set_xticks(range(len(tokens)), [repr(token)[1:-1] for token in tokens], rotation=45, ha="right")
    axes.set(ylabel="layer", title="Activation patching: how much of the answer “Paris” comes back")
    figure.colorbar(image, label="restored part of the logit difference")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    plt.close(figure)
    return file


if __name__ == "__main__":
    main()
