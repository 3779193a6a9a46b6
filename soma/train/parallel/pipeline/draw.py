"""Draws a time line: SVG for people, Chrome's trace format for chrome://tracing and Perfetto. Loads no torch."""

from collections.abc import Sequence
from html import escape
from typing import Any, get_args

from soma.base.units import human_bytes
from soma.train.parallel.pipeline.schedule import Action, actions_of
from soma.train.parallel.pipeline.simulate import Lane, Span, Timeline, Traffic

# Forwards blue, backwards green, weight gradients amber; the paler one of a pair is a rank's second stage or direction.
COLOURS = {
    "F": ("#3b7dd8", "#9cc2f2"),
    "B": ("#2f9e6e", "#9bd8bd"),
    "BW": ("#1f7a53", "#7cc7a6"),
    "W": ("#d9902f", "#f3cf9a"),
}
ROW, PLAN, GAP, LEFT, TOP, WIDTH = 26, 13, 6, 64, 40, 1200
NAMES = {"F": "forward", "B": "backward, input", "BW": "backward, whole", "W": "backward, weights"}
# Links below them, a thin lane for each kind that there is: messages violet, gathers teal, reductions red, tokens grey;
# of a run also what its ranks stand still for, pink.
LANE = 7
LANES: tuple[Lane, ...] = get_args(Lane)
LINKS = {
    "send": "#6f42c1", "receive": "#b794f4", "unshard": "#128a8a", "reduce": "#c2412d", "all-to-all": "#6e7781",
    "wait": "#f08ab4",
}  # fmt: skip
RUN_LINKS, PLAN_LINKS = 4, 4 + len(LANES)  # first threads of a trace


def svg(timeline: Timeline, plan: Timeline | None = None) -> str:
    """One row a rank, time to the right, microbatch numbers inside; hover shows stage, start and end. Links that are
    busy have lanes below it.

    With a `plan` in the same unit of time `timeline` is a measured run of it: the plan lies above it, half as high, and
    what its links should do lies above that.
    """
    schedule = timeline.schedule
    length = timeline.length if plan is None else max(timeline.length, plan.length)
    scale = (WIDTH - LEFT - 12) / length
    lanes, planned = lanes_of(timeline), [] if plan is None else lanes_of(plan)
    band = ROW + GAP + LANE * (len(lanes) + len(planned)) + (0 if plan is None else PLAN + (GAP if planned else 0))
    height = TOP + schedule.ranks * band + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="22" font-size="15" fill="#1b1f24">{escape(headline(timeline, plan))}</text>',
    ]
    for rank, row in enumerate(timeline.spans):
        y = TOP + rank * band
        if plan is not None:
            for traffic in plan.traffic[rank] if planned else []:
                parts.append(strip(traffic, y + LANE * planned.index(traffic.lane), scale))
            y += LANE * len(planned)
            for span in plan.spans[rank]:
                parts += boxes(span, y, scale, min(schedule.stages_of(rank)), PLAN)
            y += PLAN
        for traffic in timeline.traffic[rank] if lanes else []:
            parts.append(strip(traffic, y + ROW + LANE * lanes.index(traffic.lane), scale))
        parts.append(f'<text x="{LEFT - 10}" y="{y + 17}" text-anchor="end" fill="#57606a">rank {rank}</text>')
        parts.append(f'<rect x="{LEFT}" y="{y}" width="{WIDTH - LEFT - 12}" height="{ROW}" fill="#f0f2f4"/>')
        own = min(schedule.stages_of(rank))
        for span in row:
            parts += boxes(span, y, scale, own)
    shown = [timeline] if plan is None else [timeline, plan]
    return "\n".join([*parts, *legend(shown, height - 22), "</svg>", ""])


def lanes_of(timeline: Timeline) -> list[Lane]:
    """Those that there is something in, in order."""
    return [lane for lane in LANES if any(traffic.lane == lane for row in timeline.traffic for traffic in row)]


