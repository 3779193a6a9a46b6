"""What travels between ranks, and in which order: read off a schedule, the same on every rank. Loads no torch.

Two things travel: what a forward puts out, to the stage after it, and what a backward puts out (the gradient of the
stage's input), to the stage before it. Both are named by the action that makes them, `F` or `B`.
"""

from collections import deque
from dataclasses import replace

from soma.train.parallel.pipeline.schedule import Action, Schedule, Step, Transfer, actions_of

Channel = tuple[int, int]  # from rank, to rank


def made_by(action: Action) -> Action:
    """The name of what an action puts out: a whole backward gives what its first half gives."""
    return replace(action, kind="B") if action.kind == "BW" else action


def needed_by(schedule: Schedule, action: Action) -> Action | None:
    """What an action reads from the neighbouring stage; None at the ends, and for a weight gradient."""
    kind, stage, microbatch = action.kind, action.stage, action.microbatch
    if kind == "F" and stage > 0:
        return Action("F", stage - 1, microbatch)
    if kind in ("B", "BW") and stage < schedule.stages - 1:
        return Action("B", stage + 1, microbatch)
    return None


def reader_of(schedule: Schedule, action: Action) -> int | None:
    """The rank that needs what an action puts out; None where nobody does."""
    kind, stage, microbatch = action.kind, action.stage, action.microbatch
    if kind == "F" and stage < schedule.stages - 1:
        return schedule.rank_of(stage + 1, microbatch)
    if kind in ("B", "BW") and stage > 0:
        return schedule.rank_of(stage - 1, microbatch)
    return None


def channels(schedule: Schedule) -> dict[Channel, list[Action]]:
    """For every pair of ranks what goes from one to the other, in the order in which it is made.

    A channel has one direction and one order, which both of its ends know: the reader asks for its messages in just
    that order, however early, so that no two ranks can wait for each other (unless the schedule itself does). What
    stays on its rank is on no channel.
    """
    found: dict[Channel, list[Action]] = {}
    for rank in range(schedule.ranks):
        for action in schedule.actions(rank):
            reader = reader_of(schedule, action)
            if reader is not None and reader != rank:
                found.setdefault((rank, reader), []).append(made_by(action))
    return dict(sorted(found.items()))


def add_transfers(schedule: Schedule, ahead: int | None = None) -> Schedule:
    """A send after each step whose outcome another rank reads, and receives `ahead` of their readers (None: all).

    A channel's receives come in the order of its sends. The first `ahead` open before the rank's first step that
    computes, which waits for a message, or after it, where it waits for none: what it sends is what others wait for. As
    many as keep that number open follow each step that read one.
    """
    orders = channels(schedule)
    if ahead is None:
        ahead = max(map(len, orders.values()), default=0)
    number = {message: place for order in orders.values() for place, message in enumerate(order)}
    rows = []
    for rank in range(schedule.ranks):
        closed = {channel: deque(order) for channel, order in orders.items() if channel[1] == rank}

        def open_until(channel: Channel, count: int, closed: dict[Channel, deque[Action]] = closed) -> list[Step]:
            """The receives that bring the number that the channel has opened to `count`."""
            more = count - (len(orders[channel]) - len(closed[channel]))
            return [
                Transfer("receive", closed[channel].popleft(), channel[0])
                for _ in range(min(more, len(closed[channel])))
            ]

        row: list[Step] = []
        first = [receive for channel in closed for receive in open_until(channel, ahead)]
        for step in schedule.steps[rank]:
            wanted = [need for action in actions_of(step) if (need := needed_by(schedule, action)) is not None]
            read = [(need, (schedule.rank_of(need.stage, need.microbatch), rank)) for need in wanted]
            read = [(need, channel) for need, channel in read if channel in orders]
            if read:
                row, first = row + first, []
            for need, channel in read:
                row += open_until(channel, number[need] + 1)
            row.append(step)
            for action in actions_of(step):
                reader = reader_of(schedule, action)
                if reader is not None and reader != rank:
                    row.append(Transfer("send", made_by(action), reader))
            if actions_of(step):
                row, first = row + first, []
            for need, channel in read:
                row += open_until(channel, number[need] + 1 + ahead)
        rows.append(tuple(row))
    return replace(schedule, steps=tuple(rows))


def sends(schedule: Schedule) -> dict[Channel, list[Action]]:
    """The messages of every channel of a lowered schedule, in the order in which its steps send them."""
    found: dict[Channel, list[Action]] = {}
    for rank, row in enumerate(schedule.steps):
        for step in row:
            if isinstance(step, Transfer) and step.kind == "send":
                found.setdefault((rank, step.peer), []).append(step.message)
    return dict(sorted(found.items()))
