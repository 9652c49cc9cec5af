"""Models and tokenizers from a folder or the Hugging Face cache, and the module tree without weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nnsight_hpc.models.fingerprint import fingerprint
from nnsight_hpc.wire.errors import InvalidInput, NotFound
from nnsight_hpc.wire.messages import ModelIdentity

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to run: the module in evaluation mode, its tokenizer (None if it has none), and which it is."""

    module: torch.nn.Module
    tokenizer: Any
    identity: ModelIdentity


def load(
    model: str,
    *,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    **kwargs: Any,
) -> Loaded:
    """Load weights (safetensors only; no code from the model's repository runs) and tokenizer.

    Parameters
    ----------
    model
        A folder that `save_pretrained` wrote, or the id of a model in the Hugging Face cache or hub.
    dtype
        ``auto`` (as saved), a torch dtype, or the name of one.
    progress
        Called with bytes of parameters loaded and in all, from the thread that calls `load`.
    kwargs
        Passed on to ``from_pretrained``.

    Raises
    ------
    NotFound
        There is no such folder or model.
    InvalidInput
        The folder holds no model that transformers can load, or `dtype` is none.
    """
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - three seconds

    folder = find_folder(model, revision)
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    report = progress or (lambda _done, _total: None)
    report(0, total)
    wanted: Any = "auto" if dtype == "auto" else _dtype(dtype)
    try:
        module = AutoModelForCausalLM.from_pretrained(folder, dtype=wanted, use_safetensors=True, **kwargs)
    except (OSError, ValueError) as error:
        raise InvalidInput("the model cannot be loaded", where=str(folder), why=str(error)) from error
    module.eval().requires_grad_(False)
    report(total, total)
    return Loaded(
        module, load_tokenizer(folder), ModelIdentity(id=model, fingerprint=fingerprint(folder), revision=revision)
    )


def find_folder(model: str, revision: str | None = None) -> Path:
    """The folder of a model: itself, or its snapshot in the Hugging Face cache (downloaded when the hub can be reached)."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise NotFound(
                "there is no config.json", where=str(folder), next="give the folder that save_pretrained wrote"
            )
        return folder
    if folder.is_absolute() or model.startswith((".", "~")):
        raise NotFound(
            "there is no such folder for a model", where=str(folder), next="give the folder that save_pretrained wrote"
        )
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - only for models by id

    try:
        return Path(
            snapshot_download(
                model, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"]
            )
        )
    except Exception as error:  # noqa: BLE001 - the hub's client raises a dozen types, all meaning the same here
        raise NotFound(
            f"there is no model {model!r} here",
            why=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            next="give a folder, or download the model where the hub can be reached",
        ) from None


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer in `folder`, or None where the folder has none."""
    folder = Path(folder)
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    from transformers import AutoTokenizer  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def module_tree(model: str, revision: str | None = None, **kwargs: Any) -> torch.nn.Module:
    """The modules of a model on the meta device: names and shapes, no weights, no memory."""
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415

    config = AutoConfig.from_pretrained(find_folder(model, revision))
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, **kwargs)
    return module.eval().requires_grad_(requires_grad=False)


def wrap(module: torch.nn.Module, tokenizer: Any = None) -> Loaded:
    """A model that is in memory already; it has no fingerprint, and so runs only here."""
    return Loaded(module, tokenizer, ModelIdentity(id=type(module).__name__))


def _dtype(name: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(found, torch.dtype):
        raise InvalidInput(f"{name!r} is not a dtype", next="use auto, bfloat16, float16 or float32")
    return found
