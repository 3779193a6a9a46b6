"""`soma sweep`."""

from pathlib import Path
from typing import Annotated

import typer

from soma.base import progress
from soma.base.parent import end_with_input
from soma.cli.recipes import Overrides, RecipePath, RunsFolder


def sweep(
    recipe: RecipePath,
    over: Annotated[
        list[str],
        typer.Option("--over", metavar="KEY=VALUES", help="KEY=LOW..HIGH, KEY=LOW..HIGH:log or KEY=a,b,c; repeat it."),
    ],
    overrides: Overrides = None,
    objective: Annotated[str, typer.Option(help="The figure to lower, as `soma runs` names it.")] = (
        "train_validation_loss"
    ),
    trials: Annotated[int, typer.Option(min=1, help="Trials in all, those of earlier calls among them.")] = 20,
    workers: Annotated[int, typer.Option(min=1, help="Processes that work on the study.")] = 1,
    seeds: Annotated[
        int, typer.Option(min=0, help="Seeds over which the winner is held against the recipe; 0 or 1: not at all.")
    ] = 3,
    reduction: Annotated[int, typer.Option(min=2, help="At each rung the best 1/N of the trials go on.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the proposals.")] = 0,
    runs: RunsFolder = Path("runs"),
    as_worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
) -> None:
    """Search a recipe's settings; the winner must beat the spread of seeds. The same command goes on with it."""
    if as_worker:
        end_with_input()
    from soma.sweep.search import Sweep, work
    from soma.sweep.search import sweep as search_for

    search = Sweep(
        recipe, tuple(over), tuple(overrides or ()), objective=objective, runs=runs, seed=seed, reduction=reduction
    )
    with progress.use(progress.choose()):
        if as_worker:
            work(search, trials)
            return
        outcome = search_for(search, trials=trials, workers=workers, seeds=seeds)
    for line in outcome.headline():
        typer.echo(line)
