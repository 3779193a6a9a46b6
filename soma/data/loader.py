"""Token shards to batches: deterministic, seekable, sharded by rank.

There is one global order of sequences, given by the data, `seed`, `sequence_length` and `pack`. Step k takes the next
world_size × batch_size of it and rank r the r-th `batch_size` of these: four ranks together see what one rank with
four times the batch sees, and a state saved by one number of ranks is good for another.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from soma.base import progress
from soma.base.errors import UserError
from soma.data.packing import ConcatPacker, Plan, SinglePacker, WholePacker, random
from soma.data.store import TokenStore

IGNORE = -100  # target without loss
PADDING = -1  # document id of padding
Pack = Literal["concat", "whole"]
PLANS_KEPT = 2


@dataclass(frozen=True)
class Batch:
    """Four int64 arrays (batch_size, sequence_length).

    `targets[b, t]` is the token after `tokens[b, t]`, or -100 where there is no loss. `document_ids` number the
    documents in a row from 0 (-1: padding); attention must stay within one. `positions` count from 0 at the start of
    each document's part in the row.
    """

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    document_ids: np.ndarray


@dataclass(frozen=True)
class PreferenceBatch:
    """Row b of `chosen` and of `rejected` answer the same prompt; one document a row."""

    chosen: Batch
    rejected: Batch


class _Order:
    """Where in the global order we are, and what a state must agree with."""

    def __init__(
        self, packer: ConcatPacker | WholePacker | SinglePacker, identity: dict[str, Any], batch_size: int, rank: int,
        world_size: int, epochs: int | None,
    ) -> None:  # fmt: skip
        assert batch_size > 0
        assert 0 <= rank < world_size
        self.packer, self.identity, self.epochs = packer, identity, epochs
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.sequence = 0  # first sequence of the next step, counted over all epochs and ranks
        self.plans: dict[int, tuple[Plan, np.ndarray]] = {}

    @property
    def exhausted(self) -> bool:
        return self.epochs is not None and self.sequence >= self.epochs * self.packer.sequences

    def advance(self) -> np.ndarray:
        """The global indices of this rank's next rows; -1 beyond the last epoch."""
        rows = self.sequence + self.rank * self.batch_size + np.arange(self.batch_size)
        self.sequence += self.batch_size * self.world_size
        if self.epochs is not None:
            rows[rows >= self.epochs * self.packer.sequences] = -1
        return rows

    def plan(self, epoch: int) -> tuple[Plan, np.ndarray]:
        if epoch not in self.plans:
            self.plans[epoch] = self.packer.plan(random(self.identity["seed"], epoch))
            while len(self.plans) > PLANS_KEPT:
                del self.plans[next(iter(self.plans))]
        return self.plans[epoch]

    def state_dict(self) -> dict[str, Any]:
        return {"sequence": self.sequence, **self.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, value in self.identity.items():
            if state.get(key) != value:
                what = "other data" if key == "tokens_hash" else f"{key} {state.get(key)!r}, this loader has {value!r}"
                raise UserError(f"the saved data position belongs to {what}; start anew or use what it was saved with")
        self.sequence = int(state["sequence"])


def _fill(store: TokenStore, order: _Order, rows: np.ndarray) -> Batch:
    """The batch for global sequence indices `rows` (-1: a row of padding)."""
    length, per_epoch = order.packer.sequence_length, order.packer.sequences
    shape = (len(rows), length)
    batch = Batch(
        np.full(shape, store.eos_id, np.int64), np.full(shape, IGNORE, np.int64), np.zeros(shape, np.int64),
        np.full(shape, PADDING, np.int64),
    )  # fmt: skip
    epochs = np.where(rows >= 0, rows // per_epoch, -1)
    for epoch in np.unique(epochs[epochs >= 0]).tolist():
        here = np.flatnonzero(epochs == epoch)
        plan, permuted = order.plan(epoch)
        slots_BT = permuted[rows[here] % per_epoch][:, None] * length + np.arange(length)
        _fill_rows(store, plan, slots_BT, here, batch)
    return batch


def _fill_rows(store: TokenStore, plan: Plan, slots_BT: np.ndarray, here: np.ndarray, batch: Batch) -> None:
    piece_BT, offset_BT, covered_BT = plan.find(slots_BT)
    first = 1 if store.masked else 0  # the first token of a chat document is input only
    within_BT = offset_BT + plan.skip[piece_BT] + first  # the target's place in its document
    addresses_BT = np.where(covered_BT, store.starts[plan.document[piece_BT]] + within_BT, 0)
    targets_BT, learned_BT = store.gather(addresses_BT)
    inputs_BT = store.gather(np.maximum(addresses_BT - 1, 0))[0]
    begins_BT = within_BT == 0
    batch.tokens[here] = np.where(covered_BT & ~begins_BT, inputs_BT, store.eos_id)
    batch.targets[here] = np.where(covered_BT & learned_BT, targets_BT, IGNORE)
    row_start_B1 = slots_BT[:, :1]
    part_start_BT = np.maximum(plan.slot[piece_BT], row_start_B1)
    batch.positions[here] = np.where(covered_BT, slots_BT - part_start_BT, 0)
    batch.document_ids[here] = np.where(covered_BT, piece_BT - piece_BT[:, :1], PADDING)


class TokenLoader:
    """Batches of packed sequences of one split.

    `batch_size` is this rank's. `pack`: "concat" joins documents and cuts; "whole" never splits a document that fits
    (chat documents that do not fit are left out and counted in `left_out`; with `truncate` they end after the last
    answer that fits whole, are counted in `truncated`, and only those without one are left out); None takes "whole" for
    masked data.
    `epochs=None` goes on for ever; else iteration ends after that many, the last batch filled up with rows of padding,
    on all ranks at the same step. `verify` checks the shards' sha256 on opening.

    Raises UserError for a folder that is not whole or a split without anything to learn from.
    """

    def __init__(
        self, tokens_dir: Path, split: str, sequence_length: int, batch_size: int, rank: int = 0, world_size: int = 1,
        seed: int = 0, pack: Pack | None = None, epochs: int | None = None, verify: bool = True,
        truncate: bool = False,
    ) -> None:  # fmt: skip
        self.store = TokenStore(Path(tokens_dir), split, verify)
        self.sequence_length, self.batch_size = sequence_length, batch_size
        self.pack: Pack = pack or ("whole" if self.store.masked else "concat")
        pairs, self.truncated = _pairs(self.store), 0
        if truncate and self.store.masked and self.pack == "whole":
            pairs, self.truncated = whole_answers(self.store, pairs, sequence_length)
        packer: ConcatPacker | WholePacker = (
            ConcatPacker(pairs, sequence_length)
            if self.pack == "concat"
            else WholePacker(pairs, sequence_length, cut_longer=not self.store.masked)
        )
        _require_sequences(packer, self.store, sequence_length)
        identity = {
            "tokens_hash": self.store.hash, "split": split, "sequence_length": sequence_length, "pack": self.pack,
            "seed": seed, **({"truncate": True} if truncate else {}),
        }  # fmt: skip
        if self.truncated:
            progress.current().note(
                f"{self.truncated} of {self.store.documents} {split} conversations are longer than {sequence_length} "
                "tokens and end after the last answer that fits"
            )
        self._order = _Order(packer, identity, batch_size, rank, world_size, epochs)
        self.sequences_per_epoch = packer.sequences
        self.left_out = packer.left_out

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._order.exhausted:
            raise StopIteration
        return _fill(self.store, self._order, self._order.advance())

    @property
    def epoch(self) -> float:
        """Epochs seen so far, with fractions."""
        return self._order.sequence / self.sequences_per_epoch

    def state_dict(self) -> dict[str, Any]:
        """The position as plain JSON values, the same on all ranks."""
        return self._order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position. UserError if it was saved on other data or with another seed, length, packing or
        split.
        """
        self._order.load_state_dict(state)


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
        self._orders = {}
        for side, store in self.stores.items():
            packer = SinglePacker(pairs[side], fits, sequence_length)
            _require_sequences(packer, store, sequence_length)
            identity = {"tokens_hash": store.hash, "split": split, "sequence_length": sequence_length, "seed": seed}
            self._orders[side] = _Order(packer, identity, batch_size, rank, world_size, epochs)
        self.sequence_length, self.batch_size = sequence_length, batch_size
        self.sequences_per_epoch = self._orders["chosen"].packer.sequences
        self.left_out = self._orders["chosen"].packer.left_out

    def __iter__(self) -> Iterator[PreferenceBatch]:
        return self

    def __next__(self) -> PreferenceBatch:
        if self._orders["chosen"].exhausted:
            raise StopIteration
        sides = {side: _fill(self.stores[side], order, order.advance()) for side, order in self._orders.items()}
        return PreferenceBatch(**sides)

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


def _require_sequences(
    packer: ConcatPacker | WholePacker | SinglePacker, store: TokenStore, sequence_length: int
) -> None:
    if packer.left_out:
        progress.current().note(
            f"{packer.left_out} of {store.documents} {store.split} documents are longer than {sequence_length} tokens "
            "and left out"
        )
    if packer.sequences == 0:
        why = f"all are longer than sequence_length {sequence_length}" if packer.left_out else "it has no documents"
        raise UserError(f"{store.directory}: nothing in the split {store.split!r}: {why}")
