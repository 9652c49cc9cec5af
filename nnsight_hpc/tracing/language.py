"""Causal language models of Hugging Face: prompts, tokenizers, generations, weights that load when they are needed."""

from __future__ import annotations

import inspect
from functools import cached_property
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Self

import torch

from nnsight_hpc.graph.build import GENERATE
from nnsight_hpc.models import fingerprint, load, load_tokenizer, module_tree, pad_left, prepare_inputs
from nnsight_hpc.models.load import find_folder
from nnsight_hpc.tracing.backend import GROUP, new_dataset
from nnsight_hpc.tracing.dump import Dump
from nnsight_hpc.tracing.generation import bounded
from nnsight_hpc.tracing.lines import users_line
from nnsight_hpc.tracing.models import NNsight
from nnsight_hpc.tracing.value import Value
from nnsight_hpc.wire.errors import InvalidInput, NotFound
from nnsight_hpc.wire.messages import DumpSpec, ModelIdentity

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from nnsight_hpc.tracing.batches import Part
    from nnsight_hpc.wire.messages import DatasetFormat

_PROMPT = frozenset({"input_ids", "attention_mask", "position_ids", "inputs_embeds", "token_type_ids"})


class LanguageModel(NNsight):
    """A causal language model of Hugging Face.

    Parameters
    ----------
    model
        A folder, the id of a model in the hub's cache, or a module that is in memory already.
    tokenizer
        By default the one in the folder. Needed for prompts that are text.
    dispatch
        Load the weights now. By default there are only the module tree and the tokenizer until the first local run, so
        that a laptop needs no weights for remote ones.
    revision
        Of a model in the hub.
    dtype
        Of the loaded weights, or its name: ``auto`` is what is in the file.
    rename
        As for `NNsight`.
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
        dtype: str | torch.dtype = "auto",
        rename: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        self._name, self._revision, self._dtype, self._kwargs = model, revision, dtype, kwargs
        super().__init__(model if isinstance(model, torch.nn.Module) else module_tree(model, revision), rename=rename)
        self._tokenizer = tokenizer
        if dispatch:
            _ = self.module

    _identity: ModelIdentity | None = None

    @classmethod
    def from_pool(cls, name: str, cluster: str | None = None, **kwargs: Any) -> Self:
        """The model of a pool, without its weights: configuration, tokenizer and module tree come from the cluster.

        Its traces run on that pool (``remote=True``), and nowhere else.
        """
        for entry in entry_points(group=GROUP, name="pool"):
            folder, identity = entry.load()(name, cluster)
            model = cls(str(folder), **kwargs)
            model._where, model._identity = (name, cluster), identity
            return model
        raise NotFound(
            "there is no remote backend", next='install nnsight-hpc with its client: pip install "nnsight-hpc[client]"'
        )

    @property
    def module(self) -> torch.nn.Module:
        """The real module; its weights are loaded when they are first needed."""
        if self._origin is not None:
            return self._origin.module
        if isinstance(self._name, str) and any(p.is_meta for p in self._module.parameters()):
            if self._identity is not None:
                raise InvalidInput(
                    f"the weights of this model are in the pool {self._where[0]!r} only",
                    where=str(users_line()),
                    next="run it there, with remote=True",
                )
            loaded = load(self._name, dtype=self._dtype, revision=self._revision, **self._kwargs)
            self._module = loaded.module
        return self._module

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None."""
        if self._tokenizer is not None or not isinstance(self._name, str):
            return self._tokenizer
        return load_tokenizer(find_folder(self._name, self._revision))

    @cached_property
    def generation_config(self) -> Any:
        """The model's own defaults for generations, from its folder if there is one."""
        if not isinstance(self._name, str):
            return super().generation_config
        from transformers import GenerationConfig  # noqa: PLC0415 - three seconds

        try:
            return GenerationConfig.from_pretrained(find_folder(self._name, self._revision))
        except OSError:
            return super().generation_config

    def identity(self, *, remote: bool) -> ModelIdentity:
        if self._identity is not None:
            return self._identity
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

    def given(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return bool(inputs) or not kwargs.keys().isdisjoint(("input_ids", "inputs_embeds"))

    def prepare(
        self, op: str, inputs: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        prompt = {name: value for name, value in kwargs.items() if name in _PROMPT}
        options = {name: value for name, value in kwargs.items() if name not in _PROMPT}
        if inputs:
            given = inputs[0] if len(inputs) == 1 else list(inputs)
            prepared = {"input_ids": given} if type(given) is Value else prepare_inputs(given, self.tokenizer)
            prompt = {**prepared, **prompt}
        elif not any(type(value) is Value for value in prompt.values()):
            prompt = prepare_inputs(prompt, self.tokenizer)
        if op == GENERATE:
            prompt.pop("position_ids", None)  # it makes its own
            tokens = getattr(prompt.get("input_ids"), "shape", (0, None))[1]
            return (), {**prompt, **bounded(options, tokens if isinstance(tokens, int) else None)}
        given = {"use_cache": False, **prompt}
        return (), {name: v for name, v in given.items() if name in kwargs or name not in self._foreign} | options

    def dump(
        self,
        corpus: Any,
        *,
        name: str,
        remote: bool = False,
        pool: str | None = None,
        cluster: str | None = None,
        blocking: bool = True,
        format: DatasetFormat = "zarr",
        dtype: str = "auto",
        context: int = 1024,
        stride: int | None = None,
        packed: bool = False,
        text_field: str = "text",
        batch_tokens: int = 2048,
        dry_run: bool = False,
        needs: str | None = None,
        priority: int = 0,
        idempotency_key: str | None = None,
    ) -> Dump:
        """Record the block, and write what it keeps (``d.write(…)``) of every token of a corpus as a dataset.

        Parameters
        ----------
        corpus
            A path (see `storage.corpus.read_corpus` for its forms), a list of texts, lists or arrays of token ids, or the
            rows of a dataset.
        name
            The dataset's. In this process ``NAME.zarr`` is written to the working folder.
        remote, pool, cluster, blocking
            As for `trace`.
        dtype
            How floating-point values are stored; ``auto``: as the model computes them.
        context
            The largest number of tokens that the model is given at once. Longer documents are cut there.
        stride
            Keep all of longer documents, in windows that begin so many tokens apart. Each token is written once: from the
            first window that has it.
        packed
            Join all documents (an end-of-text token follows each text), and cut them where the context ends.
        text_field
            Where rows of `corpus` have their text, or token ids.
        batch_tokens
            Tokens of one forward, padding counted.
        dry_run
            Write nothing: ``d.plan()`` has documents, tokens, bytes, files, free space and the time expected.
        needs, priority, idempotency_key
            As for `trace`.
        """
        dataset = new_dataset(name, corpus, text_field=text_field)
        spec = DumpSpec(
            name=dataset.name,
            dtype=dtype,
            format=format,
            context=context,
            stride=stride or 0,
            packed=packed,
            batch_tokens=batch_tokens,
            corpus_fingerprint=dataset.fingerprint,
            command=str(users_line()),
            measure=dry_run,
        )
        sending = {"needs": needs, "priority": priority, "idempotency_key": idempotency_key}
        where = self._backend(remote=remote, pool=pool, cluster=cluster, **sending)
        return Dump(self, where, spec, dataset, blocking=blocking)

    def padded(self, parts: Sequence[Part]) -> list[Part]:
        prompts = [{name: value for name, value in kwargs.items() if name in _PROMPT} for _, kwargs in parts]
        new = pad_left(prompts, self.tokenizer)
        return [(args, {**kwargs, **prompt}) for (args, kwargs), prompt in zip(parts, new, strict=True)]

    @cached_property
    def _foreign(self) -> frozenset[str]:
        """Of what is added to a prompt, the names that the model's forward does not take (Mamba has no positions)."""
        taken = inspect.signature(type(self._module).forward).parameters
        added = ("attention_mask", "position_ids", "use_cache")
        return frozenset(name for name in added if name not in taken) if "input_ids" in taken else frozenset()
