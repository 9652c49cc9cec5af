"""``nnsight-hpc``: the program. Each command is imported when it is used, so that help and quick answers stay quick."""

from __future__ import annotations

import os
import sys
import traceback
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click
import msgspec

from nnsight_hpc.client.app import App, common_options
from nnsight_hpc.wire.errors import HpcError, InvalidInput

if TYPE_CHECKING:
    from collections.abc import Sequence

DEBUG_VARIABLE = "NNSIGHT_HPC_DEBUG"

COMMANDS: dict[str, dict[str, tuple[str, str]]] = {
    "Clusters": {
        "cluster": ("cluster", "Add, list and remove clusters."),
        "connect": ("connection", "Log in once, for all later commands."),
        "disconnect": ("connection", "End what `connect` opened."),
        "status": ("status", "Show the daemon, its pools and its requests."),
        "dashboard": ("dashboard", "Show pools, queue and requests in a browser, live, until Ctrl-C."),
        "doctor": ("doctor", "Check the whole chain, from SSH to a forward on a worker."),
    },
    "Pools": {
        "up": ("up", "Keep a model resident, or change how it is."),
        "plan": ("up", "Print the job that `up` would submit."),
        "resume": ("up", "Start a pool's workers again, after failed starts have held it."),
        "explain": ("explain", "Tell the story of a pool or a request, with times."),
        "logs": ("logs", "Show a pool's newest log, or what a request says."),
        "down": ("pools", "End a pool's workers; what runs has a minute."),
        "gc": ("gc", "Cancel jobs that belong to no pool, and remove what is left over."),
    },
    "Requests": {
        "run": ("requests", "Run a stored graph on a pool."),
        "queue": ("queue", "List the requests that run and those that wait, in the order in which they go."),
        "show": ("queue", "Show how a request stands, and how long it was in each state."),
        "wait": ("requests", "Wait for a request to end."),
        "result": ("requests", "Print or write what a request has saved, once it has completed."),
        "cancel": ("requests", "Cancel a request."),
    },
    "Datasets": {
        "dump": ("dump", "Write a pool's activations over a corpus as a dataset."),
        "dumps": ("dumps", "List dumps: how far they are, and when they will be done."),
        "ls": ("datasets", "List datasets, on the cluster and here."),
        "fetch": ("datasets", "Copy a dataset here, or a part of it, checked; goes on where it stopped."),
        "convert": ("datasets", "Copy a dataset of this machine into the other format."),
        "rm": ("datasets", "Remove datasets from the cluster."),
    },
    "Program": {
        "demo": ("demo", "Show everything on this machine, with a small model."),
        "daemon": ("daemon", "Start, stop and look at the daemon."),
        "bridge": ("bridge", "Relay stdin and stdout to the daemon (what ssh runs)."),
    },
}
"""By heading: each command's module below `commands`, and its short help (a test compares it with the command's own)."""

_MODULES = {name: module for commands in COMMANDS.values() for name, (module, _) in commands.items()}


class Program(click.Group):
    """The root of all commands: loads them by need, and is the one place where errors become words and exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(_MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        if cmd_name not in _MODULES:
            return None
        module = import_module(f"nnsight_hpc.client.commands.{_MODULES[cmd_name]}")
        found: click.Command = getattr(module, cmd_name)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        for heading, commands in COMMANDS.items():
            with formatter.section(heading):
                formatter.write_dl([(name, text) for name, (_, text) in commands.items()], col_max=12)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,  # noqa: ARG002 - errors are always ours to tell
        **extra: Any,
    ) -> Any:
        """Run the program and exit: 0, an error's own code, 2 for a wrong call, 130 after Ctrl-C."""
        arguments = sys.argv[1:] if args is None else list(args)
        try:
            code = super().main(arguments, prog_name or "nnsight-hpc", complete_var, standalone_mode=False, **extra)
            sys.stdout.flush()
        except BaseException as error:  # noqa: BLE001 - no traceback may reach a person
            code = _failed(error, as_json="--json" in arguments)
        sys.exit(code if isinstance(code, int) else 0)


def _failed(error: BaseException, *, as_json: bool) -> int:
    """Say what went wrong; the exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return 130
    if isinstance(error, BrokenPipeError):  # `nnsight-hpc … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1  # click's own code for it
    if isinstance(error, click.ClickException):
        error.show()
        _say_json(InvalidInput(error.format_message()), as_json=as_json)
        return error.exit_code
    told = error if isinstance(error, HpcError) else _unexpected(error)
    print(_coloured(told), file=sys.stderr)
    _say_json(told, as_json=as_json)
    return told.exit_code


def _unexpected(error: BaseException) -> HpcError:
    if isinstance(error, OSError) and error.strerror:
        return HpcError(error.strerror, where=str(error.filename or ""), why=f"{type(error).__name__} {error.errno}")
    if os.environ.get(DEBUG_VARIABLE):
        traceback.print_exception(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return HpcError(
        f"a defect in nnsight-hpc: {type(error).__name__}: {error}",
        where=f"{frame.filename}, line {frame.lineno}",
        next=f"please report it, with what the same command prints under {DEBUG_VARIABLE}=1",
    )


def _coloured(error: HpcError) -> str:
    colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    return (click.style("Error:", fg="red", bold=True) if colour else "Error:") + f" {error}"


def _say_json(error: HpcError, *, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.encode({"error": error.report()}).decode())


def _version(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        from importlib.metadata import version  # noqa: PLC0415 - rarely needed

        print(f"nnsight-hpc {version('nnsight-hpc')}")
        context.exit()


@click.group(cls=Program, params=common_options(), context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version."
)
@click.pass_context
def program(context: click.Context) -> None:
    """Read and change the inside of language models that stay resident on a Slurm cluster.

    Without a cluster, everything happens on this machine (the cluster "local").
    """
    context.ensure_object(App)


def main() -> None:
    program.main()
