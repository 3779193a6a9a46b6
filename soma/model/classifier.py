"""Encoders with a head over their first token: one text or two in, classes out. With one label and two texts that is a
cross-encoder (arXiv:1901.04085), which reads a query and a passage together.

Shape letters: B batch, T tokens, D model width, L labels.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from soma.base.artefact import read_json
from soma.base.errors import UserError
from soma.model.encoder import Encoder, encoder_config, fill, is_encoder

HEAD = "ForSequenceClassification"  # how the architecture's name ends
# Of a folder's names, what stands elsewhere in ours: RoBERTa's head holds the layer that BERT calls its pooler.
RENAMED = (
    ("bert.pooler.dense.", "pooler."), ("classifier.dense.", "pooler."), ("classifier.out_proj.", "classifier."),
    ("bert.", "encoder."), ("roberta.", "encoder."),
)  # fmt: skip
Activation = Literal["sigmoid", "softmax", "identity"]


class SequenceClassifier(nn.Module):
    """An encoder, a layer with tanh over its first token, and a layer to the labels."""

    def __init__(self, encoder: Encoder, labels: list[str], activation: Activation) -> None:
        super().__init__()
        width = encoder.config.hidden_size
        self.encoder, self.labels, self.activation = encoder, labels, activation
        self.pooler, self.classifier = nn.Linear(width, width), nn.Linear(width, len(labels))

    def forward(self, tokens_BT: Tensor, keep_BT: Tensor | None = None, segments_BT: Tensor | None = None) -> Tensor:
        """Logits (B, L); arguments as of `Encoder`."""
        x_BTD = self.encoder(tokens_BT, keep_BT, segments_BT)
        return self.classifier(torch.tanh(self.pooler(x_BTD[:, 0])))

    def scores(self, logits_BL: Tensor) -> Tensor:
        """Logits as the folder wants them read: (B, L) fp32."""
        if self.activation == "softmax":
            return logits_BL.float().softmax(-1)
        return logits_BL.float().sigmoid() if self.activation == "sigmoid" else logits_BL.float()


def is_classifier(directory: Path) -> bool:
    """Whether a folder holds an encoder with such a head."""
    if not is_encoder(directory):
        return False
    names = read_json(directory / "config.json").get("architectures") or [""]
    return isinstance(names, list) and str(names[0]).endswith(HEAD)


def labels_of(raw: dict[str, Any]) -> list[str]:
    """Names of the classes, in order, from a config.json; transformers has two where it says nothing."""
    named = raw.get("id2label")
    if not isinstance(named, dict) or set(named) != {str(place) for place in range(len(named))}:
        return [f"LABEL_{place}" for place in range(int(raw.get("num_labels") or 2))]
    return [str(named[str(place)]) for place in range(len(named))]


def activation_of(raw: dict[str, Any], labels: int, path: Path) -> Activation:
    """How scores are made of logits: as sentence-transformers' CrossEncoder does for one label (a sigmoid unless the
    config names another), as transformers' pipeline for several. Raises UserError."""
    if labels > 1:
        return "sigmoid" if raw.get("problem_type") == "multi_label_classification" else "softmax"
    nested = raw.get("sentence_transformers")
    given = nested.get("activation_fn") if isinstance(nested, dict) else None
    name = str(given or raw.get("sbert_ce_default_activation_function") or "Sigmoid").rpartition(".")[2]
    if name not in ("Sigmoid", "Identity"):
        raise UserError(f"{path}: the activation {name!r} is not supported, only Sigmoid and Identity")
    return "sigmoid" if name == "Sigmoid" else "identity"


def own_name(name: str) -> str:
    """A tensor's name in `SequenceClassifier`."""
    for theirs, ours in RENAMED:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def load_classifier(
    directory: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> SequenceClassifier:  # fmt: skip
    """The classifier in a Hugging Face folder, in eval mode; as `load_encoder`. Raises UserError."""
    path = directory / "config.json"
    raw = read_json(path)
    labels = labels_of(raw)
    with torch.device("meta"):
        encoder = Encoder(encoder_config(directory))
        model = SequenceClassifier(encoder, labels, activation_of(raw, len(labels), path))
    fill(model, directory, own_name, dtype, device)
    return model.eval()
