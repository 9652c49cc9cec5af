"""What goes wrong on a worker, in words for the person whose request it was."""

from __future__ import annotations

import logging

import torch

from nnsight_hpc.wire.errors import ErrorReport, ExecutionFailed, HpcError, ReplicaFailed

_MEMORY = "save less (a mean, some positions), use a shorter input, or a pool with more memory"
logger = logging.getLogger(__name__)


def report_of(error: Exception) -> ErrorReport:
    """The report of what a request raised. What is not an `HpcError` is logged with its traceback."""
    if is_out_of_memory(error):
        detail = error.where if isinstance(error, HpcError) else ""
        return ExecutionFailed(
            "the worker has not enough memory for this request",
            where=detail or "the worker",
            why=_first_line(error),
            next=_MEMORY,
            exception="MemoryError",
        ).report()
    if isinstance(error, HpcError):
        return error.report()
    logger.error("a request failed in an unexpected way", exc_info=error)
    name = type(error).__name__
    return ExecutionFailed(f"{name}: {error}", where="the worker", exception=name).report()


def is_fatal(error: Exception) -> bool:
    """Whether the worker cannot go on: after a CUDA error (not: memory) every later call of the process fails.

    See "Error Checking" in NVIDIA's CUDA C++ Programming Guide: such errors are sticky.
    """
    if is_out_of_memory(error) or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        logger.exception("the GPU does not work any more")
        return True
    return False


def end_of_gpu(report: ErrorReport, where: str) -> ReplicaFailed:
    """Why a worker ends after an error that `is_fatal`."""
    return ReplicaFailed("the GPU does not work any more after a failed request", where=where, why=report.what)


def changed_weights(where: str) -> ReplicaFailed:
    """Why a worker ends whose weights are not what they were; nothing that is known of can do that."""
    return ReplicaFailed("a request changed the weights of the resident model", where=where)


def free_memory() -> None:
    """Give cached GPU memory back after a failure, so that the next request finds all there is."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """Whether a request needed more memory than there is."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, ExecutionFailed) and error.exception == "MemoryError":
        return True
    return "DefaultCPUAllocator" in str(error)  # torch raises a plain RuntimeError for the CPU's memory


def _first_line(error: Exception) -> str:
    text = error.what if isinstance(error, HpcError) else str(error)
    return text.split("\n", 1)[0] or type(error).__name__
