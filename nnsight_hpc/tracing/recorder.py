"""Records one request: nodes in program order, which values are saved, and after the run what they turned out to be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnsight_hpc.execution.values import Absent, NotReached
from nnsight_hpc.graph import Graph, Ref
from nnsight_hpc.graph.build import BACKWARD, FINAL, SAVE
from nnsight_hpc.tracing.frames import DROP, Entries, bind, named
from nnsight_hpc.tracing.recording import Recording
from nnsight_hpc.tracing.repeats import Repeats
from nnsight_hpc.tracing.value import NO_KEYWORDS, Value
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import FrameType

    from nnsight_hpc.wire.messages import ModelIdentity


class Recorder(Recording):
    """A recording with what it returns; closed once its block is over, and then the place where values find their results.

    Attributes
    ----------
    backward
        The backward pass whose block is being recorded.
    names
        Names for saves that no name of the researcher holds.
    repeats
        Which saves one line makes at each step of a generation.
    refusal
        What is wrong with the recording and could not be raised at once.
    pending
        The id of the request that it was submitted as.
    bound
        Called when the names of the block are bound.
    settled
        The block has run: saved values act as their results.
    """

    def __init__(self, *, remote: bool = False) -> None:
        super().__init__(remote=remote)
        self.results: dict[int, Any] = {}
        self.backward: Value | None = None
        self.names: dict[int, str] = {}
        self.repeats = Repeats()
        self.refusal: InvalidInput | None = None
        self.pending = ""
        self.settled = False
        self.bound: list[Callable[[], None]] = []
        self._saves: list[int] = []
        self._containers: list[Value] = []
        self._loose: list[int] = []  # gradients that are read or set outside of a backward's block
        self._returned: Mapping[str, int] = {}

    def save(self, value: Value) -> int:
        """Keep `value` as it is at this line; returns the id of the save."""
        saved = self.append(SAVE, (value,), NO_KEYWORDS, self.block, 4).node
        self._saves.append(saved)
        if self.repeats.stepping:
            self.repeats.note(saved, self.builder.nodes[saved].source)
        if self.shadow is not None:
            self.results[saved] = value.fake
        return saved

    def save_at_the_end(self, container: Value) -> None:
        """Keep a list or dict as it is when the block is over: what is appended after this line belongs to it."""
        self._containers.append(container)

    def finish(self) -> None:
        """The block is over: save the containers that were waiting for it."""
        for container in self._containers:
            if container.node not in self._pruned:
                container.saved = self.save(container)

    def gradient(self, op: str, *args: Any) -> Value:
        """Record a read or change of a gradient, in the backward pass whose block this is or in the next one."""
        if self.backward is not None:
            return self.record(op, *args, backward=self.backward)
        value = self.record(op, *args)
        self._loose.append(value.node)
        return value

    def backpropagate(self, loss: Value, options: dict[str, Any]) -> Value:
        """Record a backward pass; gradients named before it belong to it."""
        self._loose.clear()
        return self.record(BACKWARD, loss, **options)

    def settle_gradients(self, start: int) -> None:
        """At the end of a trace: gradients named after its last backward pass belong to that one."""
        nodes = self.builder.nodes
        last = [node.id for node in nodes[start:] if node.op == BACKWARD][-1:] if self._loose else []
        for index in self._loose if last else ():
            self.amend(index, nodes[index].args, {**nodes[index].kwargs, "backward": Ref(last[0])})
        self._loose.clear()

    def drop(self, start: int) -> None:
        super().drop(start)
        self._saves = [save for save in self._saves if save < start]
        self._loose = [node for node in self._loose if node < start]

    def graph(self, frame: FrameType, model: ModelIdentity, kind: str) -> Graph:
        """The recorded graph with its tensors, its saves named after the names that hold them in `frame`."""
        names = dict(self.names)
        for name, value in named(frame, Value):
            if value.saved is not None and value.recorder is self:
                names.setdefault(value.saved, name)
        saves: dict[str, int] = {}
        for node in self._saves:
            name = names.get(node) or f"value_{node}"
            saves[name if name not in saves else f"{name}, {node}"] = node
        self._returned = saves
        nodes = self.builder.nodes
        if self._pruned:
            nodes, new = self._pruned.apply(nodes)
            saves = {name: new(node) for name, node in saves.items()}
        kept = tuple(nodes) if self._recall is None else self._recall.all(nodes)
        return Graph(kept, saves, model, kind, dict(self.tensors))

    def fill(self, results: Mapping[str, Any]) -> None:
        """Give the saved values what the run returned, by the names of the graph's saves."""
        self.results = {node: results[name] for name, node in self._returned.items()}

    def bind(self, frame: FrameType) -> None:
        """Put the results in the place of the saved values in the names of `frame` and the containers there."""
        bind(frame, Value, self._real)
        self.settled = True
        for finish in self.bound:
            finish()

    def outcome(self, value: Value) -> Any:
        """What a saved value of this recording turned out to be; of one that a loop saves at each pass, the last."""
        assert value.saved is not None, "asked for saved values only"
        result = self.results[value.saved]
        if not self._each_pass(value) or isinstance(result, Absent):
            return result
        return result[-1] if result else Absent("its loop made no pass that came there")

    def _real(self, value: Value, place: str) -> Any:
        """What stands in the place of a value in the researcher's names: itself when it is not saved, or was not made."""
        save = value.saved
        if save is None or value.recorder is not self or save not in self.results:
            return value
        if self.builder.nodes[save].block is None and not isinstance(result := self.results[save], Absent):
            return result
        if place in ("list", "tuple") and self._each_pass(value) and isinstance(self.results[save], list):
            return Entries(self.results[save])
        result = self.outcome(value)
        if not isinstance(result, Absent):
            return result
        if place != "name":
            return DROP if place == "list" or isinstance(result, NotReached) else value
        made = (self.results.get(earlier) for earlier in self.repeats.back_from(save))
        return next((result for result in made if not isinstance(result, Absent)), value)

    def _each_pass(self, value: Value) -> bool:
        """Whether a value is saved at each pass of a loop, and stands for what it is at one of them."""
        nodes = self.builder.nodes
        assert value.saved is not None, "asked for saved values only"
        save = nodes[value.saved]
        if save.block is None or not self.in_loop(save):
            return False
        return nodes[value.node].op == FINAL or self.in_loop(nodes[value.node])

    def _refused_after(self, args: tuple[Any, ...], source: str) -> InvalidInput:
        """The refusal of an operation after the block; of a saved value that was never made, with the reason."""
        for value in args:
            absent = self.results.get(value.saved) if type(value) is Value and value.saved is not None else None
            if isinstance(absent, Absent):
                return InvalidInput("this value was never made", where=source, why=absent.why)
        if self.pending and not self.results:
            return InvalidInput(
                "this value is not here yet",
                where=source,
                why=f"it is the result of request {self.pending}",
                next="tracer.request.result() waits for it",
            )
        over = "the block that this value belongs to is over"
        if any(type(value) is Value and value.saved is not None for value in args):
            found = "x.result() has it (attributes of objects are not rebound)" if self.settled else ""
            return InvalidInput(over, where=source, why="it was saved" if found else "its block failed", next=found)
        return InvalidInput(
            over,
            where=source,
            why="a value that was not saved exists only while the model runs",
            next="keep it with .save() inside the block",
        )
