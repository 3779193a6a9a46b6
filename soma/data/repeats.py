"""Repeated substrings of a corpus: counted, or cut out of all documents but the first that has them."""

from pathlib import Path
from typing import Any

import numpy as np

from soma.data import profile
from soma.data.config import DataConfig
from soma.data.dedup import exact_key
from soma.data.dedup.substring import cut_spans, repeated_spans
from soma.data.duplicates import drop_exact
from soma.data.index import Index
from soma.data.partitions import text_id

EXAMPLES = 5


class Repeats:
    """The spans that rows of an index lose; nothing is lost where the recipe has no `data.dedup.substring`.

    `section`: what the report says. `spans`: for each row that is cut, its spans.
    """

    def __init__(self, config: DataConfig, index: Index, work: Path) -> None:
        self.section: dict[str, Any] = {}
        self.spans: dict[int, np.ndarray] = {}
        settings = config.dedup.substring
        if settings is None:
            return
        self.index, self.unit, self.least = index, settings.unit, config.clean.min_chars
        order = index.order(("id", "ascending"), ("source", "ascending"))
        rank_N = np.full(len(index), -1, np.int64)
        rank_N[order] = np.arange(len(order))
        parts = [partition.path for partition in index.partitions]
        found = repeated_spans(parts, rank_N, work, settings.length, settings.unit, config.workers, config.runner)
        self.section = {"unit": settings.unit, "length": settings.length, "action": settings.action}
        self.section |= {"documents": 0, "spans": 0, "units": 0, "bytes": 0, "examples": []}
        for start, spans in zip(index.starts.tolist(), found, strict=False):
            self._count(start, spans)
        if settings.action == "remove":
            self._change()
        else:
            self.spans = {}

    def _count(self, start: int, spans: np.ndarray) -> None:
        rows, first = np.unique(spans["row"], return_index=True)
        self.spans |= dict(zip((rows + start).tolist(), np.split(spans, first[1:]), strict=False)) if len(rows) else {}
        self.section["documents"] += len(rows)
        self.section["spans"] += len(spans)
        self.section["units"] += int((spans["end"].astype(np.int64) - spans["start"]).sum())

    def _change(self) -> None:
        """Give the index the ids, sizes and keys of what is left, and drop what is too short or exact copies now."""
        import pyarrow as pa

        rows = np.array(sorted(self.spans), np.int64)
        values: dict[str, list[Any]] = {name: [] for name in ("id", "exact", "n_bytes", "n_chars")}
        before = self.index.column("n_bytes")[rows]
        start = 0
        for partition in self.index.partitions:
            for batch in partition.batches(["text", "source"]):
                here = rows[(rows >= start) & (rows < start + len(batch))]
                for row in here.tolist():
                    self._add(values, batch["text"][row - start].as_py(), row)
                start += len(batch)
        self.section["bytes"] = int(before.sum() - sum(values["n_bytes"]))
        table = self.index.table
        for name, found in values.items():
            column = table[name].to_pylist() if name in ("id", "exact") else table[name].to_numpy().copy()
            for row, value in zip(rows.tolist(), found, strict=True):
                column[row] = value
            table = table.set_column(table.column_names.index(name), table.schema.field(name), pa.array(column))
        self.index.table = table
        short = rows[np.array(values["n_chars"], np.int64) < self.least]
        self.index.drop(short, "repeated_text")
        self.index.details |= dict.fromkeys(short.tolist(), "nothing of its own is left")
        drop_exact(self.index)

    def _add(self, values: dict[str, list[Any]], text: str, row: int) -> None:
        left = cut_spans(text, self.spans[row], self.unit)
        if len(self.section["examples"]) < EXAMPLES:
            example = {"source": self.index.string("source", row), "left": profile.excerpt(left)}
            self.section["examples"].append(example | {"characters": len(text) - len(left)})
        values["id"].append(text_id(left))
        values["exact"].append(exact_key(left))
        values["n_bytes"].append(len(left.encode()))
        values["n_chars"].append(len(left))

    def apply(self, rows: np.ndarray, batch: Any) -> Any:
        """The rows of the index, an Arrow batch with `text` and `COLUMNS`, as they are after cutting."""
        import pyarrow as pa

        cut = [number for number, row in enumerate(rows.tolist()) if row in self.spans]
        if not cut:
            return batch
        texts = batch["text"].to_pylist()
        for number in cut:
            texts[number] = cut_spans(texts[number], self.spans[int(rows[number])], self.unit)
        changed = {name: self.index.table[name].take(rows).combine_chunks() for name in ("id", "n_bytes", "n_chars")}
        changed["text"] = pa.array(texts, pa.string())
        columns = [changed.get(name, batch[name]) for name in batch.schema.names]
        return pa.RecordBatch.from_arrays(columns, schema=batch.schema)
