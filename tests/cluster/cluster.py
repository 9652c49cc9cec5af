"""The test cluster as tests see it: a real Slurm cluster, its login nodes and a laptop, on this machine."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from nnsight_hpc.wire.errors import Denied, InvalidInput, NotFound, Unreachable

from . import network, slurm, users
from .cleanup import Record, find, remove, sweep
from .furnishing import furnish
from .hosts import Host, boot
from .layout import BASE, COMPUTE, HOSTS, LAPTOP, SESSION_VARIABLE, SWITCH, Folders, HostSpec
from .process import identify
from .services import services_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

_COMPUTE_NAMES = {spec.name for spec in COMPUTE}
# The shell ends at once, so that the daemon is a child of the host's process 1, which reaps it.
_IN_BACKGROUND = 'log=$1; shift; setsid "$@" >>"$log" 2>&1 & echo $!'


class Cluster:
    """Hosts `laptop`, `login`, `login2`, `n1` and `n2`; make one with `Cluster.up`, or find one with `Cluster.attach`.

    The laptop reaches the login nodes only. Users alice and bob exist on the other hosts, with one home each for all.
    Files have the same path on the machine and on every host.
    """

    def __init__(self, record: Record) -> None:
        self._record = record
        self._folders = Folders(record.folder)
        self._hosts = {name: Host(name, init) for name, init in record.hosts.items()}
        self._daemons: dict[tuple[str, str], int] = {}
        self._readable: list[Path] = []

    # Life

    @classmethod
    def up(
        cls,
        *,
        readable: Iterable[Path] = (),
        slurm_options: Mapping[str, str] | None = None,
        name: str | None = None,
    ) -> Self:
        """Start a cluster, after removing those whose process is gone.

        Parameters
        ----------
        readable
            Further files and folders that the cluster's users must be able to read, wherever they lie.
        slurm_options
            Settings of slurm.conf, as ``{"MinJobAge": "10"}``.
        name
            What `attach` finds it by.

        Raises
        ------
        Denied
            This process is not root.
        Unreachable
            A host or daemon did not start, or a node was not idle in time; shows the ends of the logs.
        """
        if os.geteuid() != 0:
            raise Denied(
                "the test cluster needs root", why="it makes network namespaces and mounts", next="sudo make test"
            )
        sweep()
        session = os.environ.get(SESSION_VARIABLE, "")
        cluster = cls(Record(name or secrets.token_hex(3), identify(os.getpid()), session))
        cluster._readable = list(readable)
        try:
            cluster._create_files(slurm_options or {})
            cluster._start()
        except BaseException:  # Ctrl-C, too
            cluster.down()
            raise
        return cluster

    @classmethod
    def attach(cls, name: str) -> Self:
        """The cluster `name`, started by another process."""
        record = find(name)
        if record is None:
            raise NotFound(f"no test cluster {name} is up", where=str(BASE), next="make cluster")
        return cls(record)

    def keep(self) -> None:
        """Let the cluster live on after this process, until `down` or ``make cluster-down``."""
        self._record.owner = None
        self._record.save()
        for host in self._hosts.values():
            host.detach()

    def down(self) -> None:
        """Remove all of it; safe to call again."""
        for host in self._hosts.values():
            host.power_off()
        remove(self._record)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    # Running programs

    def popen(
        self,
        host: str,
        argv: Sequence[str | Path],
        *,
        user: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        **options: Any,
    ) -> subprocess.Popen[Any]:
        """Start a program on a host; `options` as for `subprocess.Popen`.

        The process object is that of the program: signals reach it. It ends with the host at the latest.

        Parameters
        ----------
        user
            Default: root, the researcher, on the laptop; alice elsewhere.
        env
            Added to a clean login environment (home, user, PATH with the virtual environment's programs).
        cwd
            Default: the user's home.
        """
        name = user or ("root" if host == LAPTOP.name else "alice")
        environment = users.environment(self._folders, host, name) | self._marks() | dict(env or {})
        return self._host(host).popen(argv, user=name, env=environment, cwd=cwd or environment["HOME"], **options)

    def run(
        self,
        host: str,
        argv: Sequence[str | Path],
        *,
        user: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        check: bool = True,
        timeout: float = 120.0,
        input: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on a host to its end, as `popen` starts it, and return what it wrote.

        Raises
        ------
        subprocess.CalledProcessError
            `check` is set and the exit code is not 0; its notes show what the program wrote.
        subprocess.TimeoutExpired
            It took more than `timeout` seconds; it and its process group are killed.
        """
        pipes = {"stdin": subprocess.PIPE if input is not None else subprocess.DEVNULL, "start_new_session": True}
        pipes |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = self.popen(host, argv, user=user, env=env, cwd=cwd, **pipes)
        try:
            out, err = process.communicate(input, timeout)
        except BaseException:  # Ctrl-C, too
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        if check and process.returncode != 0:
            error = subprocess.CalledProcessError(process.returncode, list(map(str, argv)), out, err)
            error.add_note(f"on {host}\nstdout: {out}\nstderr: {err}")
            raise error
        return subprocess.CompletedProcess(argv, process.returncode, out, err)

    # Places

    @property
    def name(self) -> str:
        return self._record.identifier

    @property
    def hosts(self) -> list[str]:
        """The names of all hosts, up or down."""
        return list(HOSTS)

    def is_up(self, host: str) -> bool:
        return self._host(host).init.alive()

    def address(self, host: str) -> str:
        """A login node's address as the laptop reaches it; any other host's only address."""
        return HOSTS[host].outside or HOSTS[host].inside

    def home(self, user: str) -> Path:
        """The home of alice or bob, the same on all hosts of the cluster."""
        return self._folders.home(user)

    @property
    def laptop_home(self) -> Path:
        """Home of root, the researcher, on the laptop. Its .ssh holds the key of alice, and the right host keys."""
        return self._folders.laptop_home

    @property
    def known_hosts(self) -> Path:
        """The laptop's file of right host keys, by name and by address of each login node."""
        return self.laptop_home / ".ssh" / "known_hosts"

    def key(self, user: str) -> Path:
        """Private key of alice, bob, or `stranger`, whom no host lets in; for root, on the laptop."""
        return self._folders.keys / user

    def host_key(self, host: str) -> str:
        """The public host key of a login node: type and base64, as in a known_hosts file after the name."""
        return " ".join(users.host_key(self._folders, host).with_suffix(f".{host}.pub").read_text().split()[:2])

    @property
    def shared(self) -> Path:
        """A folder that every user on every host can read, and root on the machine writes: for models."""
        return self._folders.shared

    @property
    def scratch(self) -> Path:
        """A folder that every user can write, on every host."""
        return self._folders.scratch

    # Slurm

    def sinfo(self) -> dict[str, str]:
        """The state of each node as Slurm sees it (`idle`, `mixed`, `down*`, …)."""
        done = self.run("login", ["sinfo", "--noheader", "-N", "-o", "%N %T"], user="root")
        return dict(line.split() for line in done.stdout.splitlines())

    def wait_idle(self, timeout: float = 120.0) -> None:
        """Wait until every node is idle; `Unreachable` as of `wait_states`."""
        self.wait_states({"idle"}, timeout)

    def wait_states(self, states: set[str], timeout: float) -> None:
        """Wait until every node is in one of `states`.

        Raises
        ------
        Unreachable
            One is not after `timeout` seconds; shows the ends of the logs.
        """

        def reached() -> bool:
            with suppress(subprocess.CalledProcessError):  # slurmctld does not answer yet
                found = self.sinfo()
                return set(found) == _COMPUTE_NAMES and set(found.values()) <= states
            return False

        self._wait(reached, f"a node of the test cluster is not {' or '.join(sorted(states))}", timeout)

    def cancel_all_jobs(self, timeout: float = 120.0) -> None:
        """Cancel every user's jobs, and wait until they are gone from the nodes."""

        def jobs() -> list[str]:
            return self.run("login", ["squeue", "--noheader", "-o", "%A"], user="root").stdout.split()

        running = jobs()
        if running:
            self.run("login", ["scancel", *running], user="root")
            self._wait(lambda: not jobs(), "a cancelled job of the test cluster does not end", timeout)

    # Failures

    def stop_host(self, host: str) -> None:
        """Power failure: every process of the host is gone at once, and it answers nobody."""
        self._host(host).power_off()

    def start_host(self, host: str) -> None:
        """Boot a host that was stopped, with its daemons; does not wait until Slurm thinks that it is idle."""
        self._boot(HOSTS[host])
        self._start_services(host)

    def cut_off(self, host: str) -> None:
        """Pull a host's network cable; what runs on it runs on, and still sees the shared files."""
        network.cut_off(self._host(host))

    def join(self, host: str) -> None:
        """Plug the cable of a host in again."""
        network.join(self._host(host))

    def stop_service(self, host: str, service: str) -> None:
        """Kill a daemon (munged, sshd, slurmctld, slurmd) of a host; what it has started lives on."""
        pid = self._daemons.pop((host, service))
        self.run(host, ["kill", "-KILL", str(pid)], user="root")
        self._wait(lambda: not self._host(host).runs(pid), f"{service} on {host} does not end", 120)

    def start_service(self, host: str, service: str) -> None:
        """Start a daemon of a host, and wait until it answers.

        Raises
        ------
        Unreachable
            It ended, or does not answer within ten seconds; shows the ends of the logs.
        """
        daemon = services_of(self._folders, HOSTS[host])[service]
        script = ["sh", "-c", _IN_BACKGROUND, "sh", str(self._log(host, service)), *daemon.command]
        pid = self._daemons[host, service] = int(self.run(host, script, user="root", cwd="/").stdout)

        def answers() -> bool:
            if not self._host(host).runs(pid):
                raise self._failure(f"{service} on {host} ended")
            return daemon.ready(self._host(host))

        self._wait(answers, f"{service} on {host} does not answer", 120)

    def runs_service(self, host: str, service: str) -> bool:
        """Whether a daemon that was started on a host has not ended."""
        return self._host(host).runs(self._daemons[host, service])

    def log(self, host: str, service: str) -> str:
        """What a daemon has written so far."""
        return self._log(host, service).read_text(errors="replace")

    # How it is made

    def _create_files(self, slurm_options: Mapping[str, str]) -> None:
        self._record.save()
        self._folders.create()
        users.create_keys(self._folders)
        users.write_accounts(self._folders)
        users.create_homes(self._folders)
        users.create_laptop_home(self._folders)
        slurm.write_config(self._folders, slurm_options)

    def _start(self) -> None:
        self._boot(SWITCH)
        network.start_switch(self._hosts[SWITCH.name])
        for spec in HOSTS.values():
            self._boot(spec)
        for name in HOSTS:
            self._start_services(name)
        self.wait_idle()

    def _boot(self, spec: HostSpec) -> None:
        with (self._folders.log / f"{spec.name}.log").open("a") as log:
            host = boot(furnish(self._folders, spec, self._readable), log, self._marks())
        self._hosts[spec.name] = host
        self._record.hosts[spec.name] = host.init
        self._record.save()
        if spec is not SWITCH:
            network.plug_in(self._hosts[SWITCH.name], host, spec)

    def _start_services(self, host: str) -> None:
        for service in services_of(self._folders, HOSTS[host]):
            self.start_service(host, service)

    def _log(self, host: str, service: str) -> Path:
        return self._folders.log / f"{service}.{host}.log"

    def _wait(self, condition: Callable[[], bool], complaint: str, timeout: float) -> None:
        end = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > end:
                raise self._failure(f"{complaint} after {timeout:g} s")
            time.sleep(0.05)

    def _failure(self, complaint: str) -> Unreachable:
        """An error that shows the last lines of every log."""
        logs = {
            path.name: path.read_text(errors="replace").splitlines() for path in sorted(self._folders.log.iterdir())
        }
        ends = "\n".join(line for name, text in logs.items() if text for line in (f"{name}:", *text[-15:]))
        return Unreachable(complaint, where=str(self._folders.log), why=ends)

    def _host(self, name: str) -> Host:
        if name not in self._hosts:
            raise InvalidInput(f"the test cluster has no host {name}", next=f"one of {', '.join(HOSTS)}")
        return self._hosts[name]

    def _marks(self) -> dict[str, str]:
        return {SESSION_VARIABLE: self._record.session} if self._record.session else {}
