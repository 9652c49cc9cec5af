# ruff: noqa: E501 - programs
"""Control flow on values: what a block gives is what plain Python gives on the same tensors."""

import pytest

from tests.tracing.programs import check

SCALES = [1.0, -1.0, 0.0, 3.0]

CONDITIONALS = {
    "if else": ("if h.sum() > 0:\n    y = h + 1\nelse:\n    y = h - 1", "y"),
    "if without else": ("y = h\nif h[0, 0] > 0:\n    y = h * 2", "y"),
    "elif": ("if h[0, 0] > 0.5:\n    y = h\nelif h[0, 0] < -0.5:\n    y = -h\nelse:\n    y = h * 0", "y"),
    "nested": (
        "y = 0\nif h[0, 0] > 0:\n    if h[0, 1] > 0:\n        y = h\n    else:\n        y = h * 2\n    y = y + 1\nelse:\n    z = h\n    y = z * 3",
        "y",
    ),
    "numbers": ("if h[0, 0] > 0:\n    k, word = 2, 'a'\nelse:\n    k, word = 3, 'b'\ny = h * k", "y, k, word"),
    "one side changes": ("a = h + 1\nb = h + 2\nif h[0, 0] > 0:\n    a = b", "a, b"),
    "swap": ("a, b = h + 1, h + 2\nif h[0, 0] > 0:\n    a, b = b, a", "a, b"),
    "augmented": ("a = h.clone()\nif h[0, 0] > 0:\n    a += 1\nelse:\n    a *= 3", "a"),
    "tuples": ("if h[0, 0] > 0:\n    pair = (h, 1)\nelse:\n    pair = (h * 2, 2)\ny = pair[0] + pair[1]", "y"),
    "plain test": ("flag = True\nif flag:\n    y = h\nelse:\n    y = undefined", "y"),
    "plain inside": ("if h[0, 0] > 0:\n    y = h\n    if True:\n        y = y + 1\nelse:\n    y = h", "y"),
    "in place": ("a = h.clone()\nif h[0, 0] > 0:\n    a[0] = 5\nelse:\n    a[1] = 7", "a"),
    "list in both": (
        "items = []\nif h[0, 0] > 0:\n    items.append(h)\nelse:\n    items.append(h * 2)\ny = items[0]",
        "y, items",
    ),
    "list of constants": ("items = [5]\nif h[0, 0] > 0:\n    items.append(1)\n    items += [2, 3]", "items"),
    "dict in both": ("d = {'k': 1}\nif h[0, 0] > 0:\n    d['k'] = h\nelse:\n    d['k'] = h * 2\ny = d['k']", "y"),
}
EXPRESSIONS = {
    "and": ("y = (h[0, 0] > 0 and h[0, 1] > 0)\nz = h * 2 if y else h", "z, y"),
    "or": ("z = h * 2 if (h[0, 0] > 0 or h[0, 1] > 0) else h", "z"),
    "and or not": ("if not (h[0, 0] > 0 and not h[0, 1] > 0) or h[1, 1] > 5:\n    z = h\nelse:\n    z = -h", "z"),
    "three ands": ("c = h[0, 0] > 0 and h[0, 1] < 0 and h[1, 0] > 0\nz = h if c else -h", "z"),
    "plain and value": (
        "c = True and h[0, 0] > 0\nd = False or h[0, 0] > 0\ne = h[0, 0] > 0 and True\nz = (h if c else -h) + (h if d else -h) * 2 + (h if e else -h)",
        "z",
    ),
    "chained": ("z = h if -0.5 < h[0, 0] < 0.5 else -h", "z"),
    "chained thrice": ("z = h if -2 < h[0, 0] < 0.99 < 1 + h[0, 0] else -h", "z"),
    "plain chain": ("z = 1 if 0 < 2 < 3 else 0\nw = 0 < 3 < 2", "z, w"),
    "nested ternary": ("z = h if h[0, 0] > 0.9 else (h * 2 if h[0, 0] > 0 else h * 3)", "z"),
    "ternary of numbers": ("k = 2 if h[0, 0] > 0 else 3\nz = h * k", "z, k"),
    "plain ternary": ("k = 2 if 1 > 0 else undefined", "k"),
    "short circuit": ("k = None\nz = k is not None and k.foo\nw = k or 7", "z, w"),
}
LOOPS = {
    "rows": ("total = 0\nfor row in h:\n    total = total + row.sum()", "total"),
    "rows in place": ("total = torch.zeros(4)\nfor row in h:\n    total += row", "total"),
    "last": ("for row in h:\n    last = row * 2", "last, row"),
    "range": ("n = h.shape[0]\ny = h[0] * 0\nfor i in range(n):\n    y = y + h[i] * i", "y"),
    "range of three": ("y = 0\nfor i in range(1, h.shape[1], 2):\n    y = y + h[:, i] * i", "y"),
    "enumerate": ("y = 0\nfor i, row in enumerate(h):\n    y = y + row * i", "y"),
    "enumerate from": ("y = 0\nfor i, row in enumerate(h, 5):\n    y = y + row * i", "y"),
    "enumerate start": ("y = 0\nfor i, row in enumerate(h, start=2):\n    y = y + row * i", "y"),
    "zip": ("y = 0\nfor a, b in zip(h, h * 2):\n    y = y + a * b", "y"),
    "zip with list": ("y = 0\nfor a, k in zip(h, [3, 4]):\n    y = y + a * k", "y"),
    "enumerate zip": ("y = 0\nfor i, (a, b) in enumerate(zip(h, h * 2)):\n    y = y + a * b * i", "y"),
    "nested": ("y = 0\nfor row in h:\n    for entry in row:\n        y = y + entry * 2\n    y = y + 1", "y"),
    "number carried": ("n = 0\nfor row in h:\n    n += 1\n    if row[0] > 0:\n        n += 10", "n"),
    "flag": ("found = False\nfor row in h:\n    if row[0] > 0.5:\n        found = True\ny = 1 if found else 2", "y"),
    "two variables": ("a, b = 0, 1\nfor row in h:\n    a, b = b, a + b", "a, b"),
    "unchanged": ("k = 3\ny = 0\nfor row in h:\n    y = row * k", "y, k"),
    "continue": ("y = 0\nfor row in h:\n    if row[0] < 0:\n        continue\n    y = y + row", "y"),
    "continue in else": (
        "y = 0\nfor row in h:\n    if row[0] > 0:\n        y = y + 1\n    else:\n        continue\n    y = y + row",
        "y",
    ),
    "two continues": (
        "y = 0\nfor row in h:\n    if row[0] < 0:\n        continue\n    y = y + 1\n    if row[1] > 0:\n        y = y + 5\n        continue\n    y = y + row",
        "y",
    ),
    "continue of a plain loop": (
        "y = 0\nfor i in [0, 1, 2, 3]:\n    if h[0, i] < 0:\n        continue\n    y = y + h[1, i] * i",
        "y",
    ),
    "plain continue": ("y = 0\nfor i in [0, 1, 2, 3]:\n    if i % 2:\n        continue\n    y = y + h[1, i] * i", "y"),
    "plain break": (
        "y = 0\nfor i in (k for k in [0, 1, 2, 3]):\n    if i == 2:\n        break\n    y = y + h[1, i] * i\nelse:\n    y = 0",
        "y, i",
    ),
    "plain else": ("y = 0\nnumbers = [1, 2]\nfor i in numbers:\n    y = y + h * i\nelse:\n    y = y * 2", "y"),
    "appended": ("out = []\nfor row in h:\n    out.append(row * 2)\ny = torch.stack(out)", "y"),
    "appended twice": (
        "out = []\nfor row in h:\n    out.append(row * 2)\n    out.append(row * 3)\ny = torch.stack(out)",
        "y",
    ),
    "appended in a branch": (
        "out = [h[0]]\nfor row in h:\n    if row[0] > 0:\n        out.append(row)\ny = torch.stack(out)",
        "y",
    ),
    "appended to a list that has some": (
        "out = [h[0]]\nfor row in h:\n    out.append(row)\ny = torch.stack(out)\nz = out[0]",
        "y, z",
    ),
    "appended in two loops": (
        "out = []\nfor row in h:\n    for e in row:\n        out.append(e)\ny = torch.stack(out)",
        "y",
    ),
    "entries set": ("out = [0, 0]\nfor i, row in enumerate(h):\n    out[i] = row.sum()\ny = out[0] - out[1]", "y"),
    "extended": ("out = []\nfor row in h:\n    out.extend([row, row + 1])\ny = torch.cat(out)", "y"),
    "loop over a list that a loop made": (
        "out = []\nfor row in h:\n    out.append(row * 2)\ny = 0\nfor row in out:\n    y = y + row",
        "y",
    ),
    "dict": ("found = {'a': h[0]}\nfor row in h:\n    found['b'] = row\ny = found['a'] + found['b']", "y"),
    "kept from before": ("y = torch.zeros(4)\nfor row in h:\n    if row[0] > 0:\n        y = row", "y"),
    "list kept from before": ("y = [h[0]]\nfor row in h:\n    if row[0] > 0:\n        y = [row]", "y"),
    "kept from an earlier pass": (
        "y = 0\nfor row in h:\n    if row[0] > -5:\n        z = row\n    elif row[1] > 0:\n        z = row * 2\n    y = y + z",
        "y, z",
    ),
    "kept from the first pass": (
        "y = 0\nfirst = True\nfor row in h:\n    if first:\n        z = row.sum()\n        first = False\n    y = y + z",
        "y, z",
    ),
    "another name of a variable": ("y = h[0] * 0\nfor row in h:\n    before = y\n    y = y + row", "before, y"),
    "number of enumerate after": ("for i, row in enumerate(h):\n    y = row\nz = y * i", "z, i"),
    "empty": ("y = h[0]\nfor row in h[:0]:\n    y = y + row", "y"),
    "what was never made": (
        "z = 0\nif h[0, 0] > 0.5:\n    k = h[0]\nfor row in h:\n    if h[0, 0] > 0.5:\n        z = z + k\n    z = z + row",
        "z",
    ),
}
COMPREHENSIONS = {
    "list": ("y = torch.stack([row * 2 for row in h])", "y"),
    "filtered": ("y = torch.stack([h[0] * 0] + [row * 2 for row in h if row[0] > 0])", "y"),
    "two filters": ("y = torch.stack([h[0] * 0] + [row for row in h if row[0] > 0 if row[1] < 0])", "y"),
    "two loops": ("y = torch.stack([e * 2 for row in h for e in row if e > 0 or e <= 0])", "y"),
    "plain over value": ("y = torch.stack([e * k for k in [1, 2] for e in h])", "y"),
    "value over plain": ("y = torch.stack([e * k for e in h for k in [1, 2]])", "y"),
    "plain with a value's filter": ("y = torch.stack([h[0] * 0] + [h[0] * k for k in [1, 2, 3] if h[0, k] > 0])", "y"),
    "range": ("y = torch.stack([h[i] * i for i in range(h.shape[0])])", "y"),
    "enumerate": ("y = torch.stack([row * i for i, row in enumerate(h)])", "y"),
    "nested": ("y = torch.stack([torch.stack([e * 2 for e in row]) for row in h])", "y"),
    "ternary inside": ("y = torch.stack([row if row[0] > 0 else -row for row in h])", "y"),
    "sum": ("y = sum(row * 2 for row in h)", "y"),
    "sum of list": ("y = sum([row * 2 for row in h], h[0])", "y"),
    "list call": ("y = torch.stack(list(row * 2 for row in h))", "y"),
    "plain": ("y = [k * 2 for k in (1, 2, 3) if k % 2]\nz = {k: 1 for k in y}\nw = sum(k for k in y)", "y, z, w"),
    "lazy": ("g = (k * 2 for k in [1, 2, 3])\ny = next(g)\nz = [next(g) for _ in range(2)]", "y, z"),
    "closures": ("fs = [lambda k=k: k for k in (1, 2)]\ny = [f() for f in fs]", "y"),
    "scope": ("row = 5\nys = [row for row in h]\ny = row", "y"),
}
PYTHON = {
    "while": ("n = 0\nwhile n < 3:\n    n += 1\n    if n == 2:\n        continue\n    y = h * n", "y, n"),
    "try": ("try:\n    y = h[0, 0] > 5 or undefined\nexcept NameError:\n    y = h * 2\nz = y + 1", "z"),
    "functions": ("def f(v):\n    return v * 2\ng = lambda v: f(v) + 1\ny = g(h) if True else 0\nz = [f(k) for k in [1]]", "y, z"),
    "closure of a later name": ("def f():\n    return later\nflags = [1]\nfor _ in flags:\n    later = 3\ny = f()", "y"),
    "walrus": ("if (n := 5) > 3:\n    y = n\nz = [m := k for k in [1, 2]]", "y, z, m, n"),
    "with": ("with torch.no_grad() as g, torch.enable_grad():\n    if h[0, 0] > 0:\n        y = h\n    else:\n        y = -h", "y"),
    "match": ("match 3:\n    case 3 if True:\n        y = [h for _ in [1, 2, 3]]\n    case n:\n        y = n", "y"),
    "unpacking": ("values, indices = h.topk(2)\ny = values if values[0, 0] > 0 else indices", "y"),
    "import": ("import math as m\ny = m.pi if m.pi > 3 else 0", "y"),
    "global": ("global shown\nshown = 3 if 1 < 2 else 4\ny = shown", "y"),
    "inner class": ("class A:\n    n = 3 if 2 > 1 else 4\ny = A.n if A.n else 1", "y"),
    "print": ("print('a', 1, sep='-') if 1 else 0\ny = 1", "y"),
    "list methods": ("items = [3, 1]\nitems.sort()\nfor k in items:\n    items[0] = 7\ny = items", "y"),
}  # fmt: skip


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", CONDITIONALS)
def test_conditionals(name, scale):
    """Both branches are in the graph, and the run takes the one that Python takes."""
    check(*CONDITIONALS[name], scale)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expressions(name, scale):
    """`and`, `or`, `not`, conditional expressions and chained comparisons mean what they mean in Python."""
    check(*EXPRESSIONS[name], scale)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", LOOPS)
def test_loops(name, scale):
    """A loop over a value makes the passes that Python makes."""
    check(*LOOPS[name], scale)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", COMPREHENSIONS)
def test_comprehensions(name, scale):
    """A comprehension over values makes the entries that Python makes."""
    check(*COMPREHENSIONS[name], scale)


@pytest.mark.parametrize("name", PYTHON)
def test_python_is_left_alone(name):
    """What has nothing to do with values does what it does outside of a block."""
    check(*PYTHON[name])
