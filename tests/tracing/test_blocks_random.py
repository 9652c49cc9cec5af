"""Random programs: a block gives what plain Python gives on the same tensors."""

import random
import textwrap

from hypothesis import given, note, settings
from hypothesis import strategies as st

from tests.tracing.programs import check

SCALES = (1.0, -1.0, 3.0)
ATOMS = ("h[0, 0]", "h[0, 1]", "h[1, 2]", "h[1, 3]", "a", "b", "c", "1", "-2")
HEADS = ("for v in h[0]:", "for i, v in enumerate(h[1]):", "for i in range(h.shape[0]):", "for v in [1, 2].copy():")
START = "a, b, c = 1, h[1, 0] * 2, 0.5\nitems = []\n"
END = "\nlast = sum(items, 0)"


class _Writer:
    """Writes programs; each choice comes from one source of randomness."""

    def __init__(self, seed):
        self._random = random.Random(seed)

    def expression(self, depth=2):
        if not depth or self._random.random() < 0.4:
            return self._random.choice(ATOMS)
        left, right = self.expression(depth - 1), self.expression(depth - 1)
        forms = (
            f"({left} {self._random.choice('+-*')} {right})",
            f"({left} if {self.condition(depth - 1)} else {right})",
            f"sum([({left}) * w for w in h[0] if w > {right}], 0)",
        )
        return self._random.choice(forms)

    def condition(self, depth=1):
        left, right = self.expression(depth), self.expression(depth)
        forms = [f"({left} {self._random.choice(('<', '>', '<='))} {right})", f"(-0.5 < {left} <= {right})"]
        if depth:
            one, other = self.condition(depth - 1), self.condition(depth - 1)
            forms += [f"(not {one})", f"({one} and {other})", f"({one} or {other})"]
        return self._random.choice(forms)

    def body(self, depth):
        return [self.statement(depth) for _ in range(self._random.randint(1, 3))]

    def statement(self, depth):
        kind = self._random.choice(("=", "=", "+=", "append", "if", "if else", "for", "continue")[: 8 if depth else 4])
        if kind in ("=", "+="):
            return f"{self._random.choice('abc')} {kind} {self.expression()}"
        if kind == "append":
            return f"items.append({self.expression()})"
        inner = self.body(depth - 1)
        if kind == "if":
            return _under(f"if {self.condition()}:", inner)
        if kind == "if else":
            return _under(f"if {self.condition()}:", inner) + "\n" + _under("else:", self.body(depth - 1))
        early = [f"if {self.condition()}:\n    continue"] if kind == "continue" else []
        return _under(self._random.choice(HEADS), early + inner)


def _under(head, lines):
    return head + "\n" + textwrap.indent("\n".join(lines), "    ")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(SCALES))
def test_random_programs(seed, scale):
    """Whatever is nested in whatever: names, and lists that are filled, are what Python makes of them."""
    program = START + "\n".join(_Writer(seed).body(2)) + END
    note(program)
    check(program, "a, b, c, last", scale)
