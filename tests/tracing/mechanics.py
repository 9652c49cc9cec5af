# fmt: off - statements in one line are what is tested
# ruff: noqa: B023, F841, PLR0133, PT017, E402, D
"""Runs by itself on any Python: the mechanics of blocks and frames, with values that are nothing but notes of what was done.

No package is needed: of nnsight_hpc the modules that blocks are made of are loaded, and those that need torch or msgspec are
replaced by the few names that blocks take from them.
"""

import json
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]


def _module(name, path=None, **names):
    module = ModuleType(name)
    module.__dict__.update(names)
    if path:
        module.__path__ = [str(path)]
    sys.modules[name] = module


class Recorder:
    def __init__(self):
        self.nodes, self.block, self.bound, self.shadow = [], None, [], None
        self.builder = SimpleNamespace(nodes=self.nodes)

    def record(self, op, *args):
        args = [item.node if type(item) is Value else item for item in args]
        self.nodes.append(SimpleNamespace(id=len(self.nodes), op=op, args=args, block=self.block))
        return Value(self, len(self.nodes) - 1)

    def save(self, value):
        return self.record("save", value).node

    def in_loop(self, node):
        block = None if node.block is None else self.nodes[node.block]
        return block is not None and (block.op == "control.loop" or self.in_loop(block))

    @contextmanager
    def inside(self, value):
        before, self.block = self.block, value.node
        yield
        self.block = before

    @contextmanager
    def scope(self):
        yield


class Value:
    def __init__(self, recorder, node):
        self.recorder, self.node, self.saved, self.fake = recorder, node, None, None

    def save(self):
        self.saved = self.recorder.save(self)
        return self

    def __gt__(self, other):
        return self.recorder.record("gt", self, other)

    def __add__(self, other):
        return self.recorder.record("add", self, other)

    def __bool__(self):
        raise TypeError("no truth")

    def __iter__(self):
        raise TypeError("no length")

    def append(self, item):
        self.recorder.record("container.append", self, item)


def _users_frame():
    frame = sys._getframe(1)
    while frame.f_globals["__name__"].startswith("nnsight_hpc"):
        frame = frame.f_back
    return frame


def _load():
    ops = (ROOT / "nnsight_hpc/graph/build.py").read_text()
    constants = dict(re.findall(r'^([A-Z_]+) = "([a-z._]+)"$', ops, re.MULTILINE))
    _module("nnsight_hpc", ROOT / "nnsight_hpc")
    _module("nnsight_hpc.tracing", ROOT / "nnsight_hpc/tracing")
    _module("nnsight_hpc.graph", ROOT / "nnsight_hpc/graph")
    _module("nnsight_hpc.graph.build", **constants)
    _module(
        "nnsight_hpc.graph.nodes", Ref=lambda node: node, refs_in=lambda item: [item] if isinstance(item, int) else []
    )
    _module("nnsight_hpc.wire", ROOT / "nnsight_hpc/wire")
    _module(
        "nnsight_hpc.wire.errors", InvalidInput=type("InvalidInput", (Exception,), {"__init__": lambda *_, **__: None})
    )
    _module("nnsight_hpc.tracing.value", Value=Value)
    _module("nnsight_hpc.tracing.lines", users_line=lambda: "a line", users_frame=_users_frame)


_load()

from nnsight_hpc.tracing import block_run
from nnsight_hpc.tracing.frames import bind

Recorder.__module__ = Value.__module__ = "nnsight_hpc.tracing"  # like the real ones no objects of the researcher's


class Block:
    """A context: records its block, and binds what is saved to ``real <id of the node>``."""

    def __enter__(self):
        self.recorder = Recorder()
        self.value = self.recorder.record("point")
        self.frame = sys._getframe(1)
        self.rewritten = block_run.enter(self.frame)
        return self

    def __exit__(self, kind, error, _traceback):
        if kind is block_run.Skipped:
            return self.rewritten.finish(self.end)
        self.end(error)
        return None

    def end(self, error):
        if error is None:
            bind(self.frame, Value, lambda value, _place: value if value.saved is None else f"real {value.node}")

    def ops(self):
        return [node.op for node in self.recorder.nodes]


Block.__module__ = "nnsight_hpc.tracing"


BRANCHES = [
    "point",
    "gt",
    "control.if",
    "add",
    "save",
    "control.else",
    "add",
    "save",
    "control.merge",
    "control.merge",
    "save",
]


def in_a_function():
    with Block() as b:
        if b.value > 0:
            y = (b.value + 1).save()
        else:
            y = (b.value + 2).save()
    assert b.ops() == BRANCHES, b.ops()
    assert y == "real 8", y


def in_one_line():
    with Block() as b:
        y = (b.value + 1).save() if b.value > 0 else 5
    assert y == "real 6", (y, b.ops())
    with Block() as b:
        y = [b.value.save()]
    assert y == ["real 0"], y


def in_a_loop_with_cells():
    found = []
    for k in range(3):
        with Block() as b, contextmanager(lambda: iter([k]))() as again:
            y = b.value.save() if again == 1 else None
            read = [y for _ in [1].copy()]
        found.append((y, read[0]))
    assert found == [(None, None), ("real 0", "real 0"), (None, None)], found
    return lambda: y


def with_outer_names():
    n = 0

    def write():
        nonlocal n
        with Block() as b:
            n = b.value.save() if 1 < 2 else 0

    write()
    assert n == "real 0", n

    def read():
        return m

    with Block() as b:
        m = 4 if 1 < 2 < 3 else 0
        assert read() == 4
    assert read() == 4


def a_recorded_loop():
    total = 0
    with Block() as b:
        for row in b.value:
            if row > 0:
                continue
            total = total + row if 1 < 2 else total
        else_ = total.save()
    assert "control.loop" in b.ops()
    assert "control.carried" in b.ops()
    assert else_.startswith("real"), else_


def generator():
    for k in range(2):
        with Block() as b:
            y = b.value.save() if k else None
        yield y


def raises():
    try:
        with Block() as b:
            y = 3 if b else 4
            y / 0
    except ZeroDivisionError as error:
        line = error.__traceback__
        while line.tb_next:
            line = line.tb_next
        assert line.tb_frame.f_code.co_name == "raises"
        assert error.__context__ is None, repr(error.__context__)
    assert y == 3


def block_that_is_traced():
    with Block() as b:
        y = b.value
        y = 3 if b else 4
    assert y == 3


def traced():
    """A trace function from before the block sees its lines and those after it, and stays."""
    lines = set()
    first = block_that_is_traced.__code__.co_firstlineno

    def tracer(frame, event, _argument):
        if frame.f_code.co_name == "block_that_is_traced" and event == "line":
            lines.add(frame.f_lineno - first)
        return tracer

    sys.settrace(tracer)
    block_that_is_traced()
    assert sys.gettrace() is tracer
    sys.settrace(None)
    assert lines == {1, 2, 3, 4}, lines


with Block() as b:
    at_module_level = b.value.save() if b.value is not None else 0
assert at_module_level == "real 0"
with Block() as b:
    in_a_line = (b.value + 1).save() if b.value > 0 else b.value
assert in_a_line.startswith("real"), in_a_line


class Body:
    with Block() as b:
        y = b.value.save()


assert Body.y == "real 0"
in_a_function()
in_one_line()
assert in_a_loop_with_cells()() is None
with_outer_names()
a_recorded_loop()
assert list(generator()) == [None, "real 0"]
raises()
traced()
assert sys.gettrace() is None
print(json.dumps({"python": sys.version, "torch": "torch" in sys.modules}))
