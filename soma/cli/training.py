"""`soma train`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from soma.cli.recipes import Overrides, RecipePath, RunsFolder, execute


def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    runs: RunsFolder = Path("runs"),
    print_launch: Annotated[
        str | None,
        typer.Option("--print-launch", metavar="KIND", help="Print how to start it: torchrun, slurm or kubernetes."),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines, for --print-launch.")] = 1,
    ranks_per_node: Annotated[int, typer.Option(min=1, help="Processes on each, for --print-launch.")] = 1,
    gpus: Annotated[bool, typer.Option(help="A GPU for each rank, for --print-launch.")] = True,
    image: Annotated[str, typer.Option(help="Container image, for --print-launch kubernetes.")] = "somacube:latest",
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
    for name in blocks:
        block = getattr(loaded, name)
        try:
            layout = block.layout.resolve(nodes * ranks_per_node)
            layout.check_batch(block.batch_size, block.microbatch_size, block.sequence_length)
            if loaded.model is not None and loaded.model.vocab_size is not None:
                layout.check_model(loaded.model)
        except UserError as error:
            raise UserError(f"{recipe}: {name}: {error}") from None
    where = os.path.abspath(runs)
    arguments = ["train", str(recipe), "--runs", where]
    for override in overrides or []:
        arguments += ["--set", override]
    job = Launch(loaded.name.lower(), tuple(arguments), nodes, ranks_per_node, gpus, where, image)
    typer.echo(job.text(print_launch), nl=False)
