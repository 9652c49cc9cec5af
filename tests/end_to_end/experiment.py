"""``python experiment.py MODEL FILE POOL``: an experiment of a researcher, run on a pool; its values are saved in a file.

It reads and sets points that are spread over the ranks of a replica: heads, neurons, attention weights' projections.
"""

import sys

import torch

from nnsight_hpc import LanguageModel

PROMPT = "The Eiffel Tower is in the city of"


def experiment(model, **where):
    """Values of a trace with an intervention, of one with a gradient, and of a generation."""
    lm = LanguageModel(model)
    with lm.trace(PROMPT, **where):
        hidden = lm.model.layers[7].output.save()
        heads = lm.model.layers[9].self_attn.q_proj.output.save()
        weight = lm.model.layers[9].mlp.up_proj.weight[:4].save()
        lm.model.layers[20].mlp.down_proj.input[:, -1, [3, 900]] = 10
        logits = lm.lm_head.output[:, -1].save()
    with lm.trace(PROMPT, **where):
        neurons = lm.model.layers[11].mlp.down_proj.input
        gradient = neurons.grad.save()
        lm.lm_head.output[:, -1].log_softmax(-1)[0, 5].backward()
    with lm.generate(PROMPT, max_new_tokens=6, **where) as tracer:
        tokens = tracer.result.save()
    names = ("hidden", "heads", "weight", "logits", "gradient", "tokens")
    return dict(zip(names, (hidden, heads, weight, logits, gradient, tokens), strict=True))


if __name__ == "__main__":
    torch.save(experiment(sys.argv[1], remote=True, pool=sys.argv[3]), sys.argv[2])
