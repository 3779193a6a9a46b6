"""What a request does to the logits before a token is drawn: logit bias, bad words, penalties, and its grammar.

All but the grammar touches few of the V logits of a row: it travels to the device as flat lists of (row, id, value). A
grammar's mask travels as bits.
Shapes: R rows, V vocabulary, E entries over all rows, G rows with a grammar, W words of 32 bits.
"""

import secrets
from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from soma.engine.guided import Guide
from soma.engine.params import SamplingParams

Ids = tuple[int, ...]


class SamplingState:
    """What the sampler must know of one request from token to token. `take` each token that is made.

    bad_words: the sequences of ids that `params.bad_words` come to (see `bad_sequences`). guide: `Guides.start` of
    `params.guided`. It follows the tokens taken, whatever is computed anew meanwhile.
    """

    def __init__(
        self, params: SamplingParams, prompt_ids: Sequence[int] = (), bad_words: Sequence[Ids] = (),
        guide: Guide | None = None,
    ) -> None:  # fmt: skip
        self.params, self.guide = params, guide
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self.made: list[int] = []
        bans = [word[0] for word in bad_words if len(word) == 1]
        self.ids = np.array([*params.logit_bias, *bans], dtype=np.int64)
        self.values = np.array([*params.logit_bias.values(), *[-np.inf] * len(bans)], dtype=np.float32)
        self.bans_after: dict[int, list[Ids]] = {}  # words of several tokens, by the last token but one
        for word in bad_words:
            if len(word) > 1:
                self.bans_after.setdefault(word[-2], []).append(word)
        self.counts = TokenCounts(prompt_ids) if params.uses_penalties else None

    @property
    def position(self) -> int:
        """Tokens made so far: the number of the next one."""
        return len(self.made)

    def take(self, token: int) -> None:
        """Count a token as made."""
        if self.guide is not None:
            self.guide.take(token)
        self.made.append(token)
        if self.counts is not None:
            self.counts.add(token)

    @property
    def finished(self) -> bool:
        """Whether the request's grammar lets nothing follow what was made."""
        return self.guide is not None and self.guide.finished

    def added(self, ahead: Ids = ()) -> tuple[np.ndarray, np.ndarray]:
        """Ids and what is added to their logits, after the tokens `ahead`: the bias, and minus infinity for a ban."""
        if not self.bans_after:
            return self.ids, self.values
        last = ahead[-1] if ahead else self.made[-1] if self.made else -1
        banned = [word[-1] for word in self.bans_after.get(last, ()) if self._ends_with(word[:-1], ahead)]
        minus = np.full(len(banned), -np.inf, dtype=np.float32)
        return np.concatenate((self.ids, np.array(banned, dtype=np.int64))), np.concatenate((self.values, minus))

    def _ends_with(self, tokens: Ids, ahead: Ids) -> bool:
        return (*self.made[-len(tokens) :], *ahead)[-len(tokens) :] == tokens


class Row(NamedTuple):
    """One row of logits: whose next token it gives, and the tokens of a draft that are taken as made before it."""

    state: SamplingState
    ahead: Ids = ()

    @property
    def position(self) -> int:
        return self.state.position + len(self.ahead)


