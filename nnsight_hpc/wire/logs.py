"""The one form in which our programs log: a JSON object a line, which tools read as it is and people through `readable`.

::

    {"time":"2026-11-22T20:15:03.120Z","level":"INFO","program":"daemon","process":4711,
     "logger":"nnsight_hpc.daemon.jobs","text":"replica smol-1 is job 812","replica":"smol-1","job":"812"}

Other things stand between such lines: what the interpreter, MPI or Slurm print. They are left as they are.
"""

from __future__ import annotations

import logging
import os
from datetime import UTC, datetime
from functools import partial
from typing import Any

import msgspec

_ABOUT = ("request", "pool", "replica", "job", "incident")
"""What a record may name with ``extra=``, so that all that concerns one of them can be picked out."""
_BEGINS = '{"time":"'


class LogEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line. `error` is a traceback; the fields after it name what the line is about."""

    time: datetime
    level: str
    program: str
    process: int
    logger: str
    text: str
    error: str = ""
    request: str = ""
    pool: str = ""
    replica: str = ""
    job: str = ""
    incident: str = ""


class _JsonLines(logging.Formatter):
    def __init__(self, program: str, replica: str) -> None:
        super().__init__()
        self._entry = partial(LogEntry, program=program, process=os.getpid())
        self._usual = {"replica": replica}

    def format(self, record: logging.LogRecord) -> str:
        about: dict[str, Any] = {name: str(getattr(record, name, self._usual.get(name, ""))) for name in _ABOUT}
        entry = self._entry(
            time=datetime.fromtimestamp(int(record.created * 1000) / 1000, UTC),
            level=record.levelname,
            logger=record.name,
            text=_as_utf8(record.getMessage()),
            error=_as_utf8(self.formatException(record.exc_info)) if record.exc_info else "",
            **about,
        )
        return msgspec.json.encode(entry).decode()


def _as_utf8(text: str) -> str:
    """Names of files may hold bytes that are no UTF-8, which JSON cannot say."""
    return text.encode("utf-8", "backslashreplace").decode()


def log_as_json(
    program: str, *, replica: str = "", handler: logging.Handler | None = None, level: int = logging.INFO
) -> None:
    """Have this process log to `handler`, or else to its standard error, a JSON line for each record of at least `level`.

    Parameters
    ----------
    program
        ``daemon`` or ``worker``.
    replica
        The replica that all lines of a worker are about.
    """
    handler = handler or logging.StreamHandler()
    handler.setFormatter(_JsonLines(program, replica))
    logging.basicConfig(level=level, handlers=[handler])


def readable(text: str) -> str:
    """The lines of a log as people read them, in local time; what is no JSON line of ours stays as it is.

    The label that srun and mpirun put before a rank's lines stays before each line that comes of one.
    """
    return "".join(_readable(line) for line in text.splitlines(keepends=True))


def _readable(line: str) -> str:
    label, begins, rest = line.partition(_BEGINS)
    if not begins:
        return line
    try:
        entry = _DECODER.decode(begins + rest)
    except (msgspec.DecodeError, UnicodeEncodeError):  # a line like ours, or a part of one
        return line
    time = f"{entry.time.astimezone():%Y-%m-%d %H:%M:%S}.{entry.time.microsecond // 1000:03d}"
    said = f"{time} {entry.level} {entry.logger}: {entry.text}" + (f"\n{entry.error}" if entry.error else "")
    return "\n".join(label + part for part in said.split("\n")) + ("\n" if line.endswith("\n") else "")


_DECODER = msgspec.json.Decoder(LogEntry)
