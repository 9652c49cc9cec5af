"""``nnsight-hpc dump``: dumps are sent by ``dump POOL CORPUS``, and told what to do by ``dump VERB NAME``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nnsight_hpc.client.app import App, HpcGroup, note, pass_app
from nnsight_hpc.client.commands.dumps import cancel, pause, repair, resume, status, verify
from nnsight_hpc.client.commands.sending_options import NEEDS, PRIORITY
from nnsight_hpc.client.completion import pool_names
from nnsight_hpc.client.dumps import fetch_plan, send_dump
from nnsight_hpc.client.patience import WHILE_WAITING
from nnsight_hpc.client.tables import Table, duration, print_blocks, size
from nnsight_hpc.client.waiting import check_completed, wait_for_request
from nnsight_hpc.client.words import dump_words
from nnsight_hpc.storage.corpus import read_corpus
from nnsight_hpc.wire.messages import DatasetStatus, DumpPlan, DumpSpec, RequestStatus
from nnsight_hpc.wire.names import check_name

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from nnsight_hpc.wire.messages import DatasetFormat


class _Dump(HpcGroup):
    """What does not begin with a verb is sent: ``dump POOL CORPUS`` is ``dump run POOL CORPUS``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        pool, *_ = self.commands["run"].params
        return [*super().shell_complete(ctx, incomplete), *pool.shell_complete(ctx, incomplete)]


@click.group(cls=_Dump)
def dump() -> None:
    r"""Write a pool's activations over a corpus as a dataset.

    \b
    dump POOL CORPUS --capture POINT --name NAME    has it written (as `dump run`, which
                                                    also takes a pool named as a verb)
    dump VERB NAME                                  looks at a dump, or steers it
    """


for verb in (status, pause, resume, cancel, verify, repair):
    dump.add_command(verb)


@dump.command("run", short_help="What `dump POOL CORPUS` does.")
@click.argument("pool", shell_complete=pool_names)
@click.argument("corpus", type=click.Path(path_type=Path))
@click.option(
    "--capture",
    "captures",
    multiple=True,
    required=True,
    metavar="POINT",
    help="A point of the model, as 'model.layers.*.output' (* is any one part); repeatable.",
)
@click.option("--name", required=True, metavar="NAME", help="The dataset's name.")
@click.option("--text-field", default="text", show_default=True, help="Where a line of a .jsonl corpus has its text.")
@click.option(
    "--dtype", default="auto", show_default=True, help="How activations are stored; auto: as the model computes them."
)
@click.option(
    "--context", type=click.IntRange(1), default=1024, show_default=True, help="Tokens kept of each document."
)
@click.option("--stride", type=click.IntRange(1), help="Keep all of longer documents, in windows so many tokens apart.")
@click.option("--packed", is_flag=True, help="Join all documents, and cut them where the context ends.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["zarr", "hdf5"]),
    default="zarr",
    show_default=True,
    help="How the dataset is written.",
)
@click.option("--dry-run", is_flag=True, help="Write nothing: say what would be written, and how long it would take.")
@click.option("--no-wait", is_flag=True, help="Return when the request is accepted.")
@NEEDS
@PRIORITY
@click.option(
    "--idempotency-key",
    metavar="TEXT",
    help="Dump it once: under the same key, it is the dump that is there already.",
)
@pass_app
def run(
    app: App,
    /,
    *,
    pool: str,
    corpus: Path,
    captures: tuple[str, ...],
    name: str,
    text_field: str,
    dtype: str,
    context: int,
    stride: int | None,
    packed: bool,
    form: DatasetFormat,
    dry_run: bool,
    no_wait: bool,
    idempotency_key: str | None,
    **sending: Any,
) -> None:
    """Write a pool's activations over a corpus as a dataset.

    CORPUS is a .txt file with one document a line, .jsonl, .parquet, a Hugging Face dataset saved on disk (or an .arrow
    file of one), or token ids in .npy.
    """
    check_name(pool, of="pool")
    check_name(name, of="dataset")
    documents = read_corpus(corpus, text_field=text_field)
    spec = DumpSpec(
        name=name,
        captures=captures,
        dtype=dtype,
        format=form,
        context=context,
        stride=stride or 0,
        packed=packed,
        measure=dry_run,
        corpus_fingerprint=documents.fingerprint,
        command=shlex.join(["nnsight-hpc", *sys.argv[1:]]),
    )
    client = app.client(pool=pool, patience=WHILE_WAITING)
    note(f"Sends {documents.documents} documents, {size(len(documents.lines))}.")
    sent = send_dump(client, spec, documents.lines, pool, idempotency_key=idempotency_key, **sending)
    if no_wait and not dry_run:
        app.answer(sent, lambda: print(f"{sent.id} {sent.state.lower()}. Next: {app.program} dump status {name}"))
        return
    ended = check_completed(wait_for_request(client, sent.id, program=app.program))
    if dry_run:
        plan = fetch_plan(client, sent.id)
        app.answer(plan, lambda: _print_plan(plan))
        return
    dataset = client.get(f"/v1/datasets/{name}", DatasetStatus)
    app.answer(dataset, lambda: _print(app, dataset, ended))


def _print(app: App, dataset: DatasetStatus, ended: RequestStatus) -> None:
    print(f"Dataset {dataset.name}: {dataset.path}")
    if ended.progress is not None:
        print(dump_words(ended.progress))
    note(f"Next: {app.program} fetch {dataset.name}")


def _print_plan(plan: DumpPlan) -> None:
    rate = plan.batch_tokens / plan.batch_seconds
    measured = f"the first batch: {plan.batch_tokens} tokens in {plan.batch_seconds:.2f} s"
    lines = [
        f"{plan.documents} documents, {plan.tokens} tokens; {plan.padding:.1%} of what the model is given is padding.",
        f"{size(plan.bytes)} in {plan.files} files; {size(plan.free)} are free there.",
        f"About {duration(plan.seconds)} at {rate:.0f} tokens/s ({measured}), as long as the disk keeps up.",
    ]
    rows = [
        [one.name, f"a {one.rows}", "x".join(map(str, one.width_shape)), one.dtype, size(one.bytes)]
        for one in plan.captures
    ]
    print_blocks([Table(["capture", "row for", "width", "dtype", "size"], rows, ""), "\n".join(lines)])
    if plan.bytes > plan.free:
        note("It does not fit: free space there, capture less, or store another dtype.")
