"""The parity grid: every layout and schedule that fits four processes, and what is trained under each.

    python -m tests.train.grid          # what is covered, and what is left out and why

Layouts × schedules × {dense, MoE} × {fp32, bf16} × {few, four times as many microbatches} × {AdamW, Muon}. It is
generated: a new schedule, or a new size in `inner`, is in it. Pipelines have models whose layers lie unevenly on their
stages; all of the product have tied embeddings and unequal numbers of targets.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

from soma.train.parallel.config import Layout
from soma.train.parallel.pipeline.search import NAMED
from tests.train.parity import MOE, ROWS, Case

Sizes = dict[str, Any]  # a `layout:` block
RANKS = 4
FOLDED = ("interleaved", "zb-v", "dualpipe-v", "v-half")  # two stages on each rank (v-half: or one, as it finds)
DEPTH = {1: "", 2: "3", 4: "5", 8: "9"}  # layers of the models for so many stages ("": 2)


def name_of(sizes: Sizes) -> str:
    """`fsdp2-zero1-ep2`, `pp2-zb-v-tp2-sp`."""
    words = []
    for key in ("pp", "schedule", "dp", "fsdp", "zero", "cp", "cp_method", "tp", "sp", "ep"):
        if key in sizes:
            value = sizes[key]
            words.append(key if value is True else f"{'' if isinstance(value, str) else key}{value}")
    return "-".join(words)


def inner(ranks: int) -> Iterator[Sizes]:
    """Every layout of `ranks` without a pipeline, in every variant: ZeRO's stages, sp, both ways of cp, ep."""
    sizes = [size for size in range(1, ranks + 1) if ranks % size == 0]
    for dp, fsdp, cp, tp in product(sizes, repeat=4):
        if dp * fsdp * cp * tp != ranks:
            continue
        holders = dp * fsdp * cp
        zeros: list[Sizes] = [{}, {"zero": 1}, {"zero": 2}] if fsdp > 1 else [{}]
        methods: list[Sizes] = [{}, {"cp_method": "all_gather"}] if cp > 1 else [{}]
        sequences: list[Sizes] = [{}, {"sp": True}] if tp > 1 else [{}]
        experts: list[Sizes] = [{}, *({"ep": ep} for ep in sizes[1:] if holders % ep == 0 and MOE["num_experts"] >= ep)]
        given = {key: size for key, size in (("dp", dp), ("fsdp", fsdp), ("cp", cp), ("tp", tp)) if size > 1}
        for zero, method, sequence, ep in product(zeros, methods, sequences, experts):
            yield given | zero | method | sequence | ep


