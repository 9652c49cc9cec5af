"""Modules of a pool owner's own: a function of theirs makes the module, safetensors files give its weights.

The function is the owner's code, run in the owner's own job. No weights are ever unpickled.
"""

from __future__ import annotations

import importlib
import traceback
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from nnsight_hpc.models.fingerprint import fingerprint_of_tensors
from nnsight_hpc.models.load import Loaded, dtype_of
from nnsight_hpc.wire.errors import InvalidInput, NotFound
from nnsight_hpc.wire.messages import ModelIdentity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

_LINES = 8
"""Lines of a traceback of the owner's code that are shown."""
_NAMES = 5
"""Names of weights that an error shows."""
Example = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments and keywords that a module can be called with."""


def load_factory(
    factory: str,
    model: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Loaded, Example | None]:
    """Make a module and read its weights, all of them and no others.

    Parameters
    ----------
    factory
        ``package:function``; the function takes nothing, and returns the module, or the module and an example of its inputs
        (a tuple of arguments, or a dict of keywords).
    model
        A safetensors file, or a folder of them.
    dtype
        Of all floating-point weights; ``auto``: as they were saved.
    device
        Where the weights go; by default the CPU.
    progress
        Called with bytes of weights read and in all, from the thread that calls this.

    Raises
    ------
    NotFound
        There is no such file, or no safetensors file in the folder.
    InvalidInput
        The factory failed, and with what; or the weights are not those of its module, with their names.
    """
    files = weights_files(model)
    wanted = None if dtype == "auto" else dtype_of(dtype)
    module, example = _made(factory)
    _fill(module, _read(files, device or torch.device("cpu"), progress or (lambda _done, _total: None)), factory, model)
    module = module.to(device=device, dtype=wanted).eval().requires_grad_(requires_grad=False)
    return Loaded(module, None, identify_weights(model)), example


def identify_weights(model: str) -> ModelIdentity:
    """Which weights are in a safetensors file, or a folder of them."""
    return ModelIdentity(id=model, fingerprint=fingerprint_of_tensors(weights_files(model)))


def weights_files(model: str) -> list[Path]:
    """The safetensors files of `model`: itself, or those in the folder. Raises `NotFound` where there are none."""
    path = Path(model).expanduser()
    files = [path] if path.suffix == ".safetensors" else sorted(path.glob("*.safetensors"))
    if not files or not files[0].is_file():
        raise NotFound(
            "there are no safetensors files for the factory's module",
            where=str(path),
            next="save its weights with safetensors.torch.save_model(module, file); pickles are not read",
        )
    return files


def _made(factory: str) -> tuple[torch.nn.Module, Example | None]:
    package, _, name = factory.partition(":")
    try:
        function: Any = importlib.import_module(package)
        for part in name.split("."):
            function = getattr(function, part)
        made = function()
    except (MemoryError, torch.OutOfMemoryError):
        raise  # not the code's fault
    except (Exception, SystemExit) as error:
        raise _failed(factory, error) from error
    module, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, torch.nn.Module):
        raise InvalidInput(f"the pool's factory made a {type(module).__name__}, and no torch.nn.Module", where=factory)
    if example is None:
        return module, None
    if not isinstance(example, tuple | dict):
        raise InvalidInput(
            "the pool's factory gave an example of inputs that is neither a tuple of arguments nor a dict of keywords",
            where=factory,
            why=f"it is of type {type(example).__name__}",
        )
    return module, (example, {}) if isinstance(example, tuple) else ((), example)


def _failed(factory: str, error: BaseException) -> InvalidInput:
    """The error of the owner's code, without our own frame above it."""
    own = error.__traceback__.tb_next if error.__traceback__ else None
    lines = "".join(traceback.format_exception(type(error), error, own)).rstrip().splitlines()
    return InvalidInput(
        f"the pool's factory failed: {type(error).__name__}: {error}",
        where=factory,
        why="\n".join(lines[-_LINES:]),
        next='its package has to be found by Python on the worker: setup = ["export PYTHONPATH=/folder/of/the/package"]'
        if isinstance(error, ImportError)
        else "",
    )


def _read(files: Sequence[Path], device: torch.device, progress: Callable[[int, int], None]) -> dict[str, torch.Tensor]:
    total, done = sum(file.stat().st_size for file in files), 0
    found: dict[str, torch.Tensor] = {}
    progress(0, total)
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - it is no dict
                    if name in found:
                        raise InvalidInput(f"the weight {name} is in two files", where=str(file))
                    found[name] = tensors.get_tensor(name).to(device, copy=True)  # what is mapped changes with its file
                    done += found[name].nbytes
                    progress(done, total)
        except SafetensorError as error:
            raise InvalidInput(f"{file} is not a safetensors file", why=str(error)) from None
    progress(total, total)
    return found


def _fill(module: torch.nn.Module, weights: dict[str, torch.Tensor], factory: str, model: str) -> None:
    """Put the weights into a module, which may be on the meta device, and share those again that it shares."""
    shared = _shared(module)
    try:
        found = module.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:
        if type(error) is not RuntimeError:
            raise  # no memory: not the weights' fault
        raise InvalidInput(
            "the weights are not those of the factory's module", where=f"{model}, {factory}", why=str(error)
        ) from None
    missing = set(found.missing_keys)
    for names in shared:
        if there := [name for name in names if name not in missing]:
            missing.difference_update(names)
            for name in names:
                _share(module, there[0], name)
    problems = [*_named("no file has", missing), *_named("the module has no", found.unexpected_keys)]
    left = (*module.named_parameters(), *module.named_buffers())
    problems += _named("the factory left on the meta device", [] if problems else [n for n, t in left if t.is_meta])
    if problems:
        raise InvalidInput(
            "the weights are not those of the factory's module", where=f"{model}, {factory}", why="\n".join(problems)
        )


def _shared(module: torch.nn.Module) -> list[list[str]]:
    """The names of weights that are one tensor."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, entry in module.state_dict(keep_vars=True).items():
        if isinstance(entry, torch.Tensor):
            names[id(entry)].append(name)
    return [group for group in names.values() if len(group) > 1]


def _share(module: torch.nn.Module, source: str, name: str) -> None:
    (owner, last), (giver, given) = (_place(module, path) for path in (name, source))
    setattr(owner, last, getattr(giver, given))


def _place(module: torch.nn.Module, path: str) -> tuple[torch.nn.Module, str]:
    owner, _, last = path.rpartition(".")
    return module.get_submodule(owner), last


def _named(what: str, names: Iterable[str]) -> list[str]:
    """A line that says so of some weights; none where there are none."""
    ordered = sorted(names)
    more = f" and {len(ordered) - _NAMES} more" if ordered[_NAMES:] else ""
    return [f"{what} {', '.join(ordered[:_NAMES])}{more}"] if ordered else []
