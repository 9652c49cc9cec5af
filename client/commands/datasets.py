"""``nnsight-hpc ls``, ``fetch``, ``convert`` and ``rm``."""

from __future__ import annotations

import re
import time
from pathlib import Path

import click

from nnsight_hpc.client.app import App, command, note, pass_app
from nnsight_hpc.client.patience import WHILE_WAITING
from nnsight_hpc.client.progress import Progress
from nnsight_hpc.client.session import dataset_clients
from nnsight_hpc.client.tables import Table, age, print_blocks, size
from nnsight_hpc.storage.describe import dataset_names, describe
from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.messages import DatasetStatus
from nnsight_hpc.wire.names import check_name


@command()
@click.option(
    "--in",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path(),
    help="The folder here that is looked into.  [default: this one]",
)
@pass_app
def ls(app: App, folder: Path) -> None:
    """List datasets, on the cluster and here."""
    there = app.client().get("/v1/datasets", list[DatasetStatus])
    found = [describe(folder.absolute(), name) for name in dataset_names(folder)]
    here = [one for one in found if one is not None]
    app.answer(
        {"there": there, "here": here},
        lambda: print_blocks([_table("there", there), _table("here", here)] if there + here else ["No datasets."]),
    )


def _range(_context: click.Context, _parameter: click.Parameter, text: str | None) -> slice | None:
    """What ``a:b`` means, either of which may be absent or negative, as in Python."""
    if text is None:
        return None
    if (ends := re.fullmatch(r"(-?\d+)?:(-?\d+)?", text)) is None:
        raise click.BadParameter("give a range as 1000:2000, :2000 or -1000:")
    return slice(*(None if end is None else int(end) for end in ends.groups()))


@command()
@click.argument("name")
@click.option("--capture", "captures", multiple=True, metavar="NAME", help="Only this capture; repeatable.")
@click.option("--documents", metavar="A:B", callback=_range, help="Only documents A to B - 1.")
@click.option("--tokens", metavar="A:B", callback=_range, help="Only rows A to B - 1.")
@click.option(
    "--to",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    help="The folder in which NAME.zarr is made.  [default: this one]",
)
@pass_app
def fetch(
    app: App, *, name: str, captures: tuple[str, ...], documents: slice | None, tokens: slice | None, folder: Path
) -> None:
    """Copy a dataset here, or a part of it, checked; goes on where it stopped.

    A part is a whole dataset of its own, and only its bytes travel.
    """
    from nnsight_hpc.client.fetch import STREAMS  # noqa: PLC0415 - loads zarr, which `ls` does not need
    from nnsight_hpc.client.fetch import fetch as copy  # noqa: PLC0415
    from nnsight_hpc.client.fetch_part import Wanted, fetch_part  # noqa: PLC0415

    check_name(name, of="dataset")
    wanted, make = Wanted(captures, tokens, documents), dataset_clients(app.cluster, patience=WHILE_WAITING)
    clients = [make(ask=number == 0) for number in range(STREAMS)]
    if wanted.everything:
        path = copy(clients, name, folder.absolute())
    else:
        path = fetch_part(clients, name, folder.absolute(), wanted)
    for client in clients:
        client.close()
    app.answer({"path": str(path)}, lambda: print(path))


@command()
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option("--to", "store", type=click.Choice(["hdf5", "zarr"]), required=True, help="The format of the copy.")
@pass_app
def convert(app: App, dataset: Path, store: str) -> None:
    """Copy a dataset of this machine into the other format.

    DATASET is its folder, or its name where the folder lies in this one. The copy lies beside it and has the same values
    and provenance; after Ctrl-C, the same command goes on with it.
    """
    from nnsight_hpc.storage import convert_dataset  # noqa: PLC0415 - loads zarr, which `ls` does not need

    other = {"hdf5": "zarr", "zarr": "hdf5"}[store]
    source = dataset if dataset.suffix in {".zarr", ".hdf5"} else dataset.with_name(f"{dataset.name}.{other}")
    target = source.with_suffix(f".{store}")
    if source == target:
        raise InvalidInput(f"the dataset is {store} already", where=str(source), next=f"--to {other}")
    with Progress(f"convert {source.stem}") as progress:
        convert_dataset(
            source,
            target,
            lambda done, total: progress.show(f"{done:,} of {total:,} tokens", done=done, total=total),
        )
    app.answer({"path": str(target)}, lambda: print(target))


@command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_app
def rm(app: App, names: tuple[str, ...], yes: bool) -> None:
    """Remove datasets from the cluster.

    What has been fetched stays.
    """
    client = app.client()
    found = [
        client.get(f"/v1/datasets/{check_name(name, of='dataset')}", DatasetStatus) for name in dict.fromkeys(names)
    ]
    if not yes:
        note("\n".join(f"{one.path}  {size(one.bytes)}" for one in found))
        click.confirm("Remove this?", abort=True, err=True)
    for one in found:
        client.call("DELETE", f"/v1/datasets/{one.name}", timeout=600)
    app.answer(found, lambda: print("\n".join(f"Removed {one.path}." for one in found)))


def _table(where: str, found: list[DatasetStatus]) -> Table:
    rows = [
        [one.name, _state(one), size(one.bytes), f"{one.tokens:,}", _captures(one), _age(one), one.path]
        for one in found
    ]
    return Table([where, "state", "size", "tokens", "captures", "age", "path"], rows)


def _captures(dataset: DatasetStatus) -> str:
    """The first of them, and how many more."""
    return f"{dataset.captures[0]} +{more}" if (more := len(dataset.captures) - 1) > 0 else "".join(dataset.captures)


def _age(dataset: DatasetStatus) -> str:
    return age(time.time() - dataset.created) if dataset.created else ""


def _state(dataset: DatasetStatus) -> str:
    if dataset.complete:
        return "complete"
    if dataset.request is None:
        return "incomplete"
    return f"{'incomplete' if dataset.request.state.ended else 'being written'}: {dataset.request.state.lower()}"
