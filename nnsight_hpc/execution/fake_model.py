"""A model without its weights: a copy of the module tree whose tensors have shape, dtype and device, and no memory.

One run of it gives what stands at every point of the model for inputs of one shape. Runs are kept, so that a second trace
of the same shape runs nothing. The real module is only read: no hook is put on it, no weight is touched.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections import Counter, OrderedDict
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch.utils._pytree import tree_leaves

from nnsight_hpc.execution.fake_memory import Alive
from nnsight_hpc.execution.fake_tensors import UNKNOWN, Copying, Mode, described, quiet
from nnsight_hpc.execution.source import by_module, instrumented
from nnsight_hpc.models.devices import device_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

STEPS = 3
"""Steps of a generation that are run on fakes: the prompt, and two more to see what grows."""
_RUNS = 32
_MASK = "attention_mask"
Place = tuple[str, str, int]
"""A module's path, ``inputs`` or ``output``, and the number of its call."""


@dataclass(eq=False)
class Recording:
    """What stood where in one fake run.

    Attributes
    ----------
    points
        By module path, ``inputs`` or ``output`` and number of the call, in the order in which the run came there; inputs are
        pairs of arguments and keywords.
    result
        What the call of the model returned; `UNKNOWN` for a generation.
    footprint
        How much memory such a run takes, once that was asked for.
    """

    points: dict[Place, Any] = field(default_factory=dict)
    result: Any = UNKNOWN
    calls: Counter[str] = field(default_factory=Counter)
    footprint: Footprint | None = None

    def note(self, place: Place, value: Any) -> None:
        """What stands at a place that the run has come to."""
        self.points[place] = value


class Footprint(Recording):
    """A run of which no value is kept, so that each lives as long as in a real run.

    Attributes
    ----------
    number
        Of each place, its number in the order of the run.
    held
        For each number, the bytes beside weights and inputs that were held at most since the place before, and that are held
        there.
    growth
        By how many bytes a generation holds more at a step than at the one before.
    """

    def __init__(self, alive: Alive) -> None:
        super().__init__()
        self.number: dict[Place, int] = {}
        self.held: list[tuple[int, int]] = []
        self._alive, self._at_steps = alive, [0]

    def note(self, place: Place, _value: Any) -> None:
        self.number[place] = len(self.held)
        self.held.append(self._alive.since())
        if place[:2] == ("", "inputs"):
            self._at_steps.append(self._alive.now)

    @property
    def growth(self) -> int:
        return max(0, self._at_steps[-1] - self._at_steps[-2])


