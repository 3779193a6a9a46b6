"""What stands in many documents of a corpus, substrings and lines: counted, or cut out."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from soma.data import profile
from soma.data.config import DataConfig, LinesConfig, SubstringConfig
from soma.data.dedup import exact_key
from soma.data.dedup.lines import RepeatedLines, normal_line, repeated_lines
from soma.data.dedup.substring import cut_spans, repeated_spans
from soma.data.duplicates import drop_exact
from soma.data.index import Index
from soma.data.partitions import text_id

EXAMPLES = 5
COMMON_LINES = 20


class Repeats:
    """What rows of an index lose by `data.dedup.substring` and `data.dedup.lines`: first spans, then lines.

    `sections`: what the report says. `spans`: for each row that is cut, its spans. `losing`: rows that lose lines.
    """

    def __init__(self, config: DataConfig, index: Index, work: Path) -> None:
        self.index, self.config, self.work = index, config, work
        self.sections: dict[str, dict[str, Any]] = {}
        self.spans: dict[int, np.ndarray] = {}
        self.lines: RepeatedLines | None = None
        self.losing: set[int] = set()
        if config.dedup.substring is None and config.dedup.lines is None:
            return
        order = index.order(("id", "ascending"), ("source", "ascending"))
        self.rank_N = np.full(len(index), -1, np.int64)
        self.rank_N[order] = np.arange(len(order))
        self.parts = [partition.path for partition in index.partitions]
        if config.dedup.substring is not None:
            self._find_spans(config.dedup.substring)
        if config.dedup.lines is not None:
            self._find_lines(config.dedup.lines)
        if self.spans or self.losing:
            self._change()

    def _find_spans(self, settings: SubstringConfig) -> None:
        config = self.config
        self.unit = settings.unit
        found = repeated_spans(
            self.parts, self.rank_N, self.work, settings.length, settings.unit, config.workers, config.runner
        )
        section: dict[str, Any] = {"unit": settings.unit, "length": settings.length, "action": settings.action}
        section |= {"documents": 0, "spans": 0, "units": 0, "bytes": 0, "examples": []}
        self.sections["repeated_text"] = section
        for start, spans in zip(self.index.starts.tolist(), found, strict=False):
            rows, first = np.unique(spans["row"], return_index=True)
            section["documents"] += len(rows)
            section["spans"] += len(spans)
            section["units"] += int((spans["end"].astype(np.int64) - spans["start"]).sum())
            if settings.action == "remove" and len(rows):
                self.spans |= dict(zip((rows + start).tolist(), np.split(spans, first[1:]), strict=True))

    def _find_lines(self, settings: LinesConfig) -> None:
        config = self.config
        found = repeated_lines(
            self.parts, self.rank_N, self.work, documents=settings.documents, min_chars=settings.min_chars,
            keep_first=settings.keep_first, workers=config.workers, runner=config.runner,
        )  # fmt: skip
        self.lines = found
        common: Counter[str] = Counter()
        lost_lines = lost_bytes = 0
        for row, text in self._texts(found.rows):
            _, lost = found.cut(self._without_spans(row, text), int(self.rank_N[row]))
            common.update({normal_line(line) for line in lost})
            lost_lines += len(lost)
            lost_bytes += sum(len(line.encode()) + 1 for line in lost)
        self.sections["repeated_lines"] = {
            "in_documents": settings.documents, "action": settings.action, "distinct": len(found.hashes),
            "documents": len(found.rows), "lines": lost_lines, "bytes": lost_bytes,
            "examples": [{"line": line, "documents": count} for line, count in common.most_common(COMMON_LINES)],
        }  # fmt: skip
        if settings.action == "remove":
            self.losing = set(found.rows.tolist())

    def _texts(self, rows: np.ndarray) -> Iterator[tuple[int, str]]:
        """These rows' texts, before anything is cut."""
        start = 0
        for partition in self.index.partitions:
            for batch in partition.batches(["text"]):
                for row in rows[(rows >= start) & (rows < start + len(batch))].tolist():
                    yield row, batch["text"][row - start].as_py()
                start += len(batch)

    def _change(self) -> None:
        """Give the index the ids, sizes and keys of what is left, and drop what is too short or exact copies now."""
        import pyarrow as pa

        rows = np.array(sorted({*self.spans, *self.losing}), np.int64)
        values: dict[str, list[Any]] = {name: [] for name in ("id", "exact", "n_bytes", "n_chars")}
        for row, text in self._texts(rows):
            if row in self.spans:
                self._note_spans(row, text)
            left = self._left(row, text)
            values["id"].append(text_id(left))
            values["exact"].append(exact_key(left))
            values["n_bytes"].append(len(left.encode()))
            values["n_chars"].append(len(left))
        table = self.index.table
        for name, found in values.items():
            column = table[name].to_pylist() if name in ("id", "exact") else table[name].to_numpy().copy()
            for row, value in zip(rows.tolist(), found, strict=True):
                column[row] = value
            table = table.set_column(table.column_names.index(name), table.schema.field(name), pa.array(column))
        self.index.table = table
        short = rows[np.array(values["n_chars"], np.int64) < self.config.clean.min_chars]
        self.index.drop(short, "repeated_text")
        self.index.details |= dict.fromkeys(short.tolist(), "nothing of its own is left")
        drop_exact(self.index)

    def _note_spans(self, row: int, text: str) -> None:
        section, left = self.sections["repeated_text"], self._without_spans(row, text)
        section["bytes"] += len(text.encode()) - len(left.encode())
        if len(section["examples"]) < EXAMPLES:
            example = {"source": self.index.string("source", row), "left": profile.excerpt(left)}
            section["examples"].append(example | {"characters": len(text) - len(left)})

    def _without_spans(self, row: int, text: str) -> str:
        return cut_spans(text, self.spans[row], self.unit) if row in self.spans else text

    def _left(self, row: int, text: str) -> str:
        """What is left of a row's text."""
        text = self._without_spans(row, text)
        if row in self.losing and self.lines is not None:
            text, _ = self.lines.cut(text, int(self.rank_N[row]))
        return text

    def apply(self, rows: np.ndarray, batch: Any) -> Any:
        """The rows of the index, an Arrow batch with `text` and `COLUMNS`, as they are after cutting."""
        import pyarrow as pa

        cut = [number for number, row in enumerate(rows.tolist()) if row in self.spans or row in self.losing]
        if not cut:
            return batch
        texts = batch["text"].to_pylist()
        for number in cut:
            texts[number] = self._left(int(rows[number]), texts[number])
        changed = {name: self.index.table[name].take(rows).combine_chunks() for name in ("id", "n_bytes", "n_chars")}
        changed["text"] = pa.array(texts, pa.string())
        columns = [changed.get(name, batch[name]) for name in batch.schema.names]
        return pa.RecordBatch.from_arrays(columns, schema=batch.schema)
