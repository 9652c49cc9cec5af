"""What a pool's owner allows: graphs and dumps are held against the policy when they arrive, before anything runs."""

from __future__ import annotations

import re
from itertools import islice
from typing import TYPE_CHECKING

from nnsight_hpc.graph.access import accesses
from nnsight_hpc.graph.build import split_point
from nnsight_hpc.graph.effort import effort
from nnsight_hpc.graph.limits import MAX_PROBLEMS
from nnsight_hpc.wire.errors import Denied, InvalidInput
from nnsight_hpc.wire.pools import Policy

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from nnsight_hpc.graph import Graph
    from nnsight_hpc.graph.access import Access, Right
    from nnsight_hpc.wire.messages import DumpSpec
    from nnsight_hpc.wire.pools import PoolSpec

_PATTERN = re.compile(r"(\*|\w+)(\.(\*|\w+))*\Z", re.ASCII)
_FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*\Z", re.ASCII)


def check_graph(graph: Graph, spec: PoolSpec, owner: str) -> None:
    """Raise `Denied` where a validated graph reads or sets what the policy of its pool does not allow.

    The error names the user's lines and the modules, what is allowed, and the `owner`, who has set it.
    """
    policy = spec.policy
    if policy is None:
        return
    with effort():
        refused = list(islice(_refused(graph, policy), MAX_PROBLEMS + 1))
    if not refused:
        return
    (first, does), *others = refused
    more = [f"{_where(access)}: it {also}" for access, also in others[: MAX_PROBLEMS - 1]]
    raise Denied(
        f"the graph {does}; the policy of pool {spec.name} does not allow that",
        where=_where(first),
        why="\n".join([*more, *["and more"] * (len(refused) > MAX_PROBLEMS), f"{owner} allows {_in_words(policy)}"]),
        next=f"use what is allowed, change a copy (value.clone()) where it is enough, or ask {owner}",
    )


def check_has_texts(spec: PoolSpec) -> None:
    """Raise `InvalidInput` for a pool that cannot dump texts at all: one with a module of its owner's own."""
    if spec.factory is not None:
        raise InvalidInput(
            f"pool {spec.name} cannot write datasets of texts",
            why=f"it holds a module of its owner's own ({spec.factory}), which has no tokenizer",
            next="trace it, and save what you need: NNsight(module).trace(…, remote=True)",
        )


def check_captures(dump: DumpSpec, spec: PoolSpec, owner: str) -> None:
    """Raise `Denied` where a dump captures what the policy of its pool does not allow to read."""
    policy = spec.policy or Policy()
    for capture in dump.captures:
        if not _covers(policy.read, split_point(capture)[0]):
            raise Denied(
                f"the dump reads {capture}; the policy of pool {spec.name} does not allow that",
                why=f"{owner} allows {_in_words(policy)}",
                next=f"capture modules that may be read, one by one where need be, or ask {owner}",
            )


def spec_problems(spec: PoolSpec) -> Iterator[str]:
    """What is wrong with a pool's policy and factory, each as a sentence."""
    if policy := spec.policy:
        for pattern in (*policy.read, *policy.set):
            if not _PATTERN.match(pattern):
                yield (
                    f"its policy has {pattern!r}, which is no path of modules with * for any one part, as model.layers.*.mlp"
                )
        if policy.result_bytes is not None and policy.result_bytes < 1:
            yield f"its policy has result_bytes = {policy.result_bytes}, and it must be at least 1"
    if spec.factory is None:
        return
    if not _FACTORY.match(spec.factory):
        yield f"its factory is {spec.factory!r}, and must be package:function"
    if spec.tp != 1 or spec.replicated:
        yield "a factory's module is held by one rank: tp must be 1 (more replicas serve more requests)"
    if spec.revision is not None:
        yield "a factory's weights are a file or folder, which has no revision"


def _refused(graph: Graph, policy: Policy) -> Iterator[tuple[Access, str]]:
    """Each access that is not allowed, with what it does; of several modules the first is named."""
    known: dict[tuple[str, frozenset[str]], str | None] = {}
    for access in accesses(graph):
        key = access.right, access.modules
        if key not in known:
            known[key] = min((one for one in access.modules if not _allows(policy, access.right, one)), default=None)
        if (module := known[key]) is not None:
            yield access, access.does.replace("{}", module or "the model")


def _allows(policy: Policy, right: Right, module: str) -> bool:
    return policy.parameters if right == "parameters" else _covers(getattr(policy, right), module)


def _covers(patterns: Iterable[str], module: str) -> bool:
    """Whether a module, or one above it, is among the patterns; a ``*`` of `module` stands for any, and so needs a ``*``."""
    parts = module.split(".") if module else []
    for pattern in patterns:
        wanted = pattern.split(".")
        if pattern == "*":
            return True
        if len(wanted) <= len(parts) and all(one in ("*", part) for one, part in zip(wanted, parts, strict=False)):
            return True
    return False


def _where(access: Access) -> str:
    return str(access.node.source or f"node {access.node.id}")


def _in_words(policy: Policy) -> str:
    read, write = (", ".join(patterns) or "nothing" for patterns in (policy.read, policy.set))
    weights = "and weights to be read" if policy.parameters else "and no weights to be read"
    return f"{_all(read)} to be read, {_all(write)} to be set, {weights}"


def _all(patterns: str) -> str:
    return "all modules" if patterns == "*" else patterns
