"""A model of speech acts: a bag of n-grams a turn, then an encoder over the turns of the dialogue.

Wide and deep (Cheng et al. 2016, arXiv:1606.07792): each feature has weights of its own for the act of its turn and for
the act of the next one, a linear model; beside it a sum of embeddings a turn goes through `EncoderLayer`s in which a
turn sees itself and the turns just before. Shape letters: B dialogues, T turns, D width, A acts, F features.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from soma.base.artefact import read_json, write_json
from soma.base.errors import UserError
from soma.model.act_words import features
from soma.model.encoder import EncoderConfig, EncoderLayer
from soma.model.safetensors_io import SafetensorsFile, write_safetensors

FILE, CONFIG = "model.safetensors", "config.json"


class ActConfig(BaseModel):
    """Shape of the model."""

    model_config = ConfigDict(extra="forbid")

    model_type: str = Field("soma_speech_acts", pattern="^soma_speech_acts$", description="what kind of folder this is")
    acts: list[str] = Field(description="names of the classes, in the order of the probabilities")
    buckets: int = Field(1 << 17, gt=0, description="rows that features are hashed into")
    hidden_size: int = Field(64, gt=0, description="width of a turn's vector")
    num_hidden_layers: int = Field(1, ge=0, description="layers over the turns")
    num_attention_heads: int = Field(4, gt=0, description="heads of a layer")
    context: int = Field(4, ge=0, description="turns before its own that a turn sees")
    dropout: float = Field(0.4, ge=0, lt=1, description="of the turns' vectors, in training")


class Batch(NamedTuple):
    """Dialogues as tensors. `ids` and `weights` (F) lie turn after turn, `starts` says where each begins, `places`
    which of the B·T places it takes; `change` (B, T): 0 first turn, 1 the other speaker's, 2 the same one's."""

    ids: Tensor
    weights: Tensor
    starts: Tensor
    places: Tensor
    change: Tensor


class ActModel(nn.Module):
    """Dialogues in, logits of acts for every turn out."""

    def __init__(self, config: ActConfig) -> None:
        super().__init__()
        self.config, width, acts = config, config.hidden_size, len(config.acts)
        self.bag = nn.EmbeddingBag(config.buckets, width, mode="sum", sparse=True)
        self.wide = nn.EmbeddingBag(config.buckets, 2 * acts, mode="sum", sparse=True)
        nn.init.normal_(self.bag.weight, std=0.1)
        nn.init.zeros_(self.wide.weight)
        self.change = nn.Embedding(3, width)
        self.norm = nn.LayerNorm(width)
        layer = EncoderConfig(
            hidden_size=width, intermediate_size=2 * width, num_attention_heads=config.num_attention_heads
        )
        self.layers = nn.ModuleList(EncoderLayer(layer) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(width, acts)
        self.register_buffer("idf", torch.ones(config.buckets))

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, T, A), float32."""
        B, T = batch.change.shape
        acts = len(self.config.acts)

        def placed(bag: nn.EmbeddingBag, width: int) -> Tensor:
            rows = bag(batch.ids, batch.starts, per_sample_weights=batch.weights)
            return rows.new_zeros(B * T, width).index_copy(0, batch.places, rows).view(B, T, width)

        x_BTD = placed(self.bag, self.config.hidden_size) * 8  # weights have length 1: bring it to the size of the rest
        x_BTD = F.dropout(self.norm(x_BTD + self.change(batch.change)), self.config.dropout, self.training)
        turns = torch.arange(T, device=x_BTD.device)
        back = turns[:, None] - turns[None, :]
        mask = ((back >= 0) & (back <= self.config.context))[None, None]
        for layer in self.layers:
            x_BTD = layer(x_BTD, mask)
        wide = placed(self.wide, 2 * acts)
        before = F.pad(wide[:, :-1, acts:], (0, 0, 1, 0))
        return self.head(F.dropout(x_BTD, self.config.dropout, self.training)) + wide[..., :acts] + before


class Words(NamedTuple):
    """A turn for the model: its features, their weights (tf-idf, of length 1), and whose turn it is."""

    ids: np.ndarray
    weights: np.ndarray
    change: int


