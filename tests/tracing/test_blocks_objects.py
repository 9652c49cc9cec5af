"""Python's own objects where a value decides: what cannot be recorded is refused, at the researcher's line."""

import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnsight_hpc.wire.errors import HpcError
from tests.tracing.programs import INPUTS, MODEL, check, compiled, recorded

BRANCH = "if h[0, 0] * 0 < 1:\n    {0}\nelse:\n    {1}"
LOOP = "for row in h:\n    {0}"

REFUSED = {
    "attribute": BRANCH.format("e.n = 1", "e.n = 2"),
    "attribute of a value": BRANCH.format("e.n = h", "e.n = h * 2"),
    "attribute added": LOOP.format("e.n += 1"),
    "attribute of an entry": LOOP.format("many[0].n = 1"),
    "setattr": BRANCH.format("setattr(e, 'n', 1)", "pass"),
    "list of an attribute": LOOP.format("e.items.append(row.save())"),
    "dict of an attribute": LOOP.format("e.d['x'] = row"),
    "nested dict": BRANCH.format("d['a']['b'] = 1", "d['a']['b'] = 2"),
    "list in a dict": LOOP.format("d['x'].append(1)"),
    "list by a second name of the loop": "k = d['x']\n" + LOOP.format("m = k\n    m.append(1)"),
    "defaultdict": LOOP.format("dd[5].append(row.save())"),
    "array": BRANCH.format("a[0] = 1", "a[0] = 2"),
    "array added": "b = a\n" + BRANCH.format("b += 1", "b *= 2"),
    "tensor": BRANCH.format("t[0] = 1", "t[0] = 2"),
    "tensor added": "b = t\n" + BRANCH.format("b += 1", "pass"),
    "tensor in place": BRANCH.format("pass", "t.add_(2)"),
    "tensor in place in a loop": LOOP.format("t.add_(2)"),
    "tensor added in a loop": "b = t\n" + LOOP.format("b += row.sum()"),
    "counter": LOOP.format("n = next(c)"),
    "deletion": BRANCH.format("del d['a']['b']", "pass"),
    "made in an outer branch": "for row in h:\n    q = S(n=0)\n    if row[1] > 0:\n        q.n = 1\n    else:\n        q.n = 2",
    "plain loop in a branch": BRANCH.format("for k in [1, 2].copy(): e.n = k", "pass"),
    "two names": "l2 = l\n" + BRANCH.format("l.append(1)", "l2.append(2)"),
    "two names, one read": "l2 = l\n" + BRANCH.format("l.append(1)", "pass") + "\ny = l2[0]",
}
SEEN_AFTERWARDS = {
    "helper": BRANCH.format("put(d, 1)", "put(d, 2)"),
    "helper in a loop": LOOP.format("put(e.d, row)"),
    "helper of a global": BRANCH.format("count()", "pass"),
    "helper of a helper": LOOP.format("twice(count)"),
    "helper of a closure": "grow = keeper()\n" + BRANCH.format("grow(1)", "pass"),
    "method": BRANCH.format("box.put(h)", "box.put(-h)"),
    "method with slots": BRANCH.format("slotted.put(h)", "pass"),
    "attribute of a class": LOOP.format("Box.made()"),
    "partial": BRANCH.format("partial(put, d)(1)", "pass"),
    "array by a helper": BRANCH.format("fill(a)", "pass"),
    "tensor by a helper": BRANCH.format("fill(t)", "pass"),
    "generator by a helper": "g = (k for k in [1, 2])\n" + LOOP.format("y = advance(g)"),
    "lambda": "add = lambda k: l.append(k)\n" + BRANCH.format("add(1)", "pass"),
    "function of the block": "def add(k):\n    l.append(k)\n" + LOOP.format("add(1)"),
    "nonlocal of the block": "n = 0\ndef add():\n    nonlocal n\n    n += 1\n" + LOOP.format("add()"),
    "comprehension": "y = [l.append(1) for row in h]",
    "comprehension by a helper": "y = [put(d, row) for row in h]",
    "comprehension's filter": "y = [row for row in h if l.append(1) or row[0] > 0]",
    "generator expression": "y = sum(put(d, 1) or row for row in h)",
    "short circuit": "y = h.any() and put(d, 1)",
    "short circuit of a method": "y = h.any() and d['x'].append(1)",
    "short circuit as a statement": "h.any() and d['x'].append(1)",
    "ternary": "y = put(d, 1) if h[0, 0] > 0 else None",
    "chained comparison": "y = 0 < h[0, 0] < put(d, 1)",
    "while": "k = h.abs().sum()\nwhile k > 1:\n    k = k * 0.5\n    put(d, 1)",
    "cond": "with context.cond(h.sum() > 0) as k:\n    put(d, 1)",
    "cond's other side": "with context.cond(h.sum() > 0) as k:\n    pass\nwith k.else_():\n    e.n = 1",
    "random numbers of torch": LOOP.format("y = row + torch.randn(4)"),
    "random numbers of python": LOOP.format("y = row + random()"),
    "list in a dict that is read": "m = d['x']\n" + LOOP.format("m.append(1)") + "\ny = d['x']",
    "list that a helper reads": "del_ = sizes\n" + LOOP.format("seen.append(row)") + "\ny = sizes()",
}
ALLOWED = {
    "fresh list": ("if h[0, 0] > 0:\n    q = []\n    q.append(h)\n    y = q[0]\nelse:\n    y = -h", "y"),
    "fresh dict in a loop": ("y = 0\nfor row in h:\n    q = {}\n    q['a'] = row\n    y = y + q['a']", "y"),
    "fresh object": ("if h[0, 0] > 0:\n    q = S(n=0)\n    q.n = h\n    y = q.n\nelse:\n    y = -h", "y"),
    "fresh tensor": ("y = 0\nfor row in h:\n    m = torch.zeros(4)\n    m[0] = 1\n    y = y + row * m", "y"),
    "torch's functions": ("if h[0, 0] > 0:\n    y = torch.add(h, 1)\nelse:\n    y = h.clone().add_(3)", "y"),
    "numbers added": ("y = 3\nif h[0, 0] > 0:\n    y -= 1", "y"),
    "plain test": ("e = S(n=0)\nif 1 < 2 < 3:\n    e.n = 5\nfor k in [1, 2].copy():\n    e.n += k\ny = e.n", "y"),
    "outside": ("e = S(n=0)\ny = h if h[0, 0] > 0 else -h\ne.n = y\nz = e.n + 1", "y, z"),
}


