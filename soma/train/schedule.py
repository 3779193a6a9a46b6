"""Learning rates as pure functions of the step. Loads no torch."""

import math

from soma.train.config import TrainConfig, part_steps


def cosine(step: int, steps: int, warmup: int, minimum: float = 0.0) -> float:
    """Share of the peak at `step` (from 0) of `steps`: linear warm-up, then half a cosine down to `minimum`.

    Loshchilov & Hutter 2017 (SGDR), one period. 100 steps, warm-up 10: step 0 → 0.1, step 9 → 1, step 55 (half way from
    10 to 100) → 0.5.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return minimum + (1 - minimum) * 0.5 * (1 + math.cos(math.pi * progress))


def wsd(step: int, steps: int, warmup: int, decay: int, minimum: float = 0.0) -> float:
    """Share of the peak at `step`: linear warm-up, stable, then `decay` steps of 1 - sqrt down to `minimum`.

    Hägele et al. 2024 (arXiv:2405.18392), eq. 1: the 1 - sqrt shape beats a linear decay. 100 steps, warm-up 10, decay
    20: step 4 → 0.5, step 50 → 1, step 85 (a quarter into the decay) → 0.5.
    """
    if step < warmup:
        return (step + 1) / warmup
    into_decay = step - (steps - decay)
    if into_decay <= 0:
        return 1.0
    return minimum + (1 - minimum) * (1 - math.sqrt(into_decay / decay))


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The learning rate of `step` (from 0) when the run has `steps` in all."""
    warmup = part_steps(config.warmup, steps)
    if config.schedule == "cosine":
        factor = cosine(step, steps, warmup, config.minimum_learning_rate)
    else:
        factor = wsd(step, steps, warmup, part_steps(config.decay, steps), config.minimum_learning_rate)
    return config.learning_rate * factor