def strip(traffic: Traffic, y: float, scale: float) -> str:
    """What a link does, as a thin bar."""
    x, width = LEFT + traffic.start * scale, (traffic.end - traffic.start) * scale
    posted = "" if traffic.posted is None else f", posted at {traffic.posted:.4g}"
    hint = f"{traffic.lane}: {traffic.name}: {traffic.start:.4g} to {traffic.end:.4g}{posted}"
    return (
        f'<rect x="{x:.2f}" y="{y + 1:.2f}" width="{width:.2f}" height="{LANE - 1}" fill="{LINKS[kind_of(traffic)]}" '
        f'stroke="#ffffff" stroke-width="0.5"><title>{escape(hint)}</title></rect>'
    )


def kind_of(traffic: Traffic) -> str:
    """Its name in `LINKS`."""
    if traffic.lane == "shards":
        return "unshard" if traffic.name.startswith("unshard") else "reduce"
    return traffic.lane


def legend(timelines: Sequence[Timeline], y: float) -> list[str]:
    """The colours that are there."""
    schedule = timelines[0].schedule
    kinds = {action.kind for rank in range(schedule.ranks) for action in schedule.actions(rank)}
    links = {kind_of(traffic) for timeline in timelines for row in timeline.traffic for traffic in row}
    shown = [(dark, NAMES[kind]) for kind, (dark, _) in COLOURS.items() if kind in kinds]
    shown += [(colour, name) for name, colour in LINKS.items() if name in links]
    parts, x = [], LEFT
    for colour, name in shown:
        parts.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 18}" y="{y + 10}" fill="#57606a">{name}</text>')
        x += 40 + 7 * len(name)
    return parts


def headline(timeline: Timeline, plan: Timeline | None = None) -> str:
    """Name, sizes, and what it costs."""
    schedule = timeline.schedule
    if plan is not None:
        return (
            f"{schedule.name}: {schedule.ranks} ranks, {schedule.microbatches} microbatches; plan (above) and run: "
            f"{plan.length:.4g} and {timeline.length:.4g} a step, idle {plan.idle_share:.1%} and "
            f"{timeline.idle_share:.1%}"
        )
    bytes_ = max(timeline.peak_bytes, default=0)
    return (
        f"{schedule.name}: {schedule.ranks} ranks, {schedule.microbatches} microbatches; bubble {timeline.bubble:.4g}, "
        f"idle {timeline.idle_share:.1%}, at most {timeline.peak:.4g} activations"
        f"{f', {human_bytes(bytes_)}' if bytes_ else ''}"
    )


def boxes(span: Span, y: float, scale: float, own: int, row: float = ROW) -> list[str]:
    """The rectangles of a step in a row of height `row`; an overlap is two of half of that."""
    actions = actions_of(span.step)
    x, width, height = LEFT + span.start * scale, (span.end - span.start) * scale, row / len(actions)
    parts = []
    for place, action in enumerate(actions):
        fill = COLOURS[action.kind][action.stage != own]
        top = y + place * height
        when = f"{span.start:.4g} to {span.end:.4g}"
        hint = f"{NAMES[action.kind]}, stage {action.stage}, microbatch {action.microbatch}: {when}"
        parts.append(
            f'<rect x="{x:.2f}" y="{top:.2f}" width="{width:.2f}" height="{height:.2f}" fill="{fill}" stroke="#ffffff" '
            f'stroke-width="0.7"><title>{escape(hint)}</title></rect>'
        )
        size = min(11.0, 0.7 * height, width / (0.62 * len(str(action.microbatch))))
        if size > 5:
            parts.append(
                f'<text x="{x + width / 2:.2f}" y="{top + height / 2 + size * 0.36:.2f}" font-size="{size:.1f}" '
                f'text-anchor="middle" fill="#10151a">{action.microbatch}</text>'
            )
    return parts


