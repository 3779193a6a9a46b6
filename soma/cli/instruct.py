"""`soma data convert`, `check`: instruction files."""

from pathlib import Path
from typing import Any

import typer

SCHEMAS = "alpaca, alpaca_text, messages, sharegpt, preference, kto or seeds"


def add_commands(app: typer.Typer) -> None:
    """Put the commands under `soma data`."""
    app.command("convert")(convert)
    app.command("check")(check)


def convert(
    source: str = typer.Argument(..., metavar="IN", help="A JSON or JSONL file, a folder of such, or an address."),
    out: Path = typer.Argument(..., metavar="OUT", help="The file to write: .jsonl or .json, also .gz, .bz2, .xz."),
    to: str = typer.Option(..., "--to", help=f"The schema to write: {SCHEMAS}."),
    schema: str = typer.Option(None, "--from", help="The schema to read (default: told by the first row)."),
    skip_bad: bool = typer.Option(False, "--skip-bad", help="Leave out rows that do not fit, instead of stopping."),
) -> None:
    """Write instruction data in another schema, without loss: what OUT cannot hold is kept in its field soma_kept."""
    from soma.data.instruct.convert import convert_file

    outcome = convert_file(source, out, _schema(to, "--to"), _schema(schema, "--from"), strict=not skip_bad)
    for line in outcome.lines():
        typer.echo(f"left out: {line}", err=True)
    found = ", ".join(sorted(outcome.schemas)) or "nothing"
    typer.echo(f"{out}: {outcome.written:,} rows of {to} from {outcome.rows:,} rows ({found})")


def check(
    source: str = typer.Argument(..., metavar="IN", help="A JSON or JSONL file, a folder of such, or an address."),
    schema: str = typer.Option(None, "--schema", help="The schema to hold it to (default: told by the first row)."),
) -> None:
    """Whether every row of instruction data fits its schema: what does not is named by file, row and field."""
    from soma.data.instruct.convert import check_file

    outcome = check_file(source, _schema(schema, "--schema"))
    for line in outcome.lines():
        typer.echo(line, err=True)
    found = ", ".join(f"{count:,} {name}" for name, count in sorted(outcome.schemas.items())) or "nothing that fits"
    typer.echo(f"{source}: {outcome.rows:,} rows: {found}; {len(outcome.wrong):,} wrong")
    if outcome.wrong:
        raise typer.Exit(1)


def _schema(name: str | None, option: str) -> Any:
    from soma.base.errors import UserError
    from soma.data.instruct.schemas import SCHEMAS as KNOWN

    if name is not None and name not in KNOWN:
        raise UserError(f"{option} {name}: no such schema; {SCHEMAS} expected")
    return name
