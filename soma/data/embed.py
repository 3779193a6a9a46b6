"""Text embeddings of a corpus, from any endpoint of OpenAI's shape, into one Parquet file.

Rows are in the corpus's order: `id` (of the text, as in a corpus), `source`, `embedding` (float32, of length 1). Blocks
of documents are kept in a folder beside the file while it is made, by the hash of their texts and of what was asked:
after a kill the same command asks only for what is not there.
"""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from soma.base import progress
from soma.base.artefact import json_hash
from soma.base.errors import UserError
from soma.base.locks import Busy, lock
from soma.data.config import SemanticConfig
from soma.data.dedup.files import map_array, save_array
from soma.data.dedup.semantic import Client
from soma.data.partitions import text_id
from soma.data.readers import Document, Dropped, read_item
from soma.data.sources import Skipped, list_items

FORMAT = 1  # raise it when the same texts come to give other blocks
REQUESTS = 16  # in a block: what a kill may cost
SPLITS = ("train", "validation")


@dataclass
class Embedded:
    """What was done. `asked`: documents sent now; the others were there from before. `skipped`: files and rows that
    could not be read."""

    documents: int = 0
    asked: int = 0
    dimensions: int = 0
    skipped: int = 0


def embed_corpus(corpus: str, out: Path, config: SemanticConfig, text_field: str = "text") -> Embedded:
    """Embed the documents of a corpus folder (train, then validation) or of any source of texts.

    Of `config` counts what the client takes: url, model, key, max_chars, batch, concurrency. The bytes depend on the
    texts, `batch` and the endpoint's answers alone. Raises UserError where `out` is there already, another process
    writes it, there is no text, or the endpoint cannot be reached or refuses.
    """
    if out.exists():
        raise UserError(f"{out}: is there already; remove it to embed again, or choose another --out")
    work = out.with_name(f".{out.name}.parts")
    try:
        with lock(work.with_suffix(".lock"), wait=False):
            done = _write(corpus, out, work, config, text_field)
            shutil.rmtree(work)
            work.with_suffix(".lock").unlink()
    except Busy as busy:
        raise UserError(f"{out}: {busy}") from None
    return done


def _write(corpus: str, out: Path, work: Path, config: SemanticConfig, text_field: str) -> Embedded:
    import pyarrow as pa
    import pyarrow.parquet as pq

    client = Client(config, "soma data embed")
    asked = config.model_dump(include={"url", "model", "max_chars", "batch"})
    done = Embedded()
    work.mkdir(parents=True, exist_ok=True)
    documents = _documents(corpus, text_field, done)
    writer: Any = None
    with progress.current().task("embeddings", unit="documents") as bar, ThreadPoolExecutor(config.concurrency) as pool:
        try:
            while block := list(islice(documents, REQUESTS * config.batch)):
                texts, ids = [one.text for one in block], [text_id(one.text) for one in block]
                path = work / f"{json_hash([FORMAT, asked, ids])[:32]}.npy"
                if not path.exists():
                    batches = [texts[low : low + config.batch] for low in range(0, len(texts), config.batch)]
                    answers = list(pool.map(client.embed, batches))
                    _same_width({answer.shape[1] for answer in answers}, config)
                    save_array(path, np.concatenate(answers))
                    done.asked += len(block)
                vectors_ND = np.asarray(map_array(path))
                done.dimensions = done.dimensions or vectors_ND.shape[1]
                _same_width({done.dimensions, vectors_ND.shape[1]}, config)
                table = pa.table({
                    "id": ids, "source": [one.source for one in block],
                    "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.reshape(-1)), done.dimensions),
                })  # fmt: skip
                writer = writer or pq.ParquetWriter(work / "whole.parquet", table.schema, compression="zstd")
                writer.write_table(table)
                done.documents += len(block)
                bar.advance(len(block))
        finally:
            if writer is not None:
                writer.close()
    if writer is None:
        raise UserError(f"{corpus}: no text in there")
    os.replace(work / "whole.parquet", out)
    return done


def _same_width(widths: set[int], config: SemanticConfig) -> None:
    if len(widths) != 1:
        raise UserError(f"soma data embed: model {config.model} gave vectors of {sorted(widths)} dimensions")


def _documents(corpus: str, text_field: str, done: Embedded) -> Iterator[Document]:
    """The documents in order. Of a corpus folder only its splits: what was dropped lies beside them."""
    files = [str(path) for split in SPLITS for path in sorted(Path(corpus).glob(f"{split}-[0-9]*.parquet"))]
    for item in list_items(files or [corpus]):
        if isinstance(item, Skipped):
            done.skipped += 1
            continue
        for found in read_item(item, text_field):
            if isinstance(found, Dropped):
                done.skipped += 1
            else:
                yield found
