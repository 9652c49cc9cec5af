"""Models and tokenizers from a folder or the Hugging Face cache, and the module tree without weights."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch.nn.modules.module import register_module_parameter_registration_hook

from nnsight_hpc.models.fingerprint import fingerprint
from nnsight_hpc.wire.errors import InvalidInput, NotFound
from nnsight_hpc.wire.messages import ModelIdentity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


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
        The folder holds no model that transformers can load, or not all weights of one, or `dtype` is none.
    """
    folder = find_folder(model, revision)
    total, report = size_of(folder), progress or (lambda _done, _total: None)
    module = read_weights(folder, dtype, lambda share: report(int(share * total), total), **kwargs)
    return Loaded(module, load_tokenizer(folder), identify(model, folder, revision))


def size_of(folder: Path) -> int:
    """Bytes of a model's files of weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def identify(model: str, folder: Path, revision: str | None) -> ModelIdentity:
    """Which model `find_folder` found in `folder`; see `fingerprint` for what it raises."""
    return ModelIdentity(id=model, fingerprint=fingerprint(folder), revision=revision)


def read_weights(
    folder: Path, dtype: str | torch.dtype, report: Callable[[float], None], **kwargs: Any
) -> torch.nn.Module:
    """The model in `folder`, in evaluation mode, whose parameters ask for no gradients.

    Parameters
    ----------
    dtype, kwargs
        As for `load`.
    report
        Called with the share of the parameters that are loaded, from 0 to 1.

    Raises
    ------
    InvalidInput
        As for `load`.
    """
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - three seconds

    wanted: Any = "auto" if dtype == "auto" else dtype_of(dtype)
    report(0.0)
    try:
        with _reporting(_elements(folder), report):
            module, found = AutoModelForCausalLM.from_pretrained(
                folder, dtype=wanted, use_safetensors=True, output_loading_info=True, **kwargs
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
            raise  # no memory, a GPU that failed, another rank that did: not the model's fault
        raise InvalidInput("the model cannot be loaded", where=str(folder), why=str(error)) from error
    if missing := sorted(found["missing_keys"]):  # transformers made them up
        why = f"no file has {', '.join(missing[:5])}" + (f" and {len(missing) - 5} more" if missing[5:] else "")
        raise InvalidInput("the model cannot be loaded: weights are missing", where=str(folder), why=why)
    report(1.0)
    loaded: torch.nn.Module = module.eval().requires_grad_(requires_grad=False)
    return loaded


def _elements(folder: Path) -> int:
    """How many numbers the files of weights hold."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            total += sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


@contextmanager
def _reporting(elements: int, report: Callable[[float], None]) -> Iterator[None]:
    """Report which share of `elements` this thread has given to modules as parameters, each time it gives one.

    A sharded parameter counts whole: so what a rank reports is the share of its part.
    """
    thread, done = threading.get_ident(), 0

    def count(_module: torch.nn.Module, _name: str, parameter: torch.nn.Parameter | None) -> None:
        nonlocal done
        if parameter is not None and not parameter.is_meta and threading.get_ident() == thread:
            done += parameter.numel()
            report(min(done / elements, 1.0))  # tied weights are given twice

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


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
    from transformers import AutoConfig  # noqa: PLC0415

    return tree_of(AutoConfig.from_pretrained(find_folder(model, revision)), **kwargs)


def tree_of(config: Any, **kwargs: Any) -> torch.nn.Module:
    """The same of a model's configuration."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, **kwargs)
    tree: torch.nn.Module = module.eval().requires_grad_(requires_grad=False)
    return tree


def wrap(module: torch.nn.Module, tokenizer: Any = None) -> Loaded:
    """A model that is in memory already; it has no fingerprint, and so runs only here."""
    return Loaded(module, tokenizer, ModelIdentity(id=type(module).__name__))


def dtype_of(name: str | torch.dtype) -> torch.dtype:
    """The dtype of that name; InvalidInput where there is none."""
    found = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(found, torch.dtype):
        raise InvalidInput(f"{name!r} is not a dtype", next="use auto, bfloat16, float16 or float32")
    return found
