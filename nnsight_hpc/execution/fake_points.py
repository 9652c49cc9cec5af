"""One forward or generation on fakes, as a graph sees it: points read, set and skipped in program order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nnsight_hpc.execution.batch import Batch
from nnsight_hpc.execution.fake_model import STEPS
from nnsight_hpc.execution.fake_tensors import UNKNOWABLE, UNKNOWN, alike, fresh, is_unknown
from nnsight_hpc.graph.points import Point

if TYPE_CHECKING:
    from nnsight_hpc.execution.fake_model import Call, Place, Recording, Twin
    from nnsight_hpc.execution.rows import Rows


@dataclass(frozen=True)
class Part:
    """Some rows of the batch of a forward: from `start` to before `stop`."""

    passage: Passage
    start: int
    stop: int


class Passage:
    """What the model has at its points, and what a graph has put there.

    A value of the same form as the model's own changes nothing later. For one of another form the model is run again, with
    all that was set in place.

    Attributes
    ----------
    call
        The call of the model that it is.
    why
        Why nothing is known of the points, if nothing is.

    Raises what the model raises when it cannot run on such inputs, if `strict`; otherwise nothing is known then.
    """

    def __init__(self, twin: Twin, call: Call, *, strict: bool) -> None:
        self._twin, self.call = twin, call
        self._at: dict[Place, Any] = {}
        self._skipped: list[str] = []
        self._changed = False
        self._operations: dict[str, Recording] = {}
        self.why = "its inputs depend on data" if is_unknown((call.args, call.kwargs)) else twin.why
        self.recording: Recording | None = None
        if self.why:
            return
        try:
            self.recording = twin.record(call)
        except UNKNOWABLE as error:
            self.why = f"the model asks for data: {type(error).__name__}: {error}"
        except Exception as error:
            if call.generate or not strict or not twin.works(call.kwargs):
                self.why = f"the model does not run without data: {type(error).__name__}: {error}"
                return
            raise

    def read(self, path: str, kind: str, call: int, part: Part | None) -> Any:
        """What stands at a point now; `UNKNOWN` where the run on fakes did not come."""
        value = self._whole(path, kind, call)
        rows = self._rows(path, kind, call, part)
        return value if rows is None else rows.cut(value)

    def set(self, path: str, kind: str, call: int, part: Part | None, value: Any) -> None:
        """Put a value at a point, or skip its module; raises what the model raises when it cannot go on with that."""
        now = self._whole(path, "output" if kind == "skip" else kind, call)
        place = (path, "output" if kind in ("output", "skip") else "inputs", call)
        if kind == "skip":
            self._skipped.append(f"{path}.")
        if is_unknown(value) or now is UNKNOWN:
            self._at[place] = UNKNOWN
        elif (rows := self._rows(path, kind, call, part)) is not None:
            rows.put(value, now)
        else:
            self._at[place] = self._with_first(place, value) if kind == "input" else value
            if not alike(now, value):
                self._go_again()

    def result(self, part: Part | None) -> Any:
        """What the call of the model returned."""
        value = UNKNOWN if self.recording is None else fresh(self.recording.result)
        rows = self._rows("", "result", 0, part)
        return value if rows is None else rows.cut(value)

    def _whole(self, path: str, kind: str, call: int) -> Any:
        if kind != "input":
            return fresh(self._here((path, kind, call)))
        inputs = self._here((path, "inputs", call))
        if inputs is UNKNOWN:
            return UNKNOWN
        args, kwargs = inputs
        return fresh(args[0] if args else next(iter(kwargs.values()), None))

    def _with_first(self, place: Place, value: Any) -> Any:
        args, kwargs = self._here(place)
        return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): value})

    def _here(self, place: Place) -> Any:
        path, kind, number = place
        if self.recording is None or path.startswith(tuple(self._skipped)):
            return UNKNOWN
        if place in self._at:
            return self._at[place]
        recording = self._with_operation(path) if ":" in path else self.recording
        calls = recording.calls[path]
        if not self.call.generate or number < calls:
            return recording.points.get(place, UNKNOWN)
        if not calls or calls % STEPS:
            return UNKNOWN
        each = calls // STEPS
        last, before = (recording.points[path, kind, step * each + number % each] for step in (STEPS - 1, STEPS - 2))
        return last if alike(last, before) else UNKNOWN  # what grows from step to step is not known

    def _rows(self, path: str, kind: str, number: int, part: Part | None) -> Rows | None:
        """The rows of a part, of the batch that the model has at that step; None for all."""
        if part is None:
            return None
        operations = frozenset({path} if ":" in path else ())
        batch = Batch(self._twin.module, self.call, operations, lambda: self._twin)
        if self.recording is not None:
            each = max(self.recording.calls[path] // STEPS, 1)
            step = min(number // each, STEPS - 1) if self.call.generate else 0
            batch.look(*self.recording.points["", "inputs", step])
        return batch.part(part.start, part.stop, Point(0, path, kind, number))

    def _with_operation(self, path: str) -> Recording:
        """A run in which an operation inside of a forward is looked at, too."""
        if path not in self._operations:
            self._operations[path] = self._run(frozenset({path}))
        return self._operations[path]

    def _go_again(self) -> None:
        """Run the model with all that was set in place."""
        self._changed = True
        self._operations.clear()
        if self.call.generate:
            self.recording, self.why = None, "a value of another form was set in a generation"
            return
        try:
            self.recording = self._run(frozenset())
        except UNKNOWABLE as error:
            self.recording, self.why = None, f"the model asks for data: {type(error).__name__}: {error}"

    def _run(self, operations: frozenset[str]) -> Recording:
        if not self._changed:
            return self._twin.record(self.call, operations)
        changes = {place: value for place, value in self._at.items() if value is not UNKNOWN}
        touched = {path for path, _, _ in changes if ":" in path}
        return self._twin.rerun(self.call, changes, operations | touched)
