"""`soma feedback`: what people thought of answers, as training data."""

from pathlib import Path
from typing import Annotated

import typer

feedback_app = typer.Typer(no_args_is_help=True, help="Turn a service's request log and feedback into training data.")


@feedback_app.callback()
def _group() -> None:
    """So that `export` stays a command of its own."""


@feedback_app.command()
def export(
    log: Annotated[Path, typer.Argument(metavar="LOG", help="Folder that `soma serve --request-log` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for sft.jsonl and dpo.jsonl.")] = Path("feedback"),
) -> None:
    """Liked and corrected answers as messages, corrections as preference pairs."""
    from soma.data.feedback import export_feedback

    made = export_feedback(log, out)
    typer.echo(f"{out}: {len(made.sft)} conversations, {len(made.dpo)} preference pairs")
    for reason, count in made.left_out.most_common():
        typer.echo(f"left out {count}: {reason}")
