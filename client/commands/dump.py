"""``nnsight-hpc dump``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from urllib.parse import urlencode

import click

from nnsight_hpc.client.app import App, command, note, pass_app
from nnsight_hpc.client.corpus import read_corpus
from nnsight_hpc.client.tables import size
from nnsight_hpc.client.waiting import check_completed, dump_words, wait_for_request
from nnsight_hpc.wire.frames import pack
from nnsight_hpc.wire.messages import DatasetStatus, DumpSpec, RequestStatus, encode
from nnsight_hpc.wire.names import check_name, new_request_id


@command()
@click.argument("pool")
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
@click.option("--no-wait", is_flag=True, help="Return when the request is accepted.")
@pass_app
def dump(
    app: App,
    *,
    pool: str,
    corpus: Path,
    captures: tuple[str, ...],
    name: str,
    text_field: str,
    dtype: str,
    context: int,
    no_wait: bool,
) -> None:
    """Write a pool's activations over a corpus as a dataset.

    CORPUS is a .txt file with one document a line, or .jsonl.
    """
    check_name(pool, of="pool")
    check_name(name, of="dataset")
    documents = read_corpus(corpus, text_field=text_field)
    spec = DumpSpec(
        name=name,
        captures=captures,
        dtype=dtype,
        context=context,
        corpus_fingerprint=documents.fingerprint,
        command=shlex.join(["nnsight-hpc", *sys.argv[1:]]),
    )
    query = urlencode({"pool": pool, "request": new_request_id()})
    client = app.client()
    note(f"Sends {documents.documents} documents, {size(len(documents.lines))}.")
    frame = pack(encode(spec), documents.lines)
    status = client.put(f"/v1/datasets/{name}?{query}", frame, RequestStatus, timeout=600)
    if no_wait:
        app.answer(status, lambda: print(f"{status.id} {status.state.lower()}. Next: nnsight-hpc wait {status.id}"))
        return
    ended = check_completed(wait_for_request(client, status.id))
    dataset = client.get(f"/v1/datasets/{name}", DatasetStatus)
    app.answer(dataset, lambda: _print(dataset, ended))


def _print(dataset: DatasetStatus, ended: RequestStatus) -> None:
    print(f"Dataset {dataset.name}: {dataset.path}")
    if ended.progress is not None:
        print(dump_words(ended.progress))
    note(f"Next: nnsight-hpc fetch {dataset.name}")
