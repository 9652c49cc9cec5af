# ruff: noqa: E501 - programs
"""`break`, `continue`, `while`, `for … else`, `assert` on values, and Python's own functions of them: as plain Python has it."""

import pytest

from nnsight_hpc.tracing import block_loops
from tests.tracing.programs import INPUTS, MODEL, check, recorded

SCALES = [1.0, -1.0, 0.0, 3.0]

JUMPS = {
    "break": ("y = 0\nfor row in h:\n    if row[0] > 0:\n        break\n    y = y + row.sum()", "y, row"),
    "break at once": ("for row in h:\n    break\ny = row", "y"),
    "break after": ("y = 0\nfor row in h:\n    y = y + row\n    if y[0] > 0:\n        break", "y"),
    "break in a plain loop": (
        "y = 0\nfor k in [0, 1, 2, 3].copy():\n    if h[0, k] > 0:\n        break\n    y = y + h[1, k]",
        "y, k",
    ),
    "break in a literal's loop": (
        "y = 0\nfor k in (0, 1, 2):\n    y = y + h[1, k]\n    if h[0, k] > 0:\n        break",
        "y, k",
    ),
    "break in a range": (
        "y = 0\nfor k in range(h.shape[1]):\n    if h[0, k] > 0.5:\n        break\n    y = y + h[1, k]",
        "y",
    ),
    "break with else": (
        "y = 0\nfor row in h:\n    if row[0] > 0:\n        y = row\n        break\nelse:\n    y = 1",
        "y",
    ),
    "else": ("y = 0\nfor row in h:\n    y = y + row\nelse:\n    y = y * 2", "y"),
    "plain break with else": (
        "y = 0\nfor k in [1, 2].copy():\n    if k == 2:\n        break\n    y = y + h * k\nelse:\n    y = 7",
        "y, k",
    ),
    "break in an else": (
        "y = 0\nfor row in h:\n    if row[0] > 0:\n        y = y + row\n    else:\n        y = y - 1\n        break\n    y = y * 2",
        "y",
    ),
    "break and continue": (
        "y = 0\nfor e in h.flatten():\n    if e < 0:\n        continue\n    y = y + e\n    if y > 1:\n        break\n    y = y + 1",
        "y",
    ),
    "continue in a nested if": (
        "y = 0\nfor row in h:\n    if row[0] > 0:\n        y = y + 1\n        if row[1] > 0:\n            continue\n        y = y + 10\n    y = y + row.sum()",
        "y",
    ),
    "break in a nested if": (
        "y = 0\nfor e in h.flatten():\n    if e > -0.9:\n        y = y + 1\n        if e > 0:\n            if e > 0.5:\n                break\n            y = y + 100\n        y = y + 10\n    y = y + e",
        "y",
    ),
    "break of the inner loop": (
        "y = 0\nfor row in h:\n    for e in row:\n        if e > 0:\n            break\n        y = y + e\n    y = y + 1",
        "y",
    ),
    "break of both": (
        "y = 0\nfor row in h:\n    found = False\n    for e in row:\n        if e > 0.9:\n            found = True\n            break\n        y = y + e\n    if found:\n        break\n    y = y + 1",
        "y",
    ),
    "break in the inner else": (
        "y = 0\nfor row in h:\n    for e in row:\n        if e > 0.9:\n            break\n        y = y + e\n    else:\n        break\n    y = y + 1",
        "y",
    ),
    "continue in with": (
        "y = 0\nfor row in h:\n    with torch.no_grad():\n        if row[0] > 0:\n            continue\n        y = y + 1\n    y = y + row.sum()",
        "y",
    ),
    "continue in try": (
        "y = 0\nfor row in h:\n    try:\n        if row[0] > 0:\n            continue\n        y = y + 1\n    finally:\n        y = y + 5\n    y = y + row.sum()",
        "y",
    ),
    "plain continue deep": (
        "y = []\nfor i in [0, 1, 2, 3].copy():\n    if i % 2:\n        if i == 3:\n            continue\n        y.append(i)\n    y.append(i * 10)",
        "y",
    ),
    "plain break keeps the iterator": (
        "it = iter([1, 2, 3])\nfor k in it:\n    if k == 1:\n        break\ny = list(it)",
        "y",
    ),
    "break with a list": (
        "out = []\nfor row in h:\n    out.append(row)\n    if row[0] > 0:\n        break\ny = torch.stack(out)",
        "y",
    ),
    "break in a while": ("n = 0\nwhile True:\n    n += 1\n    if h[0, 0] * n > 2 or n > 5:\n        break", "n"),
    "loop variable after": ("for i, row in enumerate(h):\n    if row[1] > 0:\n        break\ny = row * i", "y"),
}
WHILES = {
    "halving": ("y = h * 100\nwhile y.abs().sum() > 1:\n    y = y * 0.5", "y"),
    "counting": ("n = 0\ny = h\nwhile y.abs().sum() > 1:\n    y = y * 0.5\n    n += 1", "y, n"),
    "not once": ("n = 0\nwhile h.sum() > 1e9:\n    n += 1", "n"),
    "a number that a value decides": (
        "n = 0\nk = 0\nwhile n < 3:\n    k += 1\n    if h[0, 0] > 0:\n        n += 1\n    else:\n        n += 2",
        "n, k",
    ),
    "and": ("n = 0\ny = h * 8\nwhile y.abs().max() > 1 and n < 2:\n    y = y / 2\n    n += 1", "y, n"),
    "continue": (
        "n = 0\ny = h.abs().sum()\nwhile y > 0.5:\n    y = y * 0.5\n    if y > 1:\n        continue\n    n += 1",
        "y, n",
    ),
    "break": (
        "n = 0\ny = h.abs().sum()\nwhile y > 0.01:\n    y = y * 0.5\n    n += 1\n    if n == 3:\n        break\nelse:\n    n = -1",
        "y, n",
    ),
    "break by a value": ("y = h.abs().sum() + 1\nwhile True:\n    y = y * 0.5\n    if y < 0.2:\n        break", "y"),
    "nested": (
        "t = 0\na = h.abs().sum() + 4\nwhile a > 1:\n    b = a\n    while b > 0.5:\n        b = b * 0.5\n        t = t + b\n    a = a * 0.5",
        "t, a, b",
    ),
    "in a loop": (
        "t = 0\nfor row in h:\n    e = row.abs().sum() + 1\n    while e > 1:\n        e = e - 0.75\n    t = t + e",
        "t",
    ),
    "list": (
        "out = []\ny = h.abs().sum() + 2\nwhile y > 1:\n    y = y * 0.5\n    out.append(y)\nz = torch.stack(out)",
        "z",
    ),
    "plain else": ("n = 0\nwhile n < 3:\n    n += 1\nelse:\n    n = 10", "n"),
    "else by a value": ("y = h.abs().sum()\nwhile y > 1:\n    y = y * 0.5\nelse:\n    y = y + 100", "y"),
}
FUNCTIONS = {
    "any": ("y = 1 if any(row.sum() > 0 for row in h) else 2", "y"),
    "all": ("y = 1 if all(row.sum() > 0 for row in h) else 2", "y"),
    "any of a list": ("y = any([h[0, 0] > 0, h[0, 1] > 0])\nz = all([True, h[0, 0] > 0])", "y, z"),
    "any of plain": ("y = any(k > 1 for k in [1, 2])\nz = all([])\nw = any([])", "y, z, w"),
    "any is lazy": ("it = iter([1, 2, 3])\ny = any(k == 2 for k in it)\nz = list(it)", "y, z"),
    "min and max": ("y = min(h[0, 0], h[0, 1])\nz = max(h[0, 0], h[0, 1], h[1, 0], 0.1)", "y, z"),
    "min of elements": ("y = min(h[0])\nz = max(e * 2 for e in h[1])\nw = max([1, 5, 3])\nv = max('ab', key=ord)", "y, z, w, v"),
    "len": ("y = len(h)\nz = len(h[0, 1:])\nw = len([row for row in h])\nv = len('abc')", "y, z, w, v"),
    "len decides": ("y = 1 if len([e for e in h[0] if e > 0]) > 1 else 2", "y"),
    "range of len": ("y = 0\nfor i in range(len(h)):\n    y = y + h[i] * i", "y"),
    "reversed": ("y = []\nfor row in reversed(h):\n    y.append(row)\nz = torch.stack(y)\nw = list(reversed([1, 2]))", "z, w"),
    "reversed list": ("rows = [row for row in h]\ny = torch.stack([row * 2 for row in reversed(rows)])", "y"),
    "reversed parts": ("y = 0\nfor i, part in enumerate(reversed(h.split(2, -1))):\n    part += 1\n    y = y + part * i", "y, h"),
    "reversed copy": ("y = 0\nfor row in reversed(h):\n    row += 1\n    y = y + row", "y, h"),
    "sum": ("y = sum(e for e in h[0])\nz = sum([h[0, 0], 1])", "y, z"),
    "spread": ("y = h.view(*h.shape[:-1], 2, 2)\nz = h.reshape(-1, *h.shape)\nw = torch.zeros(*h.shape) + h\nv = h.T.expand(3, *h.T.shape)", "y, z, w, v"),
    "spread size": ("y = h.repeat(*h.size())\nz = h.permute(*[1, 0])\nw = h.view(*(4, 2))", "y, z, w"),
    "spread list": ("y = torch.stack([*h])\nz = torch.stack([*h, h[0], *[h[1]]])\nw = [*(1, 2), 3]", "y, z, w"),
    "tuple": ("values, indices = tuple(h.topk(2))", "values, indices"),
    "short circuit": ("out = [h[0]]\nh[0, 0] > 0 and out.append(h[1])\nh[0, 1] > 0 or out.append(h[1] * 2)\ny = torch.stack(out)", "y"),
    "ternary": ("out = []\nout.append(h[0]) if h[0, 0] > 0 else out.append(h[1] * 2)\ny = torch.stack(out)", "y"),
    "plain dict and set": ("y = {k: k for k in [1, 2].copy() if k > 1}\nz = {k for k in [1].copy()}", "y, z"),
    "dict of values": ("y = {k: h * k for k in [1, 2].copy()}", "y[1]"),
    "assert": ("assert h.abs().sum() >= 0, 'negative'\nassert 1 < 2 < 3\ny = h", "y"),
}  # fmt: skip


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", JUMPS)
def test_jumps(name, scale):
    """A jump that a value decides leaves the pass or the loop that it leaves in Python."""
    check(*JUMPS[name], scale)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", WHILES)
