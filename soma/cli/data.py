"""`soma data`: what is done to corpora outside of a run."""

from pathlib import Path

import typer

data_app = typer.Typer(no_args_is_help=True, help="Work on corpora outside of a run.")


@data_app.command("index")
def index(
    corpora: list[Path] = typer.Argument(..., help="Corpus folders, such as runs/NAME/corpus."),
    out: Path = typer.Option(..., "--out", help="The index folder: made, or grown if it is there."),
    num_hashes: int = typer.Option(None, help="Length of a MinHash signature (default: data.dedup.num_hashes)."),
    ngram: int = typer.Option(None, help="Words in a shingle (default: data.dedup.ngram)."),
) -> None:
    """Keep what corpora hold in an index that new data is deduplicated against (data.dedup.against)."""
    from soma.data.config import DedupConfig
    from soma.data.dedup.against import add_to_index

    given = {"num_hashes": num_hashes, "ngram": ngram}
    config = DedupConfig(**{name: value for name, value in given.items() if value is not None})
    facts = add_to_index(out, corpora, config)
    documents = sum(part["documents"] for part in facts["parts"])
    typer.echo(f"{out}: {documents:,} documents of {len(facts['corpora'])} corpora")
