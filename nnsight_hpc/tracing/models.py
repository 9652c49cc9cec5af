"""The models that a researcher wraps: any `torch.nn.Module`, or a causal language model of Hugging Face."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from nnsight_hpc.models import fingerprint, load, load_tokenizer, module_tree, prepare_inputs
from nnsight_hpc.models.load import find_folder
from nnsight_hpc.tracing.backend import backend
from nnsight_hpc.tracing.context import Session, Trace
from nnsight_hpc.tracing.envoy import Envoy
from nnsight_hpc.wire.errors import NotFound
from nnsight_hpc.wire.messages import ModelIdentity


class NNsight(Envoy):
    """A module whose inside can be read and changed in ``with model.trace(…)`` blocks.

    ::

        with model.trace(x):
            hidden = model.layers[3].output.save()
            model.layers[4].output[:] *= 0
    """

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(module)

    @property
    def module(self) -> torch.nn.Module:
        """The real module, with weights."""
        return self._module

    def identity(self, *, remote: bool) -> ModelIdentity:  # noqa: ARG002 - a language model computes more when it is sent
        """Which model this is, for a graph."""
        return ModelIdentity(id=type(self._module).__name__)

    def trace(
        self, *inputs: Any, remote: bool = False, pool: str | None = None, cluster: str | None = None, **kwargs: Any
    ) -> Trace:
        """Record the block and run it within one forward of the model.

        Parameters
        ----------
        inputs, kwargs
            What the model is called with.
        remote
            Run on a pool of a cluster (or of the embedded profile ``local``) instead of in this process.
        pool, cluster
            Which ones; by default the pool with the same weights, on the default cluster.
        """
        args, keywords = self._prepare(inputs, kwargs)
        return Trace(self, backend(remote=remote, pool=pool, cluster=cluster), args, keywords)

    def session(self, *, remote: bool = False, pool: str | None = None, cluster: str | None = None) -> Session:
        """Record several traces and run them as one request."""
        return Session(self, backend(remote=remote, pool=pool, cluster=cluster))

    def _prepare(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return inputs, kwargs


class LanguageModel(NNsight):
    """A causal language model: its config, tokenizer and module tree now, its weights at the first local run.

    Parameters
    ----------
    model
        A folder that `save_pretrained` wrote, a Hugging Face id, or a module that is in memory already.
    tokenizer
        Instead of the model's own.
    dispatch
        Load the weights at once.
    revision
        Of a model by id.
    dtype
        Of the weights: ``auto`` (as saved) or the name of a torch dtype.
    kwargs
        Passed on to ``from_pretrained``.

    Raises
    ------
    NotFound
        There is no such model.
    """

    def __init__(
        self,
        model: str | torch.nn.Module,
        tokenizer: Any = None,
        *,
        dispatch: bool = False,
        revision: str | None = None,
        dtype: str = "auto",
        **kwargs: Any,
    ) -> None:
        self._name, self._revision, self._dtype, self._kwargs = model, revision, dtype, kwargs
        super().__init__(model if isinstance(model, torch.nn.Module) else module_tree(model, revision))
        self._tokenizer = tokenizer
        if dispatch:
            _ = self.module

    @property
    def module(self) -> torch.nn.Module:
        """The real module; its weights are loaded when they are first needed."""
        if isinstance(self._name, str) and any(p.is_meta for p in self._module.parameters()):
            loaded = load(self._name, dtype=self._dtype, revision=self._revision, **self._kwargs)
            self._module = loaded.module
        return self._module

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None."""
        if self._tokenizer is not None or not isinstance(self._name, str):
            return self._tokenizer
        return load_tokenizer(find_folder(self._name, self._revision))

    def identity(self, *, remote: bool) -> ModelIdentity:
        if not isinstance(self._name, str):
            return super().identity(remote=remote)
        weights = self._fingerprint if remote else ""
        return ModelIdentity(id=self._name, fingerprint=weights, revision=self._revision)

    @cached_property
    def _fingerprint(self) -> str:
        try:
            return fingerprint(find_folder(self._name, self._revision))
        except NotFound:
            return ""  # no weights here: the pool is chosen by name

    def _prepare(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        prompt = inputs[0] if len(inputs) == 1 else (list(inputs) or kwargs)
        extra = kwargs if inputs else {}
        return (), {"use_cache": False, **prepare_inputs(prompt, self.tokenizer), **extra}
