"""Agreement on errors, cancelling and time limits: no rank waits for another that has failed.

While a request runs, every collective is preceded by a word (`words`), and the request's end is a word, too. All post FINE
in normal running. A rank that fails posts FAILED instead, once to each communicator that it shares with others, and so
meets its peers at whatever word they are at. They unwind and do the same, all exchange what happened, all raise one
and the same error, and all are ready for the next request.

Why this cannot hang: a rank waits at one word at a time. A word that is not answered waits for some rank that is elsewhere:
computing (it will come), failed (it has posted here), or waiting at a word itself. Following these, one comes to a rank that
has failed. Each rank posts exactly one failing word to each communicator, and none can be a word ahead of another.

What the guard cannot heal is an error inside a collective, after its word: a broken network, a CUDA error that NCCL meets,
an exception that a signal raises just there (workers take signals in another thread). Then the watchdog or the launcher ends
the job.

An exception that comes out of a collective is not asked for its type: autograd and the dispatcher of torch may have
wrapped it on the way through C++, and a library may have swallowed it. The guard remembers what it heard.
"""

from __future__ import annotations

import logging
import traceback
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch

from nnsight_hpc.parallel.progress import Progress
from nnsight_hpc.parallel.words import Channel, Operation, Step, Word
from nnsight_hpc.wire.errors import ErrorReport, HpcError, ReplicaFailed, RequestCancelled, from_report

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nnsight_hpc.parallel.mpi import MPI
    from nnsight_hpc.parallel.world import World

T = TypeVar("T")
_NOTHING = ErrorReport("", "")
logger = logging.getLogger(__name__)


class PeerFailed(RuntimeError):
    """Another rank cannot go on. It ends what this rank was doing; `Guard.run` turns it into the error of all ranks."""


class Stop(NamedTuple):
    """Why a request is to end although nothing failed: CANCELLED or TIME_LIMIT, and the error to raise."""

    word: Word
    error: HpcError


class Guard:
    """The words of one world.

    Attributes
    ----------
    progress
        What the watchdog looks at.
    """

    def __init__(self, world: World) -> None:
        self.progress = Progress()
        self._world = world
        self._all_ranks = Channel(world.comm, self.progress)
        self._channels = [self._all_ranks]
        self._opened = 0
        self._messages = world.comm.Dup()
        self._stop: Callable[[], Stop | None] = _never
        self._heard = Word.FINE
        self._said = (Word.FINE, _NOTHING)

    def open(self, comm: MPI.Intracomm) -> tuple[Channel, int]:
        """The channel for the words of a communicator, and the communicator's number there; collective over it.

        All communicators of all ranks have one channel, which is that of the request's end, too: so ranks that are about
        to use different ones of them, or none any more, hear that of one another.
        """
        if comm.size == self._world.size:
            self._opened += 1
            return self._all_ranks, self._opened
        channel = Channel(comm, self.progress)
        self._channels.append(channel)
        return channel, 0

    def close(self, channel: Channel) -> None:
        """Give a channel back; collective over its communicator."""
        if channel is not self._all_ranks:
            self._channels.remove(channel)
            channel.close()

    def before(self, step: Step, channel: Channel | None = None) -> None:
        """Agree that all ranks of a channel (default: all) are well and about to take one step. Nothing between requests.

        Call it when all memory that the step needs is allocated, so that running out of memory is agreed on, too.

        Raises
        ------
        PeerFailed
            Some rank is not well, wants to stop, or is about to take another step.
        """
        if not self.progress.running.is_set():
            return
        if self._heard:
            raise PeerFailed("the request has ended on another rank")
        channel, stop = channel or self._all_ranks, self._stop()
        heard = channel.exchange(stop.word if stop else Word.FINE, step)
        self.progress.words += 1
        if heard:
            if heard is Word.APART:
                self._said = heard, ErrorReport("HpcError", f"the ranks do different things: one was at {step}")
            elif stop:
                self._said = stop.word, stop.error.report()
            self._leave(heard, but=channel)
            raise PeerFailed(f"the ranks stop at {step}: {heard.name}")

    def run(self, function: Callable[[], T], stop: Callable[[], Stop | None] | None = None) -> T:
        """Run a function on all ranks at once (each calls this), to the result of each or to one error of all.

        Parameters
        ----------
        stop
            Asked at each word: why the request is to end now, if it is. May differ between ranks, and be given on one.

        Raises
        ------
        HpcError
            The function failed on some rank, or was stopped; the same error on all ranks. It is the failed rank's own,
            with the rank and its node added where not all ranks failed alike.
        """
        self._stop, self._heard, self._said = stop or _never, Word.FINE, (Word.FINE, _NOTHING)
        self.progress.running.set()
        leaving = None
        try:
            result = function()
            self.before(Step(Operation.END))
        except BaseException as error:  # noqa: BLE001 - whatever it was, the others must hear of it
            if not self._heard:
                word = Word.CANCELLED if isinstance(error, RequestCancelled) else Word.FAILED
                self._said = word, _report(error)
                self._leave(word)
            elif isinstance(error, ReplicaFailed):  # as it cleared up, after another rank had failed
                self._said = Word.FAILED, _report(error)
            _drop_frames(error)
            leaving = None if isinstance(error, Exception) else error
            agreed = self._agreed()
        else:
            return result
        finally:
            self._stop = _never
            self.progress.running.clear()
        try:
            raise leaving or agreed
        finally:  # the error's traceback has this frame, which is not to have the error: a circle lives until it is collected
            del leaving, agreed

    def _leave(self, word: Word, but: Channel | None = None) -> None:
        """Give the request up: meet the peers of every channel at their word, but of the one where all just heard it."""
        self._heard = word
        posted = [
            (channel, channel.post(word, Step(Operation.END))) for channel in self._channels if channel is not but
        ]
        for channel, request in posted:
            channel.wait(request)

    def _agreed(self) -> HpcError:
        """The error of all ranks, after all have said what they know."""
        with self.progress.lock:
            everyone = self._messages.allgather(self._said)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return agreed_error(everyone, [*map(self._world.name, range(self._world.size))])


def agreed_error(everyone: Sequence[tuple[Word, ErrorReport]], names: Sequence[str]) -> HpcError:
    """One error from what each rank has to say itself (FINE: nothing); the same on whichever rank this is called.

    That a rank cannot go on at all counts more than anything else: the replica ends.
    """
    said = {name: report for name, (word, report) in zip(names, everyone, strict=True) if word}
    worst, first = max(everyone, key=lambda one: (one[1].kind == ReplicaFailed.__name__, one[0]))
    error = from_report(first)
    alike = [name for name, report in said.items() if report == first]
    if worst >= Word.FAILED and len(alike) < len(names):
        others = [f"{name}: {report.what}" for name, report in said.items() if report != first]
        error.why = "\n".join(
            filter(None, [error.why, f"raised by {', '.join(alike)} (of {len(names)} ranks)", *others])
        )
    return error


def _report(error: BaseException) -> ErrorReport:
    if isinstance(error, HpcError):
        return error.report()
    if isinstance(error, Exception):  # others leave on purpose
        logger.error("a request failed in an unexpected way", exc_info=error)
    name = type(error).__name__
    return ErrorReport("ExecutionFailed", f"{name}: {error}", where="the worker", exception=name)


def _drop_frames(error: BaseException | None) -> None:
    """Free what the frames of a traceback hold (activations), and of those that led to it."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        following = error.__cause__ or error.__context__
        error.__cause__ = error.__context__ = None
        error = following


def _never() -> None:
    return None
