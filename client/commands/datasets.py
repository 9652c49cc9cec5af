"""``nnsight-hpc datasets``, ``fetch``, ``convert`` and ``remove``."""

from __future__ import annotations

from pathlib import Path

import click

from nnsight_hpc.client.app import App, command, pass_app
from nnsight_hpc.client.progress import Progress
from nnsight_hpc.client.tables import print_table
from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.messages import DatasetStatus
from nnsight_hpc.wire.names import check_name


@command()
@pass_app
def datasets(app: App) -> None:
    """List datasets."""
    found = app.client().get("/v1/datasets", list[DatasetStatus])
    rows = [[one.name, _state(one), one.path] for one in found]
    app.answer(found, lambda: print_table(["dataset", "state", "path"], rows, empty="No datasets."))


@command()
@click.argument("name")
@click.option(
    "--to",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    help="The folder in which NAME.zarr is made.  [default: this one]",
)
@pass_app
def fetch(app: App, name: str, folder: Path) -> None:
    """Copy a dataset here, checked; goes on where it stopped."""
    from nnsight_hpc.client.fetch import fetch as copy  # noqa: PLC0415 - loads zarr, which `datasets` does not need

    path = copy(app.client(), check_name(name, of="dataset"), folder.absolute())
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
    from nnsight_hpc.storage import convert_dataset  # noqa: PLC0415 - loads zarr, which `datasets` does not need

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
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_app
def remove(app: App, name: str, yes: bool) -> None:
    """Remove a dataset from the cluster.

    What has been fetched stays.
    """
    client = app.client()
    dataset = client.get(f"/v1/datasets/{check_name(name, of='dataset')}", DatasetStatus)
    if not yes:
        click.confirm(f"Remove {dataset.path}?", abort=True, err=True)
    client.call("DELETE", f"/v1/datasets/{name}", timeout=600)
    app.answer(dataset, lambda: print(f"Removed {dataset.path}."))


def _state(dataset: DatasetStatus) -> str:
    if dataset.complete:
        return "complete"
    if dataset.request is None:
        return "incomplete"
    return f"{'incomplete' if dataset.request.state.ended else 'being written'}: {dataset.request.state.lower()}"