def chrome_trace(
    timeline: Timeline, unit_microseconds: float = 1000.0, plan: Timeline | None = None
) -> dict[str, Any]:  # fmt: skip
    """The time line as complete events (`ph: X`), a process for each rank; a unit of time is shown as a millisecond.
    What links do lies in threads of its own, with an arrow from rank to rank for each message; bytes are a counter.

    A measured run is in seconds: its unit is 1e6 microseconds. Its `plan`, in the same unit, lies in threads below it,
    and so does what the plan's links do.
    """
    events: list[dict[str, Any]] = []
    for rank, row in enumerate(timeline.spans):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        for span in row:
            for thread, action in enumerate(actions_of(span.step)):
                events.append(event(action, span, rank, thread, unit_microseconds))
        events += link_events(timeline, rank, unit_microseconds)
        if plan is None:
            continue
        events += link_events(plan, rank, unit_microseconds, "plan: ")
        for thread, name in ((0, "run"), (2, "plan")):
            events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": thread, "args": {"name": name}})
        for span in plan.spans[rank]:
            for thread, action in enumerate(actions_of(span.step)):
                events.append(event(action, span, rank, 2 + thread, unit_microseconds))
    events += arrows(timeline, unit_microseconds)
    if plan is not None:
        events += arrows(plan, unit_microseconds, "plan: ")
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def event(action: Action, span: Span, rank: int, thread: int, unit: float) -> dict[str, Any]:
    """One complete event."""
    return {
        "ph": "X", "name": str(action), "cat": NAMES[action.kind], "pid": rank, "tid": thread,
        "ts": span.start * unit, "dur": (span.end - span.start) * unit,
        "args": {"stage": action.stage, "microbatch": action.microbatch},
    }  # fmt: skip


def thread_of(lane: Lane, prefix: str) -> int:
    """The thread of a lane: those of a plan beside its run come last."""
    return LANES.index(lane) + (PLAN_LINKS if prefix else RUN_LINKS)


def arrows(timeline: Timeline, unit: float, prefix: str = "") -> list[dict[str, Any]]:
    """For every message a flow from its slice on the sender to its slice on the reader. (Each end lies in the middle of
    its slice: viewers bind an arrow to the slice in which it is.)"""
    sent: dict[tuple[int | None, int | None, Action | None], Traffic] = {
        (rank, entry.peer, entry.message): entry
        for rank, row in enumerate(timeline.traffic) for entry in row if entry.lane == "send"
    }  # fmt: skip
    events: list[dict[str, Any]] = []
    for rank, row in enumerate(timeline.traffic):
        for entry in row:
            if entry.lane != "receive":
                continue
            pair = ("s", entry.peer, sent[entry.peer, rank, entry.message]), ("f", rank, entry)
            name = f"{prefix}{entry.peer}>{rank} {entry.message}"
            for phase, owner, end in pair:
                events.append({
                    "ph": phase, "name": "message", "cat": "message", "id": name, "bp": "e", "pid": owner,
                    "tid": thread_of(end.lane, prefix), "ts": (end.start + end.end) / 2 * unit,
                })  # fmt: skip
    return events


def link_events(timeline: Timeline, rank: int, unit: float, prefix: str = "") -> list[dict[str, Any]]:
    """A rank's traffic, and its bytes as counter events."""
    events: list[dict[str, Any]] = []
    traffic = timeline.traffic[rank] if timeline.traffic else []
    for lane in lanes_of(timeline):
        own, thread = [entry for entry in traffic if entry.lane == lane], thread_of(lane, prefix)
        if own:
            name = {"name": f"{prefix}{lane}"}
            events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": thread, "args": name})
        events += [
            {"ph": "X", "name": entry.name, "cat": kind_of(entry), "pid": rank, "tid": thread,
             "ts": entry.start * unit, "dur": (entry.end - entry.start) * unit,
             **({} if entry.posted is None else {"args": {"posted": entry.posted * unit}})}
            for entry in own
        ]  # fmt: skip
    held = timeline.held[rank] if timeline.held else []
    if any(count for _, count in held):
        events += [
            {"ph": "C", "name": "bytes", "pid": rank, "ts": time * unit, "args": {"bytes": count}}
            for time, count in held
        ]
    return events