def words_of(turns: Sequence[Any], buckets: int, idf: np.ndarray) -> list[Words]:
    """The turns of a dialogue (`soma.data.acts.acts.Turn`) as the model sees them, without features of weight 0."""
    found = []
    for at, turn in enumerate(turns):
        ids = features(turn.text, buckets)
        ids = ids[idf[ids] > 0]
        weights = idf[ids] / (np.linalg.norm(idf[ids]) or 1.0)
        change = 0 if at == 0 else 1 + (turns[at - 1].speaker == turn.speaker)
        found.append(Words(ids, weights.astype(np.float32), change))
    return found


def batch_of(dialogues: Sequence[Sequence[Words]], device: torch.device | str = "cpu") -> Batch:
    """Dialogues of at least one turn as one batch."""
    T = max(map(len, dialogues))
    change = np.zeros((len(dialogues), T), np.int64)
    places, starts, place = [], [], 0
    for row, turns in enumerate(dialogues):
        for at, turn in enumerate(turns):
            change[row, at] = turn.change
            places.append(row * T + at)
            starts.append(place)
            place += len(turn.ids)
    every = [turn for turns in dialogues for turn in turns]
    ids, weights = np.concatenate([turn.ids for turn in every]), np.concatenate([turn.weights for turn in every])
    parts = (ids, weights, np.array(starts, np.int64), np.array(places, np.int64), change)
    return Batch(*(torch.from_numpy(part).to(device) for part in parts))


def save_acts(model: ActModel, folder: Path) -> None:
    """Write config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    specs = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    write_safetensors(folder / FILE, specs, tensors.values())
    write_json(folder / CONFIG, model.config.model_dump())


def load_acts(folder: Path) -> "ActClassifier":
    """The classifier of a folder. Raises UserError for one that holds none."""
    if not (folder / FILE).is_file():
        raise UserError(f"{folder}: no model of speech acts there; `soma data train-acts` makes one")
    try:
        model = ActModel(ActConfig.model_validate(read_json(folder / CONFIG)))
    except ValidationError as error:
        raise UserError(f"{folder / CONFIG}: not a model of speech acts ({error.errors()[0]['msg']})") from None
    file = SafetensorsFile(folder / FILE)
    try:
        model.load_state_dict({name: file.read(name) for name in file.tensors})
    except RuntimeError as error:
        raise UserError(f"{folder / FILE}: does not fit its config ({str(error).splitlines()[-1].strip()})") from None
    finally:
        file.close()
    return ActClassifier(model)


class ActClassifier:
    """The model as `soma.data.acts.acts.ActScorer`: handed to the data room, which loads no torch."""

    def __init__(self, model: ActModel) -> None:
        self.model = model.eval()
        self.acts = tuple(model.config.acts)
        digest = hashlib.sha256(json.dumps(model.config.model_dump(), sort_keys=True).encode())
        for tensor in (model.head.weight, model.wide.weight):
            digest.update(tensor.detach().numpy().tobytes())
        self.name = f"acts:{digest.hexdigest()[:16]}"
        self.idf = model.idf.numpy()  # type: ignore[operator]

    @torch.inference_mode()
    def probabilities(self, dialogues: Sequence[Sequence[Any]], turns_at_once: int = 4096) -> list[np.ndarray]:
        """(turns, acts) for each dialogue, rows that sum to 1. Long dialogues are cut into overlapping pieces."""
        pieces: list[tuple[int, int, list[Words]]] = []  # dialogue, turns that are there for context alone, words
        step = 64
        for number, turns in enumerate(dialogues):
            words = words_of(turns, self.model.config.buckets, self.idf)
            reach = self.model.config.context * max(1, self.model.config.num_hidden_layers)
            for start in range(0, len(words), step):
                first = max(0, start - reach)
                pieces.append((number, start - first, words[first : start + step]))
        found: list[list[np.ndarray]] = [[] for _ in dialogues]
        width = step + self.model.config.context * max(1, self.model.config.num_hidden_layers)
        at_once = max(1, turns_at_once // width)
        for at in range(0, len(pieces), at_once):
            chunk = pieces[at : at + at_once]
            scores = F.softmax(self.model(batch_of([words for _, _, words in chunk])), -1).numpy()
            for (number, skip, words), rows in zip(chunk, scores, strict=True):
                found[number].append(rows[skip : len(words)])
        empty = np.zeros((0, len(self.acts)), np.float32)
        return [np.concatenate(parts) if parts else empty for parts in found]
