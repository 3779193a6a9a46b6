"""Draws a time line: SVG for people, Chrome's trace format for chrome://tracing and Perfetto. Loads no torch."""

from html import escape
from typing import Any

from soma.train.parallel.pipeline.schedule import Action, actions_of
from soma.train.parallel.pipeline.simulate import Span, Timeline

# Forwards blue, backwards green, weight gradients amber; the paler one of a pair is a rank's second stage or direction.
COLOURS = {
    "F": ("#3b7dd8", "#9cc2f2"),
    "B": ("#2f9e6e", "#9bd8bd"),
    "BW": ("#1f7a53", "#7cc7a6"),
    "W": ("#d9902f", "#f3cf9a"),
}
ROW, PLAN, GAP, LEFT, TOP, WIDTH = 26, 13, 6, 64, 40, 1200
NAMES = {"F": "forward", "B": "backward, input", "BW": "backward, whole", "W": "backward, weights"}


def svg(timeline: Timeline, plan: Timeline | None = None) -> str:
    """One row a rank, time to the right, microbatch numbers inside; hover shows stage, start and end.

    With a `plan` in the same unit of time `timeline` is a measured run of it: the plan lies above it, half as high.
    """
    schedule = timeline.schedule
    length = timeline.length if plan is None else max(timeline.length, plan.length)
    scale = (WIDTH - LEFT - 12) / length
    band = ROW + GAP + (0 if plan is None else PLAN)
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
            for span in plan.spans[rank]:
                parts += boxes(span, y, scale, min(schedule.stages_of(rank)), PLAN)
            y += PLAN
        parts.append(f'<text x="{LEFT - 10}" y="{y + 17}" text-anchor="end" fill="#57606a">rank {rank}</text>')
        parts.append(f'<rect x="{LEFT}" y="{y}" width="{WIDTH - LEFT - 12}" height="{ROW}" fill="#f0f2f4"/>')
        own = min(schedule.stages_of(rank))
        for span in row:
            parts += boxes(span, y, scale, own)
    x = LEFT
    for kind, (dark, _) in COLOURS.items():
        if any(action.kind == kind for rank in range(schedule.ranks) for action in schedule.actions(rank)):
            y = height - 22
            parts.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{dark}"/>')
            parts.append(f'<text x="{x + 18}" y="{y + 10}" fill="#57606a">{NAMES[kind]}</text>')
            x += 150
    return "\n".join([*parts, "</svg>", ""])


def headline(timeline: Timeline, plan: Timeline | None = None) -> str:
    """Name, sizes, and what it costs."""
    schedule = timeline.schedule
    if plan is not None:
        return (
            f"{schedule.name}: {schedule.ranks} ranks, {schedule.microbatches} microbatches; plan (above) and run: "
            f"{plan.length:.4g} and {timeline.length:.4g} a step, idle {plan.idle_share:.1%} and "
            f"{timeline.idle_share:.1%}"
        )
    return (
        f"{schedule.name}: {schedule.ranks} ranks, {schedule.microbatches} microbatches; bubble {timeline.bubble:.4g}, "
        f"idle {timeline.idle_share:.1%}, at most {timeline.peak:.4g} activations"
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

    A measured run is in seconds: its unit is 1e6 microseconds. Its `plan`, in the same unit, lies in threads below it.
    """
    events: list[dict[str, Any]] = []
    for rank, row in enumerate(timeline.spans):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        for span in row:
            for thread, action in enumerate(actions_of(span.step)):
                events.append(event(action, span, rank, thread, unit_microseconds))
        if plan is None:
            continue
        for thread, name in ((0, "run"), (2, "plan")):
            events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": thread, "args": {"name": name}})
        for span in plan.spans[rank]:
            for thread, action in enumerate(actions_of(span.step)):
                events.append(event(action, span, rank, 2 + thread, unit_microseconds))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def event(action: Action, span: Span, rank: int, thread: int, unit: float) -> dict[str, Any]:
    """One complete event."""
    return {
        "ph": "X", "name": str(action), "cat": NAMES[action.kind], "pid": rank, "tid": thread,
        "ts": span.start * unit, "dur": (span.end - span.start) * unit,
        "args": {"stage": action.stage, "microbatch": action.microbatch},
    }  # fmt: skip