def pipelines(stages: int, ranks: int) -> Iterator[Sizes]:
    """Every schedule on `stages` ranks, over every layout of the ranks that are left."""
    for schedule, rest in product(NAMED, inner(ranks // stages)):
        chunks: Sizes = {"virtual_stages": 2} if schedule == "interleaved" else {}
        yield {"pp": stages, "schedule": schedule} | chunks | rest


GRID: dict[str, Sizes] = {
    name_of(sizes): sizes for sizes in [*inner(RANKS), *pipelines(2, RANKS), *pipelines(4, RANKS)]
}
# On eight ranks: three dimensions, and four stages over every layout of two ranks.
EIGHT: dict[str, Sizes] = {name_of(sizes): sizes for sizes in pipelines(4, 8)} | {
    name_of(sizes): sizes
    for sizes in (
        {"dp": 2, "fsdp": 2, "tp": 2},
        {"dp": 2, "fsdp": 2, "cp": 2, "ep": 4},
        {"fsdp": 2, "cp": 2, "tp": 2, "sp": True},
        {"pp": 2, "schedule": "1f1b", "fsdp": 2, "tp": 2, "sp": True},
        {"pp": 2, "schedule": "zb-v", "dp": 2, "fsdp": 2},
        {"pp": 2, "schedule": "1f1b", "fsdp": 2, "cp": 2, "ep": 2},
        {"pp": 2, "schedule": "zb-h1", "fsdp": 2, "tp": 2, "ep": 2},
        {"pp": 2, "schedule": "dualpipe", "cp": 2, "tp": 2, "sp": True},
        {"pp": 2, "schedule": "dualpipe-v", "dp": 2, "tp": 2, "ep": 2},
        {"pp": 2, "schedule": "interleaved", "virtual_stages": 2, "fsdp": 4, "zero": 2},
    )
}


def depth(sizes: Sizes) -> str:
    """What a layout adds to a model's name."""
    return DEPTH[sizes.get("pp", 1) * (2 if sizes.get("schedule") in FOLDED else 1)]


def microbatch_sizes(sizes: Sizes) -> list[int | None]:
    """Rows of a microbatch where a rank takes few of them in a step (1, or as many as its schedule needs; None: all
    rows are one), and where it takes four times as many, or as many as it has rows."""
    rows = ROWS // (sizes.get("dp", 1) * sizes.get("fsdp", 1))
    stages = sizes.get("pp", 1)
    few = {"interleaved": stages, "dualpipe": 2 * stages, "dualpipe-v": 2 * stages}.get(sizes.get("schedule", ""), 1)
    assert few <= rows, sizes
    return [None if count == 1 else rows // count for count in dict.fromkeys((few, min(4 * few, rows)))]


def kinds(sizes: Sizes) -> list[str]:
    """Dense models and MoE; where experts are divided, MoE alone."""
    return [f"{kind}{depth(sizes)}" for kind in (("moe",) if "ep" in sizes else ("dense", "moe"))]


def cells(sizes: Sizes) -> list[Case]:
    """The product under a layout."""
    axes = product(kinds(sizes), ("fp32", "bf16"), microbatch_sizes(sizes), ("adamw", "muon"))
    return [Case(*values) for values in axes]


def others(sizes: Sizes) -> list[Case]:
    """What else is trained under a layout: latent attention with biased routers, learned positions, fp16, activations
    that are computed again, and low-rank updates beside frozen weights, whole or rounded, with dropout and without."""
    few, many = ends_of(sizes)
    latent, moe, dense, gpt2 = (f"{kind}{depth(sizes)}" for kind in ("latent", "moe", "dense", "gpt2"))
    found = [
        Case(latent, microbatch=many, optimizer="muon"),
        Case(latent, "bf16", few),
        Case(moe, "fp16", many),
        # (In bf16 updates of rank 3 in five layers are 0.046 apart under tp: rounding, and over the bound.)
        Case(moe, "fp32" if "pp" in sizes else "bf16", many, lora="full"),
        Case(moe, microbatch=many, lora="full", pairs=True),
        Case(latent, microbatch=many, lora="full", dropout=0.4),
    ]
    if "ep" not in sizes:
        found += [
            Case(gpt2, "bf16", few, "muon"),
            Case(dense, microbatch=many, checkpointing="selective"),
            Case(dense, "bf16", many, pairs=True, checkpointing=True),
            Case(gpt2, microbatch=few, lora="full", dropout=0.4, checkpointing="selective"),
            Case(dense, microbatch=few, lora="full", dropout=0.4, checkpointing=True),
            Case(dense, microbatch=many, lora="full", dropout=0.4, pairs=True),
        ]
    if "pp" in sizes:
        return found
    found += [
        Case(moe, microbatch=few, checkpointing=True),
        Case(latent, microbatch=many, lora="full"),
        Case(moe, microbatch=many, optimizer="muon", pairs=True),
    ]
    if "ep" not in sizes:
        found += [Case(gpt2, microbatch=many), Case(gpt2, microbatch=many, lora="full")]
        if sizes.get("tp", 1) < 4:  # a rounded weight is cut where the pieces are whole groups
            found += [Case("wide", lora="int8"), Case("wide", "bf16", lora="int4")]
    return found


def ends_of(sizes: Sizes) -> tuple[int | None, int | None]:
    """The first and the last of `microbatch_sizes`."""
    found = microbatch_sizes(sizes)
    return found[0], found[-1]


def eight(sizes: Sizes) -> list[Case]:
    """Under a layout of eight ranks."""
    few, many = ends_of(sizes)
    first, moe = kinds(sizes)[0], kinds(sizes)[-1]
    found = [Case(first, microbatch=many, optimizer="muon"), Case(moe, "bf16", few), Case(first, "bf16", many, "muon")]
    if sizes.get("pp") == 4:
        return found
    latent = f"latent{depth(sizes)}"
    return [
        *found,
        Case(latent, microbatch=many, optimizer="muon", checkpointing="every:2"),
        Case(latent, microbatch=few, lora="full"),
    ]


def main() -> None:
    """Print the product."""
    print("layout".ljust(44), "models × precisions × microbatches × optimizers = cells, and others")
    total = more = 0
    for name, sizes in GRID.items():
        counts = [ROWS // Layout(**sizes).resolve(RANKS).data_ranks // (size or ROWS) or 1
                  for size in microbatch_sizes(sizes)]  # fmt: skip
        found, beside = len(cells(sizes)), len(others(sizes))
        print(name.ljust(44), f"{'+'.join(kinds(sizes))} × fp32+bf16 × {'+'.join(map(str, counts))} × adamw+muon "
              f"= {found} + {beside}")  # fmt: skip
        total, more = total + found, more + beside
    for name, sizes in EIGHT.items():
        print(f"8 ranks: {name}".ljust(44), f"{len(eight(sizes))}")
    print(f"{len(GRID)} layouts on four ranks: {total} cells and {more} others; {len(EIGHT)} on eight: "
          f"{sum(map(len, map(eight, EIGHT.values())))}")  # fmt: skip
    print("left out: dense models where ep > 1 (no experts to divide); one microbatch under schedules that need more")


if __name__ == "__main__":
    main()
