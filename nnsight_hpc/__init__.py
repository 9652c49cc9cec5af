"""nnsight-hpc: the inside of language models that stay resident on a Slurm cluster.

The names below are imported when they are first used (PEP 562), so that the command line and the daemon,
which need neither, never load torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

from nnsight_hpc.wire import errors as _errors

if TYPE_CHECKING:
    from nnsight_hpc.graph import Graph
    from nnsight_hpc.tracing import LanguageModel, NNsight

__version__ = _version("nnsight-hpc")

_LAZY = {
    "Graph": "nnsight_hpc.graph",
    "LanguageModel": "nnsight_hpc.tracing",
    "NNsight": "nnsight_hpc.tracing",
}

globals().update({name: getattr(_errors, name) for name in _errors.__all__})

__all__ = ["Graph", "LanguageModel", "NNsight", *_errors.__all__]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'nnsight_hpc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
