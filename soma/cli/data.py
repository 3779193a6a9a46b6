"""`soma data`: what is done to corpora outside of a run."""

from pathlib import Path

import typer

from soma.cli import instruct

data_app = typer.Typer(no_args_is_help=True, help="Work on corpora outside of a run.")
instruct.add_commands(data_app)


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


@data_app.command("catalogue")
def catalogue(
    name: str = typer.Argument(None, help="A corpus: show what it costs and the block for a recipe."),
    cores: int = typer.Option(1, "--cores", min=1, help="Cores that read, for the hours."),
    block: bool = typer.Option(False, "--block", help="Print the recipe's block alone, to be put into a file."),
) -> None:
    """Known corpora: size, licence, languages, how to get them, what it costs; and the source block of a recipe."""
    from soma.data import catalogue as known

    if name is None:
        for one in known.CATALOGUE.values():
            size = "" if one.text_gb is None else f"{one.text_gb:,.4g} GB"
            typer.echo(f"{one.name:<18} {size:>10}  {one.languages:<26} {one.title}")
        typer.echo("\nsoma data catalogue NAME says more.")
        return
    one = known.find(name)
    if not block:
        typer.echo(f"{one.title}\nlicence    {one.licence}\nlanguages  {one.languages}\nhow        {one.how}")
        typer.echo(f"reference  {one.reference}")
        cost = one.cost(cores)
        if cost is None:
            typer.echo("cost       no size in bytes is stated")
        else:
            typer.echo(
                f"cost       {cost['disk_gb']:,.4g} GB of disk, {cost['download_hours']:,.3g} h of download at 100 "
                f"Mbit/s, {cost['read_hours']:,.3g} h of reading on {cores} core{'s' * (cores > 1)} (reckoned)"
            )
        typer.echo("")
    typer.echo(known.block(one), nl=False)


@data_app.command("quality")
def quality(
    good: list[str] = typer.Option(..., "--good", help="Sources of text that is good; repeat it."),
    other: list[str] = typer.Option(..., "--other", help="Sources of text as it comes, such as a crawl; repeat it."),
    out: Path = typer.Option(..., "--out", help="The classifier's file (.npz), for data.filters.quality.scorer."),
    text_field: str = typer.Option("text", "--text-field", help="Field of JSON rows and Parquet columns."),
    seed: int = typer.Option(0, "--seed", help="Of the order in which documents are taken."),
) -> None:
    """Fit a classifier of good text, whose probability a recipe can filter by (fastText's kind of model)."""
    from soma.data.signals.linear import fit

    found = fit(good, other, out, text_field=text_field, seed=seed)
    typer.echo(
        f"{out}: {found.good:,} good and {found.other:,} other documents. Of {found.held_out:,} held out: area under "
        f"the ROC curve {found.auc:.3f}; {found.above_median:.1%} of the others are above the median of the good"
    )
    typer.echo(f"  data.filters.quality: {{scorer: 'linear:{out}', min_score: 0.5}}")


@data_app.command("packing")
def packing(
    tokens: str = typer.Argument(..., help="A tokens folder, such as runs/NAME/tokens, or its URL."),
    length: int = typer.Option(2048, "--length", min=2, help="Tokens of a sequence."),
    split: str = typer.Option("train", "--split", help="The split that is looked at."),
    buffer: list[int] = typer.Option(
        None, "--buffer", min=1, help="Also packed so many documents at a time; repeat it."
    ),
) -> None:
    """What each way of packing wastes on a split: padding, documents cut, and cut without need."""
    from soma.data.packed import waste_table

    typer.echo(waste_table(tokens, split, length, buffer or []))


@data_app.command("mix")
def mix(
    out: Path = typer.Argument(..., help="The mixture's folder, made new."),
    part: list[str] = typer.Option(
        ..., "--part", metavar="NAME=TOKENS[,weight=W][,epochs=E]", help="A tokens folder or URL; repeat it."
    ),
) -> None:
    """Make one tokens folder of several, by weights and epochs, to be trained on as any other."""
    from soma.base.artefact import building
    from soma.data.mixture import read_part, write_mixture

    parts = [read_part(text) for text in part]
    with building(out) as folder:
        write_mixture(folder, parts, home=out.absolute())
    typer.echo(f"{out}: {len(parts)} parts")
