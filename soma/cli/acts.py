"""`soma data acts`, `train-acts`: which speech acts a corpus holds, and which its traffic asks for."""

from pathlib import Path
from typing import Annotated

import typer

from soma.cli.data import data_app


@data_app.command("acts")
def acts(
    corpus: Annotated[Path, typer.Argument(help="A corpus folder, or a file (.jsonl .json .parquet .txt).")],
    model: Annotated[Path, typer.Option("--model", help="The folder that `soma data train-acts` wrote.")],
    traffic: Annotated[
        Path | None, typer.Option("--traffic", help="Requests it is meant for: a service's log, or a file of bodies.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the report as JSON.")] = None,
    page: Annotated[Path | None, typer.Option("--page", help="Write the report as a page (.html).")] = None,
) -> None:
    """The mix of speech acts in a corpus, against that of its traffic, and what is missing."""
    from soma.base import progress
    from soma.base.artefact import write_json
    from soma.data.acts import mix
    from soma.data.acts.read import read_turns
    from soma.model.acts import load_acts

    scorer = load_acts(model)
    with progress.use(progress.choose()):
        ours = mix.count(corpus.name, read_turns(corpus), scorer)
        theirs = mix.count(traffic.name, read_turns(traffic), scorer) if traffic else None
    report = mix.compare(ours, theirs, scorer.name)
    for line in mix.shown(report):
        typer.echo(line)
    if out is not None:
        write_json(out, report)
    if page is not None:
        mix.write_page(page, report)


@data_app.command("train-acts")
def train_acts(
    dialogues: Annotated[list[Path], typer.Argument(help="Labelled dialogues: DailyDialog's .txt, switchboard.zip.")],
    out: Annotated[Path, typer.Option("--out", help="The folder of the model.")],
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over them.")] = 3,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of weights, order and dropout.")] = 0,
) -> None:
    """Train the model that `soma data acts` asks; a tenth of the dialogues chooses the epoch."""
    from soma.base import progress
    from soma.base.errors import UserError
    from soma.data.acts.acts import LEARNED, Dialogue
    from soma.data.acts.dialogues import read_dialogues
    from soma.model.acts import ActConfig, save_acts
    from soma.train.acts import ActTraining, train_acts

    found: dict[str, Dialogue] = {}
    for path in dialogues:
        found |= {f"{path}#{name}": dialogue for name, dialogue in read_dialogues(path).items()}
    held = dict(list(found.items())[::10])
    train = {name: dialogue for name, dialogue in found.items() if name not in held}
    if not train:
        raise UserError(f"{dialogues[0]}: one dialogue is too few to train on")
    with progress.use(progress.choose()):
        training = ActTraining(epochs=epochs, seed=seed)
        classifier, history = train_acts(train, held, ActConfig(acts=list(LEARNED)), training)
    save_acts(classifier.model, out)
    best = max(history, key=lambda entry: entry["macro_f1"])
    typer.echo(f"{out}: {len(train):,} dialogues, macro-F1 {best['macro_f1']:.3f} on {len(held):,} held out")
