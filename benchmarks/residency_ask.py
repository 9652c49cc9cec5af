"""``residency_ask.py MODEL [POOL]``: a researcher's program that asks a model a few times, and prints when it was answered.

With a pool it asks that; without one it loads the weights itself. All else is the same.
"""

import json
import sys
import time

import torch

from nnsight_hpc import LanguageModel

AGAIN = 5
IDS = torch.arange(16)[None]


def main() -> None:
    path, pool = sys.argv[1], (sys.argv[2:] or [None])[0]
    model = LanguageModel(path)
    print(model, file=sys.stderr)
    open_since = time.time()
    answered = []
    for _ in range(1 + AGAIN):
        with model.trace(IDS, remote=pool is not None, pool=pool):
            model.model.layers[0].output[0].mean().save()
            model.lm_head.output[0, -1, :8].save()
        answered.append(time.time())
    print(json.dumps({"open": open_since, "answered": answered}))


main()
