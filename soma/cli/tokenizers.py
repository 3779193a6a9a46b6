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


@tokenizer_app.command("extend")
def extend(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, hf:ID or registry:NAME@VERSION.")],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The larger model's folder, made new.")],
    add: Annotated[
        Path | None, typer.Option("--add", metavar="FILE", help="One token a line, found wherever it stands in a text.")
    ] = None,
    train_on: Annotated[
        list[str] | None,
        typer.Option("--train-on", metavar="PATH", help="Learn tokens from this text (BPE); repeat it."),
    ] = None,
    size: Annotated[int, typer.Option("--size", min=1, help="Tokens to learn with --train-on.")] = 1000,
    init: Annotated[
        str, typer.Option(help="New rows start as the mean of the token's pieces (pieces), or of all rows (mean).")
    ] = "pieces",
    multiple: Annotated[int, typer.Option(min=1, help="Round the embeddings' rows up to a multiple of this.")] = 64,
    special: Annotated[bool, typer.Option("--special", help="The tokens of --add are special tokens.")] = False,
) -> None:
    """Give a model's vocabulary more tokens; what it says of the old ones stays the same."""
    from soma.base.errors import UserError
    from soma.data.tokenizer_compare import read_texts
    from soma.model.extend import extend as extend_model

    if add is None and not train_on:
        raise UserError("nothing to add: give --add FILE or --train-on PATH")
    if init not in ("pieces", "mean"):
        raise UserError(f"--init {init}: pieces or mean")
    if add is not None and not add.is_file():
        raise UserError(f"{add}: no such file")
    tokens = [line for line in add.read_text(encoding="utf-8").splitlines() if line] if add is not None else []
    texts = [text.text for text in read_texts(train_on)] if train_on else []
    done = extend_model(
        model, out, tokens=tokens, texts=texts, size=size if train_on else 0, init=init, multiple=multiple,  # type: ignore[arg-type]
        special=special,
    )  # fmt: skip
    typer.echo(f"{out}: {len(done.tokens)} new tokens, {done.entries} in all, {done.rows} rows in the embeddings")
