"""Training the model of speech acts (`soma.model.acts`): minutes on one thread."""

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from soma.base import progress
from soma.base.errors import UserError
from soma.model.act_words import features
from soma.model.acts import ActClassifier, ActConfig, ActModel, Words, batch_of, words_of
from soma.train.schedule import cosine

PIECE = 32  # turns of a long call that are trained on together, with the turns before them as context


class ActTraining(BaseModel):
    """How it is trained."""

    model_config = ConfigDict(extra="forbid")

    epochs: int = Field(3, gt=0, description="passes; the one that was best on the validation dialogues is kept")
    batch_size: int = Field(16, gt=0, description="dialogues (or pieces of long ones) a step")
    bag_rate: float = Field(0.01, gt=0, description="learning rate of the embeddings of features (sparse Adam)")
    wide_rate: float = Field(0.02, gt=0, description="learning rate of the linear part (sparse Adam)")
    rate: float = Field(0.002, gt=0, description="learning rate of all else (AdamW)")
    feature_dropout: float = Field(0.3, ge=0, lt=1, description="share of features that a step leaves out")
    label_smoothing: float = Field(0.05, ge=0, lt=1, description="of the cross-entropy")
    seed: int = Field(0, ge=0, description="of weights, order and dropout")


class Piece(NamedTuple):
    """Turns of one dialogue and their labels, -1 where there is none or where they are context alone."""

    words: list[Words]
    labels: np.ndarray


def train_acts(
    train: Mapping[str, Sequence[Any]], validation: Mapping[str, Sequence[Any]], config: ActConfig,
    training: ActTraining | None = None,
) -> tuple[ActClassifier, list[dict[str, float]]]:  # fmt: skip
    """Train on dialogues whose turns say their act; returns the classifier and, for each epoch, loss and macro-F1.

    Classes weigh by the square root of their rarity. Raises UserError where a class has no turn to learn from.
    """
    training = training or ActTraining()
    torch.manual_seed(training.seed)
    generator = np.random.default_rng(training.seed)
    model = ActModel(config)
    idf = inverse_frequencies(train, config.buckets)
    model.idf.copy_(torch.from_numpy(idf))  # type: ignore[operator]
    pieces = pieces_of(train, config, idf)
    held = pieces_of(validation, config, idf)
    counts = Counter(label for piece in pieces for label in piece.labels.tolist() if label >= 0)
    if missing := [act for number, act in enumerate(config.acts) if not counts[number]]:
        raise UserError(f"no turn is labelled {', '.join(missing)}: there is nothing to learn it from")
    total = counts.total()
    weights_A = torch.tensor([math.sqrt(total / counts[n] / len(config.acts)) for n in range(len(config.acts))])
    sparse = {model.bag.weight, model.wide.weight}
    rest = [parameter for parameter in model.parameters() if parameter not in sparse]
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.SparseAdam([model.bag.weight], lr=training.bag_rate), training.bag_rate),
        (torch.optim.SparseAdam([model.wide.weight], lr=training.wide_rate), training.wide_rate),
        (torch.optim.AdamW(rest, lr=training.rate, weight_decay=0.05), training.rate),
    ]
    steps = training.epochs * math.ceil(len(pieces) / training.batch_size)
    history: list[dict[str, float]] = []
    best, best_state, step, started = -1.0, {}, 0, time.perf_counter()
    with progress.current().task("train the acts", total=steps, unit="steps") as task:
        for epoch in range(training.epochs):
            model.train()
            losses = []
            order = generator.permutation(len(pieces))
            for at in range(0, len(order), training.batch_size):
                chosen = [pieces[number] for number in order[at : at + training.batch_size]]
                for optimizer, rate in optimizers:
                    optimizer.param_groups[0]["lr"] = rate * cosine(step, steps, min(40, steps // 4 + 1))
                loss = loss_of(model, chosen, weights_A, training)
                model.zero_grad()
                loss.backward()
                for optimizer, _ in optimizers:
                    optimizer.step()
                losses.append(loss.detach().item())
                step += 1
                task.advance(1)
            score = float(f1_scores(*judged(model, held), len(config.acts)).mean())
            spent = time.perf_counter() - started
            history.append({"epoch": epoch + 1, "loss": float(np.mean(losses)), "macro_f1": score, "seconds": spent})
            if score > best:
                best, best_state = score, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(best_state)
    return ActClassifier(model), history


def loss_of(model: ActModel, pieces: Sequence[Piece], weights_A: Tensor, training: ActTraining) -> Tensor:
    """Weighted cross-entropy of the labelled turns, with features left out at random."""
    batch = batch_of([piece.words for piece in pieces])
    keep = 1 - training.feature_dropout
    kept = batch.weights * (torch.rand_like(batch.weights) < keep) / keep
    logits_BTA = model(batch._replace(weights=kept))
    labels = torch.full(batch.change.shape, -1)
    for row, piece in enumerate(pieces):
        labels[row, : len(piece.labels)] = torch.from_numpy(piece.labels)
    return F.cross_entropy(
        logits_BTA.flatten(0, 1), labels.flatten(), weight=weights_A, ignore_index=-1,
        label_smoothing=training.label_smoothing,
    )  # fmt: skip


def inverse_frequencies(dialogues: Mapping[str, Sequence[Any]], buckets: int) -> np.ndarray:
    """ln((1 + n) / (1 + df)) + 1 for each bucket (scikit-learn's smooth idf), 0 for those in fewer than two turns."""
    counts, turns = np.zeros(buckets, np.int64), 0
    for dialogue in dialogues.values():
        for turn in dialogue:
            counts[features(turn.text, buckets)] += 1
            turns += 1
    return np.where(counts > 1, np.log((1 + turns) / (1 + counts)) + 1, 0).astype(np.float32)


def pieces_of(dialogues: Mapping[str, Sequence[Any]], config: ActConfig, idf: np.ndarray) -> list[Piece]:
    """Dialogues as pieces of at most PIECE labelled turns, each with the turns before it as context."""
    found = []
    reach = config.context * max(1, config.num_hidden_layers)
    for turns in dialogues.values():
        words = words_of(turns, config.buckets, idf)
        labels = np.array([config.acts.index(turn.act) if turn.act in config.acts else -1 for turn in turns])
        for start in range(0, len(words), PIECE):
            first = max(0, start - reach)
            own = labels[first : start + PIECE].copy()
            own[: start - first] = -1
            if (own >= 0).any():
                found.append(Piece(words[first : start + PIECE], own))
    return found


@torch.inference_mode()
def judged(model: ActModel, pieces: Sequence[Piece]) -> tuple[np.ndarray, np.ndarray]:
    """(labels, predictions) of the labelled turns."""
    model.eval()
    labels, predictions = [], []
    for at in range(0, len(pieces), 64):
        chunk = pieces[at : at + 64]
        best_BT = model(batch_of([piece.words for piece in chunk])).argmax(-1).numpy()
        for piece, row in zip(chunk, best_BT, strict=True):
            known = piece.labels >= 0
            labels.append(piece.labels[known])
            predictions.append(row[: len(piece.labels)][known])
    return np.concatenate(labels), np.concatenate(predictions)


def f1_scores(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """F1 of each class: 2 TP / (labelled + predicted), 0 where both are none."""
    both = np.bincount(labels[labels == predictions], minlength=classes)
    total = np.bincount(labels, minlength=classes) + np.bincount(predictions, minlength=classes)
    return 2 * both / np.maximum(1, total)
