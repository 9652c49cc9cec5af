"""Slurm's words in sentences: why a job waits and what one can do, and how a job ended.

The codes are those of squeue(1), "JOB REASON CODES" and "JOB STATE CODES", and of
https://slurm.schedmd.com/job_reason_codes.html; Slurm's own word stays in brackets, to look it up.
"""

from __future__ import annotations

import re
import signal

from nnsight_hpc.wire.states import EndCause

_SEE_LIMITS = "see the limits: sacctmgr show qos; sacctmgr show associations user=$USER"
_ADMIN = "ask the cluster's administrators"
_CHANGE = "it will never start so: change the pool"

PENDING: dict[str, tuple[str, str]] = {
    "None": ("Slurm has not looked at the job yet", "it does so within a minute or two"),
    "WaitingForScheduling": ("Slurm has not looked at the job yet", "it does so within a minute or two"),
    "SchedDefer": ("Slurm looks at waiting jobs later, since it is busy", "wait"),
    "CONFIGURING": ("its nodes are being started", "wait some minutes"),
    "NodePowerSaving": ("its nodes are being switched on", "wait some minutes"),
    "Resources": ("next in line, waits for nodes, GPUs or memory to become free", "asking for less starts sooner"),
    "Priority": ("waits behind jobs of higher priority", "a shorter time limit or fewer nodes may start sooner"),
    "BeginTime": ("its earliest start time has not come", "wait: it was submitted for later"),
    "Dependency": ("waits for another job", "see which: scontrol show job JOBID"),
    "DependencyNeverSatisfied": ("waits for a job that can no longer end as wanted", "cancel it and start again"),
    "Reservation": ("its reservation has not begun, or has no free nodes", "see: scontrol show reservation"),
    "ReservationDeleted": ("its reservation was deleted", "change the pool's reservation"),
    "ReservationInvalid": ("its reservation is not valid any more", "change the pool's reservation"),
    "InvalidReservation": ("its reservation does not exist, or is not for you", "change the pool's reservation"),
    "RESV_DEL_HOLD": ("held: its reservation was deleted", "change the pool's reservation"),
    "JobArrayTaskLimit": ("the limit of tasks at a time is reached", "wait for others to end"),
    "Licenses": ("waits for a licence", "see: scontrol show licenses"),
    "BurstBufferResources": ("waits for space in the burst buffer", "see: scontrol show burst"),
    "BurstBufferStageIn": ("its data are being copied to the burst buffer", "wait some minutes"),
    "BurstBufferOperation": ("something failed in the burst buffer", _ADMIN),
    "PowerNotAvail": ("the cluster has no electric power left for it", "wait for other jobs to end"),
    "PowerReserved": ("electric power is reserved for others", "see: scontrol show reservation"),
    "Prolog": ("the site's prolog is running", "wait some minutes"),
    "Cleaning": ("was requeued, and its former run is still being cleaned up", "wait some minutes"),
    "FedJobLock": ("the clusters of the federation agree on where it runs", "wait some minutes"),
    "REQUEUED": ("was requeued", "wait some minutes"),
    "REQUEUE_FED": ("was requeued on another cluster of the federation", "wait some minutes"),
    "REQUEUE_HOLD": ("was requeued and is held", "release it: scontrol release JOBID"),
    "SPECIAL_EXIT": ("was requeued after a special exit code and is held", "release it: scontrol release JOBID"),
    "JobHeldUser": ("held by its owner", "release it: scontrol release JOBID"),
    "JobHeldAdmin": ("held by an administrator", _ADMIN),
    "JobHoldMaxRequeue": ("held, since it was requeued too often", "look at its log, then: scontrol release JOBID"),
    "launch failed requeued held": ("held, since it could not be launched", "look at its log; " + _ADMIN),
    "ReqNodeNotAvail": (
        "nodes that it needs are down, drained or reserved",
        "often a maintenance is near: a shorter time limit may fit before it (scontrol show reservation)",
    ),
    "Nodes required for job are DOWN, DRAINED or reserved": (
        "nodes that it needs are down, drained or reserved",
        "look at them: sinfo -R; another partition may have free ones",
    ),
    "NodeDown": ("a node that it needs is down", "look at it: sinfo -R"),
    "FrontEndDown": ("no front end node is available", _ADMIN),
    "PartitionDown": ("its partition is down", "use another partition, or wait: sinfo -s"),
    "PartitionInactive": ("its partition starts no jobs at the moment", "use another partition, or wait: sinfo -s"),
    "PartitionNodeLimit": ("asks for more nodes than its partition allows", _CHANGE + " (sinfo -s)"),
    "PartitionTimeLimit": ("its time limit is above its partition's", _CHANGE + "'s time (sinfo -o '%P %l')"),
    "PartitionConfig": ("its partition cannot give what it asks for", _CHANGE + " (sinfo -o '%P %D %c %m %G')"),
    "AccountNotAllowed": ("its account may not use this partition", "change the pool's account or partition"),
    "QOSNotAllowed": ("its QOS may not be used here", "change the pool's qos or partition"),
    "InvalidAccount": ("its account does not exist, or is not yours", "change the pool's account"),
    "InvalidQOS": ("its QOS does not exist, or is not yours", "change the pool's qos"),
    "BadConstraints": ("no nodes have what it asks for", _CHANGE + "'s constraint or gres"),
    "Constraints": ("no nodes have what it asks for", _CHANGE + "'s constraint or gres"),
    "AccountingPolicy": ("a limit of your account is reached", _SEE_LIMITS),
    "AssociationJobLimit": ("your account's limit of jobs is reached", _SEE_LIMITS),
    "AssociationResourceLimit": ("a limit of your account is reached", _SEE_LIMITS),
    "AssociationTimeLimit": ("your account's time is used up", _SEE_LIMITS),
    "QOSJobLimit": ("the QOS's limit of jobs is reached", _SEE_LIMITS),
    "QOSResourceLimit": ("a limit of the QOS is reached", _SEE_LIMITS),
    "QOSTimeLimit": ("the QOS's time is used up", _SEE_LIMITS),
    "QOSUsageThreshold": ("your usage is above what the QOS allows", _SEE_LIMITS),
    "InactiveLimit": ("the site's limit for inactive jobs is reached", _ADMIN),
    "JobLaunchFailure": ("could not be launched", "is its folder there, and writable, on the compute nodes?"),
    "SystemFailure": ("Slurm, the network or a file system has failed", _ADMIN),
    "DeadLine": ("cannot end before its deadline", _CHANGE),
    "MaxMemPerLimit": ("asks for more memory than a node or CPU may have", _CHANGE + "'s mem"),
    "MaxMemPerNode": ("asks for more memory than a node may have", _CHANGE + "'s mem"),
    "NonZeroExitCode": ("an earlier run of it failed", "look at its log"),
    "RaisedSignal": ("an earlier run of it was ended by a signal", "look at its log"),
    "TimeLimit": ("an earlier run of it reached its time limit", "look at its log"),
    "OutOfMemory": ("an earlier run of it ran out of memory", "ask for more with mem"),
}
"""Reason (or state) of a waiting job: what it means, and what one can do."""

