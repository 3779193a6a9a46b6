"""What tuning on answers did, on held-out conversations or preference pairs: `answers.json`.

* conversations: {kind: "answers", after, before}, each as `score_answers` gives it.
* pairs: {kind: "pairs", pairs, accuracy, margin, interval, loss, plain_accuracy, after, before}; see `pair_figures`.

`before` is the model that tuning started from, `after` the tuned one. Where nothing is held out the figures are null.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from soma.base import progress
from soma.base.artefact import content_hash, write_json
from soma.data.store import read_index
from soma.evaluate.answers import answer_costs, read_masked, score_answers
from soma.evaluate.config import EvaluateConfig
from soma.evaluate.perplexity import bootstrap, token_logprobs, window_settings
from soma.model.hub import load_model
from soma.train.compute import native_bf16, resolve_device

SPLIT = "validation"
Costs = tuple[np.ndarray, np.ndarray]  # nats and tokens of each answer


def evaluate_tuned(
    config: EvaluateConfig, out: Path, *, model: Path, start: Path, tokens: Path, beta: float = 0.1,
    device: str = "auto",
) -> dict[str, Any]:  # fmt: skip
    """Score the held-out split of masked `tokens` with the tuned `model` and the one it started from; fills `out`.

    `beta` is DPO's, for the loss of pairs. Raises UserError for tokens without masks or ids that a model does not have.
    """
    place = resolve_device(device)
    precision = ("bf16" if native_bf16(place) else "fp32") if config.precision == "auto" else config.precision
    is_pairs = f"{SPLIT}.chosen" in read_index(tokens)["splits"]
    scored: dict[str, Any] = {}
    for name, folder in (("after", model), ("before", start)):
        network = load_model(folder, dtype=torch.bfloat16 if precision == "bf16" else torch.float32, device=place)
        length, stride = window_settings(network, config.sequence_length, config.stride)
        if not is_pairs:
            scored[name] = score_answers(
                network, tokens, split=SPLIT, length=length, stride=stride, batch_size=config.batch_size,
                resamples=config.resamples, seed=config.seed,
            )  # fmt: skip
            continue
        costs: list[Costs] = []
        for side in ("chosen", "rejected"):
            ids, masks = read_masked(tokens, f"{SPLIT}.{side}")
            logprobs = token_logprobs(network, ids, length=length, stride=stride, batch_size=config.batch_size)
            costs.append(answer_costs(logprobs, masks))
        scored[name] = costs
    facts: dict[str, Any] = {"format": "soma-answers", "version": 1, "split": SPLIT, "precision": precision}
    facts |= {"model_hash": content_hash(model), "start_hash": content_hash(start)}
    if is_pairs:
        facts |= {"kind": "pairs", **pair_figures(scored["after"], scored["before"], beta, config)}
    else:
        facts |= {"kind": "answers", **scored}
    if facts["after"] is None:
        progress.current().note(f"{tokens}: nothing is held out, so the tuned answers have no score")
    write_json(out / "answers.json", facts)
    return facts


def pair_figures(after: list[Costs], before: list[Costs], beta: float, config: EvaluateConfig) -> dict[str, Any]:
    """Figures of pairs from the nats of their chosen and rejected answers.

    A pair's margin is log p(chosen) - log p(rejected), less the same of the starting model: DPO's reward over β.
    `accuracy` is the share of margins above 0 and `margin` their mean, in nats, with its 95 % `interval`; `loss` is
    DPO's, -log σ(β · margin); `plain_accuracy` counts pairs whose chosen answer is the likelier one, whatever the start
    did. Worked number: costs (10, 20) after and (12, 15) before are a margin of (20 - 10) - (15 - 12) = 7 nats, and at
    β 0.1 a loss of 0.40319.
    """
    (chosen, chosen_sizes), (rejected, rejected_sizes) = after
    if not len(chosen):
        return {"pairs": 0, "accuracy": None, "margin": None, "loss": None, "after": None, "before": None}
    margins = (rejected - chosen) - (before[1][0] - before[0][0])
    inside = bootstrap(margins, np.ones_like(margins), config.resamples, config.seed)
    return {
        "pairs": len(margins), "accuracy": float((margins > 0).mean()), "margin": float(margins.mean()),
        "interval": list(inside) if inside else None,
        "loss": float(np.logaddexp(0, -beta * margins).mean()), "start_loss": math.log(2),
        "plain_accuracy": float((chosen < rejected).mean()),
        "start_plain_accuracy": float((before[0][0] < before[1][0]).mean()),
        "after": {"chosen_nats_per_token": float(chosen.sum() / chosen_sizes.sum()),
                  "rejected_nats_per_token": float(rejected.sum() / rejected_sizes.sum())},
        "before": {"chosen_nats_per_token": float(before[0][0].sum() / chosen_sizes.sum()),
                   "rejected_nats_per_token": float(before[1][0].sum() / rejected_sizes.sum())},
    }  # fmt: skip


def headline(facts: dict[str, Any]) -> str:
    """The figures in a line."""
    if facts["after"] is None:
        return "nothing is held out"
    after, before = facts["after"], facts["before"]
    if facts["kind"] == "answers":
        return (
            f"{after['nats_per_token']:.3f} nats per token on {after['conversations']:,} held-out conversations "
            f"(before tuning {before['nats_per_token']:.3f})"
        )
    return (
        f"{facts['accuracy']:.1%} of {facts['pairs']:,} held-out pairs moved towards the chosen answer, by "
        f"{facts['margin']:.3g} nats in the mean; loss {facts['loss']:.4f} (before {facts['start_loss']:.4f})"
    )
