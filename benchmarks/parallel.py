"""Parallel training on two ranks with one pinned thread each: what our layouts and runtimes cost.

Layouts: a step of the real loop (AdamW, gradient clipping; an 8-layer Llama of width 256, 8 sequences of 256 tokens in
microbatches of 2, fp32) under FSDP, tensor and pipeline parallelism, against data-parallel replicas (DDP) on the same
ranks: seconds of a step, the longest of the ranks; all layouts take turns, and all must have the same loss. A ratio of
0.8 is an overhead of 25 %. No bar: two ranks that share a memory say what the software costs, not what a network does.
Our replicas themselves are held against a plain loop with torch's DistributedDataParallel.

Pipelines: `soma.train.parallel.pipeline` against `torch.distributed.pipelining`'s runtime, on the schedules that it
has, over the same stages of an 8-layer Llama (width 128, 8 microbatches of 64 tokens, fp32: small, so that what is not
computing shows). Both give the same gradients, and the loss on every rank. The two take turns; seconds of a step, the
longest of the ranks, and the processor time of all ranks.

    python benchmarks/parallel.py --json              # both; --layouts or --pipeline for one
    python benchmarks/parallel.py --device cuda --json    # a GPU for each rank: width 2048, bf16, NCCL
"""

from common import Case, finish, make_case, parser

PIPELINE_ROUNDS = 3  # rounds of the pipelines for each round of the layouts, whose steps are longer


def layout_cases(rounds: int, warmup: int, device: str) -> list[Case]:
    """One case for each layout against replicas, and one for those against torch's."""
    from peers.layouts import PLAIN, measure

    times = {name: [1000 * s for s in seconds] for name, seconds in measure(rounds, warmup, device).items()}
    replicas, plain = times.pop("DDP"), times.pop(PLAIN)
    cases = [make_case("layout, DDP", "ms", replicas, PLAIN, plain, higher_is_better=False)]
    return cases + [
        make_case(f"layout, {name}", "ms", ours, "DDP", replicas, higher_is_better=False)
        for name, ours in times.items()
    ]


def pipeline_cases(rounds: int, warmup: int, device: str) -> list[Case]:
    """Two cases for each schedule: a step's time, for which no slower than torch's is the bar, and processor time."""
    from peers.pipelining import measure

    cases = []
    for name, times in measure(rounds, warmup, device).items():
        for place, (what, bar) in enumerate((("", 1.0), (", processor time", None))):
            ours, theirs = ([1000 * pair[place] for pair in times[side]] for side in ("ours", "theirs"))
            cases.append(
                make_case(f"pipeline, {name}{what}", "ms", ours, "torch.distributed.pipelining", theirs, bar,
                          higher_is_better=False)
            )  # fmt: skip
    return cases


def main() -> None:
    arguments = parser("parallel", __doc__ or "", rounds=9)
    arguments.add_argument("--layouts", action="store_true", help="layouts alone")
    arguments.add_argument("--pipeline", action="store_true", help="pipeline schedules alone")
    arguments.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: two GPUs, NCCL")
    chosen = arguments.parse_args()
    chosen.threads = 1
    both = chosen.layouts == chosen.pipeline
    cases: list[Case] = []
    if both or chosen.pipeline:
        cases += pipeline_cases(PIPELINE_ROUNDS * chosen.rounds, chosen.warmup, chosen.device)
    if both or chosen.layouts:
        cases += layout_cases(chosen.rounds, chosen.warmup, chosen.device)
    finish("parallel" if chosen.device == "cpu" else "parallel-gpu", chosen, cases)


if __name__ == "__main__":
    main()
