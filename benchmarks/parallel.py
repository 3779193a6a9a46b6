"""Parallel training on two ranks with one pinned thread each: what our layouts and runtimes cost.

Layouts: a step of the real loop (AdamW, gradient clipping; an 8-layer Llama of width 256, 8 sequences of 256 tokens in
microbatches of 2, fp32) under FSDP, tensor and pipeline parallelism, against data-parallel replicas (DDP) on the same
ranks: seconds of a step, the longest of the ranks; all layouts take turns, and all must have the same loss. A ratio of
0.8 is an overhead of 25 %. No bar: two ranks that share a memory say what the software costs, not what a network does.

Pipelines: `soma.train.parallel.pipeline` against `torch.distributed.pipelining`'s runtime, on the schedules that it
has, over the same stages of an 8-layer Llama (width 128, 8 microbatches of 64 tokens, fp32: small, so that what is not
computing shows). Both must give the same gradients. The two take turns; seconds of a step, the longest of the ranks.

    python benchmarks/parallel.py --json              # both; --layouts or --pipeline for one
"""

from common import Case, finish, make_case, parser

PIPELINE_ROUNDS = 3  # rounds of the pipelines for each round of the layouts, whose steps are longer


def layout_cases(rounds: int, warmup: int) -> list[Case]:
    """One case for each layout against replicas."""
    from peers.layouts import measure

    times = measure(rounds, warmup)
    replicas = [1000 * seconds for seconds in times.pop("DDP")]
    return [
        make_case(f"layout, {name}", "ms", [1000 * s for s in ours], "DDP", replicas, higher_is_better=False)
        for name, ours in times.items()
    ]


def pipeline_cases(rounds: int, warmup: int) -> list[Case]:
    """One case for each schedule; no slower than torch's is the bar."""
    from peers.pipelining import measure

    return [
        make_case(f"pipeline, {name}", "ms", [1000 * s for s in ours], "torch.distributed.pipelining",
                  [1000 * s for s in theirs], bar=1.0, higher_is_better=False)
        for name, (ours, theirs) in measure(rounds, warmup).items()
    ]  # fmt: skip


def main() -> None:
    arguments = parser("parallel", __doc__ or "", rounds=9)
    arguments.add_argument("--layouts", action="store_true", help="layouts alone")
    arguments.add_argument("--pipeline", action="store_true", help="pipeline schedules alone")
    chosen = arguments.parse_args()
    chosen.threads = 1
    both = chosen.layouts == chosen.pipeline
    cases = layout_cases(chosen.rounds, chosen.warmup) if both or chosen.layouts else []
    if both or chosen.pipeline:
        cases += pipeline_cases(PIPELINE_ROUNDS * chosen.rounds, chosen.warmup)
    finish("parallel", chosen, cases)


if __name__ == "__main__":
    main()
