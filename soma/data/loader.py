"""Token shards to batches: deterministic, seekable, sharded by rank.

There is one global order of sequences, given by the data, `seed`, `sequence_length` and `pack`. Step k takes the next
world_size × batch_size of it and rank r the r-th `batch_size` of these: four ranks together see what one rank with
four times the batch sees, and a state saved by one number of ranks is good for another.

Tokens lie in a folder, at a URL (soma/data/streaming.py) or in several of these (soma/data/mixture.py).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from soma.base import progress
from soma.base.artefact import json_hash
from soma.base.errors import UserError
from soma.base.secrets import URL
from soma.data.config import StreamConfig
from soma.data.mixture import Schedule, parts_of
from soma.data.packing import Blocks, ConcatPacker, Packer, Plan, SinglePacker, WholePacker, blocks_of
from soma.data.store import MIXTURE, TokenStore, read_index
from soma.data.streaming import StreamedStore

IGNORE = -100  # target without loss
PADDING = -1  # document id of padding
Pack = Literal["concat", "whole"]


@dataclass(frozen=True)
class Batch:
    """Int64 arrays (batch_size, sequence_length).

    `targets[b, t]` is the token after `tokens[b, t]`, or -100 where there is no loss. `document_ids` number the
    documents in a row from 0 (-1: padding); attention must stay within one. `positions` count from 0 at the start of
    each document's part in the row. `stamps` name each token to dropout, where training has put them in
    (`soma.train.stamps`).
    """

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    document_ids: np.ndarray
    stamps: np.ndarray | None = None

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> "Batch":
        """The batch with all arrays that it has changed in the same way."""
        stamps = None if self.stamps is None else change(self.stamps)
        return Batch(
            change(self.tokens), change(self.targets), change(self.positions), change(self.document_ids), stamps
        )  # fmt: skip


@dataclass(frozen=True)
class PreferenceBatch:
    """Row b of `chosen` and of `rejected` answer the same prompt; one document a row. `is_pair`: bool (batch_size,),
    False for the rows that fill up a last batch.
    """

    chosen: Batch
    rejected: Batch
    is_pair: np.ndarray


class _Order:
    """Where in the global order we are, and what a state must agree with. `length` is one epoch's sequences."""

    def __init__(
        self, length: int, identity: dict[str, Any], batch_size: int, rank: int, world_size: int, epochs: int | None,
    ) -> None:  # fmt: skip
        assert batch_size > 0
        assert 0 <= rank < world_size
        self.length, self.identity, self.epochs = length, identity, epochs
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.sequence = 0  # first sequence of the next step, counted over all epochs and ranks

    @property
    def exhausted(self) -> bool:
        return self.epochs is not None and self.sequence >= self.epochs * self.length

    def advance(self) -> np.ndarray:
        """The global indices of this rank's next rows; -1 beyond the last epoch."""
        rows = self.sequence + self.rank * self.batch_size + np.arange(self.batch_size)
        self.sequence += self.batch_size * self.world_size
        if self.epochs is not None:
            rows[rows >= self.epochs * self.length] = -1
        return rows

    def state_dict(self) -> dict[str, Any]:
        return {"sequence": self.sequence, **self.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, value in self.identity.items():
            if state.get(key) != value:
                what = "other data" if key == "tokens_hash" else f"{key} {state.get(key)!r}, this loader has {value!r}"
                raise UserError(f"the saved data position belongs to {what}; start anew or use what it was saved with")
        self.sequence = int(state["sequence"])


def _empty(rows: int, length: int, eos_id: int) -> Batch:
    """A batch of padding."""
    shape = (rows, length)
    return Batch(
        np.full(shape, eos_id, np.int64), np.full(shape, IGNORE, np.int64), np.zeros(shape, np.int64),
        np.full(shape, PADDING, np.int64),
    )  # fmt: skip


def _fill(store: TokenStore, blocks: Blocks, seed: int, numbers: np.ndarray, rows: np.ndarray, batch: Batch) -> None:
    """Put the sequences `numbers`, counted over all epochs, into `rows` of the batch."""
    for here, plan, sequences in blocks.locate(seed, numbers):
        slots_BT = sequences[:, None] * blocks.sequence_length + np.arange(blocks.sequence_length)
        _fill_rows(store, plan, slots_BT, rows[here], batch)


def _fill_rows(store: TokenStore, plan: Plan, slots_BT: np.ndarray, here: np.ndarray, batch: Batch) -> None:
    piece_BT, offset_BT, covered_BT = plan.find(slots_BT)
    first = 1 if store.masked else 0  # the first token of a chat document is input only
    within_BT = offset_BT + plan.skip[piece_BT] + first  # the target's place in its document
    addresses_BT = store.starts[plan.document[piece_BT]] + within_BT
    addresses_BT = np.where(covered_BT, addresses_BT, addresses_BT[covered_BT][0])  # padding reads no shard of its own
    targets_BT, learned_BT = store.gather(addresses_BT)
    begins_BT = within_BT == 0
    inputs_BT = store.gather(np.where(begins_BT, addresses_BT, np.maximum(addresses_BT - 1, 0)))[0]
    batch.tokens[here] = np.where(covered_BT & ~begins_BT, inputs_BT, store.eos_id)
    batch.targets[here] = np.where(covered_BT & learned_BT, targets_BT, IGNORE)
    row_start_B1 = slots_BT[:, :1]
    part_start_BT = np.maximum(plan.slot[piece_BT], row_start_B1)
    batch.positions[here] = np.where(covered_BT, slots_BT - part_start_BT, 0)
    batch.document_ids[here] = np.where(covered_BT, piece_BT - piece_BT[:, :1], PADDING)


class _Part:
    """One tokens folder of a loader: its store, its packing, and what a state must agree with."""

    def __init__(
        self, ref: Path | str, split: str, sequence_length: int, pack: Pack | None, verify: bool, truncate: bool,
        buffer: int | None, length_stages: Sequence[int], stream: StreamConfig,
    ) -> None:  # fmt: skip
        self.store = (
            StreamedStore(str(ref), split, stream) if URL.match(str(ref)) else TokenStore(Path(ref), split, verify)
        )
        if isinstance(self.store, StreamedStore) and buffer is None and not self.store.fits():
            raise UserError(
                f"{self.store.where}: {split} is larger than stream.cache_gb {stream.cache_gb:g}: give pack_buffer, "
                "the documents that are shuffled at a time (each block then needs its own shards only)"
            )
        self.pack: Pack = pack or ("whole" if self.store.masked else "concat")
        pairs, self.truncated = _pairs(self.store), 0
        if truncate and self.store.masked and self.pack == "whole":
            pairs, self.truncated = whole_answers(self.store, pairs, sequence_length)
        self.blocks = Blocks(
            lambda documents: _packer(pairs[documents], sequence_length, self.pack, self.store.masked),
            *blocks_of(pairs, buffer, length_stages), sequence_length,
        )  # fmt: skip
        _require_sequences(self.blocks, self.store, sequence_length)
        if self.truncated:
            progress.current().note(
                f"{self.truncated} of {self.store.documents} {split} conversations are longer than {sequence_length} "
                "tokens and end after the last answer that fits"
            )


def _packer(pairs: np.ndarray, sequence_length: int, pack: Pack, masked: bool) -> Packer:
    if pack == "concat":
        return ConcatPacker(pairs, sequence_length)
    return WholePacker(pairs, sequence_length, cut_longer=not masked)


class TokenLoader:
    """Batches of packed sequences of one split.

    `tokens` is a tokens folder, its URL, or a mixture folder. `batch_size` is this rank's. `pack`: "concat" joins
    documents and cuts; "whole" never splits a document that fits (chat documents that do not fit are left out and
    counted in `left_out`; with `truncate` they end after the last answer that fits whole, are counted in `truncated`,
    and only those without one are left out); None takes "whole" for masked data. `buffer` documents are packed and
    shuffled at a time (None: all); `length_stages` are the longest documents (in tokens) of the stages of an epoch, see
    `packing.blocks_of`. `epochs=None` goes on for ever, or until a mixture has nothing more to give; else iteration
    ends after that many, the last batch filled up with rows of padding, on all ranks at the same step. `verify` checks
    the shards' sha256 on opening.

    Raises UserError for a folder that is not whole or a split without anything to learn from.
    """

    def __init__(
        self, tokens: Path | str, split: str, sequence_length: int, batch_size: int, rank: int = 0, world_size: int = 1,
        seed: int = 0, pack: Pack | None = None, epochs: int | None = None, verify: bool = True,
        truncate: bool = False, buffer: int | None = None, length_stages: Sequence[int] = (),
        stream: StreamConfig | None = None,
    ) -> None:  # fmt: skip
        parts = _mixed(tokens, split)
        self.parts = [
            _Part(part["tokens"], split, sequence_length, pack, verify, truncate, buffer, length_stages,
                  stream or StreamConfig())
            for part in parts
        ]  # fmt: skip
        self.sequence_length, self.batch_size, self.seed = sequence_length, batch_size, seed
        self.store, self.pack = self.parts[0].store, self.parts[0].pack
        sizes = [part.blocks.sequences for part in self.parts]
        passes = [part["epochs"] for part in parts]
        limits = [None if once is None else round(size * once) for size, once in zip(sizes, passes, strict=True)]
        self.sequences_per_epoch = sum(
            size if limit is None else limit for size, limit in zip(sizes, limits, strict=True)
        )
        weights = [part["weight"] or size * (once or 1) for part, size, once in zip(parts, sizes, passes, strict=True)]
        self.schedule = Schedule(weights, limits, seed) if len(parts) > 1 or limits[0] is not None else None
        self.total = None if self.schedule is None else self.schedule.total
        hashes = [part.store.hash for part in self.parts]
        mixed = list(zip(hashes, weights, limits, strict=True))
        identity = {
            "tokens_hash": hashes[0] if self.schedule is None else json_hash(mixed), "split": split,
            "sequence_length": sequence_length, "pack": self.pack, "seed": seed,
            **({"truncate": True} if truncate else {}), **({"buffer": buffer} if buffer else {}),
            **({"length_stages": list(length_stages)} if length_stages else {}),
        }  # fmt: skip
        self._order = _Order(self.sequences_per_epoch, identity, batch_size, rank, world_size, epochs)
        self.left_out = sum(part.blocks.left_out for part in self.parts)
        self.truncated = sum(part.truncated for part in self.parts)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        order = self._order
        if order.exhausted or (self.total is not None and order.sequence >= self.total):
            raise StopIteration
        self._announce()
        rows = order.advance()
        batch = _empty(len(rows), self.sequence_length, self.store.eos_id)
        real = np.flatnonzero(rows >= 0)
        owner, numbers = self._locate(rows[real])
        for number, part in enumerate(self.parts):
            here = np.flatnonzero(owner == number)
            if len(here):
                _fill(part.store, part.blocks, self.seed, numbers[here], real[here], batch)
        return batch

    def _locate(self, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.schedule is None:
            return np.zeros(len(sequences), np.int64), sequences
        return self.schedule.locate(sequences)

    def _announce(self) -> None:
        """Tell each store which documents come next."""
        sequence = self._order.sequence
        firsts = [sequence] if self.schedule is None else self.schedule.given(sequence).tolist()
        for part, first in zip(self.parts, firsts, strict=True):
            part.store.want(part.blocks.upcoming(self.seed, first))

    @property
    def epoch(self) -> float:
        """Epochs seen so far, with fractions. An epoch of a mixture is as long as its parts together, each as often as
        its `epochs` say.
        """
        return self._order.sequence / self.sequences_per_epoch

    @property
    def waited(self) -> float:
        """Seconds in which batches stood still because a shard was not here yet."""
        return sum(part.store.waited for part in self.parts if isinstance(part.store, StreamedStore))

    def state_dict(self) -> dict[str, Any]:
        """The position as plain JSON values, the same on all ranks."""
        return self._order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position. UserError if it was saved on other data or with another seed, length, packing or
        split.
        """
        self._order.load_state_dict(state)


def _mixed(tokens: Path | str, split: str) -> list[dict[str, Any]]:
    """The parts of a mixture; a tokens folder is one part, without end."""
    if not URL.match(str(tokens)):
        index = read_index(Path(tokens))
        if index["format"] == MIXTURE:
            return parts_of(Path(tokens), index, split)
    return [{"tokens": tokens, "weight": None, "epochs": None}]


class PreferenceLoader:
    """Batches of preference pairs, with the protocol of `TokenLoader`. Pairs of which a side is too long are left
    out.
    """

    def __init__(
        self, tokens_dir: Path, split: str, sequence_length: int, batch_size: int, rank: int = 0, world_size: int = 1,
        seed: int = 0, epochs: int | None = None, verify: bool = True,
    ) -> None:  # fmt: skip
        self.stores = {side: TokenStore(Path(tokens_dir), f"{split}.{side}", verify) for side in ("chosen", "rejected")}
        pairs = {side: _pairs(store) for side, store in self.stores.items()}
        if len(pairs["chosen"]) != len(pairs["rejected"]):
            raise UserError(f"{tokens_dir}: {split}.chosen and {split}.rejected differ in their number of documents")
        fits = (pairs["chosen"] <= sequence_length) & (pairs["rejected"] <= sequence_length)
        self._orders, self._blocks, self.seed = {}, {}, seed
        for side, store in self.stores.items():
            blocks = self._blocks[side] = Blocks.single(SinglePacker(pairs[side], fits, sequence_length))
            _require_sequences(blocks, store, sequence_length)
            identity = {"tokens_hash": store.hash, "split": split, "sequence_length": sequence_length, "seed": seed}
            self._orders[side] = _Order(blocks.sequences, identity, batch_size, rank, world_size, epochs)
        self.sequence_length, self.batch_size = sequence_length, batch_size
        self.sequences_per_epoch = self._blocks["chosen"].sequences
        self.left_out = self._blocks["chosen"].left_out

    def __iter__(self) -> Iterator[PreferenceBatch]:
        return self

    def __next__(self) -> PreferenceBatch:
        if self._orders["chosen"].exhausted:
            raise StopIteration
        sides = {}
        for side, order in self._orders.items():
            rows = order.advance()
            sides[side] = _empty(len(rows), self.sequence_length, self.stores[side].eos_id)
            real = np.flatnonzero(rows >= 0)
            _fill(self.stores[side], self._blocks[side], self.seed, rows[real], real, sides[side])
        return PreferenceBatch(**sides, is_pair=(sides["chosen"].targets != IGNORE).any(axis=1))

    @property
    def epoch(self) -> float:
        """Epochs seen so far, with fractions."""
        return self._orders["chosen"].sequence / self.sequences_per_epoch

    def state_dict(self) -> dict[str, Any]:
        """The position as plain JSON values, the same on all ranks."""
        return {side: order.state_dict() for side, order in self._orders.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position. UserError as in `TokenLoader`."""
        for side, order in self._orders.items():
            order.load_state_dict(state.get(side, {}))


def _pairs(store: TokenStore) -> np.ndarray:
    """(input, target) pairs in each document."""
    return np.maximum(np.diff(store.starts) - (1 if store.masked else 0), 0)


def whole_answers(store: TokenStore, pairs: np.ndarray, sequence_length: int) -> tuple[np.ndarray, int]:
    """The pairs of each conversation, where one that is too long ends after its last answer that fits whole, and how
    many were shortened so. Without such an answer its length stays, so that it is left out.

    Worked example: mask 0 1 1 0 1 1 (5 pairs) at T = 4: the second answer would be cut, so 2 pairs stay.
    """
    pairs, shortened = pairs.copy(), 0
    for document in np.flatnonzero(pairs > sequence_length):
        start = int(store.starts[document])
        _, mask = store.gather(np.arange(start, start + sequence_length + 2))  # one more, to see an answer's end
        ends = np.flatnonzero((mask[1:-1] != 0) & (mask[2:] == 0)) + 1
        if len(ends):
            pairs[document] = ends[-1]
            shortened += 1
    return pairs, shortened


def _require_sequences(blocks: Blocks, store: TokenStore, sequence_length: int) -> None:
    if blocks.left_out:
        progress.current().note(
            f"{blocks.left_out} of {store.documents} {store.split} documents are longer than {sequence_length} tokens "
            "and left out"
        )
    if blocks.sequences == 0:
        why = f"all are longer than sequence_length {sequence_length}" if blocks.left_out else "it has no documents"
        raise UserError(f"{store.where}: nothing in the split {store.split!r}: {why}")
