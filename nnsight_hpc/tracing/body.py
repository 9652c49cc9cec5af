"""What all contexts that record a block share: the block may have to run in another form than it is written in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnsight_hpc.tracing import block_run

if TYPE_CHECKING:
    from types import FrameType, TracebackType


class Body:
    """A context whose block is rewritten where its control flow hangs on values; `_end` is what happens when it is over."""

    _rewritten: block_run.BlockRun | None = None

    def _begin_block(self, frame: FrameType) -> None:
        """The end of ``__enter__``, with the frame that called it; only what cannot fail comes after it."""
        self._rewritten = block_run.enter(frame)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _tb: TracebackType | None
    ) -> bool | None:
        if kind is block_run.Skipped and self._rewritten is not None:
            return self._rewritten.finish(self._end)
        self._end(error)
        return None

    def _end(self, error: BaseException | None) -> None:
        """The end of the block, which raised `error` or None."""
        raise NotImplementedError
