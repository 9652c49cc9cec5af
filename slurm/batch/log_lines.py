"""The lines of one rank out of the log of several: srun and mpirun begin each line with its rank."""

from __future__ import annotations

import re

_LABEL = re.compile(
    r"(?: *(?P<srun>\d+): |\[\d+,(?P<mpirun>\d+)\]<std(?:out|err|diag)>: ?)(?P<line>.*)", re.ASCII | re.DOTALL
)


def of_rank(text: str, rank: int) -> str:
    """What one of several ranks has written, without its label; `text` begins with a whole line.

    Lines without a label are those of the job's script and of what started the ranks.
    """
    labelled = (_LABEL.match(line) for line in text.splitlines(keepends=True))
    return "".join(match["line"] for match in labelled if match and int(match["srun"] or match["mpirun"]) == rank)
