"""Documents of before: corpora or indexes that new documents are deduplicated against.

Any corpus folder will do; its signatures are computed when it is used. An index (`soma data index`) keeps them: 544
bytes a document beside the compressed text, `index.json` says with which settings. It grows by one part for each corpus
that is put in; `corpora` remembers which, so the same corpus is put in once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from soma.base import progress
from soma.base.artefact import content_hash, json_hash, read_json, write_json
from soma.base.errors import UserError
from soma.data.config import DedupConfig
from soma.data.dedup.exact import exact_key
from soma.data.dedup.minhash import MINHASH_SEED, minhash_words
from soma.data.dedup.words import parse

FORMAT, VERSION = "soma-dedup-index", 1
BATCH_ROWS = 512
KEY_BYTES = 32


@dataclass(frozen=True)
class Old:
    """The parts of all folders, one after the other: Parquet files with `text` and `source`; in an index also `exact`
    and `signatures`.
    """

    parts: tuple[Path, ...]
    starts: tuple[int, ...]

    @property
    def documents(self) -> int:
        return self.starts[-1]

    def keys(self) -> tuple[np.ndarray, np.ndarray]:
        """(exact keys ascending, void of 32 bytes; the row of each): 40 bytes a document in memory."""
        import pyarrow.parquet as pq

        found = [b""]
        for part in self.parts:
            with pq.ParquetFile(part) as file:
                known = "exact" in file.schema_arrow.names
                for batch in file.iter_batches(BATCH_ROWS, columns=["exact" if known else "text"]):
                    values = batch.column(0).to_pylist()
                    found += values if known else [exact_key(text) for text in values]
        keys = np.frombuffer(b"".join(found), np.dtype((np.void, KEY_BYTES)))
        order = np.argsort(keys, kind="stable")
        return keys[order], order

    def sources(self, rows: np.ndarray) -> dict[int, str]:
        """The source of each of these rows."""
        import pyarrow.parquet as pq

        found: dict[int, str] = {}
        wanted = np.unique(rows)
        for part, low, high in zip(self.parts, self.starts[:-1], self.starts[1:], strict=True):
            here = wanted[(wanted >= low) & (wanted < high)]
            if len(here):
                names = pq.read_table(part, columns=["source"])["source"].take(here - low).to_pylist()
                found |= dict(zip(here.tolist(), names, strict=True))
        return found


def open_old(folders: Sequence[str], config: DedupConfig) -> Old:
    """The documents of these corpus and index folders. Raises UserError for what is neither, and for an index whose
    signatures were made with other settings.
    """
    import pyarrow.parquet as pq

    parts = [part for folder in folders for part in _parts(Path(folder), config)]
    starts = np.cumsum([0, *(pq.read_metadata(part).num_rows for part in parts)])
    return Old(tuple(parts), tuple(starts.tolist()))


def old_fingerprint(folders: Sequence[str]) -> str:
    """Hash over the content of these folders."""
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"data.dedup.against: {folder}: no such folder")
    return json_hash([content_hash(Path(folder)) for folder in folders])


def _parts(folder: Path, config: DedupConfig) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"data.dedup.against: {folder}: no such folder")
    if (folder / "index.json").exists():
        facts = _facts(folder)
        wanted = _settings(config)
        if facts["settings"] != wanted:
            raise UserError(
                f"data.dedup.against: {folder} was made with {facts['settings']}, data.dedup says {wanted}: "
                "use the same, or make another index (soma data index)"
            )
        return [folder / part["file"] for part in facts["parts"]]
    parts = sorted(folder.glob("train-[0-9]*.parquet")) + sorted(folder.glob("validation-[0-9]*.parquet"))
    if not parts:
        raise UserError(f"data.dedup.against: {folder}: neither a corpus (train-00000.parquet) nor an index")
    return parts


def _facts(folder: Path) -> dict[str, Any]:
    facts = read_json(folder / "index.json")
    if not isinstance(facts, dict) or facts.get("format") != FORMAT or facts.get("version") != VERSION:
        raise UserError(f"{folder / 'index.json'}: not {FORMAT} version {VERSION}; make the index again")
    return facts


def _settings(config: DedupConfig) -> dict[str, int]:
    return {"num_hashes": config.num_hashes, "ngram": config.ngram, "seed": MINHASH_SEED}


# --- An index ---


def add_to_index(folder: Path, corpora: Sequence[Path], config: DedupConfig) -> dict[str, Any]:
    """Put corpora into the index `folder`, which is made if it is not there. Returns its `index.json`.

    A part is whole before `index.json` names it; a corpus that is in it already is passed over.
    """
    settings = _settings(config)
    facts: dict[str, Any] = {"format": FORMAT, "version": VERSION, "settings": settings, "parts": [], "corpora": []}
    if (folder / "index.json").exists():
        facts = _facts(folder)
        if facts["settings"] != settings:
            raise UserError(f"{folder} was made with {facts['settings']}, not {settings}: make another index")
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: not empty, and no index; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    for corpus in corpora:
        name = content_hash(corpus) if corpus.is_dir() else ""
        if name in facts["corpora"]:
            progress.current().note(f"{corpus} is in the index already")
            continue
        for shard in _parts(corpus, config):
            path = folder / f"{len(facts['parts']):05d}.parquet"
            facts["parts"].append({"file": path.name, "documents": _write_part(shard, path, config)})
        facts["corpora"].append(name)
        write_json(folder / "index.json", facts)
    return facts


def _write_part(shard: Path, path: Path, config: DedupConfig) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [(name, pa.string()) for name in ("id", "text", "source")]
    schema = pa.schema([*names, ("exact", pa.binary()), ("signatures", pa.list_(pa.uint32(), config.num_hashes))])
    temporary = path.with_name(f".{path.name}.tmp")
    documents = 0
    with pq.ParquetWriter(temporary, schema, compression="zstd", store_schema=False) as file:
        for batch in _batches(shard):
            texts = batch["text"].to_pylist()
            signatures_NH = minhash_words(parse(texts), config)
            signatures = pa.FixedSizeListArray.from_arrays(pa.array(signatures_NH.ravel()), config.num_hashes)
            exact = pa.array([exact_key(text) for text in texts])
            file.write_table(pa.table([*batch.select(["id", "text", "source"]).columns, exact, signatures], schema))
            documents += len(texts)
    temporary.replace(path)
    return documents


def _batches(shard: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(shard) as file:
        yield from file.iter_batches(BATCH_ROWS, columns=["id", "text", "source"])