def test_whiles(name, scale):
    """A `while` makes as many passes as in Python."""
    check(*WHILES[name], scale)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name, scale):
    """Python's functions of values give what they give of tensors."""
    check(*FUNCTIONS[name], scale)


def test_a_while_that_does_not_end(monkeypatch):
    """Is an error that names the line and the most passes, not a wrong value."""
    monkeypatch.setattr(block_loops, "MOST_PASSES", 20)
    with pytest.raises(AssertionError, match="20 passes") as caught:
        recorded("y = h\nwhile y.abs().sum() >= 0:\n    y = y * 0.5", "y")
    assert "while y.abs().sum() >= 0:" in str(caught.value)


def test_passes_end_where_the_loop_does(monkeypatch):
    """After a `break` no further pass runs: what they would print is not printed."""
    lines = []
    monkeypatch.setattr("builtins.print", lambda *parts: lines.append(parts))
    recorded(
        "for e in h.flatten():\n    tracer.log('pass')\n    if e > -5:\n        break".replace("tracer", "context"), "1"
    )
    assert len(lines) == 1


def test_assert():
    """A condition that is false is an `AssertionError` at its line, with the message."""
    with pytest.raises(AssertionError, match=r"sum is tensor\(.*\) , below 100") as caught:
        recorded("assert h.sum() > 100, f'sum is {h.sum()}, below {100}'", "1")
    assert "<program" in caught.value.where
    with pytest.raises(AssertionError):
        recorded("if h.sum() > -100:\n    assert h.sum() > 100", "1")
    recorded("if h.sum() > 100:\n    assert h.sum() > 1000", "1")


def test_break_of_an_iterator_with_a_name():
    """What such a loop leaves for later depends on the value: refused."""
    from nnsight_hpc.wire.errors import InvalidInput

    with pytest.raises(InvalidInput, match="loop over a list"):
        recorded("it = iter([0, 1, 2])\nfor k in it:\n    if h[0, k] > 0:\n        break", "1")


def test_unrolled_loops_are_left():
    """Under validate, where Python runs loops over values, a `break` that a value decides works as well."""
    with MODEL.trace(INPUTS, validate=True):
        total = 0
        for row in MODEL[1].output:
            total = total + row.sum()
            if row[0] < 5:
                break
        kept = total.save()
    assert kept == MODEL.module(INPUTS)[0].sum()
