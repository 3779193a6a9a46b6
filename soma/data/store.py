"""Token shards, memory-mapped (see `soma/data/tokens.py` for the format)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from soma.base.artefact import file_hash, json_hash, read_json
from soma.base.errors import UserError

FORMAT, VERSION = "soma-tokens", 1


@dataclass(frozen=True)
class Shard:
    """One shard, memory-mapped. `first_token` and `first_document` are its place in the split."""

    ids: np.ndarray
    mask: np.ndarray | None
    offsets: np.ndarray
    first_token: int
    first_document: int


class TokenStore:
    """A split of a tokens folder. `starts` (documents + 1,) int64 are token addresses in the whole split.

    Every file's size is checked on opening, its sha256 too with `verify`. Raises UserError that names the folder or
    file.
    """

    def __init__(self, directory: Path, split: str, verify: bool = True) -> None:
        self.index = read_index(directory)
        if split not in self.index["splits"]:
            raise UserError(f"{directory}: no split {split!r}; there are {', '.join(self.index['splits'])}")
        entry = self.index["splits"][split]
        self.directory, self.split, self.entry = directory, split, entry
        self.eos_id, self.masked, self.vocab_size = self.index["eos_id"], self.index["masked"], self.index["vocab_size"]
        self.shards: list[Shard] = []
        starts = [np.zeros(1, np.int64)]
        token, document = 0, 0
        for facts in entry["shards"]:
            shard = self._shard(facts, token, document, verify)
            self.shards.append(shard)
            starts.append(shard.offsets[1:].astype(np.int64) + token)
            token, document = token + facts["tokens"], document + facts["documents"]
        self.starts = np.concatenate(starts)
        self.first_tokens = np.array([shard.first_token for shard in self.shards], np.int64)

    @property
    def tokens(self) -> int:
        return int(self.starts[-1])

    @property
    def documents(self) -> int:
        return len(self.starts) - 1

    @property
    def hash(self) -> str:
        """Hash of the split's content: what a loader's state is tied to."""
        return json_hash([self.index["dtype"], self.index["eos_id"], self.index["masked"], self.entry["shards"]])

    def gather(self, addresses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (int64) and masks (bool; all true where the data has none) at addresses of any shape."""
        ids, mask = np.empty(addresses.shape, np.int64), np.ones(addresses.shape, bool)
        owner = np.searchsorted(self.first_tokens, addresses, side="right") - 1
        for number in np.unique(owner).tolist():
            shard, here = self.shards[number], owner == number
            local = addresses[here] - shard.first_token
            ids[here] = shard.ids[local]
            if shard.mask is not None:
                mask[here] = shard.mask[local] != 0
        return ids, mask

    def document(self, number: int) -> np.ndarray:
        """The stored ids of one document, int64."""
        return self.gather(np.arange(self.starts[number], self.starts[number + 1]))[0]

    def _shard(self, facts: dict[str, Any], token: int, document: int, verify: bool) -> Shard:
        path = self.directory / facts["file"]
        stem = path.name.removesuffix(".bin")
        ids = _map(
            path, np.dtype(self.index["dtype"]).newbyteorder("<"), facts["tokens"], facts["sha256"] if verify else None
        )
        offsets = _map(
            path.with_name(f"{stem}.offsets.bin"), np.dtype("<u8"), facts["documents"] + 1,
            facts["offsets_sha256"] if verify else None,
        )  # fmt: skip
        mask = None
        if self.masked:
            mask_path = path.with_name(f"{stem}.mask.bin")
            mask = _map(mask_path, np.dtype(np.uint8), facts["tokens"], facts["mask_sha256"] if verify else None)
        if offsets[-1] != facts["tokens"]:
            raise UserError(
                f"{path.with_name(f'{stem}.offsets.bin')}: corrupt: ends at {offsets[-1]}, not {facts['tokens']}"
            )
        return Shard(ids, mask, offsets, token, document)


def _map(path: Path, dtype: np.dtype[Any], count: int, sha: str | None) -> np.ndarray:
    if not path.exists():
        raise UserError(f"{path}: missing, though index.json names it; make the tokens again")
    size, wanted = path.stat().st_size, count * dtype.itemsize
    if size != wanted:
        raise UserError(
            f"{path}: {'truncated' if size < wanted else 'too long'}: {size} bytes, index.json says {wanted}"
        )
    if sha is not None and file_hash(path) != sha:
        raise UserError(f"{path}: corrupt: its sha256 is not the one in index.json; make the tokens again")
    return np.memmap(path, dtype, mode="r") if count else np.zeros(0, dtype)


def read_index(directory: Path) -> dict[str, Any]:
    """The folder's index.json. Raises UserError where it is not a tokens folder of this version."""
    if not (directory / "index.json").exists():
        raise UserError(f"{directory}: no index.json; this is not a tokens folder (`soma run` makes one)")
    index = read_json(directory / "index.json")
    if not isinstance(index, dict) or index.get("format") != FORMAT or index.get("version") != VERSION:
        raise UserError(f"{directory / 'index.json'}: not {FORMAT} version {VERSION}; make the tokens again")
    return index
