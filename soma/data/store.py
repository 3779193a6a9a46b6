"""Token shards, memory-mapped (see `soma/data/tokens.py` for the format)."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from soma.base.artefact import file_hash, json_hash, read_json
from soma.base.errors import UserError

FORMAT, VERSION = "soma-tokens", 1
MIXTURE = "soma-mixture"  # of several tokens folders: soma/data/mixture.py


@dataclass(frozen=True)
class Shard:
    """One shard: what index.json says of it, and where its documents begin. `first_token` is its place in the split."""

    facts: dict[str, Any]
    offsets: np.ndarray
    first_token: int


class TokenStore:
    """A split of a tokens folder. `starts` (documents + 1,) int64 are token addresses in the whole split.

    Every file's size is checked on opening, its sha256 too with `verify`. Raises UserError that names the folder or
    file.
    """

    def __init__(self, directory: Path, split: str, verify: bool = True) -> None:
        self.directory, self.verify = directory, verify
        self.files: dict[tuple[str, str], np.ndarray] = {}
        self._read(read_index(directory), str(directory), split)

    def _read(self, index: dict[str, Any], where: str, split: str) -> None:
        if split not in index["splits"]:
            raise UserError(f"{where}: no split {split!r}; there are {', '.join(index['splits'])}")
        self.index, self.where, self.split, self.entry = index, where, split, index["splits"][split]
        self.eos_id, self.masked, self.vocab_size = index["eos_id"], index["masked"], index["vocab_size"]
        self.dtype = np.dtype(index["dtype"]).newbyteorder("<")
        self.shards: list[Shard] = []
        starts, token = [np.zeros(1, np.int64)], 0
        for facts in self.entry["shards"]:
            offsets = self._offsets(facts)
            self.shards.append(Shard(facts, offsets, token))
            starts.append(offsets[1:].astype(np.int64) + token)
            token += facts["tokens"]
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
            here = owner == number
            local = addresses[here] - self.first_tokens[number]
            shard_ids, shard_mask = self.arrays(number)
            ids[here] = shard_ids[local]
            if shard_mask is not None:
                mask[here] = shard_mask[local] != 0
        return ids, mask

    def arrays(self, number: int) -> tuple[np.ndarray, np.ndarray | None]:
        """A shard's ids and, in masked data, its mask."""
        facts = self.shards[number].facts
        return self.files[facts["file"], "ids"], self.files.get((facts["file"], "mask"))

    def want(self, documents: Iterable[np.ndarray]) -> None:
        """Told which documents come next, group by group. All of them are here already."""

    def document(self, number: int) -> np.ndarray:
        """The stored ids of one document, int64."""
        return self.gather(np.arange(self.starts[number], self.starts[number + 1]))[0]

    def _offsets(self, facts: dict[str, Any]) -> np.ndarray:
        """Map a shard's files, and say where its documents begin."""
        for role in ("ids", "offsets", *(["mask"] if self.masked else [])):
            name, dtype, count, sha = part(facts, role, self.dtype)
            self.files[facts["file"], role] = map_file(
                self.directory / name, dtype, count, sha if self.verify else None
            )
        return checked_offsets(facts, self.files[facts["file"], "offsets"], f"{self.directory}/")


def part(facts: dict[str, Any], role: str, dtype: np.dtype[Any]) -> tuple[str, np.dtype[Any], int, str]:
    """A shard's file for "ids", "offsets" or "mask": its name, dtype, number of values and sha256."""
    stem = facts["file"].removesuffix(".bin")
    if role == "offsets":
        return f"{stem}.offsets.bin", np.dtype("<u8"), facts["documents"] + 1, facts["offsets_sha256"]
    if role == "mask":
        return f"{stem}.mask.bin", np.dtype(np.uint8), facts["tokens"], facts["mask_sha256"]
    return facts["file"], dtype, facts["tokens"], facts["sha256"]


def checked_offsets(facts: dict[str, Any], offsets: np.ndarray, folder: str) -> np.ndarray:
    """The offsets, if they end where the shard does."""
    if offsets[-1] != facts["tokens"]:
        name = part(facts, "offsets", np.dtype("<u8"))[0]
        raise UserError(f"{folder}{name}: corrupt: ends at {offsets[-1]}, not {facts['tokens']}")
    return offsets


def map_file(path: Path, dtype: np.dtype[Any], count: int, sha: str | None) -> np.ndarray:
    """A shard's file, memory-mapped; UserError where its size or (if given) its sha256 is another."""
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
    """The index.json of a tokens folder or mixture. Raises UserError where it is none of this version."""
    if not (directory / "index.json").exists():
        raise UserError(f"{directory}: no index.json; this is not a tokens folder (`soma run` makes one)")
    return checked_index(read_json(directory / "index.json"), str(directory / "index.json"), (FORMAT, MIXTURE))


def checked_index(index: Any, where: str, formats: Collection[str] = (FORMAT,)) -> dict[str, Any]:
    """The index, if it is one of this version."""
    if not isinstance(index, dict) or index.get("format") not in formats or index.get("version") != VERSION:
        raise UserError(f"{where}: not {FORMAT} version {VERSION}; make the tokens again")
    return index
