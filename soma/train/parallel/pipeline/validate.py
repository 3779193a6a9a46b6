"""Checks a schedule before anything runs: whole, on the right ranks, messages met, no deadlock, within its memory."""

from collections import Counter
from collections.abc import Iterable, Mapping

from soma.train.parallel.pipeline.lower import lower
from soma.train.parallel.pipeline.schedule import Action, Schedule, ShardAction, Step, Transfer, actions_of
from soma.train.parallel.pipeline.simulate import DeadlockError, simulate
from soma.train.parallel.pipeline.transfers import Channel, made_by, needed_by, reader_of, sends

Place = tuple[int, int]  # rank, number of the step in its row
SHOWN = 14  # steps of a row in a picture: those around the culprit


def validate(schedule: Schedule) -> None:
    """Raises ValueError: what is wrong, and a picture of the grid in which `!` marks the culprit.

    Every microbatch passes every stage forward once and backward once (whole, or split in B and W), each on the rank
    that the placement names; what an action needs comes before it; no rank waits for ever; no rank holds more
    activations than the schedule claims. A schedule that is not lowered is lowered for it. In one that is, every
    message that another rank reads is sent once, after it was made, and received once, before it is read, in the order
    of the sends; a stage that is sharded is gathered whenever it is used and cut again; its gradients are reduced as
    often as its stage of ZeRO says.
    """
    check_whole(schedule)
    plan = lower(schedule) if schedule.zero is None else schedule
    check_transfers(plan)
    for rank in range(plan.ranks):
        check_shards(plan, rank)
    try:
        timeline = simulate(plan)
    except DeadlockError as error:
        fail(plan, str(error), [(rank, error.done[rank]) for rank in error.stuck])
    claimed = schedule.activations
    if claimed is not None:
        for rank, held in enumerate(timeline.peaks):
            if held > claimed + 1e-9:
                culprit = first_above(schedule, rank, claimed)
                fail(schedule, f"rank {rank} holds {held:g} activations at once, {claimed:g} were promised", [culprit])


def check_whole(schedule: Schedule) -> None:
    """Every action that exists is there once, where it belongs: one forward; one backward, whole or in two parts."""
    places: dict[Action, list[Place]] = {}
    for rank, row in enumerate(schedule.steps):
        for place, step in enumerate(row):
            for action in actions_of(step):
                check_place(schedule, (rank, place), action)
                places.setdefault(action, []).append((rank, place))
    for action, found in places.items():
        if len(found) > 1:
            fail(schedule, f"{action} is done {len(found)} times", found)
    for microbatch in range(schedule.microbatches):
        for stage in range(schedule.stages):
            check_visit(schedule, places, stage, microbatch)


def check_visit(schedule: Schedule, places: Mapping[Action, list[Place]], stage: int, microbatch: int) -> None:
    """One forward, one backward, whole or in two parts."""
    rank = schedule.rank_of(stage, microbatch)
    forward = Action("F", stage, microbatch)
    if forward not in places:
        missing(schedule, rank, forward, f"rank {rank} never runs {forward}")
    input_, weights, both = (
        Action("B", stage, microbatch),
        Action("W", stage, microbatch),
        Action("BW", stage, microbatch),
    )
    found = [action for action in (input_, weights, both) if action in places]
    if found in ([input_, weights], [both]):
        return
    parts = ", ".join(action.kind for action in found) or "nothing"
    message = f"the backward of stage {stage}, microbatch {microbatch} is {parts}: one BW, or B and W"
    if both in found:
        fail(schedule, message, [place for action in found for place in places[action]])
    missing(schedule, rank, weights if input_ in found else input_ if weights in found else both, message)


def check_place(schedule: Schedule, place: Place, action: Action) -> None:
    """The action exists and belongs here."""
    if not (0 <= action.stage < schedule.stages and 0 <= action.microbatch < schedule.microbatches):
        fail(
            schedule,
            f"rank {place[0]}, step {place[1]}: {action} is outside {schedule.stages} stages and "
            f"{schedule.microbatches} microbatches",
            [place],
        )
    there = schedule.rank_of(action.stage, action.microbatch)
    if there != place[0]:
        fail(schedule, f"rank {place[0]} has {action}, which belongs to rank {there}", [place])


