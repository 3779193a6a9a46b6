"""The lineage as a small graph: each stage, what it was made from, its key, and whether it ran or was cached."""

from collections.abc import Mapping, Sequence

from soma.base.axes import esc, shorten, time_span, xy
from soma.base.charts import figure, nothing
from soma.evaluate.facts import Stage

NODE_WIDTH, NODE_HEIGHT, GAP = 128.0, 58.0, 26.0


def depths(stages: Sequence[Stage]) -> dict[str, int]:
    """How many stages lie before each one on its longest way from a source. Stages come after their inputs."""
    found: dict[str, int] = {}
    for stage in stages:
        found[stage.stage] = 1 + max((found.get(name, -1) for name in stage.inputs.values()), default=-1)
    return found


def places(stages: Sequence[Stage]) -> dict[str, tuple[int, int]]:
    """(depth, position among those of the same depth) of each stage, siblings ordered by where their inputs are."""
    depth = depths(stages)
    found: dict[str, tuple[int, int]] = {}
    for level in range(max(depth.values(), default=-1) + 1):
        members = [stage for stage in stages if depth[stage.stage] == level]

        def middle(stage: Stage) -> float:
            above = [found[name][1] for name in stage.inputs.values() if name in found]
            return sum(above) / len(above) if above else 0.0

        for position, stage in enumerate(sorted(members, key=middle)):
            found[stage.stage] = (level, position)
    return found


def lineage_chart(stages: Sequence[Stage], *, title: str = "", width: float = 920, down: bool = False) -> str:
    """Boxes from left to right (or from the top `down`, for narrow screens), joined by what was read."""
    if not stages:
        return nothing(width, title)
    grid = places(stages)
    deep, broad = (1 + max(place[axis] for place in grid.values()) for axis in (0, 1))
    columns, rows = (broad, deep) if down else (deep, broad)
    box = min(NODE_WIDTH, (width - 2 - GAP * (columns - 1)) / columns)
    step = (width - 2 - box) / (columns - 1) if columns > 1 else 0.0
    top = 30.0 if title else 4.0
    row_step = NODE_HEIGHT + GAP
    corner: dict[str, tuple[float, float]] = {}
    for name, (level, position) in grid.items():
        column, row = (position, level) if down else (level, position)
        corner[name] = (1 + column * step, top + row * row_step)
    body = [
        _edge(corner[name], corner[stage.stage], box, down)
        for stage in stages for name in dict.fromkeys(stage.inputs.values()) if name in corner
    ]  # fmt: skip
    body += [_node(stage, corner, box) for stage in stages]
    return figure(width, top + rows * row_step - GAP + 4, title, body)


def _edge(start: tuple[float, float], end: tuple[float, float], box: float, down: bool) -> str:
    if down:
        x1, y1, x2, y2 = start[0] + box / 2, start[1] + NODE_HEIGHT, end[0] + box / 2, end[1]
        bend = (y2 - y1) / 2
        path = f"M{xy(x1)} {xy(y1)}C{xy(x1)} {xy(y1 + bend)} {xy(x2)} {xy(y2 - bend)} {xy(x2)} {xy(y2)}"
    else:
        x1, y1, x2, y2 = start[0] + box, start[1] + NODE_HEIGHT / 2, end[0], end[1] + NODE_HEIGHT / 2
        bend = (x2 - x1) / 2
        path = f"M{xy(x1)} {xy(y1)}C{xy(x1 + bend)} {xy(y1)} {xy(x2 - bend)} {xy(y2)} {xy(x2)} {xy(y2)}"
    return f'<path class="edge" d="{path}"/>'


def _node(stage: Stage, corner: Mapping[str, tuple[float, float]], box: float) -> str:
    x, y = corner[stage.stage]
    state = "cached" if stage.cached else time_span(stage.seconds)
    origin = ", ".join(stage.inputs.values())
    words = f"{stage.stage} {stage.key}: {state}" + (f"; made from {origin}" if origin else "")
    lines = "".join(
        f'<text class="{kind} mid" x="{xy(x + box / 2)}" y="{xy(y + down)}">{esc(shorten(text, box - 8, size))}</text>'
        for text, kind, down, size in (
            (stage.stage.replace("_", " "), "title", 19, 13),
            (stage.key[:8], "soft mono", 35, 12),
            (state, "soft", 50, 12),
        )
    )
    kind = "node kept" if stage.cached else "node"
    return (
        f'<g><title>{esc(words)}</title><rect class="{kind}" x="{xy(x)}" y="{xy(y)}" width="{xy(box)}" '
        f'height="{xy(NODE_HEIGHT)}" rx="6"/>{lines}</g>'
    )