_ENDED: dict[str, str] = {
    "CANCELLED": "cancelled (scancel)",
    "TIMEOUT": "reached its time limit",
    "PREEMPTED": "preempted by another job",
    "NODE_FAIL": "a node of it failed",
    "OUT_OF_MEMORY": "ran out of memory: ask for more with mem",
    "BOOT_FAIL": "its nodes could not be started",
    "DEADLINE": "reached its deadline",
    "REVOKED": "another cluster of the federation took it",
}
_CAUSES: dict[str, EndCause] = {
    "CANCELLED": EndCause.CANCELLED,
    "TIMEOUT": EndCause.WALLTIME,
    "PREEMPTED": EndCause.PREEMPTED,
    "NODE_FAIL": EndCause.NODE_FAILED,
    "OUT_OF_MEMORY": EndCause.OUT_OF_MEMORY,
    "BOOT_FAIL": EndCause.NODE_FAILED,
    "DEADLINE": EndCause.WALLTIME,
    "REVOKED": EndCause.CANCELLED,
    "COMPLETED": EndCause.DRAINED,
    "FAILED": EndCause.CRASHED,
}
"""The final states of jobs, and what they are to us."""

_LIMIT = re.compile(
    r"(?P<whose>Assoc|QOS|)(?P<kind>Grp|Max|Min)(?P<what>[A-Za-z]+?)"
    r"(?:Per(?P<each>User|Account|Acct|Job|Node))?(?:Limit|NotSatisfied)?\Z"
)
_WHOSE = {"Assoc": "your account", "QOS": "the QOS", "": "the QOS"}
_WHAT = {
    "Cpu": "CPUs",
    "CPU": "CPUs",
    "GRES": "GPUs and the like (GRES)",
    "Node": "nodes",
    "Mem": "memory",
    "Memory": "memory",
    "Jobs": "jobs",
    "Job": "jobs",
    "SubmitJobs": "jobs in the queue",
    "SubmitJob": "jobs in the queue",
    "Wall": "time",
    "WallDuration": "time",
    "Billing": "billed resources",
    "BB": "the burst buffer",
    "Energy": "energy",
    "License": "licences",
    "Unknown": "something that Slurm does not name",
}
_TIMES = {"RunMinutes": "the time of running jobs on {}", "Minutes": "the time on {}"}


