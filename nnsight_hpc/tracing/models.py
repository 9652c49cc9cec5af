"""What a researcher wraps a module in: envoys of all its modules, and the contexts that run it."""
# ruff: noqa: SLF001 - edited copies of one model

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any, Self

from nnsight_hpc.graph.build import GENERATE
from nnsight_hpc.models.fingerprint import fingerprint_of_module
from nnsight_hpc.tracing.backend import backend
from nnsight_hpc.tracing.context import Session, Trace
from nnsight_hpc.tracing.editing import Editing
from nnsight_hpc.tracing.envoy import Envoy
from nnsight_hpc.tracing.generation import generation_options
from nnsight_hpc.tracing.lines import users_line
from nnsight_hpc.tracing.rerun import rerun
from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.messages import ModelIdentity

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from nnsight_hpc.graph import Graph
    from nnsight_hpc.tracing.batches import Part
    from nnsight_hpc.tracing.edits import Edit


class NNsight(Envoy):
    """A module whose inside can be read and changed in ``with model.trace(…)`` blocks.

    ::

        with model.trace(x):
            hidden = model.layers[3].output.save()
            model.layers[4].output[:] *= 0

    Parameters
    ----------
    rename
        New names for modules, beside the old ones: ``{"mlp": "ffn", "model.layers": "blocks"}``; a path is one from any
        module that has it.

    Attributes
    ----------
    edits
        Interventions that every trace begins with.
    attached
        Modules of the researcher by where they hang.
    """

    def __init__(self, module: torch.nn.Module, *, rename: Mapping[str, str] | None = None) -> None:
        super().__init__(module)
        self._renamed, self._edits, self._attached = dict(rename or {}), [], {}
        self._origin: NNsight | None = None

    _edits: list[Edit]
    _attached: dict[tuple[str, str], torch.nn.Module]
    _where: tuple[str | None, str | None] = (None, None)  # the pool and cluster that a remote trace runs on by default

    @property
    def module(self) -> torch.nn.Module:
        """The real module, with weights."""
        return self.tree

    @property
    def tree(self) -> torch.nn.Module:
        """The modules, their weights perhaps not loaded."""
        return self.origin._module

    @property
    def origin(self) -> NNsight:
        """The model that this one is an edited copy of, or itself."""
        return self._origin or self

    @property
    def edits(self) -> list[Edit]:
        return self._edits

    @property
    def attached(self) -> dict[tuple[str, str], torch.nn.Module]:
        return self._attached

    @property
    def renamed(self) -> dict[str, str]:
        return self._renamed

    @property
    def _model(self) -> NNsight:
        return self

    def identity(self, *, remote: bool) -> ModelIdentity:
        """Which model this is, for a graph: where it is sent, by the weights; on the meta device it stands for any."""
        weights = fingerprint_of_module(self.tree) if remote else ""
        return ModelIdentity(id=type(self._module).__name__, fingerprint=weights)

    def trace(
        self,
        *inputs: Any,
        remote: bool = False,
        pool: str | None = None,
        cluster: str | None = None,
        blocking: bool = True,
        needs: str | None = None,
        exclusive: bool = False,
        priority: int = 0,
        idempotency_key: str | None = None,
        scan: bool = False,
        validate: bool = False,
        **kwargs: Any,
    ) -> Trace:
        """Record the block and run it within one forward of the model.

        Parameters
        ----------
        inputs, kwargs
            What the model is called with; without inputs, ``tracer.invoke(…)`` gives them.
        remote
            Run on a pool of a cluster (or of the embedded profile ``local``) instead of in this process.
        pool, cluster
            Which ones; by default the pool with the same weights, on the default cluster.
        blocking
            False: submit the request and return at once; ``tracer.request.result()`` waits for it.
        needs
            How long it runs at least (``10m``): a worker with less time left does not begin it.
        exclusive
            Share no forward with other requests; by default those with inputs of the same length may run together.
        priority
            From -100 to 100: of your own requests the larger goes first. Between users it counts nothing.
        idempotency_key
            A name for what is to be done once: sent again under the same key, also by another process or from another
            machine, it is the request that is there already, and not run a second time.
        scan, validate
            Give every value in the block its shape, dtype and device, and raise errors of shapes and indices there.
        """
        sending = {"needs": needs, "exclusive": exclusive, "priority": priority, "idempotency_key": idempotency_key}
        where = self._backend(remote=remote, pool=pool, cluster=cluster, **sending)
        return Trace(self, where, inputs, kwargs, scan=scan or validate, blocking=blocking)

    def generate(
        self,
        *inputs: Any,
        remote: bool = False,
        pool: str | None = None,
        cluster: str | None = None,
        blocking: bool = True,
        needs: str | None = None,
        exclusive: bool = False,
        priority: int = 0,
        idempotency_key: str | None = None,
        scan: bool = False,
        validate: bool = False,
        **kwargs: Any,
    ) -> Trace:
        """As `trace`, with a generation in place of a forward; `kwargs` are those of the model's own ``generate``.

        Sampling (``do_sample=True``) needs a ``seed=``.
        """
        if not hasattr(self._module, "generate"):
            raise InvalidInput(f"{type(self._module).__name__} generates nothing", where=str(users_line()))
        sending = {"needs": needs, "exclusive": exclusive, "priority": priority, "idempotency_key": idempotency_key}
        where = self._backend(remote=remote, pool=pool, cluster=cluster, **sending)
        options = generation_options(kwargs, self.generation_config)
        return Trace(self, where, inputs, options, op=GENERATE, scan=scan or validate, blocking=blocking)

    def scan(self, *inputs: Any, **kwargs: Any) -> Trace:
        """Record the block with fake tensors, and run nothing: every value has its shape, dtype and device in it."""
        return Trace(self, backend(remote=False), inputs, kwargs, scan=True, run=False)

    def session(
        self,
        *,
        remote: bool = False,
        pool: str | None = None,
        cluster: str | None = None,
        blocking: bool = True,
        needs: str | None = None,
        exclusive: bool = False,
        priority: int = 0,
        idempotency_key: str | None = None,
    ) -> Session:
        """Record several traces and run them as one request; the arguments are those of `trace`."""
        sending = {"needs": needs, "exclusive": exclusive, "priority": priority, "idempotency_key": idempotency_key}
        where = self._backend(remote=remote, pool=pool, cluster=cluster, **sending)
        return Session(self, where, blocking=blocking)

    def edit(self, *, inplace: bool = False) -> Editing:
        """``with model.edit() as edited:`` records interventions that every later trace of `edited` begins with.

        `edited` shares the weights; with ``inplace=True`` it is the model itself.
        """
        return Editing(self if inplace else self._copy())

    def clear_edits(self) -> None:
        """Take the edits of this model back."""
        self._edits.clear()

    def run(
        self,
        graph: Graph,
        *inputs: Any,
        tensors: Mapping[str, torch.Tensor] | None = None,
        remote: bool = False,
        pool: str | None = None,
        cluster: str | None = None,
        needs: str | None = None,
        exclusive: bool = False,
        priority: int = 0,
        idempotency_key: str | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Run a recorded graph again, and return its saved values by name.

        Parameters
        ----------
        inputs, kwargs
            What to call the model with in place of what was recorded; none: as recorded.
        tensors
            Tensor constants by name, in place of those that the graph brings; one read from a document brings none.
        """
        sending = {"needs": needs, "exclusive": exclusive, "priority": priority, "idempotency_key": idempotency_key}
        where = self._backend(remote=remote, pool=pool, cluster=cluster, **sending)
        return rerun(self, graph, where, (inputs, kwargs), tensors or {})

    def given(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether these are inputs; a model that takes none needs none."""
        return bool(inputs or kwargs) or not inspect.signature(self._module.forward).parameters

    def prepare(
        self,
        op: str,  # noqa: ARG002 - a language model's own generation takes other arguments than its forward
        inputs: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a forward or generation (`op`) for what the researcher gave."""
        return inputs, kwargs

    def padded(self, parts: Sequence[Part]) -> list[Part]:
        """Prepared inputs of invokes in one form, as far as padding can give it; that of a plain module is not known."""
        return list(parts)

    @property
    def generation_config(self) -> Any:
        """The model's own defaults for generations."""
        return getattr(self._module, "generation_config", None)

    def _backend(self, *, remote: bool, pool: str | None, cluster: str | None, **sending: Any) -> Any:
        default_pool, default_cluster = self._where
        return backend(remote=remote, pool=pool or default_pool, cluster=cluster or default_cluster, **sending)

    def _copy(self) -> Self:
        edited = copy.copy(self)
        edited._origin, edited._edits = self.origin, list(self._edits)
        edited._hint()
        return edited
