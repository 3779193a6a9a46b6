"""Draws docs/schedules/*.svg and writes the first table of docs/schedules.md: `python tools/schedules.py`.

`measured.svg` and the table of runs are made by `python benchmarks/schedules.py --json --docs`.
"""

from pathlib import Path

from soma.train.parallel.pipeline import formulas
from soma.train.parallel.pipeline.costs import Costs, Memory
from soma.train.parallel.pipeline.draw import svg
from soma.train.parallel.pipeline.lower import lower, one_by_one
from soma.train.parallel.pipeline.schedules import SCHEDULES
from soma.train.parallel.pipeline.search import NAMED, memory_per_stage, per_stage
from soma.train.parallel.pipeline.simulate import Timeline, simulate

RANKS, MICROBATCHES = 4, 12
COSTS = Costs(1, 1, 1)
SHARDED = Costs(1, 1, 1, 0.15, unshard=0.4, reduce=0.6)
SHARDED_BYTES = Memory(1.5e9, 4e9, 8e9, 25e6, 4)
EXPERTS = Costs(1, 1, 1, 0.1, all_to_all=0.8)
DOCS = Path(__file__).parents[1] / "docs"
REMARKS = {
    "gpipe": "memory grows with the microbatches",
    "1f1b": "",
    "interleaved": "v times the transfers; m a multiple of p",
    "zb-h1": "split backward",
    "zb-h2": "split backward, twice the memory",
    "zb-v": "split backward, two stages a rank",
    "dualpipe": "two copies of the parameters; hides all-to-all",
    "dualpipe-v": "the same without the second copy",
    "v-half": "found by search: at most ceil(p/2)+1 activations",
}


def timelines() -> dict[str, Timeline]:
    """Every schedule at equal times."""
    plans = {name: make(RANKS, MICROBATCHES) for name, make in NAMED.items()}
    return {name: simulate(plan, per_stage(COSTS, plan)) for name, plan in plans.items()}


def linked() -> dict[str, Timeline]:
    """With what links do: stages that are sharded in two ways, and pairs that hide trips to experts or do not."""
    plans = {f"zb-v-zero-{zero}": lower(SCHEDULES["zb-v"](RANKS, 8), zero) for zero in (2, 3)}
    found = {
        name: simulate(plan, per_stage(SHARDED, plan), memory_per_stage(SHARDED_BYTES, plan))
        for name, plan in plans.items()
    }
    pairs = SCHEDULES["dualpipe"](RANKS, MICROBATCHES)
    for name, plan in (("experts", pairs), ("experts-apart", one_by_one(pairs))):
        found[f"dualpipe-{name}"] = simulate(plan, per_stage(EXPERTS, plan))
    return found


def table(lines: dict[str, Timeline]) -> str:
    """The page's table."""
    rows = [
        "| schedule | step | bubble | formula | | idle share | activations by rank | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, line in lines.items():
        published = formulas.bubble(name, RANKS, COSTS)
        rows.append(
            f"| {name} | {line.length:g} | {line.bubble:g} | {'' if published is None else f'{published:g}'} "
            f"| {formulas.FORMULAS.get(name, '')} | {line.idle_share:.1%} "
            f"| {' '.join(f'{held:g}' for held in line.peaks)} | {REMARKS[name]} |"
        )
    return "\n".join(rows)


def pictures() -> dict[str, str]:
    """All drawings, by the names of their files."""
    return {f"{name}.svg": svg(line) for name, line in (timelines() | linked()).items()}


def written(page: str) -> str:
    """The page with the table as it is now."""
    start, end = "<!-- simulated -->\n", "<!-- /simulated -->"
    head, rest = page.split(start)
    return head + start + table(timelines()) + "\n" + end + rest.split(end)[1]


def main() -> None:
    for name, picture in pictures().items():
        (DOCS / "schedules" / name).write_text(picture)
    page = DOCS / "schedules.md"
    page.write_text(written(page.read_text()))


if __name__ == "__main__":
    main()
