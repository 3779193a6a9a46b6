"""What a layout asks of a pipeline: its schedule for a batch, and the layers of its stages. Loads no torch."""

import re
from itertools import accumulate, pairwise

from soma.base.errors import UserError
from soma.model.config import ModelConfig
from soma.model.formulas import flops_per_token
from soma.train.parallel.config import Layout
from soma.train.parallel.pipeline.schedule import Schedule, layers_of_stages
from soma.train.parallel.pipeline.schedules import interleaved
from soma.train.parallel.pipeline.search import NAMED


def make_plan(layout: Layout, batch_size: int, microbatch_size: int | None) -> Schedule:
    """The schedule of a resolved layout for the microbatches of one data rank's rows.

    Raises UserError with the arithmetic that fails and the nearest that works.
    """
    name, chunks = layout.schedule, layout.virtual_stages
    if name not in NAMED:
        raise UserError(f"layout: schedule {name!r}: expected one of {', '.join(NAMED)}")
    if name == "interleaved" and chunks == 1:
        raise UserError("layout: schedule interleaved has 2 or more virtual_stages, and there is 1: take 2, or 1f1b")
    if name != "interleaved" and chunks > 1:
        raise UserError(
            f"layout: virtual_stages {chunks} with schedule {name}: only interleaved has them: take schedule "
            "interleaved, or virtual_stages 1"
        )
    microbatches = microbatches_of(layout, batch_size, microbatch_size)
    try:
        return plan_of(layout, microbatches)
    except ValueError as error:
        rule = re.sub(r"[:;] use [^:;]*$", "", str(error))  # its advice is in ranks, ours in settings
        raise UserError(f"layout: {rule}: {advice(layout, microbatches, batch_size, microbatch_size)}") from None


def microbatches_of(layout: Layout, batch_size: int, microbatch_size: int | None) -> int:
    """How many microbatches a data rank's rows are."""
    rows = batch_size // layout.data_ranks
    own = f"{rows} sequences of a rank (batch_size {batch_size} / (dp × fsdp = {layout.data_ranks}))"
    if layout.microbatches is None:
        return rows // (microbatch_size or rows)
    if rows % layout.microbatches:
        counts = [count for count in range(1, rows + 1) if rows % count == 0]
        near = min(counts, key=lambda count: abs(count - layout.microbatches))  # type: ignore[operator]
        raise UserError(f"layout: {layout.microbatches} microbatches do not divide {own}: take microbatches {near}")
    if microbatch_size and layout.microbatches * microbatch_size != rows:
        raise UserError(
            f"layout: {layout.microbatches} microbatches × microbatch_size {microbatch_size} = "
            f"{layout.microbatches * microbatch_size}, not the {own}: take microbatches {rows // microbatch_size}, or "
            "leave one of the two out"
        )
    return layout.microbatches


def plan_of(layout: Layout, microbatches: int) -> Schedule:
    """Raises ValueError where ranks and microbatches do not fit the schedule."""
    if layout.schedule == "interleaved":
        return interleaved(layout.pp, microbatches, layout.virtual_stages)
    return NAMED[layout.schedule](layout.pp, microbatches)


def advice(layout: Layout, microbatches: int, batch_size: int, microbatch_size: int | None) -> str:
    """The number of microbatches nearest to one that a schedule cannot take, as the settings that give it."""
    counts = [count for count in range(1, 4 * max(layout.pp, microbatches) + 1) if is_possible(layout, count)]
    if not counts:
        return f"take pp {layout.pp + 1} or {layout.pp - 1}, or schedule 1f1b"
    count = min(counts, key=lambda other: abs(other - microbatches))
    rows = batch_size // layout.data_ranks
    if microbatch_size:
        change = f"batch_size {count * microbatch_size * layout.data_ranks}"
        if rows % count == 0:
            change = f"microbatch_size {rows // count}, or {change}"
    else:
        change = f"microbatches {count}"
        if rows % count:
            change += f" and batch_size {-(-rows // count) * count * layout.data_ranks}"
    return f"take {change}, or schedule 1f1b, which takes any number of microbatches"


def is_possible(layout: Layout, microbatches: int) -> bool:
    """Whether the schedule takes so many microbatches."""
    try:
        plan_of(layout, microbatches)
    except ValueError:
        return False
    return True


def layers_for(layout: Layout, plan: Schedule, model: ModelConfig, sequence_length: int) -> list[list[int]]:
    """The layers of every stage: `stage_layers`, or a split that weighs the head.

    Raises UserError with the arithmetic where layers and stages do not fit.
    """
    count, stages = model.num_hidden_layers, plan.stages
    if stages > count:
        a_rank = stages // layout.pp
        most = count // a_rank
        change = layout.nearest("pp", range(2, most + 1)) if most > 1 else "schedule 1f1b, which has 1 stage a rank"
        raise UserError(
            f"layout: schedule {plan.name} on pp {layout.pp} has {stages} stages ({a_rank} a rank), and the model has "
            f"{count} layers, at least one for each: take {change}"
        )
    if layout.stage_layers is None:
        return weighed_split(count, stages, head_layers(model, sequence_length))
    counts = layout.stage_layers
    even = [len(layers) for layers in layers_of_stages(count, stages)]
    if len(counts) != stages:
        raise UserError(
            f"layout: stage_layers {counts} are {len(counts)} stages, and schedule {plan.name} on pp {layout.pp} has "
            f"{stages}: take as many, such as {even}"
        )
    if sum(counts) != count:
        raise UserError(
            f"layout: stage_layers {' + '.join(map(str, counts))} = {sum(counts)} layers, and the model has {count}: "
            f"take {count}, such as {even}"
        )
    return [list(range(start, end)) for start, end in pairwise(accumulate(counts, initial=0))]


def head_layers(model: ModelConfig, sequence_length: int) -> float:
    """How many layers' work the head is. Worked number: Llama 3.1 8B at 8192 tokens: 525M parameters of the head
    against 218M and the attention of a layer: 1.84."""
    head = 6 * model.vocab_size * model.hidden_size
    return head * model.num_hidden_layers / (flops_per_token(model, sequence_length) - head)


def weighed_split(layers: int, stages: int, head: float) -> list[list[int]]:
    """Consecutive layers of every stage, where the last stage's head counts as `head` layers: the slowest stage is as
    fast as can be, and the others are even. (Looking words up costs nothing to speak of.)

    Worked example: 16 layers on 4 stages with a head of 1.8: 5, 4, 4, 3, so that the slowest has 5 and not 5.8.
    """
    if stages == 1:
        return [list(range(layers))]

    def slowest(last: int) -> tuple[float, float]:
        others = -(-(layers - last) // (stages - 1))
        return max(others, last + head), abs(last - layers / stages)

    last = min(range(1, layers - stages + 2), key=slowest)
    return [*layers_of_stages(layers - last, stages - 1), list(range(layers - last, layers))]
