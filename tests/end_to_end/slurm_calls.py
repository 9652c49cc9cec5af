"""Slurm's programs as a user has them on PATH, in small scripts that note each call and can give a wrong answer once."""

from dataclasses import dataclass

PROGRAMS = ("squeue", "sinfo", "scontrol", "sacct", "sacctmgr")
_SCRIPT = """\
#!/bin/sh
echo "$(date +%s.%N) {program} $*" >>{log}
if mv {answer} {answer}.given 2>/dev/null; then exec cat {answer}.given; fi
exec /usr/bin/{program} "$@"
"""


@dataclass(frozen=True)
class Call:
    """One real execution of a program."""

    time: float
    program: str
    arguments: str


class SlurmCalls:
    """A folder for PATH, with what was called from it."""

    def __init__(self, cluster):
        base = cluster.scratch / "slurm-calls"
        self.folder, self._base, self._log = base / "bin", base, base / "log"
        self.folder.mkdir(parents=True, exist_ok=True)
        base.chmod(0o777)  # alice's calls write the log, and take a wrong answer away
        self._log.touch()
        self._log.chmod(0o666)
        for program in PROGRAMS:
            script = self.folder / program
            script.write_text(_SCRIPT.format(program=program, log=self._log, answer=self._answer(program)))
            script.chmod(0o755)

    def since(self, time):
        """All calls from then on."""
        rows = (line.split(" ", 2) for line in self._log.read_text().splitlines())
        calls = [Call(float(at), program, arguments) for at, program, arguments in rows]
        return [call for call in calls if call.time >= time]

    def answer_once(self, program, text):
        """Let the next call of `program` print `text` and end with success."""
        draft = self._base / "draft"
        draft.write_text(text)
        draft.chmod(0o644)
        draft.rename(self._answer(program))

    def answered(self, program):
        """Whether that has happened."""
        return not self._answer(program).exists()

    def _answer(self, program):
        return self._base / f"{program}.answer"
