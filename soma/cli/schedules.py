"""`soma schedule`: a pipeline schedule checked, timed and drawn."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from soma.base.errors import UserError
from soma.base.units import human_bytes, parse_bytes

if TYPE_CHECKING:
    from soma.train.parallel.pipeline.costs import Costs, Memory, PerStage
    from soma.train.parallel.pipeline.schedule import Schedule
    from soma.train.parallel.pipeline.simulate import Timeline

MOST = 2**19  # stages × microbatches of a plan: 256 × 512 take 14 s and 260 MB
EACH = "one number for a rank's whole share of the model, or one for each stage (or parts of stages): 1,1,2,1"


def schedule(
    name: str = typer.Argument("", help="A schedule, or search; --list names them."),
    stages: int = typer.Option(
        4, min=1, help="Ranks of the pipeline (schedules on a V or interleaved cut each in two)."
    ),
    microbatches: int = typer.Option(8, min=1, help="Microbatches of a step."),
    forward: str = typer.Option("1", help=f"Time of a forward: {EACH}."),
    backward: str = typer.Option("1", help="Time of a backward for the input alone, likewise."),
    weight: str = typer.Option("1", help="Time of a backward for the weights, likewise."),
    transfer: float = typer.Option(0.0, min=0.0, help="Time of a message from rank to rank."),
    link: list[str] = typer.Option([], help="Time of messages on one link: 3-4=0.5. May be given again."),
    all_to_all: str = typer.Option("0", help="Time in which tokens travel to experts and back in a pass, likewise."),
    overlapped: float | None = typer.Option(
        None, min=0.0, help="Time of an overlapped forward and backward, if measured."
    ),
    zero: int = typer.Option(0, min=0, max=3, help="Stage of ZeRO of stages that are sharded (0: not sharded)."),
    shards: int = typer.Option(1, min=1, help="Ranks over which a stage is sharded."),
    unshard: str = typer.Option("0", help="Time in which a stage's parameters are gathered, likewise."),
    reduce: str = typer.Option("0", help="Time in which a stage's gradients are reduced, likewise."),
    activation_bytes: str = typer.Option("0", help="What a microbatch's forward leaves: 2GB, or one for each stage."),
    parameter_bytes: str = typer.Option("0", help="Parameters, likewise."),
    gradient_bytes: str = typer.Option("0", help="Gradients, likewise."),
    message_bytes: str = typer.Option("0", help="A message from rank to rank."),
    virtual_stages: int = typer.Option(2, min=2, help="For interleaved: stages of a rank."),
    memory: float | None = typer.Option(None, help="For search: most activations a rank; default ceil(p/2)+1."),
    draw: Path | None = typer.Option(None, help="Write a picture (.svg) or a Chrome trace (.json)."),
    list_: bool = typer.Option(False, "--list", help="Name the schedules."),
) -> None:
    """Check, time and draw a pipeline schedule; the published formula stands beside the simulated bubble."""
    from soma.train.parallel.pipeline import search
    from soma.train.parallel.pipeline.draw import chrome_trace, svg
    from soma.train.parallel.pipeline.lower import lower
    from soma.train.parallel.pipeline.simulate import simulate
    from soma.train.parallel.pipeline.validate import validate

    if list_:
        show_list()
        return
    check_sizes(stages, microbatches, {"transfer": transfer, "overlapped": overlapped, "memory": memory}, draw)
    costs = read_costs(
        {"forward": forward, "backward": backward, "weight": weight, "all-to-all": all_to_all, "unshard": unshard,
         "reduce": reduce}, links(transfer, link, stages), overlapped,
    )  # fmt: skip
    sizes = {"activation-bytes": activation_bytes, "parameter-bytes": parameter_bytes, "gradient-bytes": gradient_bytes}
    held = read_memory(sizes, message_bytes, shards)
    try:
        plan = make(name, stages, microbatches, virtual_stages, memory, costs)
        check_lengths(plan, costs, held)
        plan = lower(plan, zero)
        validate(plan)
    except ValueError as error:
        raise UserError(str(error)) from None
    timeline = simulate(plan, search.per_stage(costs, plan), search.memory_per_stage(held, plan))
    if not math.isfinite(timeline.length):
        raise UserError("the times add up to more than a number can hold: give them in a larger unit")
    show(timeline, costs, held, virtual_stages)
    if draw is not None:
        draw.write_text(svg(timeline) if draw.suffix == ".svg" else json.dumps(chrome_trace(timeline)))
        typer.echo(f"drawn: {draw}")


def read_costs(
    times: dict[str, str], transfer: "float | dict[tuple[int, int], float]", overlapped: float | None
) -> "Costs":
    """The times by the names of their options. Raises UserError for what is no time, and where nothing takes any."""
    from soma.train.parallel.pipeline.costs import Costs

    number = {option: numbers(text, option) for option, text in times.items()}
    if all(not any(each(number[option])) for option in ("forward", "backward", "weight")):
        raise UserError("--forward, --backward, --weight: all are 0, so nothing would take any time")
    return Costs(
        number["forward"], number["backward"], number["weight"], transfer, overlapped, number["all-to-all"],
        number["unshard"], number["reduce"],
    )  # fmt: skip


def read_memory(sizes: dict[str, str], message: str, shards: int) -> "Memory":
    """The bytes by the names of their options. Raises UserError for what is no size."""
    from soma.train.parallel.pipeline.costs import Memory

    counts = {option: byte_counts(text, f"--{option}") for option, text in sizes.items()}
    return Memory(
        counts["activation-bytes"], counts["parameter-bytes"], counts["gradient-bytes"],
        parse_bytes(message, "--message-bytes"), shards,
    )  # fmt: skip


def check_sizes(stages: int, microbatches: int, numbers: dict[str, float | None], draw: Path | None) -> None:
    """Raise UserError for a plan too large to be made, a number that is none, a picture that cannot be written."""
    if stages * microbatches > MOST:
        raise UserError(
            f"--stages {stages} × --microbatches {microbatches} is more than {MOST}: ask for a smaller plan"
        )
    for option, value in numbers.items():
        if value is not None and not math.isfinite(value):
            raise UserError(f"--{option} {value}: give a finite number")
    if draw is None:
        return
    if draw.suffix not in (".svg", ".json"):
        raise UserError(f"--draw {draw}: expected a name that ends in .svg or .json")
    if not draw.parent.is_dir():
        raise UserError(f"--draw {draw}: there is no folder {draw.parent}: make it, or choose another path")


def make(
    name: str, stages: int, microbatches: int, virtual_stages: int, memory: float | None, costs: "Costs"
) -> "Schedule":
    """The schedule of that name. Raises ValueError where there is none."""
    from soma.train.parallel.pipeline import search
    from soma.train.parallel.pipeline.schedules import interleaved

    if name == "search":
        for time in options_of(costs).values():
            if len(each(time)) not in (1, 2 * stages):
                raise ValueError(
                    f"search: {len(each(time))} times: give one, or those of {2 * stages} parts of the model"
                )
        return search.search(stages, microbatches, search.v_half_limit(stages) if memory is None else memory, costs)
    if name == "interleaved":
        return interleaved(stages, microbatches, virtual_stages)
    if name not in search.NAMED:
        raise ValueError(f"schedule {name!r}: expected search or one of {', '.join(search.NAMED)}")
    return search.NAMED[name](stages, microbatches)


def show_list() -> None:
    """The schedules, each with the first sentence of its documentation and the formula of its bubble."""
    from soma.train.parallel.pipeline.formulas import FORMULAS
    from soma.train.parallel.pipeline.search import NAMED

    for name, function in NAMED.items():
        first = (function.__doc__ or "").split("\n")[0].split(". ")[0].rstrip(".")
        typer.echo(f"{name:12} {first}{f'; bubble {FORMULAS[name]}' if name in FORMULAS else ''}")
    typer.echo(f"{'search':12} The shortest for your times that holds at most --memory activations")


def show(timeline: "Timeline", costs: "Costs", memory: "Memory", virtual_stages: int) -> None:
    """What a schedule costs; `costs` and `memory` as they were given."""
    from soma.train.parallel.pipeline import formulas

    plan, given = timeline.schedule, options_of(costs)
    is_even = all(len(each(value)) == 1 for value in given.values())
    published = formulas.bubble(plan.name, plan.ranks, costs, virtual_stages) if is_even else None
    formula = "none" if published is None else f"{published:.6g}   = {formulas.FORMULAS[plan.name]}"
    is_free = not (costs.transfer or any(each(costs.unshard)) or any(each(costs.reduce)))  # as the formulas have it
    promised = "" if plan.activations is None else f"; at most {plan.activations:g} promised"
    free = "" if is_free or published is None else ", for free transfers"
    typer.echo(f"{plan.name}: {plan.ranks} ranks, {plan.microbatches} microbatches, {plan.stages} stages")
    typer.echo(f"step         {timeline.length:.6g}")
    typer.echo(f"bubble       {timeline.bubble:.6g}   formula {formula}{free}")
    typer.echo(f"idle share   {timeline.idle_share:.2%}")
    held = " ".join(f"{most:g}" for most in timeline.peaks)
    typer.echo(f"activations  {held}   (by rank, in a rank's forwards{promised})")
    if any(timeline.exposed):
        typer.echo(f"all-to-all   {' '.join(f'{time:.6g}' for time in timeline.exposed)}   (by rank, not hidden)")
    if any(timeline.peak_bytes):
        peaks = "   ".join(human_bytes(count) for count in timeline.peak_bytes)
        cut = f", {memory.shards} shards" if plan.zero else ""
        typer.echo(f"memory       {peaks}   (by rank, at most{cut})")
    if any(any(moved.values()) for moved in timeline.sent):
        sent = "   ".join(human_bytes(sum(moved.values())) for moved in timeline.sent)
        typer.echo(f"sent         {sent}   (by rank: messages, gathers and reductions of a step)")


def each(value: "PerStage") -> Sequence[float]:
    return (value,) if isinstance(value, int | float) else value


def numbers(text: str, option: str) -> "PerStage":
    """`1` or `1,2,1`."""
    found = []
    for part in text.split(","):
        if not re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)(e-?\d+)?\s*", part) or not math.isfinite(float(part)):
            raise UserError(f"--{option} {text!r}: {part!r} is no time; write one number, or one for each stage: 1,1,2")
        found.append(float(part))
    return found[0] if len(found) == 1 else tuple(found)


def byte_counts(text: str, option: str) -> "PerStage":
    """`2GB` or `2GB,1GB`."""
    found = [float(parse_bytes(part, option)) for part in text.split(",")]
    return found[0] if len(found) == 1 else tuple(found)


def links(transfer: float, link: list[str], ranks: int) -> "float | dict[tuple[int, int], float]":
    """The time of a message, or that of every link in both directions."""
    if not link:
        return transfer
    times = {(one, other): transfer for one in range(ranks) for other in range(ranks)}
    for text in link:
        match = re.fullmatch(r"(\d+)-(\d+)=(\d+\.?\d*|\.\d+)", text)
        if match is None or int(match[1]) == int(match[2]) or max(int(match[1]), int(match[2])) >= ranks:
            raise UserError(f"--link {text!r}: expected two ranks below {ranks} and a time, such as 0-1=0.5")
        one, other = int(match[1]), int(match[2])
        times[one, other] = times[other, one] = float(match[3])
    return times


def options_of(costs: "Costs") -> "dict[str, PerStage]":
    """The times that may be given for each stage, by their options."""
    return {
        "forward": costs.forward, "backward": costs.backward, "weight": costs.weight, "all-to-all": costs.all_to_all,
        "unshard": costs.unshard, "reduce": costs.reduce,
    }  # fmt: skip


def check_lengths(plan: "Schedule", costs: "Costs", memory: "Memory") -> None:
    """As many numbers as stages, or as parts that make up stages. Raises ValueError."""
    sizes = {
        "activation-bytes": memory.activation, "parameter-bytes": memory.parameters, "gradient-bytes": memory.gradients
    }  # fmt: skip
    for option, value in (options_of(costs) | sizes).items():
        if len(each(value)) > 1 and len(each(value)) % plan.stages:
            raise ValueError(f"--{option}: {len(each(value))} numbers, {plan.name} has {plan.stages} stages")