def pending_in_words(reason: str) -> str:
    """What a waiting job waits for, from squeue's reason; one that is not known is shown as it is."""
    reason = "None" if reason == "(null)" else reason
    for code, (sentence, action) in PENDING.items():
        if reason == code or re.match(re.escape(code) + r"[ ,;]", reason):
            return "; ".join(part for part in (sentence, action) if part) + f" [{reason}]"
    if match := _LIMIT.match(reason):
        return f"{_limit_in_words(match)} [{reason}]"
    return reason


def cause_of(state: str) -> EndCause | None:
    """Why a job in this state of Slurm's has ended; None when it has not, or when the state is not known here."""
    return _CAUSES.get(state)


def ended_in_words(state: str, reason: str, code: int | None, signal_number: int) -> str:
    """How a job ended, from its final state, squeue's reason, and its exit code and signal, where these are known."""
    if state in _ENDED:
        return _ENDED[state]
    if reason == "JobLaunchFailure":
        return ": ".join(PENDING[reason])
    if code is None:
        return "ended with success" if state == "COMPLETED" else "failed"
    return end_in_words(code, signal_number)


def end_in_words(code: int, signal_number: int) -> str:
    """How a process ended, from its exit code and the number of the signal that ended it (0: none)."""
    if signal_number:
        return f"ended by signal {_signal_name(signal_number)}"
    if code > 128 and _signal_name(code - 128) != str(code - 128):
        return f"failed with exit code {code}, as after signal {_signal_name(code - 128)}"
    return f"failed with exit code {code}" if code else "ended with success"


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else str(number)


def _limit_in_words(match: re.Match[str]) -> str:
    what = _what_in_words(match["what"])
    if match["kind"] == "Min":
        return f"asks for less than {_WHOSE[match['whose']]} wants of {what}; {_CHANGE}"
    each = f" for each {match['each'].replace('Acct', 'Account').lower()}" if match["each"] else ""
    return f"the limit of {_WHOSE[match['whose']]} on {what}{each} is reached; {_SEE_LIMITS}"


def _what_in_words(what: str) -> str:
    for ending, words in _TIMES.items():
        if what.endswith(ending):
            return words.format(_what_in_words(what.removesuffix(ending)))
    return _WHAT.get(what, what)
