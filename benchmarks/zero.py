"""What a step of ZeRO costs beside the mathematics: ours and DeepSpeed's, on the same model in the same loop.

Counted in one step of rank 0 (exact, and the same on every machine): operations between ranks by kind and dtype, bytes
that a rank sends, the share of them that starts after the last matrix product, operations launched in the passes and in
the update (clipping, optimizer, zeroing), and how often Python asks for a tensor's value. Then timed, the two in turn.
Stages 1 and 2 are held against FSDP2's as well, replicas against Accelerate's (torch's DistributedDataParallel), hybrid
shards against our own ZeRO-3 on four ranks. fp32 parameters, bf16 products, AdamW, clipping; one microbatch a step,
and four.

    python benchmarks/zero.py --json                   # two Gloo ranks (four for hybrid), a small Llama
    python benchmarks/zero.py --device cuda --json     # two GPUs, NCCL: 0.55 billion parameters, 4,096 tokens a rank
    python benchmarks/zero.py --stages 1 2 --counts    # some of it

In a ratio more than 1 means that ours sends, launches or waits less (where one side has none of something, both
have one more in the ratio). Bytes are those of rings (of n ranks each sends (n-1)/n of what is gathered or scattered,
and twice that of an all-reduce). On CPUs the model is 200 times smaller than on GPUs, and so are our
buckets and Accelerate's; DeepSpeed's holds the whole model in either.
"""

from typing import Any

from common import Case, finish, make_case, parser

STAGES = ("ddp", "1", "2", "3", "hybrid")
DEEPSPEED, ACCELERATE, FSDP2 = "DeepSpeed", "Accelerate", "FSDP2"


def sides(stage: str) -> tuple[int, dict[str, Any], dict[str, dict[str, Any]]]:
    """Ranks, our layout, and the peers' layouts."""
    if stage == "ddp":
        return 2, {"dp": 2}, {ACCELERATE: {"dp": 2, "engine": "accelerate"}}
    if stage == "hybrid":
        return 4, {"dp": 2, "fsdp": 2}, {"ours, zero 3": {"fsdp": 4}}
    layout = {"fsdp": 2, "zero": int(stage)}
    others = {DEEPSPEED: layout | {"engine": "deepspeed"}}
    return 2, layout, others if stage == "3" else others | {FSDP2: layout | {"fsdp2": True}}


def count_cases(label: str, peer: str, ours: Any, theirs: Any, ranks: int) -> list[Case]:
    """What was counted, ours beside the peer's."""

    def case(what: str, unit: str, mine: float, other: float) -> Case:
        both = [float(mine)], [float(other)]
        ratio = both if mine and other else ([1.0 + mine], [1.0 + other])  # none at all of something: one more each
        made = make_case(f"{label}: {what}", unit, ratio[0], peer, ratio[1], higher_is_better=False)
        made.ours, made.theirs = both[0][0], both[1][0]
        return made

    cases = [
        case("operations between ranks", "calls", len(ours.collectives), len(theirs.collectives)),
        case("sent by a rank", "MB", ours.sent(ranks) / 1e6, theirs.sent(ranks) / 1e6),
        case("of that, after the last product", "%", 100 * ours.late(), 100 * theirs.late()),
    ]
    mine, other = ours.by_kind(), theirs.by_kind()
    for kind in sorted(mine.keys() | other.keys()):
        (calls, size), (their_calls, their_size) = mine.get(kind, (0, 0)), other.get(kind, (0, 0))
        cases.append(case(kind, "calls", calls, their_calls))
        cases.append(case(kind, "MB", size / 1e6, their_size / 1e6))
    return [
        *cases,
        case("launched in the passes", "operations", ours.launches["passes"], theirs.launches["passes"]),
        case("launched in the update", "operations", ours.launches["update"], theirs.launches["update"]),
        case("of all, through DTensor", "operations", ours.through_dtensor, theirs.through_dtensor),
        case("values asked for", "reads", ours.reads, theirs.reads),
    ]


def stage_cases(stage: str, microbatches: int, chosen: Any, absent: set[str]) -> list[Case]:
    """All cases of a stage."""
    from peers.zero import Ranks

    size, layout, others = sides(stage)
    peers = [peer for peer in others if peer not in absent]
    label = f"{stage if stage in ('ddp', 'hybrid') else f'zero {stage}'}, {microbatches} microbatches"
    every = {
        name: Ranks(size, sizes, microbatches, chosen.device)
        for name, sizes in {"ours": layout, **others}.items() if name not in absent
    }  # fmt: skip
    counts = {name: ranks.ask("count") for name, ranks in every.items()}
    cases = [case for peer in peers for case in count_cases(label, peer, counts["ours"], counts[peer], size)]
    if not chosen.counts:
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in every}
        peaks, losses = {}, {}
        for round_ in range(-chosen.warmup, chosen.rounds):
            for name in sorted(every, reverse=round_ % 2 == 1):
                seconds, busy, losses[name], peaks[name] = every[name].ask("time")
                if round_ >= 0:
                    times[name].append((1000 * seconds, 1000 * busy))
        assert max(losses.values()) - min(losses.values()) < 5e-2, losses  # they train the same model
        for peer in peers:
            for place, what in enumerate(("a step", "processor time of all ranks")):
                ours, theirs = ([pair[place] for pair in times[name]] for name in ("ours", peer))
                cases.append(make_case(f"{label}: {what}", "ms", ours, peer, theirs, higher_is_better=False))
            if chosen.device == "cuda":
                cases.append(make_case(f"{label}: peak", "GiB", [peaks["ours"]], peer, [peaks[peer]],
                                       higher_is_better=False))  # fmt: skip
    for ranks in every.values():
        ranks.close()
    return cases


def missing(name: str) -> str | None:
    """Why a peer cannot run; None if it can."""
    from importlib.util import find_spec

    package = name.lower()
    return None if find_spec(package) else f"{package} is not installed: pip install 'somacube[{package}]'"


def main() -> None:
    arguments = parser("zero", __doc__ or "", rounds=9)
    arguments.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all")
    arguments.add_argument("--microbatches", nargs="+", type=int, default=[1, 4], choices=[1, 2, 4])
    arguments.add_argument("--counts", action="store_true", help="count, and take no times")
    arguments.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: two GPUs, NCCL")
    chosen = arguments.parse_args()
    chosen.threads = 1
    cases: list[Case] = []
    not_run: dict[str, str] = {}
    for stage in chosen.stages:
        size, _, others = sides(stage)
        reasons = {peer: reason for peer in {DEEPSPEED, ACCELERATE} & others.keys() if (reason := missing(peer))}
        not_run |= {f"{stage}, {peer}": reason for peer, reason in reasons.items()}
        if chosen.device == "cuda":
            import torch

            if torch.cuda.device_count() < size:
                not_run[stage] = f"it takes {size} GPUs, and there are {torch.cuda.device_count()}"
                continue
        if reasons.keys() == others.keys():
            continue
        for microbatches in chosen.microbatches:
            cases += stage_cases(stage, microbatches, chosen, set(reasons))
    name = "zero" if chosen.device == "cpu" else "zero-gpu"
    finish(name, chosen, cases, ["deepspeed", "accelerate"], not_run)


if __name__ == "__main__":
    main()
