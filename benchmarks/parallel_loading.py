"""The memory of a rank while it loads its part of a random Llama of 900 MB: anonymous, at its peak.

``--quick``: 500 MB, and two ranks only. Anonymous memory is what no file stands behind, and what is counted when memory
runs out. On CPUs, slices of whole rows stay in the mapped files; all others are copied, as everything is when the dtype
changes (bfloat16). The goal is the rank's share of the files and 15 % of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from figures import Figure, main

if TYPE_CHECKING:
    from collections.abc import Iterator

DEGREES = (2, 4)
_ALLOWANCE = 0.15
_MPIRUN = ["mpirun", "--oversubscribe", "--allow-run-as-root", "--bind-to", "none", "-np"]
_RANKS = str(Path(__file__).with_name("parallel_loading_ranks.py"))


def _save(folder: Path, layers: int) -> int:
    """A random Llama in several files; its size in bytes."""
    import torch  # noqa: PLC0415 - only once the arguments are well
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    config = LlamaConfig(
        vocab_size=16000,
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    torch.set_num_threads(1)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="200MB")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def measure(quick: bool) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as scratch:
        folder, answer = Path(scratch) / "model", Path(scratch) / "answer.json"
        size = _save(folder, 3 if quick else 7)
        yield Figure("the model's files, MB", size / 2**20, None, "<=", "")
        for degree in DEGREES[:1] if quick else DEGREES:
            program = [sys.executable, "-m", "mpi4py", _RANKS, str(folder), str(answer)]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
            subprocess.run([*_MPIRUN, str(degree), *program], check=True, env=environment)
            for dtype, held, peak, seconds in json.loads(answer.read_text()):
                name, goal = f"{degree} ranks, {dtype}", 1 / degree + _ALLOWANCE
                yield Figure(f"{name}: a rank holds, of the files", held / size, None, "<=", f"{held >> 20} MB")
                yield Figure(f"{name}: its anonymous peak", peak / size, goal, "<=", f"{peak >> 20} MB")
                yield Figure(f"{name}: seconds", seconds, None, "<=", "")


if __name__ == "__main__":
    main(measure, __doc__)
