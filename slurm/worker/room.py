"""How many requests may share a forward: as many as there is memory for, of which nobody is made to wait for long."""

from __future__ import annotations

_MOST = 64
_LEAST_TOKENS, _MOST_TOKENS = 256, 4096
"""Beyond some thousand tokens a forward gains nothing by more, and all who share it wait longer."""


class Room:
    """What the model's thread has learnt of the memory that tokens take, and the courier asks by. Safe in both threads.

    Attributes
    ----------
    requests, tokens
        How many may share the next forward.
    """

    def __init__(self) -> None:
        self.requests = _MOST
        self.tokens = _MOST_TOKENS
        self._ceiling = _MOST_TOKENS

    def took(self, tokens: int, memory: int, budget: int) -> None:
        """So many tokens are estimated to take so much memory."""
        self._ceiling = min(_MOST_TOKENS, self._ceiling + self._ceiling // 8)
        self._set(budget * tokens // max(memory, 1))

    def was_too_small(self) -> None:
        """The memory ran out in a forward that several shared."""
        self._ceiling //= 2
        self._set(self._ceiling)

    def _set(self, tokens: int) -> None:
        self._ceiling = max(_LEAST_TOKENS, self._ceiling)
        self.tokens = min(self._ceiling, max(_LEAST_TOKENS, tokens))
