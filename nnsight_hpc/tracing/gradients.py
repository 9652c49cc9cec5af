"""A backward pass as a block: the gradients that are named in it belong to that pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from nnsight_hpc.tracing.recorder import Recorder
    from nnsight_hpc.tracing.value import Value


class Backward:
    """What ``loss.backward()`` returns: nothing to use, but for ``with loss.backward():``."""

    def __init__(self, recorder: Recorder, value: Value) -> None:
        self._recorder, self._value = recorder, value

    def __enter__(self) -> Self:
        self._outer, self._recorder.backward = self._recorder.backward, self._value
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self._recorder.backward = self._outer
