"""`soma data annotations`, `agreement`, `annotate`: what people said of texts."""

from pathlib import Path
from typing import Annotated, Any

import typer

from soma.base.errors import UserError
from soma.cli.data import data_app

Form = Annotated[str | None, typer.Option("--from", help="doccano, prodigy or textgrid (default: by name and row).")]
TaskOption = Annotated[
    str | None,
    typer.Option("--task", help="classification, spans, relations, seq2seq or intent (doccano)."),
]  # fmt: skip
Offsets = Annotated[str, typer.Option("--offsets", help="What the file counts spans in: codepoints, utf16 or utf8.")]


def one_of(option: str, value: str | None, names: tuple[str, ...]) -> Any:
    """The value of an option that takes one of a few. Raises UserError."""
    if value is not None and value not in names:
        raise UserError(f"{option} {value}: expected one of {', '.join(names)}")
    return value


@data_app.command("annotations")
def annotations(
    file: Annotated[Path, typer.Argument(help="A file of doccano, Prodigy or Praat.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write; its suffix says the kind (.jsonl, .csv …).")],
    to: Annotated[str, typer.Option("--to", help="doccano, prodigy or textgrid.")],
    form: Form = None,
    task: TaskOption = None,
    offsets: Offsets = "codepoints",
    out_offsets: Annotated[str, typer.Option("--out-offsets", help="What the new file counts them in.")] = "codepoints",
    short: Annotated[bool, typer.Option("--short", help="Write a TextGrid in its short form.")] = False,
) -> None:
    """Turn annotations of one format into another, losing nothing: doccano, Prodigy, Praat TextGrid."""
    from soma.data.annotation.files import FORMATS, Problem, read_records, write_records
    from soma.data.annotation.offsets import UNITS
    from soma.data.annotation.record import TASKS

    problems: list[Problem] = []
    records = read_records(
        file, one_of("--from", form, FORMATS), one_of("--task", task, TASKS), one_of("--offsets", offsets, UNITS),
        problems,
    )  # fmt: skip
    write_records(
        out, records, one_of("--to", to, FORMATS), task=one_of("--task", task, TASKS),
        offsets=one_of("--out-offsets", out_offsets, UNITS), short=short,
    )  # fmt: skip
    for problem in problems:
        typer.echo(f"set aside: {problem.place}: {problem.reason}", err=True)
    typer.echo(f"{out}: {len(records):,} records, {len(problems):,} set aside")


@data_app.command("agreement")
def agreement(
    files: Annotated[list[Path], typer.Argument(help="A file for each annotator (or one that names them).")],
    form: Form = None,
    task: TaskOption = None,
    level: Annotated[str, typer.Option(help="How far classes differ: nominal, ordinal or interval.")] = "nominal",
    out: Annotated[Path | None, typer.Option("--out", help="Write the report as JSON.")] = None,
    adjudicate: Annotated[
        Path | None, typer.Option("--adjudicate", help="Write the disputed items as JSONL, to be annotated anew.")
    ] = None,
    show: Annotated[int, typer.Option("--show", help="How many disputed items to print.")] = 10,
) -> None:
    """How far annotators agree (Krippendorff's alpha, Cohen's kappa), and what to adjudicate."""
    from soma.base.artefact import write_json, write_text
    from soma.data.annotation import agreement as measured
    from soma.data.annotation.files import FORMATS, read_records
    from soma.data.annotation.record import TASKS

    form, task = one_of("--from", form, FORMATS), one_of("--task", task, TASKS)
    names = [path.name if len({p.name for p in files}) == len(files) else str(path) for path in files]
    found = {name: read_records(path, form, task) for name, path in zip(names, files, strict=True)}  # type: ignore[arg-type]
    report = measured.agreement(measured.align(found), one_of("--level", level, measured.LEVELS))
    for line in measured.shown(report, show):
        typer.echo(line)
    if out is not None:
        write_json(out, measured.without_nan(report))
    if adjudicate is not None:
        write_text(adjudicate, measured.adjudication_lines(report))


@data_app.command("annotate")
def annotate(
    file: Annotated[Path, typer.Argument(help="Texts: a file of doccano, Prodigy or Praat, or a text a line (.txt).")],
    out: Annotated[Path, typer.Option("--out", help="Where each decision goes at once (.jsonl); resumed if there.")],
    labels: Annotated[str, typer.Option("--labels", metavar="A,B,…", help="Classes, or labels of spans.")] = "",
    relation_labels: Annotated[str, typer.Option("--relation-labels", metavar="A,B,…", help="Of relations.")] = "",
    work: Annotated[
        str, typer.Option("--work", help="classification, multilabel, spans, relations or seq2seq.")
    ] = "classification",
    to: Annotated[str, typer.Option("--to", help="What is written: prodigy or doccano.")] = "prodigy",
    form: Form = None,
    annotator: Annotated[str | None, typer.Option("--annotator", help="Who decides: kept with every decision.")] = None,
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8100,
) -> None:
    """Label texts on a page on this machine: classes, spans, relations, texts that answer."""
    from soma.base import progress
    from soma.data.annotation.files import FORMATS
    from soma.serve.annotate.app import serve_annotate
    from soma.serve.annotate.session import WORK, Session

    def split(text: str) -> list[str]:
        return [label.strip() for label in text.split(",")] if text.strip() else []

    session = Session(
        file, out, one_of("--work", work, WORK), split(labels), split(relation_labels),
        form=one_of("--to", to, FORMATS[:2]), read_as=one_of("--from", form, FORMATS), annotator=annotator,
    )  # fmt: skip
    with progress.use(progress.choose()):
        serve_annotate(session, port=port)