class TokenCounts:
    """The different tokens of a request, and how often each was made (0 for those of the prompt alone)."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self.ids = array("q", dict.fromkeys(prompt_ids))
        self.counts = array("f", bytes(4 * len(self.ids)))
        self.places = {token: place for place, token in enumerate(self.ids)}

    def add(self, token: int) -> None:
        place = self.places.setdefault(token, len(self.ids))
        if place == len(self.ids):
            self.ids.append(token)
            self.counts.append(0.0)
        self.counts[place] += 1

    def arrays(self, ahead: Ids = ()) -> tuple[np.ndarray, np.ndarray]:
        """Ids (int64) and counts (float32), the tokens `ahead` included; copies."""
        ids, counts = np.array(self.ids), np.array(self.counts)
        for token in ahead:
            place = self.places.get(token)
            if place is None:
                found = np.flatnonzero(ids[len(self.ids) :] == token)
                place = len(self.ids) + int(found[0]) if len(found) else len(ids)
            if place == len(ids):
                ids, counts = np.append(ids, token), np.append(counts, np.float32(0))
            counts[place] += 1
        return ids, counts


def adjust(logits_RV: Tensor, rows: Sequence[Row]) -> Tensor:
    """Float32 logits as bias, bad words, penalties and grammars leave them, in this order; the given ones stay as they
    are.

    Repetition (Keskar et al. 2019, CTRL, section 4.1) counts the prompt's tokens too; presence and frequency count
    what was made (OpenAI).
    """
    added = [(i, *row.state.added(row.ahead)) for i, row in enumerate(rows)]
    added = [entry for entry in added if len(entry[1])]
    counted = [
        (i, *row.state.counts.arrays(row.ahead)) for i, row in enumerate(rows) if row.state.counts is not None
    ]  # fmt: skip
    guided = [i for i, row in enumerate(rows) if row.state.guide is not None]
    if not added and not counted and not guided:
        return logits_RV
    logits_RV = logits_RV.clone()
    if added:
        places, values_E = flat(added, logits_RV.device)
        logits_RV.index_put_(places, values_E, accumulate=True)
    if counted:
        places, counts_E = flat(counted, logits_RV.device)
        params = [row.state.params for row in rows]
        strengths = [(one.repetition_penalty, one.frequency_penalty, one.presence_penalty) for one in params]
        strengths_R3 = torch.tensor(strengths, dtype=torch.float32).to(logits_RV.device)
        repetition_E, frequency_E, presence_E = strengths_R3[places[0]].unbind(1)
        x_E = logits_RV[places]
        x_E = torch.where(x_E > 0, x_E / repetition_E, x_E * repetition_E)
        logits_RV[places] = x_E - frequency_E * counts_E - presence_E * (counts_E > 0)
    if guided:
        allowed_GV = allowed_tokens([rows[i] for i in guided], logits_RV.size(1), logits_RV.device)
        logits_RV[guided] = logits_RV[guided].masked_fill_(~allowed_GV, -torch.inf)
    return logits_RV


def allowed_tokens(rows: Sequence[Row], vocab_size: int, device: torch.device) -> Tensor:
    """Bool (G, V): what the grammar of each row allows."""
    words_GW = np.empty((len(rows), -(-vocab_size // 32)), dtype=np.int32)
    for row, words_W in zip(rows, words_GW, strict=True):
        assert row.state.guide is not None
        row.state.guide.allowed(words_W, row.ahead)
    bits_GW1 = torch.from_numpy(words_GW).to(device)[:, :, None]
    places_X = torch.arange(32, dtype=torch.int32, device=device)
    return ((bits_GW1 >> places_X) & 1).bool().flatten(1)[:, :vocab_size]


def flat(
    entries: Sequence[tuple[int, np.ndarray, np.ndarray]], device: torch.device
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """((rows, ids), values), each (E), on the device, of (row, ids, values) per row."""
    rows_E = np.repeat([row for row, _, _ in entries], [len(ids) for _, ids, _ in entries])
    ids_E = np.concatenate([ids for _, ids, _ in entries])
    values_E = np.concatenate([values for _, _, values in entries])
    places = torch.from_numpy(np.stack((rows_E, ids_E))).to(device)
    return (places[0], places[1]), torch.from_numpy(values_E).to(device)


def bad_sequences(params: SamplingParams, encode: Callable[[str], list[int]]) -> list[Ids]:
    """The sequences of ids that `params.bad_words` name. A text stands for itself within a word and at its start,
    that is without and with a space before it; other ways to spell it in tokens are not looked for."""
    found: dict[Ids, None] = {}
    for word in params.bad_words:
        if isinstance(word, str):
            bare = word.lstrip()
            found |= {tuple(encode(text)): None for text in (bare, " " + bare)}
        else:
            found[tuple(word)] = None
    return [ids for ids in found if ids]
