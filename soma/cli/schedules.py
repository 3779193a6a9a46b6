"""`soma schedule`: a pipeline schedule checked, timed and drawn."""

import json
from pathlib import Path

import typer

from soma.base.errors import UserError


def schedule(
    name: str = typer.Argument(help="gpipe, 1f1b, interleaved, zb-h1, zb-h2, zb-v, dualpipe, dualpipe-v, or search"),
    stages: int = typer.Option(
        4, min=1, help="Ranks of the pipeline (schedules on a V or interleaved cut each in two)."
    ),
    microbatches: int = typer.Option(8, min=1, help="Microbatches of a step."),
    forward: float = typer.Option(1.0, min=0.0, help="Time of a rank's forward."),
    backward: float = typer.Option(1.0, min=0.0, help="Time of a rank's backward for the input alone."),
    weight: float = typer.Option(1.0, min=0.0, help="Time of a rank's backward for the weights."),
    transfer: float = typer.Option(0.0, min=0.0, help="Time from rank to rank."),
    overlapped: float | None = typer.Option(None, min=0.0, help="Time of an overlapped forward and backward."),
    memory: float | None = typer.Option(None, help="For search: most activations a rank; default ceil(p/2)+1."),
    draw: Path | None = typer.Option(None, help="Write a picture (.svg) or a Chrome trace (.json)."),
) -> None:
    """Check, time and draw a pipeline schedule; the published formula stands beside the simulated bubble."""
    from soma.train.parallel.pipeline import formulas, search, simulate
    from soma.train.parallel.pipeline.draw import chrome_trace, svg
    from soma.train.parallel.pipeline.schedules import SCHEDULES
    from soma.train.parallel.pipeline.validate import validate

    costs = simulate.Costs(forward, backward, weight, transfer, overlapped)
    if draw is not None and draw.suffix not in (".svg", ".json"):
        raise UserError(f"--draw {draw}: expected a name that ends in .svg or .json")
    if forward + backward + weight <= 0:
        raise UserError("--forward, --backward, --weight: all are 0, so nothing would take any time")
    try:
        if name == "search":
            limit = search.v_half_limit(stages) if memory is None else memory
            plan = search.search(stages, microbatches, limit, costs)
        elif name in SCHEDULES:
            plan = SCHEDULES[name](stages, microbatches)
        else:
            raise UserError(f"schedule {name!r}: expected search or one of {', '.join(SCHEDULES)}")
        validate(plan)
    except ValueError as error:
        raise UserError(str(error)) from None
    timeline = simulate.simulate(plan, search.per_stage(costs, plan))
    published = formulas.bubble(plan.name, stages, costs)
    typer.echo(f"{plan.name}: {stages} ranks, {microbatches} microbatches, {plan.stages} stages")
    typer.echo(f"step         {timeline.length:.6g}")
    typer.echo(f"bubble       {timeline.bubble:.6g}   formula {'none' if published is None else f'{published:.6g}'}")
    typer.echo(f"idle share   {timeline.idle_share:.2%}")
    typer.echo(f"activations  {' '.join(f'{held:g}' for held in timeline.peaks)}   (by rank, in a rank's forwards)")
    if draw is not None:
        draw.write_text(svg(timeline) if draw.suffix == ".svg" else json.dumps(chrome_trace(timeline)))
        typer.echo(f"drawn: {draw}")
