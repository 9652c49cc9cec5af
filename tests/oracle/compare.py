"""How the tests compare with the oracle: bit for bit in one process, within stated tolerances where ranks share the work.

Ranks add the parts of a sum in another order than one process does, so their float32 values differ in the last bits, and
what is computed from these differs by more. Numbers that are no floats (tokens, indices, masks, shapes) must always be equal.
"""

import math
from contextlib import contextmanager

import torch

ON_RANKS = {torch.float32: 5e-5, torch.float64: 5e-5, torch.bfloat16: 2e-2}
"""By how much an entry of a tensor from ranks may be off, as part of the tensor's largest. Seen in float32: 7e-6."""
NUMBER_ON_RANKS = 1e-3
"""By how much a single number may be: often a sum over thousands of terms that cancel one another. Seen: 5e-5."""
_ZERO = 1e-7
"""Of a tensor of zeros."""
_HUGE = 1e30  # a mask's "minus infinity" is no scale for what stands beside it
_exact = True


@contextmanager
def within_tolerances():
    """While active, values come from ranks; for all threads."""
    global _exact  # noqa: PLW0603 - how the one test that runs just now compares
    _exact = False
    try:
        yield
    finally:
        _exact = True


def same(got, expected):
    """Whether two nested values are the same; an output of transformers counts as its fields by name."""
    if isinstance(expected, torch.Tensor):
        alike = isinstance(got, torch.Tensor) and got.dtype == expected.dtype and got.shape == expected.shape
        return alike and (torch.equal(got, expected) if _exact else _near(got.cpu(), expected.cpu()))
    if isinstance(expected, dict):
        return list(got) == list(expected) and all(same(got[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return len(got) == len(expected) and all(map(same, got, expected))
    if isinstance(expected, float) and not _exact:
        return math.isclose(got, expected, rel_tol=NUMBER_ON_RANKS, abs_tol=_ZERO)
    return got == expected


def close(got, expected, *, atol=2e-5, rtol=2e-5):
    """Assert that tensors are so close that matrices of other shapes explain it; on ranks, `same` will do."""
    if _exact or not same(got, expected):
        torch.testing.assert_close(got, expected, atol=atol, rtol=rtol)


def _near(got, expected):
    if not expected.is_floating_point():
        return torch.equal(got, expected)
    part, off = ON_RANKS[expected.dtype] if expected.ndim else NUMBER_ON_RANKS, (got - expected).abs()
    magnitudes = expected[expected.abs() < _HUGE].abs()
    scale = magnitudes.max().item() if len(magnitudes) else 0.0
    near = torch.allclose(got, expected, rtol=part, atol=max(part * scale, _ZERO), equal_nan=True)
    if not near:
        print(f"off by {off.max():.2g} of {scale:.2g} in {int((off > part * scale).sum())} of {off.numel()} entries")
    return near
