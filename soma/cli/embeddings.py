"""`soma model embeddings`, `soma data embed`: vectors of tokens, vectors of texts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from soma.base.errors import UserError
from soma.cli.data import data_app

if TYPE_CHECKING:
    from soma.model.embeddings import Plane, Section

model_app = typer.Typer(no_args_is_help=True, help="Look into a model's folder.")


@model_app.callback()
def _group() -> None:
    """Look into a model's folder."""


@model_app.command("embeddings")
def embeddings(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, hf:ID or registry:NAME@VERSION.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Export all tokens: .npz, .parquet, .txt or .vec.")
    ] = None,
    nearest: Annotated[list[str] | None, typer.Option("--nearest", metavar="WORD", help="Its neighbours.")] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="Neighbours of each word.")] = 10,
    analogies: Annotated[
        Path | None, typer.Option("--analogies", metavar="FILE", help="word2vec's questions-words.txt, or one like it.")
    ] = None,
    map_file: Annotated[
        Path | None, typer.Option("--map", metavar="FILE", help="Draw words on a plane: .svg or .html.")
    ] = None,
    map_words: Annotated[
        list[str] | None, typer.Option("--map-word", help="Draw this word; repeat it (default: the first 150).")
    ] = None,
) -> None:
    """A model's input embeddings: export, nearest words, analogies, a map. No other tensor is read."""
    from soma.model import embeddings as room

    if map_file is not None and map_file.suffix not in (".svg", ".html"):
        raise UserError(f"--map {map_file}: .svg or .html")
    questions = None if analogies is None else room.read_questions(analogies)
    found = room.read_embeddings(model)
    words = found.words()
    tokens, width = found.vectors.shape
    typer.echo(f"{tokens:,} tokens, {len(words.words):,} of them words, {width} dimensions")
    if out is not None:
        left_out = room.export(found, out)
        note = f", {left_out:,} tokens left out: the format has no white space" if left_out else ""
        typer.echo(f"{out}: {tokens - left_out:,} vectors{note}")
    for word in nearest or []:
        typer.echo(f"\n{word}")
        for name, cosine in words.nearest(word, count):
            typer.echo(f"  {cosine:6.3f}  {name}")
    if questions is not None:
        typer.echo("\n" + "\n".join(analogy_lines(room.answer(words, questions))))
    if map_file is not None:
        draw(map_file, room.plane(words, map_words or []), model)
        typer.echo(f"{map_file}")


def analogy_lines(sections: "list[Section]") -> list[str]:
    """A table of sections, then their sum; accuracy is of the questions whose words are all known."""
    from soma.model.embeddings import Section

    total = Section("all", *(sum(getattr(one, key) for one in sections) for key in ("questions", "covered", "right")))
    lines = [f"{'section':<30} {'questions':>9} {'covered':>15} {'right':>7} {'accuracy':>9}"]
    for one in [*sections, total]:
        covered = f"{one.covered:,} ({one.covered / max(one.questions, 1):.1%})"
        accuracy = f"{one.right / one.covered:.1%}" if one.covered else "–"
        lines.append(f"{one.name:<30} {one.questions:>9,} {covered:>15} {one.right:>7,} {accuracy:>9}")
    return lines


def draw(path: Path, plane: "Plane", model: str) -> None:
    """Write a map of words as an SVG file or a page."""
    from soma.base.artefact import write_text
    from soma.base.axes import esc, percent
    from soma.base.charts import standalone
    from soma.base.page import page_style, responsive
    from soma.base.scatter import word_map

    title = f"Input embeddings of {Path(model.rstrip('/')).name}: {len(plane.words)} words, principal components"
    points = [(float(x), float(y)) for x, y in plane.points]

    def chart(width: int) -> str:
        return word_map(
            plane.words, points, title=title, width=width, x_label=f"first: {percent(plane.shares[0])} of the variance",
            y_label=f"second: {percent(plane.shares[1])}",
        )  # fmt: skip

    if path.suffix == ".svg":
        write_text(path, standalone(chart(1000)))
        return
    write_text(path, (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{esc(title)}</title><style>{page_style()}</style><main>{responsive(chart)}</main></html>\n"
    ))  # fmt: skip


@data_app.command("embed")
def embed(
    corpus: Annotated[str, typer.Argument(metavar="CORPUS", help="A corpus folder, or text, JSONL, Parquet, a URL …")],
    url: Annotated[str, typer.Option("--url", help="An endpoint of OpenAI's shape: its base, or …/v1/embeddings.")],
    model: Annotated[str, typer.Option("--model", help="The embedding model's name there.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The Parquet file, made new.")],
    text_field: Annotated[str, typer.Option("--text-field", help="Field of JSON rows and Parquet columns.")] = "text",
    api_key_env: Annotated[str | None, typer.Option("--api-key-env", help="Variable with the endpoint's key.")] = None,
    max_chars: Annotated[int, typer.Option("--max-chars", min=1, help="Embed so much of a text's start.")] = 8000,
    batch: Annotated[int, typer.Option("--batch", min=1, max=2048, help="Documents in a request.")] = 32,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, max=256, help="Requests at once.")] = 4,
) -> None:
    """Embed the texts of a corpus by any encoder's endpoint. Interrupted, the same command goes on where it was."""
    from soma.base import progress
    from soma.data.config import SemanticConfig
    from soma.data.embed import embed_corpus

    config = SemanticConfig(
        url=url, model=model, api_key_env=api_key_env, max_chars=max_chars, batch=batch, concurrency=concurrency
    )
    with progress.use(progress.choose()):
        done = embed_corpus(corpus, out, config, text_field)
    kept = f", {done.documents - done.asked:,} of them from before" if done.asked < done.documents else ""
    skipped = f"; {done.skipped:,} files or rows could not be read" if done.skipped else ""
    typer.echo(f"{out}: {done.documents:,} documents{kept}, {done.dimensions} dimensions{skipped}")
