"""Work that is spread over several streams: while one waits for the other side, another one brings bytes."""

from __future__ import annotations

from collections import deque
from threading import Thread
from typing import TYPE_CHECKING, TypeVar

from nnsight_hpc.client.tally import Stopped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

S = TypeVar("S")
J = TypeVar("J")


def spread(streams: Sequence[S], jobs: Iterable[J], run: Callable[[S, J], None]) -> None:
    """Do each job on one of the streams; raises what `run` raised on the first of them.

    The first stream is this thread's. The others help: one that fails (it may not log in without a person, say) puts
    its job back and ends, and the first stream, which may do what the others may not, meets the error if there is one.
    """
    waiting = deque(jobs)

    def work(stream: S, *, helps: bool) -> None:
        while waiting:
            try:
                job = waiting.popleft()
            except IndexError:  # another stream was faster
                return
            try:
                run(stream, job)
            except Stopped:
                return
            except Exception:
                waiting.appendleft(job)
                if not helps:
                    raise
                return

    helpers = [
        Thread(target=work, args=(stream,), kwargs={"helps": True}, daemon=True, name="stream")
        for stream in streams[1 : len(waiting)]
    ]
    try:
        for helper in helpers:
            helper.start()
        work(streams[0], helps=False)
        for helper in helpers:
            helper.join()
        work(streams[0], helps=False)  # what a helper has put back in the end
    except BaseException:
        waiting.clear()
        raise
