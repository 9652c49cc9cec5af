"""What ranks hold of every tensor at every place of a model, learnt by comparing with the unsharded model.

One small forward is run for real, and one of the unsharded model on fake tensors. Where shapes differ, a tensor is cut;
where they do not, but ranks hold different values, it is a part of a sum, and nobody is shown it. Where a gradient differs
between ranks, it is a part of one. Batch and tokens are primes that divide no size of the model, so that a dimension which
is cut and holds them is told from one that is not.

Places inside of a forward are learnt all together when the first of them is asked for, and hold for all layers of a kind.
Forms of a call that may have other tensors than a usual one are learnt, too. All but those are learnt from the first layers
of each kind: a second's work, however deep the model is.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from nnsight_hpc.execution.fake_model import Call, stand_in
from nnsight_hpc.execution.source import by_module, operations_of
from nnsight_hpc.parallel.comparing import compared, equal, merged
from nnsight_hpc.parallel.forms import MASK, form_of, small, usual
from nnsight_hpc.parallel.layout import Layout, Same
from nnsight_hpc.parallel.plans import packed
from nnsight_hpc.parallel.trial import Trials
from nnsight_hpc.parallel.upstream import replace_layer_number_by_wildcard
from nnsight_hpc.wire.errors import InvalidGraph

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import nn

    from nnsight_hpc.parallel.comparing import Known
    from nnsight_hpc.parallel.forms import Form
    from nnsight_hpc.parallel.observing import Place
    from nnsight_hpc.parallel.trial import Outcome

_PRIMES = (3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47)
_ORDINARY: Form = frozenset()


class Learning:
    """What is known of a model's places so far. Creating it is collective, as is `prepare` where there is something new.

    Parameters
    ----------
    module
        The model on this rank.
    unsharded
        Its module tree, on the meta device.

    Attributes
    ----------
    places
        By place, and then by name of the leaf, what is known; None is for tensors that are whole.
    """

    def __init__(self, module: nn.Module, unsharded: nn.Module) -> None:
        stand_in(module, unsharded)
        self._module, self._trials = module, Trials(module, unsharded)
        sizes = {size for tensor in unsharded.parameters() for size in tensor.shape}
        self._primes = [prime for prime in _PRIMES if all(size % prime for size in sizes)][:2]
        self.places: dict[Place, dict[str, Known]] = {}
        self._first: dict[tuple[type, str], str] = {}
        self._stand_ins: dict[Place, Place] = {}
        self._learnt: set[tuple[Form, str]] = set()
        self._prepared: set[tuple[Form, frozenset[str]]] = {(_ORDINARY, frozenset())}
        self._usual = usual(module, *self._primes)
        self._learn(self._usual, {}, deep=False)

    def prepare(self, call: Call, operations: frozenset[str]) -> None:
        """Learn what a call needs that is not known yet; the same on all ranks.

        Raises
        ------
        InvalidGraph
            An operation is inside of a forward that tensor parallelism has replaced.
        """
        form = form_of(call, self.arguments_of(""))
        if (form, operations) in self._prepared:
            return
        self._check(operations)
        with self._agreed():
            self._prepare(call, form, operations)
            self._prepared.add((form, operations))

    def _prepare(self, call: Call, form: Form, operations: frozenset[str]) -> None:
        wanted = self._new(form, {self.place_of(path, "output")[0] for path in operations})
        if form:
            self._learn(small(call, *self._primes), wanted, deep=True)
        elif wanted:
            self._learn(self._usual, wanted, deep=False)
        self._learnt |= {(form, f"{path}:{name}") for path, names in wanted.items() for name in names}
        unseen = {self.place_of(path, "output")[0] for path in operations} - {path for path, _ in self.places}
        if unseen:  # only other calls than the usual come there
            self._learn(small(call, *self._primes), by_module(unseen), deep=True)

    @contextmanager
    def _agreed(self) -> Iterator[None]:
        """All ranks know afterwards what they learn here, or none does: else they would not learn together next time."""
        before = (
            {place: dict(leaves) for place, leaves in self.places.items()},
            dict(self._first),
            dict(self._stand_ins),
            set(self._learnt),
            set(self._prepared),
        )
        try:
            yield
            dist.barrier()
        except BaseException:
            self.places, self._first, self._stand_ins, self._learnt, self._prepared = before
            raise

    def place_of(self, path: str, side: str) -> Place:
        """The place that stands for another one: for an operation, or a module that was not run, that in another layer."""
        found = self._stand_ins.get((path, side))
        if found is None:
            module, colon, name = path.partition(":")
            known = not colon and (path, side) in self.places
            found = (path if known else f"{self._alike(module)}{colon}{name}"), side
            self._stand_ins[path, side] = found
        return found

    def arguments_of(self, path: str) -> Sequence[str]:
        """The names of the positional arguments at a place, as far as they are known."""
        return self._trials.arguments.get(path, ())

    def _alike(self, path: str) -> str:
        """The module that stands for all of a kind in all layers: the first that the model runs."""
        kind = type(self._module.get_submodule(path)), replace_layer_number_by_wildcard(path)
        return self._first.setdefault(kind, path)

    def _check(self, operations: Iterable[str]) -> None:
        """Refuse operations in forwards that are not there any more."""
        for operation in operations:
            path, _, name = operation.partition(":")
            own = vars(self._module.get_submodule(path))
            if "forward" in own and "_old_forward" not in own:  # the latter is accelerate's
                raise _replaced(path, name)

    def _new(self, form: Form, operations: Iterable[str]) -> dict[str, frozenset[str]]:
        """The operations to learn now, by module: those asked for, and all others that stand beside them."""
        unknown = [path for path in operations if (form, path) not in self._learnt]
        return {
            path: names | {operation.name for operation in operations_of(self._module.get_submodule(path))}
            for path, names in by_module(unknown).items()
        }

    def _learn(self, call: Call, operations: Mapping[str, frozenset[str]], *, deep: bool) -> None:
        """Learn from a call; inside of forwards also from one without a mask, which decides how tensors go on."""
        self._note(self._trials.run(call, operations, deep=deep))
        if operations and MASK in call.kwargs:
            kwargs = {name: value for name, value in call.kwargs.items() if name != MASK}
            self._note(self._trials.run(Call(call.args, kwargs, call.generate), operations, deep=deep))

    def _note(self, outcome: Outcome) -> None:
        """Take note of what the ranks hold."""
        self._stand_ins.clear()
        widths = self._packed_widths(outcome)
        for (place, call), leaves in outcome.values[0].items():
            self._alike(_module(place[0]))
            known, wholes = self.places.setdefault(place, {}), outcome.wholes.get(place, [{}])
            for name in leaves:
                ranks = [sights.get((place, call), {}).get(name) for sights in outcome.values]
                part = compared(wholes[min(call, len(wholes) - 1)].get(name), ranks, self._primes)
                if isinstance(part, Layout) and part.dim == -1:
                    part = replace(part, packed=widths[_around(place[0])].get(part.total, 1))
                if part is None and not equal([sights.get((place, 0), {}).get(name) for sights in outcome.gradients]):
                    part = Same(len(ranks))
                known[name] = merged(known[name], part) if name in known else part

    def _packed_widths(self, outcome: Outcome) -> dict[str, dict[int, int]]:
        """For each module with a packed one in it: the width of that one's output, and of how many parts it is made.

        What else is as wide in such a module was made from it (GPT-2's q, k and v before they are split).
        """
        found: dict[str, dict[int, int]] = defaultdict(dict)
        for path in self._trials.arguments:
            parts = packed(self._module, path)
            if parts > 1 and (path, "output") in outcome.wholes:
                shape: Any = outcome.wholes[path, "output"][0][""].shape
                found[_around(path)][shape[-1]] = parts
        return found


def _around(path: str) -> str:
    """The module in which a module or an operation is."""
    return _module(path) if ":" in path else path.rpartition(".")[0]


def _module(path: str) -> str:
    """The module at a path, or the one whose forward has the operation at it."""
    return path.partition(":")[0]


def _replaced(path: str, name: str) -> InvalidGraph:
    return InvalidGraph(
        f"there is no operation {name} of {path} in a model that is spread over ranks",
        where=path,
        why="tensor parallelism has replaced this module's forward: each rank calculates a part of the module's output",
        next="use the module's own input and output, or run the model in one process",
    )
