"""``with model.dump(corpus, name=…) as d:`` records a block once, and runs it on one batch of a corpus after the other."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NoReturn, Self

import msgspec
import torch

from nnsight_hpc.execution.values import save_tensors
from nnsight_hpc.graph.build import FORWARD
from nnsight_hpc.graph.dumps import BATCH
from nnsight_hpc.tracing.batches import Batch
from nnsight_hpc.tracing.current import session_now, trace_now
from nnsight_hpc.tracing.edits import replay
from nnsight_hpc.tracing.lines import users_line
from nnsight_hpc.tracing.points import Points
from nnsight_hpc.tracing.recorder import Recorder
from nnsight_hpc.tracing.value import Value
from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.messages import DumpPlan, decode

if TYPE_CHECKING:
    from pathlib import Path
    from types import FrameType

    from nnsight_hpc.storage import ActivationDataset
    from nnsight_hpc.tracing.backend import Backend, Dumped, NewDataset
    from nnsight_hpc.tracing.models import NNsight
    from nnsight_hpc.wire.messages import DumpSpec

_LIKE = (2, 3)
"""What stands for a batch while the block is recorded: documents and tokens."""


class DumpRecorder(Recorder):
    """Records a dump, which returns nothing: what it keeps is written."""

    def save(self, value: Any) -> NoReturn:  # noqa: ARG002
        raise InvalidInput(
            "a dump keeps what is written",
            where=str(users_line()),
            why="its block is run on many batches, and a name can hold one value",
            next='d.write("name", value)',
        )

    def write(self, name: str, value: Value) -> None:
        """Keep `value` of every batch."""
        self.names[Recorder.save(self, value)] = name


class Dump(Points):
    """The block of a dump, and what came of it.

    ::

        with model.dump("corpus.jsonl", name="run1", remote=True) as d:
            hidden = model.model.layers[10].output
            d.write("resid_10", hidden)
            d.write("features", torch.relu(hidden @ encoder))
        dataset = d.dataset()

    The values in the block have the rows of a batch: ``[documents, tokens, …]``, documents of unequal length padded on the
    right. What is written has a row for each token, or for each document. Ctrl-C while it waits leaves a remote dump running.
    """

    steps = None
    recorder: DumpRecorder

    def __init__(self, model: NNsight, backend: Backend, spec: DumpSpec, new: NewDataset, *, blocking: bool) -> None:
        super().__init__(model, backend, "capture", blocking=blocking)
        self.recorder = DumpRecorder(remote=True)  # a dataset says how it was made: it can hold no Python function
        self._spec, self._new = spec, new
        self._like = {name: torch.ones(_LIKE, dtype=torch.int64) for name in BATCH}
        self._written: dict[str, str] = {}
        self._dumped: Dumped | None = None

    def __enter__(self) -> Self:
        if trace_now.get() is not None or session_now.get() is not None:
            raise InvalidInput("a dump cannot be recorded inside a trace or session", where=str(users_line()))
        self._frame = sys._getframe(1)  # noqa: SLF001 - the documented way to a caller's frame
        for name, tensor in self._like.items():
            self.recorder.adopt(tensor, name)
        args, kwargs = self.model.prepare(FORWARD, (), {"input_ids": self._like["input_ids"]})
        self.where = self.recorder.append(FORWARD, args, {**kwargs, **self._taken(kwargs)}, None)
        self.wheres.append(self.where.node)
        if self.model.edits:
            batch = Batch(self.where, None)
            batch.parts.append((args, kwargs))
            replay(self.model.edits, self.recorder, batch)
        self._begin_block(self._frame)
        self._token = trace_now.set(self)
        return self

    def _taken(self, kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Of what stands for the batch, that which the model takes."""
        return {name: tensor for name, tensor in self._like.items() if name in kwargs}

    @property
    def input_ids(self) -> Value:
        """The batch's tokens ``[documents, tokens]``."""
        return self.recorder.record("Tensor.clone", self._like["input_ids"])

    @property
    def mask(self) -> Value:
        """1 where the batch has a token and 0 where it is padded, ``[documents, tokens]``.

        For what is computed over tokens: ``(x * d.mask[..., None]).sum(1) / d.mask.sum(1, keepdim=True)`` is the mean.
        """
        return self.recorder.record("Tensor.clone", self._like["attention_mask"])

    def write(self, name: str, value: Any) -> None:
        """Keep `value` of every batch under `name`.

        Parameters
        ----------
        name
            Letters, digits, ``.``, ``_`` and ``-``.
        value
            ``[documents, tokens, …]``: a row for each token; or ``[documents, …]``: a row for each document. Which it is
            is found out where the model runs, before anything is written.

        Raises
        ------
        InvalidInput
            `value` is none of this block, or stands in a conditional or loop on values; `name` is none, or taken.
        """
        line = str(users_line())
        if type(value) is not Value or value.recorder is not self.recorder:
            why = "it belongs to another block" if type(value) is Value else f"it is a {type(value).__name__}"
            raise InvalidInput(f"{name} is no value of this block", where=line, why=why)
        if self.recorder.block is not None:
            raise InvalidInput(
                f"{name} is written in a conditional or loop on values",
                where=line,
                why="every batch has to have it",
                next="choose with torch.where, and write after the block",
            )
        if name in self._written:
            raise InvalidInput(f"{name} is written twice", where=line, why=f"first at {self._written[name]}")
        try:
            self._new.check_capture(name)
        except InvalidInput as error:
            raise InvalidInput(f"{name!r} cannot be the name of a capture", where=line, why=error.why) from None
        self._written[name] = line
        self.recorder.write(name, value)

    @property
    def request(self) -> Dumped:  # type: ignore[override]  # a dump has no names to bind
        """The request that was sent, once the block is over; of a dump in this process, what has become of it."""
        if self._dumped is None:
            raise InvalidInput("there is no request", where=str(users_line()), why="the block is not over, or failed")
        return self._dumped

    def status(self) -> Any:
        """Where the request is, and how far: a `RequestStatus`."""
        return self.request.status()

    def wait(self, timeout: float | None = None) -> Any:
        """The status once the request has ended, or as it is after `timeout` seconds."""
        return self.request.wait(timeout)

    def summary(self) -> dict[str, Any]:
        """What was written, once it is: documents, tokens, bytes, seconds, the share of padding, and overflows."""
        return self.request.result()

    def plan(self) -> DumpPlan:
        """What would be written, and how long that would take, of a dump with ``dry_run=True``."""
        if not self._spec.measure:
            raise InvalidInput("this dump writes", where=str(users_line()), next="model.dump(…, dry_run=True) measures")
        return decode(self.request.result()["plan"].encode(), DumpPlan)

    @property
    def path(self) -> Path:
        """Where the dataset lies, on the machine that wrote it."""
        return self.request.path

    def dataset(self) -> ActivationDataset:
        """The dataset, once it is complete, where it lies on this machine; else ``nnsight-hpc fetch`` brings it."""
        return self.request.dataset()

    def _end(self, error: BaseException | None) -> None:
        trace_now.reset(self._token)
        frame, self._frame = self._frame, None
        try:
            if error is None and frame is not None:
                self._run(frame)
        finally:
            self.recorder.points.clear()
            self.recorder.close()

    def _run(self, frame: FrameType) -> None:
        """Send what was recorded, or run it; and wait for its end where asked to."""
        if not self._written:
            raise InvalidInput("the dump writes nothing", where=self._spec.command, next='d.write("name", value)')
        self.recorder.settle_gradients(0)
        if self.recorder.refusal:
            raise self.recorder.refusal
        self._graph = self.recorder.graph(frame, self.model.identity(remote=True), self._kind)
        block = save_tensors({name: t for name, t in self._graph.tensors.items() if name not in BATCH})
        spec = msgspec.structs.replace(self._spec, graph=self._graph.to_json(), tensor_bytes=len(block))
        self._dumped = self._backend.dump(spec, block + self._new.lines, self.model)
        if self._blocking:
            self._dumped.result()

    _frame: FrameType | None = None