def check_transfers(plan: Schedule) -> None:
    """Both ends of every message, and nothing else."""
    ends: dict[Transfer, Place] = {}
    for rank, row in enumerate(plan.steps):
        made: set[Action] = set()
        opened: set[Action] = set()
        for place, step in enumerate(row):
            if isinstance(step, Transfer):
                check_end(plan, (rank, place), step, made)
                if step in ends and ends[step][0] == rank:
                    fail(plan, f"rank {rank} has {said(step)} twice", [ends[step], (rank, place)])
                ends[step] = (rank, place)
                opened.add(step.message)
            for action in actions_of(step):
                need = needed_by(plan, action)
                if need is not None and plan.rank_of(need.stage, need.microbatch) != rank and need not in opened:
                    fail(plan, f"rank {rank} runs {action} without a receive of {need} before it", [(rank, place)])
                made.add(made_by(action))
    for rank in range(plan.ranks):
        for action in plan.actions(rank):
            reader = reader_of(plan, action)
            if reader is not None and reader != rank and Transfer("send", made_by(action), reader) not in ends:
                message = f"rank {rank} never sends {made_by(action)}, which rank {reader} reads"
                missing(plan, rank, action, message, f"{made_by(action)}>{reader}")
    check_orders(plan, ends)


def check_end(plan: Schedule, place: Place, step: Transfer, made: set[Action]) -> None:
    """A send of what was made here for that rank, a receive of what is made there for this one."""
    rank, message = place[0], step.message
    source, reader = (rank, step.peer) if step.kind == "send" else (step.peer, rank)
    is_wanted = (
        message.kind in ("F", "B") and 0 <= message.stage < plan.stages and 0 <= message.microbatch < plan.microbatches
        and source != reader and plan.rank_of(message.stage, message.microbatch) == source
        and reader_of(plan, message) == reader
    )  # fmt: skip
    if not is_wanted:
        fail(plan, f"rank {rank} has {said(step)}: rank {reader} reads no such thing of rank {source}", [place])
    if step.kind == "send" and message not in made:
        fail(plan, f"rank {rank} sends {message} before it has made it", [place])


def check_orders(plan: Schedule, ends: Mapping[Transfer, Place]) -> None:
    """A channel's receives in the order of its sends."""
    receives: dict[Channel, list[Action]] = {}
    for rank, row in enumerate(plan.steps):
        for step in row:
            if isinstance(step, Transfer) and step.kind == "receive":
                receives.setdefault((step.peer, rank), []).append(step.message)
    for channel, order in sends(plan).items():
        for sent, received in zip(order, receives[channel], strict=True):
            if sent != received:
                fail(
                    plan, f"rank {channel[0]} sends {sent} to rank {channel[1]}, which receives {received} first",
                    [ends[Transfer("send", sent, channel[1])], ends[Transfer("receive", received, channel[0])]],
                )  # fmt: skip


def said(step: Transfer) -> str:
    return f"a {step.kind} of {step.message} {'to' if step.kind == 'send' else 'from'} rank {step.peer}"


def check_shards(plan: Schedule, rank: int) -> None:
    """A stage is whole when it is used and cut in the end; what was summed up is reduced when ZeRO says so."""
    row, zero = plan.steps[rank], plan.zero or 0
    whole: dict[int, int] = {}  # stages that are gathered, and where
    summed: dict[int, list[int]] = {}  # stages with gradients that are not reduced: where they were made
    ends = Counter(action.stage for action in plan.actions(rank) if action.kind in ("W", "BW"))
    for place, step in enumerate(row):
        here = (rank, place)
        if isinstance(step, ShardAction):
            if not zero or step.stage not in plan.stages_of(rank):
                fail(plan, f"rank {rank} has {step}, but no such stage is sharded there", [here])
            if (step.kind == "unshard") == (step.stage in whole):
                state = "is whole already" if step.kind == "unshard" else "is not whole"
                fail(plan, f"rank {rank} has {step} where stage {step.stage} {state}", [here])
            if step.kind == "unshard":
                whole[step.stage] = place
            elif step.kind == "reshard":
                del whole[step.stage]
            else:
                check_reduce(plan, here, step, summed.pop(step.stage, []), ends[step.stage])
        for action in actions_of(step):
            if zero and action.stage not in whole:
                fail(plan, f"rank {rank} runs {action} while the parameters of stage {action.stage} are cut", [here])
            if action.kind in ("W", "BW"):
                summed.setdefault(action.stage, []).append(place)
        if zero == 3 and actions_of(step):
            check_turns(plan, here, whole)
    if zero:
        for stage, made in summed.items():
            fail(plan, f"rank {rank} never reduces gradients of stage {stage}", [(rank, place) for place in made])
        for stage, place in whole.items():
            fail(plan, f"rank {rank} never cuts stage {stage} again", [(rank, place)])


