"""`soma train`."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from soma.cli.recipes import Overrides, RecipePath, RunsFolder, execute


def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    runs: RunsFolder = Path("runs"),
    print_launch: Annotated[
        str | None,
        typer.Option(
            "--print-launch",
            metavar="KIND",
            help="Print how to start it: torchrun, slurm, kubernetes (a Job), jobset or pytorchjob.",
        ),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines, for --print-launch.")] = 1,
    min_nodes: Annotated[
        int | None, typer.Option(min=1, help="Go on with so few when machines are lost, for --print-launch.")
    ] = None,
    ranks_per_node: Annotated[int, typer.Option(min=1, help="Processes on each, for --print-launch.")] = 1,
    gpus: Annotated[bool, typer.Option(help="A GPU for each rank, for --print-launch.")] = True,
    image: Annotated[str, typer.Option(help="Container image, for --print-launch on Kubernetes.")] = "somacube:latest",
    as_json: Annotated[bool, typer.Option("--json", help="Events as JSON lines on standard output.")] = False,
) -> None:
    """Run a recipe up to its last training stage; under torchrun on all its ranks, as its `layout` says."""
    from soma.base.errors import UserError
    from soma.recipe import load
    from soma.train.parallel.launch import Launch

    loaded = load(recipe, overrides or [])
    blocks = [name for name in ("train", "tune", "prefer") if getattr(loaded, name) is not None]
    if not blocks:
        raise UserError(f"{recipe}: nothing to train: it has none of the blocks train, tune and prefer")
    if print_launch is None:
        execute(loaded, runs, as_json, first=None, last=blocks[-1], force=False)
        return
    least = nodes if min_nodes is None else min_nodes
    if least > nodes:
        raise UserError(f"--min-nodes {least} is more than --nodes {nodes}")
    reasons = {count: _why_not(loaded, blocks, count * ranks_per_node) for count in range(least, nodes + 1)}
    if reasons[nodes] is not None:
        raise UserError(f"{recipe}: {reasons[nodes]}")
    for count, reason in reasons.items():
        if reason is not None:
            works = ", ".join(str(one) for one, why in reasons.items() if why is None)
            raise UserError(
                f"{recipe}: --min-nodes {least}: the job could come to have {count} nodes, and there {reason}. It "
                f"works on {works}: raise --min-nodes, or change the layout or the batch"
            )
    where = os.path.abspath(runs)
    arguments = ["train", str(recipe), "--runs", where]
    for override in overrides or []:
        arguments += ["--set", override]
    job = Launch(loaded.name.lower(), tuple(arguments), nodes, ranks_per_node, gpus, where, image, min_nodes)
    typer.echo(job.text(print_launch), nl=False)


def _why_not(recipe: Any, blocks: list[str], ranks: int) -> str | None:
    """Why a recipe's training stages cannot run on so many ranks; None if they can."""
    from soma.base.errors import UserError
    from soma.train.parallel.fit import check_fit

    for name in blocks:
        config = getattr(recipe, name)
        try:
            check_fit(config, config.layout.resolve(ranks), recipe.model)
        except UserError as error:
            return f"{name}: {error}"
    return None
