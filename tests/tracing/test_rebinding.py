"""After a block the names of the researcher's frame are bound to the real things, wherever the block stands."""

import ast
import contextlib
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from nnsight_hpc.tracing.frames import DROP, Entries, bind, named
from tests.tracing.programs import INPUTS, MODEL, compiled

HIDDEN = MODEL.module(INPUTS).detach()
IF = "if MODEL[1].output.sum() > -100:"  # makes the block one that is rewritten


def _module(text):
    return compiled(textwrap.dedent(text), {"MODEL": MODEL, "INPUTS": INPUTS, "contextlib": contextlib})


PLACES = {
    "function": """
        def f():
            with MODEL.trace(INPUTS):
                x = MODEL[1].output.save()
            return x
        result = f()
        """,
    "module": """
        with MODEL.trace(INPUTS):
            result = MODEL[1].output.save()
        """,
    "one line": """
        def f():
            with MODEL.trace(INPUTS): x = MODEL[1].output.save()
            return x
        result = f()
        """,
    "one line, with a condition": """
        def f():
            with MODEL.trace(INPUTS): x = MODEL[1].output.save() if 1 < 2 < MODEL[1].output.shape[1] else 0
            return x
        result = f()
        """,
    "one line at module level": """
        with MODEL.trace(INPUTS) as tracer: result = [k.save() for k in [MODEL[1].output]][0]
        """,
    "condition": """
        def f():
            with MODEL.trace(INPUTS) as tracer:
                if MODEL[1].output.sum() > -100:
                    x = MODEL[1].output.save()
            assert tracer.graph
            return x
        result = f()
        """,
    "condition at module level": """
        with MODEL.trace(INPUTS) as tracer:
            if MODEL[1].output.sum() > -100:
                result = MODEL[1].output.save()
            else:
                result = (MODEL[1].output * 2).save()
        """,
    "two traces in one function": """
        def f():
            with MODEL.trace(INPUTS):
                x = MODEL[0].output.save()
            with MODEL.trace(INPUTS):
                for k in [1].copy():
                    y = MODEL[k].output.save()
            assert x.shape == y.shape
            return y
        result = f()
        """,
    "trace in a loop": """
        def f():
            found = []
            for k in range(3):
                with MODEL.trace(INPUTS * k):
                    found.append(MODEL[1].output.save() if k else None)
            return found[1]
        result = f()
        """,
    "recursion": """
        def f(depth):
            below = f(depth - 1) if depth else None
            with MODEL.trace(INPUTS):
                x = MODEL[1].output.save() if depth == 2 else below
            return x
        result = f(3)
        """,
    "generator": """
        def f():
            for k in range(2):
                with MODEL.trace(INPUTS):
                    x = MODEL[1].output.save() if k < 5 else None
                yield x
        result = list(f())[1]
        """,
    "yield in the block": """
        def f():
            with MODEL.trace(INPUTS):
                x = MODEL[1].output.save()
                yield 1
            yield x
        result = list(f())[1]
        """,
    "nonlocal": """
        def f():
            x = None
            def g():
                nonlocal x
                with MODEL.trace(INPUTS):
                    x = MODEL[1].output.save() if not None else 0
            g()
            return x
        result = f()
        """,
    "captured by an inner function": """
        def f():
            def read():
                return x
            with MODEL.trace(INPUTS):
                x = MODEL[1].output.save() if not None else 0
                assert read() is x
            return read()
        result = f()
        """,
    "captured by a lambda of the block": """
        def f():
            with MODEL.trace(INPUTS):
                x = MODEL[1].output if not None else 0
                double = lambda: x * 2
                y = (double() / 2).save()
            return y
        result = f()
        """,
    "changed by an outer function": """
        def f():
            n = 0
            def bump():
                nonlocal n
                n += 1
                return n
            with MODEL.trace(INPUTS):
                bump()
                x = MODEL[1].output.save() if n == 1 else None
            return x
        result = f()
        """,
    "global": """
        def f():
            global result
            with MODEL.trace(INPUTS):
                result = MODEL[1].output.save() if not None else 0
        f()
        """,
    "global without control flow": """
        def f():
            global result
            with MODEL.trace(INPUTS):
                result = MODEL[1].output.save()
        f()
        """,
    "class body": """
        class A:
            with MODEL.trace(INPUTS):
                x = MODEL[1].output.save()
        result = A.x
        """,
    "method with private names": """
        class A:
            def __init__(self):
                self.__k = 1
            def f(self):
                with MODEL.trace(INPUTS):
                    x = MODEL[self.__k].output.save() if self.__k else None
                return x
        result = A().f()
        """,
    "list": """
        def f():
            found = []
            with MODEL.trace(INPUTS):
                for k in [0, 1].copy():
                    found.append(MODEL[k].output.save())
            return found
        result = f()[1]
        """,
    "dict of lists": """
        found = {"a": []}
        with MODEL.trace(INPUTS):
            for k in [0, 1].copy():
                found["a"].append((k, MODEL[k].output.save()))
        result = found["a"][1][1]
        """,
    "tuple under two names": """
        with MODEL.trace(INPUTS):
            one = other = (MODEL[1].output.save(), 3)
            both = [one, other]
        assert one is other and both[0] is one and both[1] is one
        result = other[0]
        """,
    "session": """
        def f():
            with MODEL.session() as s, MODEL.trace(INPUTS) as t:
                x = MODEL[1].output.save() if not None else 0
            with MODEL.session():
                with MODEL.trace(INPUTS):
                    y = MODEL[1].output
                    if y.sum() > -100:
                        z = y * 2
                with MODEL.trace(INPUTS):
                    w = (z / 2).save()
            assert s and t
            return w
        result = f()
        """,
    "another manager after the trace": """
        import torch
        def f():
            with MODEL.trace(INPUTS) as t, torch.enable_grad() as g, contextlib.nullcontext(3) as three:
                x = MODEL[1].output.save() if three == 3 and torch.is_grad_enabled() else 0
            return x
        result = f()
        """,
    "exit stack": """
        def f():
            with contextlib.ExitStack() as stack:
                stack.enter_context(MODEL.trace(INPUTS))
                x = MODEL[1].output.save()
            return x
        result = f()
        """,
    "manager of one's own": """
        @contextlib.contextmanager
        def traced():
            with MODEL.trace(INPUTS) as tracer:
                inside = MODEL[0].output.save()
                yield tracer
            inside.shape + (1,)
        @contextlib.contextmanager
        def twice():
            with traced() as tracer:
                yield tracer
        def f():
            with traced() as tracer:
                if MODEL[1].output.sum() > -100:
                    x = MODEL[1].output.save()
            with twice() as tracer:
                y = MODEL[1].output.save() if MODEL[1].output.sum() > -100 else 0
            assert x.equal(y) and tracer.graph
            return y
        result = f()
        """,
    "manager that goes on after its yield": """
        @contextlib.contextmanager
        def traced(late):
            with MODEL.trace(INPUTS):
                yield
                late.append(MODEL[1].output.save())
        def f():
            late = []
            with traced(late):
                x = MODEL[0].output.save() if 1 < 2 else 0
            return late[0]
        result = f()
        """,
    "target of its own": """
        class Box: pass
        box = Box()
        with MODEL.trace(INPUTS) as box.tracer:
            result = MODEL[1].output.save() if box.tracer else None
        """,
    "in a finally": """
        def f():
            try:
                pass
            finally:
                with MODEL.trace(INPUTS), contextlib.nullcontext():
                    x = MODEL[1].output.save() if not None else 0
            return x
        result = f()
        """,
    "asynchronous function": """
        import asyncio
        async def f():
            with MODEL.trace(INPUTS):
                x = MODEL[1].output.save() if not None else 0
            await asyncio.sleep(0)
            return x
        result = asyncio.run(f())
        """,
    "star import, locals and eval": """
        def f():
            with MODEL.trace(INPUTS):
                x = MODEL[1].output.save() if eval("1") else locals()
            return x
        result = f()
        """,
    "unbound names": """
        def f():
            with MODEL.trace(INPUTS):
                try:
                    unknown
                except UnboundLocalError:
                    x = MODEL[1].output.save() if not None else 0
            unknown = 1
            return x
        result = f()
        """,
    "deleted names": """
        def f():
            gone = 1
            with MODEL.trace(INPUTS):
                x = MODEL[1].output.save() if gone else None
                del gone
            assert "gone" not in locals()
            return x
        result = f()
        """,
}


