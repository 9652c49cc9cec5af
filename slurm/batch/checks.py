"""Checks of what people write into a pool: nothing of it may become a line or an option of its own in a script."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from pathlib import Path


def check_text(value: str, key: str) -> str:
    """`value`, or `InvalidInput` when it is empty or has a line break or another character that cannot be seen."""
    if not value or not value.isprintable():
        raise InvalidInput(
            f"{key} cannot be {value!r}",
            why="it is empty" if not value else "it has a line break or another character that cannot be seen",
        )
    return value


def check_path(path: Path) -> str:
    r"""`path` as text, or `InvalidInput` when it has ``%`` or ``\``, which Slurm and submitit replace in file names."""
    text = check_text(str(path), "the home folder")
    if "%" in text or "\\" in text:
        raise InvalidInput(
            f"the home folder cannot be {text!r}",
            why="Slurm replaces % and \\ in the names of files",
            next="set NNSIGHT_HPC_HOME to a folder whose path has neither",
        )
    return text