@dataclass(frozen=True)
class Call:
    """One call of a model, or of its `generate`, with fake tensors and constants."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    generate: bool = False


class _Enough(BaseException):
    """Leaves a generation. Not an `Exception`: the model must not swallow it."""


class Twin:
    """The copy of a module without weights, and what its fake runs have found.

    Parameters
    ----------
    device
        Where the model is, or would be: not the meta device.

    Attributes
    ----------
    runs
        How often the model was run on fakes.
    why
        Why there is no copy, if the module holds what cannot be copied: then nothing is known of the model.
    """

    def __init__(self, module: torch.nn.Module, device: torch.device) -> None:
        self.device = device
        self.mode = Mode(allow_non_fake_inputs=True)
        self.runs = 0
        self._lock = threading.RLock()
        self._recordings: OrderedDict[Any, Recording | Exception] = OrderedDict()
        self._recording: Recording | None = None
        self._changes: Mapping[Place, Any] = {}
        self._mask: Any = None
        self.module, self.why = torch.nn.Module(), ""
        try:
            with torch.no_grad(), Copying(self.fake):
                self.module = copy.deepcopy(module)
            self._hook()
        except Exception as error:  # noqa: BLE001 - a module may hold anything (locks, files, threads)
            self.why = f"the model cannot be copied: {type(error).__name__}: {error}"
        if getattr(getattr(self.module, "config", None), "_experts_implementation", None):
            self.module.set_experts_implementation("batched_mm")  # the others ask for data

    def fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake tensor like `tensor`, which may be real, fake or on the meta device."""
        device = self.device if tensor.is_meta else tensor.device
        return self.fake_like(tensor, device)

    def fake_like(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        with torch._C.DisableTorchFunctionSubclass(), self.mode:  # noqa: SLF001 - also while a module is copied
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    def fake_known(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """As `fake_like` for a real tensor; the value of one of one element is known, for it may be a size."""
        fake = self.fake_like(tensor, device)
        if tensor.numel() == 1:
            self.mode.know(fake, tensor.detach().clone())
        return fake

    @contextmanager
    def active(self) -> Iterator[None]:
        """While it lasts, everything that torch makes is fake, without gradients; one thread at a time."""
        was, quiet.on = getattr(quiet, "on", False), True
        try:
            with self._lock, torch.no_grad(), self.mode:
                yield
        finally:
            quiet.on = was

    def record(self, call: Call, operations: frozenset[str] = frozenset()) -> Recording:
        """What stands at each point of the model in such a call; run once for each form of its inputs, and kept.

        Raises what the model raises, each time.

        Parameters
        ----------
        operations
            Operations inside of forwards whose points are wanted, too: ``path.of.module:operation``.
        """
        key = described((call.args, call.kwargs)), call.generate, operations
        with self._lock:
            found = self._recordings.get(key)
            if found is None:
                found = self._recordings[key] = self._tried(call, operations)
                if len(self._recordings) > _RUNS:
                    self._recordings.popitem(last=False)
            self._recordings.move_to_end(key)
        if isinstance(found, Exception):
            raise found.with_traceback(None)
        return found

    def rerun(self, call: Call, changes: Mapping[Place, Any], operations: frozenset[str]) -> Recording:
        """As `record` for a call in which other values are put at some places; not kept."""
        with self._lock:
            self._changes = changes
            try:
                return self._run(call, operations)
            finally:
                self._changes = {}

    def footprint(self, call: Call) -> Footprint:
        """How much memory a call takes that was recorded: found out by one more run, and kept with the recording."""
        recording = self.record(call)
        if recording.footprint is None:
            given = (leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, torch.Tensor))
            alive = Alive([*self.module.parameters(), *self.module.buffers(), *given])
            footprint = Footprint(alive)
            with self._lock:
                self.mode.follow = alive.follow
                try:
                    self._run(call, frozenset(), footprint)
                finally:
                    self.mode.follow = footprint.result = None
            recording.footprint = footprint
        return recording.footprint

    def works(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether the model runs on fakes at all, as far as can be tried: a language model with two tokens."""
        if "input_ids" not in kwargs:
            return True
        with self.active():
            tokens = torch.zeros((1, 2), dtype=torch.int64, device=self.device)
        try:
            self.record(Call((), {"input_ids": tokens}))
        except Exception:  # noqa: BLE001 - that it fails is the answer
            return False
        return True

    def _tried(self, call: Call, operations: frozenset[str]) -> Recording | Exception:
        try:
            return self._run(call, operations)
        except Exception as error:  # noqa: BLE001 - it is kept like a result, and raised again
            return error.with_traceback(None)

    def _run(self, call: Call, operations: frozenset[str], into: Recording | None = None) -> Recording:
        self.runs += 1
        self._recording = recording = into or Recording()
        self.mode.answers, self.mode.given = call.generate, False  # what is kept by shapes must not depend on values
        try:
            with ExitStack() as stack:
                for path, names in by_module(operations).items():
                    watch = functools.partial(self._operation, path)
                    stack.enter_context(instrumented(self.module.get_submodule(path), names, watch))
                stack.enter_context(self.active())
                function = self.module.generate if call.generate else self.module  # a module without one says so
                recording.result = function(*call.args, **call.kwargs)
        except _Enough:
            pass
        finally:
            self._recording, self.mode.answers, self.mode.given = None, False, True
        return recording

    def _operation(
        self, module: str, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run an operation inside of a forward, and note what it got and gave."""
        recording, path = self._recording, f"{module}:{name}"
        assert recording is not None, "operations are watched during a run only"
        call = recording.calls[path]
        args, kwargs = self._put((path, "inputs", call), args, kwargs)
        recording.points[path, "inputs", call] = args, kwargs
        output = self._changes.get((path, "output", call), UNKNOWN)
        made = function(*args, **kwargs)
        recording.points[path, "output", call] = made if output is UNKNOWN else output
        recording.calls[path] += 1
        return recording.points[path, "output", call]

    def _put(self, place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The inputs at a place with what is to be changed there; what is `UNKNOWN` in the change stays as the model has it."""
        if place not in self._changes:
            return args, kwargs
        new, named = self._changes[place]
        return (
            tuple(args[n] if value is UNKNOWN else value for n, value in enumerate(new)),
            {name: kwargs.get(name) if value is UNKNOWN else value for name, value in named.items()},
        )

    def _without_made_mask(self, args: tuple[Any, ...], kwargs: dict[str, Any], at: int) -> tuple[Any, Any]:
        """A mask that the model made is not known: transformers leaves it out (None) where the data shows no padding."""

        def made(value: Any) -> bool:
            return isinstance(value, torch.Tensor) and value is not self._mask

        args = tuple(UNKNOWN if n == at and made(value) else value for n, value in enumerate(args))
        return args, {**kwargs, _MASK: UNKNOWN} if made(kwargs.get(_MASK)) else kwargs

    def _hook(self) -> None:
        for module in self.module.modules():
            module._forward_hooks.clear()  # noqa: SLF001 - a person's hooks note what real runs do
            module._forward_pre_hooks.clear()  # noqa: SLF001
        for path, module in self.module.named_modules(remove_duplicate=False):
            self._hook_one(module, path)

    def _hook_one(self, module: torch.nn.Module, path: str) -> None:
        named = list(inspect.signature(module.forward).parameters)
        mask_at = named.index(_MASK) if _MASK in named else -1

        def before(
            _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            if self._recording is None:
                return None
            place = (path, "inputs", self._recording.calls[path])
            args, kwargs = self._put(place, args, kwargs)
            if not path:
                self._mask = kwargs.get(_MASK)
            self._recording.note(place, self._without_made_mask(args, kwargs, mask_at))
            return args, kwargs

        def after(_: Any, _args: Any, output: Any) -> Any:
            recording = self._recording
            if recording is None:
                return None
            place = (path, "output", recording.calls[path])
            recording.calls[path] += 1
            now = self._changes.get(place, output)
            recording.note(place, now)
            if not path and self.mode.answers and recording.calls[""] == STEPS:
                raise _Enough
            return now

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)


_twins: WeakKeyDictionary[torch.nn.Module, tuple[Any, Twin]] = WeakKeyDictionary()
_stand_ins: WeakKeyDictionary[torch.nn.Module, torch.nn.Module] = WeakKeyDictionary()


def stand_in(module: torch.nn.Module, whole: torch.nn.Module) -> None:
    """Have fakes of `module`, whose tensors are spread over processes, made from `whole`, on the meta device."""
    _stand_ins[module] = whole


def twin_of(module: torch.nn.Module) -> Twin:
    """The twin of a module: made once, and again when its modules or the form of its parameters have changed."""
    now = _form(module)
    known = _twins.get(module)
    if known is None or known[0] != now:
        device = device_of(module)
        where = torch.device("cpu") if device.type == "meta" else device  # where its weights would be loaded
        known = _twins[module] = (now, Twin(_stand_ins.get(module, module), where))
    return known[1]


def _form(module: torch.nn.Module) -> Any:
    """What has to be the same for a twin to stand for a module."""
    waiting, modules, parameters = [module], [], []
    while waiting:  # a walk of our own: each request asks, and that of `named_parameters` takes milliseconds
        part = waiting.pop()
        modules.append((id(part), part.training))
        parameters += [(p.shape, p.dtype, p.device) for p in part._parameters.values() if p is not None]  # noqa: SLF001
        waiting += [child for child in part._modules.values() if child is not None]  # noqa: SLF001
    return modules, parameters
