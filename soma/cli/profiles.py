"""`soma data report` and `soma data schema`: what is in a corpus or in rows."""

from pathlib import Path

import typer

from soma.base.errors import UserError


def report(
    a: str = typer.Argument(..., help="A corpus folder, or a file, folder, glob or address as in data.sources."),
    b: str = typer.Argument(None, help="Another version, to see what drifted."),
    out: Path = typer.Option(Path("data-report.html"), "--out", help="The page to write."),
    as_json: bool = typer.Option(False, "--json", help="Print the figures as JSON; no page is written."),
    text_field: str = typer.Option("text", help="Field of JSON rows that holds the text."),
    label: list[str] = typer.Option([], "--label", help="Field of the rows that holds a label; may be given again."),
    near: bool = typer.Option(True, help="Look for near-duplicates."),
    bias: bool = typer.Option(True, help="Count identity terms."),
    scorer: str = typer.Option(None, help="words:PATH or an http address that judges sentences about groups."),
    workers: int = typer.Option(1, min=1, help="Processes that read; the result is the same for any number."),
    runner: str = typer.Option("local", help="local, or ray for a Ray cluster through Daft."),
) -> None:
    """What is in a corpus: distributions, coverage, duplicates, anomalies, bias; with a second one, what drifted."""
    import json

    from soma.data.profile.page import write_page
    from soma.data.profile.report import data_report
    from soma.data.profile.scan import Options
    from soma.data.signals.scorers import open_scorer

    if runner not in ("local", "ray"):
        raise UserError(f"--runner {runner}: expected local or ray")
    options = Options(text_field, labels=tuple(label), bias=bias, workers=workers, runner=runner)  # type: ignore[arg-type]
    judge = open_scorer(scorer) if scorer else None
    found = data_report([a], [b] if b else [], options, near, judge)
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False, indent=1))
        return
    write_page(out, found)
    drifted = f"; drift: {found['drift']['verdict']}" if found["drift"] else ""
    typer.echo(f"{out}: {found['a']['documents']:,} documents{drifted}")


def schema(
    sources: list[str] = typer.Argument(..., help="JSONL, JSON or Parquet files, folders, globs, addresses."),
    out: Path = typer.Option(None, "--out", help="Write the schema here."),
    against: Path = typer.Option(None, "--against", help="Hold rows against this; exit 1 if they break it."),
) -> None:
    """The types of the fields of rows, what differs between files, and rows that break a schema of before."""
    from soma.base.artefact import write_json
    from soma.data.profile import schema as types

    if against is not None:
        found = types.validate(sources, types.load_schema(against))
        for one in found["examples"]:
            typer.echo(f"{one['source']}#{one['row']}: {one['path']}: {one['problem']}")
        typer.echo(f"{found['rows']:,} rows, {found['mistakes']:,} mistakes")
        raise typer.Exit(1 if found["mistakes"] else 0)
    inferred = types.infer(sources)
    for field in inferred["fields"]:
        notes = [f"{field[key]:,} {key}" for key in ("null", "missing") if field[key]]
        typer.echo(f"{field['path']:<40} {' or '.join(field['types']):<20} {', '.join(notes)}".rstrip())
    for one in inferred["drift"]:
        typer.echo(f"drift: {one['path']}: {one['problem']}; {', '.join(one['files'][:5])}")
    if out is not None:
        write_json(out, inferred)
