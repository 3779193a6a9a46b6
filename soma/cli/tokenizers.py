"""`soma tokenizer`: compare tokenizers, extend a model's, convert."""

from pathlib import Path
from typing import Annotated

import typer

tokenizer_app = typer.Typer(no_args_is_help=True, help="Compare, extend and convert tokenizers.")
SENTENCE = "The quick brown fox can't jump 12,345 times — naïve café, 日本語, Здравствуй 🦙\n    return x ** 2"


@tokenizer_app.command("compare")
def compare(
    tokenizers: Annotated[
        list[str], typer.Argument(metavar="TOKENIZER…", help="Model or tokenizer folders, hf:ID, or their files.")
    ],
    on: Annotated[
        list[str],
        typer.Option(
            "--on", metavar="[NAME=]PATH", help="Text, JSONL, Parquet, a corpus folder …; repeat it: each is a domain."
        ),
    ],
    sentence: Annotated[
        list[str] | None, typer.Option("--sentence", help="Show how each cuts this; may be given again.")
    ] = None,
    text_field: Annotated[str, typer.Option("--text-field", help="Field of JSON rows with the text.")] = "text",
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page with tables and cuts.")
    ] = None,
) -> None:
    """Fertility, bytes per token, unknown tokens and speed, by domain and language, and how each cuts a sentence."""
    import os
    import sys

    from soma.base.artefact import write_text
    from soma.data import tokenizer_compare as comparing

    loaded = comparing.load(tokenizers)
    found = comparing.compare(loaded, comparing.read_texts(on, text_field), sentence or [SENTENCE])
    typer.echo(comparing.table(found))
    typer.echo(comparing.picture(found, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ), color=True)
    if html is not None:
        write_text(html, comparing.page(found))
        typer.echo(f"{html}")


@tokenizer_app.command("convert")
def convert(
    source: Annotated[str, typer.Argument(metavar="TOKENIZER", help="A folder or file of any form.")],
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="Made new: tokenizer.json and its settings.")],
) -> None:
    """Write a tokenizer as the folder that transformers, vLLM and Soma read."""
    from soma.base.artefact import building
    from soma.data.config import TokenizerConfig
    from soma.data.tokenizer import load_tokenizer

    with building(out) as folder:
        load_tokenizer(TokenizerConfig(load=source), folder)
    typer.echo(f"{out}")
