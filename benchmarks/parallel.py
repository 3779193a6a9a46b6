"""Parallel training on two ranks with one pinned thread each: what our runtimes cost beside PyTorch's.

Pipelines: `soma.train.parallel.pipeline` against `torch.distributed.pipelining`'s runtime, on the schedules that it
has, over the same stages of an 8-layer Llama (width 128, 8 microbatches of 64 tokens, fp32: small, so that what is not
computing shows). Both must give the same gradients. The two take turns; seconds of a step, the longest of the ranks.

    python benchmarks/parallel.py --pipeline --json
"""

from common import Case, finish, make_case, parser


def pipeline_cases(rounds: int, warmup: int) -> list[Case]:
    """One case for each schedule; no slower than torch's is the bar."""
    from peers.pipelining import measure

    return [
        make_case(f"pipeline, {name}", "ms", [1000 * s for s in ours], "torch.distributed.pipelining",
                  [1000 * s for s in theirs], bar=1.0, higher_is_better=False)
        for name, (ours, theirs) in measure(rounds, warmup).items()
    ]  # fmt: skip


def main() -> None:
    arguments = parser("parallel", __doc__ or "", rounds=15)
    arguments.add_argument("--pipeline", action="store_true", help="pipeline schedules")
    chosen = arguments.parse_args()
    if not chosen.pipeline:
        arguments.error("say what to measure: --pipeline")
    chosen.threads = 1
    finish("parallel", chosen, pipeline_cases(chosen.rounds, chosen.warmup))


if __name__ == "__main__":
    main()
