"""What every command shares: the chosen cluster, how to answer, and the options that say so."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click
import msgspec

from nnsight_hpc.client.completion import cluster_names

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nnsight_hpc.client.patience import PatientClient


class App:
    """The options that hold for all commands, as given before or after the command's name."""

    def __init__(self) -> None:
        self.cluster: str | None = None
        self.json = False

    def client(self, *, pool: str | None = None, start: bool = True, patience: float = 0.0) -> PatientClient:
        """A client of the chosen cluster's daemon; where none was named, of the one that `pool`'s definition names."""
        from nnsight_hpc.client import config  # noqa: PLC0415 - `--help` needs neither profiles nor a connection
        from nnsight_hpc.client.session import connect  # noqa: PLC0415

        self.cluster = self.cluster or config.load().bound(pool)
        return connect(self.cluster, start=start, patience=patience)

    @property
    def program(self) -> str:
        """How the next command begins that is to talk to the same cluster."""
        return f"nnsight-hpc -c {self.cluster}" if self.cluster else "nnsight-hpc"

    def answer(self, message: msgspec.Struct | Sequence[Any] | dict[str, Any], as_text: Callable[[], object]) -> None:
        """Print a command's result on stdout: JSON with ``--json``, else what `as_text` prints."""
        if self.json:
            print(msgspec.json.format(msgspec.json.encode(message)).decode())
        else:
            as_text()


def note(text: str) -> None:
    """Say something that is not the command's result."""
    print(text, file=sys.stderr, flush=True)


def _set_cluster(context: click.Context, _parameter: click.Parameter, value: str | None) -> None:
    app = context.ensure_object(App)
    app.cluster = value or app.cluster


def _set_json(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    app = context.ensure_object(App)
    app.json = value or app.json


def common_options() -> list[click.Parameter]:
    """``--cluster`` and ``--json``, which the program and each of its commands take."""
    return [
        click.Option(
            ["-c", "--cluster"],
            expose_value=False,
            callback=_set_cluster,
            metavar="NAME",
            shell_complete=cluster_names,
            help="The cluster to talk to; else the pool's own, $NNSIGHT_HPC_CLUSTER, the configuration's default, or local.",
        ),
        click.Option(
            ["--json"],
            is_flag=True,
            expose_value=False,
            callback=_set_json,
            help="Print the result, and errors, as JSON.",
        ),
    ]


class HpcCommand(click.Command):
    """A command with the common options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += common_options()


class HpcGroup(click.Group):
    """Commands below a command (``cluster add``)."""

    command_class = HpcCommand


def command(name: str | None = None, **kwargs: Any) -> Callable[[Callable[..., Any]], HpcCommand]:
    return click.command(name, cls=HpcCommand, **kwargs)


pass_app = click.make_pass_decorator(App, ensure=True)
