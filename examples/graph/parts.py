"""What the graph has of its own: a classifier over embeddings, and a form."""

from pathlib import Path

import numpy as np

TRAINED = np.load(Path(__file__).parent / "topics.npz")  # written by prepare.py


def topic(embedding: np.ndarray) -> np.ndarray:
    """The label of the nearest centroid for each unit vector, [N, D]."""
    return TRAINED["labels"][(embedding @ TRAINED["centroids_LD"].T).argmax(1)]


def form(text_input: np.ndarray) -> np.ndarray:
    """What people with questions about money get."""
    return np.array(["Please fill in the form at /refunds."] * len(text_input))