@pytest.mark.parametrize("place", PLACES)
def test_names_are_bound(place):
    """In each kind of place the name is bound to a plain tensor, the one that the model gives."""
    result = _module(PLACES[place])["result"]
    assert type(result) is torch.Tensor
    assert torch.equal(result, HIDDEN)


def test_without_a_source():
    """Code that has no source is recorded as it is written, and a value that is asked for its truth says what to write."""
    names = {"MODEL": MODEL, "INPUTS": INPUTS}
    exec("with MODEL.trace(INPUTS):\n x = [MODEL[k].output.save() for k in (0, 1)]", names)
    assert torch.equal(names["x"][1], HIDDEN)
    with pytest.raises(Exception, match=r"tracer\.cond"):
        exec("with MODEL.trace(INPUTS):\n x = 1 if MODEL[1].output.sum() > 0 else 2", names)


def test_a_notebook(tmp_path):
    """In IPython's shell cells bind their names, with control flow, in one-line blocks, and again when a cell is edited."""
    cells = [
        "from tests.tracing.programs import INPUTS, MODEL\nimport torch",
        "with MODEL.trace(INPUTS):\n    a = MODEL[1].output.save()",
        "with MODEL.trace(INPUTS):\n    if MODEL[1].output.sum() > -100:\n        b = MODEL[1].output.save()",
        "with MODEL.trace(INPUTS): c = [r.save() for r in [MODEL[1].output] if 1]",
        "%time\nwith MODEL.trace(INPUTS): d = MODEL[1].output.save() if 1 < 2 else 0",
        "def f():\n    with MODEL.trace(INPUTS):\n        x = [r.save() for r in MODEL[1].output]\n    return x\ne = f()",
        "import asyncio\nawait asyncio.sleep(0)\nwith MODEL.trace(INPUTS): g = MODEL[1].output.save() if 1 < 2 else 0",
        "kinds = [type(v) is torch.Tensor for v in (a, b, c[0], d, e[0], g)]",
    ]
    program = tmp_path / "shell.py"
    program.write_text(
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "shell = InteractiveShell.instance()\n"
        f"for cell in {cells!r}:\n    shell.run_cell(cell, store_history=True).raise_error()\n"
        "print('KINDS', shell.user_ns['kinds'])\n"
    )
    pytest.importorskip("IPython")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "IPYTHONDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, env=environment, check=False)
    assert f"KINDS {[True] * 6}" in done.stdout, done.stdout + done.stderr


class _Thing:
    def __init__(self, number):
        self.number = number


def test_entries_are_spread_and_dropped():
    """A replaced entry of a list or tuple becomes any number of entries; a key of a dict goes with none."""
    one, two = _Thing(1), _Thing(2)
    items, pair, named_things = [one, 0, two], (two, one), {"a": one, "b": two}
    alias = items
    bind(sys._getframe(), _Thing, lambda t, place: t if place == "name" else DROP if t.number == 1 else _twice(place))
    assert (items, pair, named_things) == ([0, 2, 2], (2, 2), {"b": 2})
    assert alias is items
    assert [(name, value.number) for name, value in named(sys._getframe(), _Thing)] == [("one", 1), ("two", 2)]


def _twice(place):
    return 2 if place == "dict" else Entries([2, 2])


def test_every_place_is_real_code():
    """The programs of this file parse, so that none is left out by an error of its own."""
    assert all(ast.parse(textwrap.dedent(text)) for text in PLACES.values())