def check_reduce(plan: Schedule, here: Place, step: ShardAction, made: list[int], ends: int) -> None:
    """Once a step at stage 1, after the last gradient; once for each gradient at 2 and 3."""
    wanted = ends if plan.zero == 1 else 1
    if len(made) != wanted:
        fail(
            plan, f"rank {here[0]} has {step} after {len(made)} backward passes of it: ZeRO-{plan.zero} has it after "
            f"{wanted}", [here],
        )  # fmt: skip


def check_turns(plan: Schedule, here: Place, whole: Iterable[int]) -> None:
    """Stage 3 of ZeRO keeps whole what runs now and what runs next."""
    row = plan.steps[here[0]]
    following = next((step for step in row[here[1] + 1 :] if actions_of(step)), None)
    used = {action.stage for step in (row[here[1]], following) if step is not None for action in actions_of(step)}
    for stage in whole:
        if stage not in used:
            fail(plan, f"rank {here[0]} keeps stage {stage} whole during {row[here[1]]}, which does not use it", [here])


def first_above(schedule: Schedule, rank: int, claimed: float) -> Place:
    """The forward with which a rank holds more than the schedule claims."""
    held = 0
    for place, step in enumerate(schedule.steps[rank]):
        actions = actions_of(step)
        held += sum(action.kind == "F" for action in actions)
        if held > claimed * schedule.stages_per_rank + 1e-9:
            return rank, place
        held -= sum(action.kind in ("W", "BW") for action in actions)
    raise AssertionError("no step is above")


def missing(schedule: Schedule, rank: int, action: Action, message: str, word: str | None = None) -> None:
    """Something that is not there: `word` (the action) is drawn where it would belong, behind its predecessor."""
    kinds = {"F": "F", "B": "B", "BW": "B", "W": "W"}

    def is_before(step: Step) -> bool:
        return any(
            kinds[other.kind] == kinds[action.kind] and other.stage == action.stage
            and other.microbatch <= action.microbatch for other in actions_of(step)
        )  # fmt: skip

    place = max((place + 1 for place, step in enumerate(schedule.steps[rank]) if is_before(step)), default=0)
    fail(schedule, message, [], ((rank, place), word or str(action)))


def fail(schedule: Schedule, message: str, culprits: list[Place], lacking: tuple[Place, str] | None = None) -> None:
    raise ValueError(f"schedule {schedule.name}: {message}\n{grid(schedule, culprits, lacking)}")


def grid(schedule: Schedule, culprits: Iterable[Place], lacking: tuple[Place, str] | None = None) -> str:
    """The plan as text: a line for each rank, in order; `!` before the culprits and their ranks, `!(…)` for what lacks.

    Of long rows, the steps around a culprit; those of other ranks around the same share of their rows.
    """
    marked = set(culprits)
    centres = dict([*([lacking[0]] if lacking else []), *sorted(marked)])
    share = max((place / len(schedule.steps[rank]) for rank, place in centres.items()), default=0.0)
    rows = []
    for rank, row in enumerate(schedule.steps):
        words = [f"!{step}" if (rank, place_) in marked else f"{step}" for place_, step in enumerate(row)]
        centre = centres.get(rank, int(share * len(row)))
        first, last = max(0, centre - SHOWN // 2), centre + SHOWN // 2 + 1
        shown = words[first:last]
        if lacking is not None and lacking[0][0] == rank:
            shown.insert(lacking[0][1] - first, f"!({lacking[1]})")
        dots = "… " if first else "", " …" if last < len(row) else ""
        rows.append(f"{'!' if rank in centres else ' '}rank {rank}: {dots[0]}{' '.join(shown)}{dots[1]}")
    return "\n".join(rows)
