"""Random programs: a block gives what plain Python gives on the same tensors, or refuses; it is never wrong in silence."""

import random
import textwrap

from hypothesis import given, note, settings
from hypothesis import strategies as st

from nnsight_hpc.wire.errors import InvalidInput
from tests.tracing.programs import check

SCALES = (1.0, -1.0, 3.0)
ATOMS = ("h[0, 0]", "h[0, 1]", "h[1, 2]", "h[1, 3]", "a", "b", "c", "(t + h[0, 0])", "1", "-2")
HEADS = (
    "for v in h[0]:",
    "for i, v in enumerate(h[1]):",
    "for i in range(h.shape[0]):",
    "for v in [1, 2].copy():",
    "for v in (1, 2):",
    "for v, w in zip(h[0], h[1]):",
    "for v in reversed(h[1]):",
)
START = "a, b, c, t = 1, h[1, 0] * 2, 0.5, torch.tensor(0.25)\nitems, v, w, i = [], 0, 0, 0\n"
END = "\nlast = sum(items, 0)\nsize = len(items)"
NAMES = "a, b, c, t, v, w, i, last, size"
PLAIN_STATEMENTS = ("=", "=", "+=", "append", "short")
NESTING_STATEMENTS = ("if", "if else", "for", "for", "while")
EFFECTS = (
    "d['k'] = X",
    "box.n = X",
    "grow(X)",
    "box.put(X)",
    "seen.append(X)",
    "other.append(X)",
    "y = [grow(v) for v in h[0]]",
)


class _Writer:
    """Writes programs; each choice comes from one source of randomness.

    Parameters
    ----------
    effects
        Whether they change what is no name of the block.
    """

    def __init__(self, seed, *, effects=False):
        self._random = random.Random(seed)
        self._effects = effects
        self._numbers = 0

    def expression(self, depth=2):
        if not depth or self._random.random() < 0.4:
            return self._random.choice(ATOMS)
        left, right = self.expression(depth - 1), self.expression(depth - 1)
        forms = (
            f"({left} {self._random.choice('+-*')} {right})",
            f"({left} if {self.condition(depth - 1)} else {right})",
            f"sum([({left}) * w for w in h[0] if w > {right}], 0)",
            f"{self._random.choice(('min', 'max'))}({left}, {right})",
            f"len([w for w in h[1] if w < {right}])",
        )
        return self._random.choice(forms)

    def condition(self, depth=1):
        left, right = self.expression(depth), self.expression(depth)
        forms = [f"({left} {self._random.choice(('<', '>', '<='))} {right})", f"(-0.5 < {left} <= {right})"]
        if depth:
            one, other = self.condition(depth - 1), self.condition(depth - 1)
            forms += [f"(not {one})", f"({one} and {other})", f"({one} or {other})"]
            forms += [f"any(w > {left} for w in h[0])", f"all([{one}, {other}])"]
        return self._random.choice(forms)

    def body(self, depth, *, loop=False):
        lines = [self.statement(depth, loop=loop) for _ in range(self._random.randint(1, 3))]
        if loop and self._random.random() < 0.5:
            lines.insert(self._random.randint(0, len(lines)), self.jump(depth))
        return lines

    def jump(self, depth):
        jump = self._random.choice(("continue", "break"))
        before = self.body(0) if self._random.random() < 0.4 else []
        inner = [*before, jump]
        if depth and self._random.random() < 0.4:
            inner = [_under(f"if {self.condition()}:", inner), *self.body(0)]
        return _under(f"if {self.condition()}:", inner)

    def statement(self, depth, *, loop):
        kind = self._random.choice(PLAIN_STATEMENTS + NESTING_STATEMENTS if depth else PLAIN_STATEMENTS)
        if self._effects and self._random.random() < 0.15:
            return self._random.choice(EFFECTS).replace("X", self.expression(1))
        if kind in ("=", "+="):  # `+=` of a tensor of before is refused
            return f"{self._random.choice('abct' if kind == '=' else 'abc')} {kind} {self.expression()}"
        if kind == "append":
            return f"items.append({self.expression()})"
        if kind == "short":
            return f"{self.condition()} {self._random.choice(('and', 'or'))} items.append({self.expression(1)})"
        return getattr(self, f"_{kind.replace(' ', '_')}")(depth - 1, loop=loop)

    def _if(self, depth, *, loop):
        return _under(f"if {self.condition()}:", self.body(depth, loop=loop))

    def _if_else(self, depth, *, loop):
        return self._if(depth, loop=loop) + "\n" + _under("else:", self.body(depth, loop=loop))

    def _for(self, depth, *, loop):
        return _under(self._random.choice(HEADS), self.body(depth, loop=True)) + self._otherwise(loop=loop)

    def _while(self, depth, *, loop):
        self._numbers += 1
        count = f"n{self._numbers}"
        head = f"{count} = 0\nwhile {self.condition()} and {count} < 3:"
        return _under(head, [f"{count} += 1", *self.body(depth, loop=True)]) + self._otherwise(loop=loop)

    def _otherwise(self, *, loop):
        return "\n" + _under("else:", self.body(0, loop=loop)) if self._random.random() < 0.3 else ""


def _under(head, lines):
    return head + "\n" + textwrap.indent("\n".join(lines), "    ")


class Box:
    """Has an attribute, and a method that changes it."""

    def __init__(self):
        self.n = 0

    def put(self, item):
        self.n = self.n + item


def _objects():
    total = [0]

    def grow(item):
        total.append(item)
        return total[-1]

    seen = []
    return {"d": {"k": 0}, "box": Box(), "grow": grow, "total": total, "seen": seen, "other": seen}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(SCALES))
def test_random_programs(seed, scale):
    """Whatever is nested in whatever: names, and lists that are filled, are what Python makes of them."""
    program = START + "\n".join(_Writer(seed).body(2)) + END
    note(program)
    check(program, NAMES, scale)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(SCALES))
def test_random_effects(seed, scale):
    """Programs that change attributes, entries, and what helper functions keep, do what Python does, or are refused."""
    program = START + "\n".join(_Writer(seed, effects=True).body(2)) + END
    end = "\nk, n, t, s, o = d['k'], box.n, sum(total, 0), sum(seen, 0), sum(other, 0)"
    note(program)
    try:
        check(program + end, NAMES + ", k, n, t, s, o", scale, make=_objects)
    except InvalidInput as refused:
        if "where a value decides" not in refused.what and "depends on a value" not in refused.what:
            raise
