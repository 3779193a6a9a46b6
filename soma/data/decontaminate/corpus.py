"""Decontamination of a corpus: documents with items of an evaluation set are listed, and leave."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from soma.data import profile
from soma.data.config import DataConfig
from soma.data.decontaminate.items import Field, plain, read_fields
from soma.data.decontaminate.match import find_contamination
from soma.data.index import Index

EXAMPLES = 10
FILE = "contamination.parquet"


def drop_contaminated(config: DataConfig, index: Index, work: Path, out: Path) -> dict[str, Any]:
    """Write `contamination.parquet` and, unless the recipe says `report`, drop the documents in it.

    Returns the report's section. The file has a row for each document and field of an item that was found in it:
    `source`, `id` of the document; `set`, `item` (from 1), `field`; `match` (`ngram` or `near`), `n_windows` of the
    field found in the document and their share, `overlap`; `item_text`; `document_text` around the first of them.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    settings = config.decontaminate
    if settings is None:
        return {}
    fields = read_fields(settings)
    parts = [partition.path for partition in index.partitions]
    matches = find_contamination(parts, index.kept_N, fields, work, settings, config.workers, config.runner)
    rows = _rows(index, fields, matches)
    rows.sort(key=lambda row: (row["source"], row["id"], row["set"], row["item"], row["field"]))
    kinds = {"item": pa.int64(), "n_windows": pa.int64(), "overlap": pa.float64()}
    names = ("source", "id", "set", "item", "field", "match", "n_windows", "overlap", "item_text", "document_text")
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in names])
    pq.write_table(pa.Table.from_pylist(rows, schema), out / FILE, compression="zstd", store_schema=False)
    found = np.unique(matches["row"]).astype(np.int64)
    if settings.action == "drop":
        index.drop(found, "contaminated")
        index.details |= _details(fields, matches)
    in_set = Counter(field.set for field in fields)
    hit = Counter(fields[number].set for number in np.unique(matches["field"]).tolist())
    sets = [{"set": name, "fields": count, "found": hit[name]} for name, count in sorted(in_set.items())]
    examples = [{key: row[key] for key in names if key != "id"} for row in rows[:EXAMPLES]]
    return {"action": settings.action, "documents": len(found), "sets": sets, "examples": examples}


def _rows(index: Index, fields: list[Field], matches: np.ndarray) -> list[dict[str, Any]]:
    found, start = [], 0
    for partition in index.partitions:
        for batch in partition.batches(["text"]):
            low, high = np.searchsorted(matches["row"], [start, start + len(batch)])
            for match in matches[low:high]:
                row, field = int(match["row"]), fields[match["field"]]
                words = plain(batch["text"][row - start].as_py()).split()[max(0, int(match["word"]) - 5) :]
                found.append(
                    {
                        "source": index.string("source", row), "id": index.string("id", row), "set": field.set,
                        "item": field.item, "field": field.name, "match": "near" if match["near"] else "ngram",
                        "n_windows": int(match["windows"]), "overlap": round(float(match["overlap"]), 4),
                        "item_text": profile.excerpt(field.text),
                        "document_text": profile.excerpt(" ".join(words[:60])),
                    }
                )  # fmt: skip
            start += len(batch)
    return found


def _details(fields: list[Field], matches: np.ndarray) -> dict[int, str]:
    """For each document the item of which most is in it."""
    best: dict[int, str] = {}
    for match in np.sort(matches, order=["row", "overlap", "field"]):
        field = fields[match["field"]]
        best[int(match["row"])] = f"{match['overlap']:.0%} of {field.set}#{field.item} {field.name}"
    return best