class Box:
    number = 0

    def __init__(self):
        self.kept = []

    def put(self, item):
        self.kept.append(item)

    @classmethod
    def made(cls):
        cls.number += 1


class Slotted:
    __slots__ = ("kept",)

    def put(self, item):
        self.kept = item


_counted = 0


def _count():
    global _counted  # noqa: PLW0603 - what is tested
    _counted += 1


def _keeper():
    total = 0

    def grow(k):
        nonlocal total
        total += k

    return grow


def _put(d, k):
    d["k"] = k


def _fill(a):
    a[0] = 1


def _helpers(seen):
    names = {
        "Box": Box,
        "box": Box(),
        "slotted": Slotted(),
        "put": _put,
        "count": _count,
        "keeper": _keeper,
        "fill": _fill,
    }
    others = {"twice": lambda f: (f(), f()), "partial": partial, "random": random.random, "advance": next}
    return {**names, **others, "seen": seen, "sizes": lambda: len(seen)}


def _objects():
    from collections import defaultdict
    from itertools import count

    e = SimpleNamespace(n=0, items=[], d={})
    names = {"e": e, "many": (e,), "d": {"a": {"b": 0}, "x": []}, "dd": defaultdict(list), "l": [0], "c": count()}
    names |= _helpers([])
    return {**names, "a": np.zeros(3), "t": torch.zeros(3), "S": SimpleNamespace}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    """An object of before that a branch or loop of a value changes is refused, unchanged, and the message tells a way."""
    objects = _objects()
    with pytest.raises(HpcError, match="where a value decides") as caught:
        recorded(REFUSED[name], "1", 1.0, objects)
    assert "<program" in caught.value.where
    assert caught.value.next
    assert (objects["e"].n, objects["e"].items, objects["d"]) == (0, [], {"a": {"b": 0}, "x": []})
    assert not objects["a"].any()
    assert not objects["t"].any()


@pytest.mark.parametrize("name", SEEN_AFTERWARDS)
def test_changed_by_what_is_called(name):
    """What a function, a comprehension or an expression changes that a value decides about is refused, too."""
    with pytest.raises(HpcError, match="where a value decides") as caught:
        recorded(SEEN_AFTERWARDS[name], "1", 1.0, _objects())
    assert "<program" in caught.value.where
    assert caught.value.next


@pytest.mark.parametrize("scale", [1.0, -1.0])
@pytest.mark.parametrize("name", ALLOWED)
def test_allowed(name, scale):
    """What is made where it is changed, and what no value decides, is Python's."""
    check(*ALLOWED[name], scale, {"S": SimpleNamespace})


@pytest.mark.parametrize("taken", [True, False])
def test_plain_entries(taken):
    """Plain numbers and strings that a branch puts into lists and dicts of before are there after the block, unsaved."""
    log, d, first = [], {"b": 0}, [1, 2]
    with MODEL.trace(INPUTS):
        if MODEL[1].output.sum() * 0 > (-1 if taken else 1):
            log.append("pos")
            d["b"] = 1
            first[0] = 9
        else:
            log.append("neg")
            d["b"] = 2
    assert (log, d, first) == ((["pos"], {"b": 1}, [9, 2]) if taken else (["neg"], {"b": 2}, [1, 2]))


GLOBALS = {
    "module, loop": "acts = []\nwith MODEL.trace(INPUTS):\n    for row in MODEL[1].output:\n        acts.append(row.save())\n",
    "module, branch": (
        "acts = []\nwith MODEL.trace(INPUTS):\n    h = MODEL[1].output\n"
        "    if h.sum() * 0 < 1:\n        acts.append(h[0].save())\n        acts.append(h[1].save())\n"
    ),
    "function": (
        "acts = []\ndef run():\n    with MODEL.trace(INPUTS):\n        for row in MODEL[1].output:\n"
        "            acts.append(row.save())\nrun()\n"
    ),
    "global": (
        "acts = None\ndef run():\n    global acts\n    acts = []\n    with MODEL.trace(INPUTS):\n"
        "        for row in MODEL[1].output:\n            acts.append(row.save())\nrun()\n"
    ),
}


@pytest.mark.parametrize("name", GLOBALS)
def test_global_lists(name):
    """A list of the module or notebook is filled like one of a function."""
    found = compiled(GLOBALS[name], {"MODEL": MODEL, "INPUTS": INPUTS})
    assert type(found["acts"]) is list
    assert torch.equal(torch.stack(found["acts"]), MODEL.module(INPUTS).detach())
