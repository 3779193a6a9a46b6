"""What the steps after reading know of each document without its text: one row of an index, some 150 bytes."""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from soma.data.partitions import Partition, schema

COLUMNS = ("id", "source", "whole", "exact", "n_bytes", "n_chars")
CACHED_GROUPS = 64  # row groups whose text is held, of at most `partitions.BATCH_BYTES` each


class Index:
    """All rows of all partitions, numbered in the order of the partitions.

    `table` has the columns `COLUMNS`; `kept_N` (bool) says which rows are still in; of the others `reason_N` holds the
    number of the reason in `reasons`, `twin_N` the row that is kept in its place (or −1) and `details`
    what else is to be said of it.
    """

    def __init__(self, partitions: Sequence[Partition]) -> None:
        import pyarrow as pa

        self.partitions = partitions
        batches = [batch for partition in partitions for batch in partition.batches(COLUMNS)]
        names = schema(None)
        self.table: Any = pa.Table.from_batches(batches, pa.schema([names.field(name) for name in COLUMNS]))
        self.starts = np.cumsum([0, *(partition.facts["rows"] for partition in partitions)])
        rows = int(self.starts[-1])
        self.kept_N = np.ones(rows, bool)
        self.reason_N = np.full(rows, -1, np.int16)
        self.reasons: list[str] = []
        self.twin_N = np.full(rows, -1, np.int64)
        self.details: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.kept_N)

    def column(self, name: str) -> np.ndarray:
        """An integer column as an array."""
        return np.asarray(self.table[name].to_numpy())

    def string(self, name: str, row: int) -> str:
        """One value of a column of strings."""
        return str(self.table[name][row].as_py())

    def drop(self, rows: np.ndarray, reason: str, twins: np.ndarray | None = None) -> None:
        """Take rows out, for a reason that `dropped.parquet` will give."""
        if reason not in self.reasons:
            self.reasons.append(reason)
        self.kept_N[rows] = False
        self.reason_N[rows] = self.reasons.index(reason)
        if twins is not None:
            self.twin_N[rows] = twins

    def order(self, *keys: tuple[str, str]) -> np.ndarray:
        """Numbers of the rows that are in, sorted by columns: `("n_chars", "descending"), …`."""
        import pyarrow as pa
        import pyarrow.compute as pc

        rows = np.flatnonzero(self.kept_N)
        if not len(rows):
            return rows
        table = self.table.select([name for name, _ in keys]).append_column("row", pa.array(np.arange(len(self))))
        table = table.filter(pa.array(self.kept_N))
        sorted_N: np.ndarray = rows[pc.sort_indices(table, [*keys, ("row", "ascending")]).to_numpy()]
        return sorted_N


class Texts(Sequence[str]):
    """The texts of some rows of an index, read from the partitions when they are asked for."""

    def __init__(self, index: Index, rows: np.ndarray) -> None:
        self.documents, self.rows = index, rows
        self.cache: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self.firsts: dict[int, list[int]] = {}  # of a partition: its row groups' first rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[str]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: Any) -> Any:
        row = int(self.rows[number])
        part = int(np.searchsorted(self.documents.starts, row, side="right")) - 1
        row -= int(self.documents.starts[part])
        firsts = self._firsts(part)
        group = bisect_right(firsts, row) - 1
        return self._group(part, group)[row - firsts[group]].as_py()

    def _firsts(self, part: int) -> list[int]:
        import pyarrow.parquet as pq

        if part not in self.firsts:
            facts = pq.read_metadata(self.documents.partitions[part].path)
            sizes = [facts.row_group(group).num_rows for group in range(facts.num_row_groups)]
            self.firsts[part] = [int(first) for first in np.cumsum([0, *sizes[:-1]])]
        return self.firsts[part]

    def _group(self, part: int, group: int) -> Any:
        import pyarrow.parquet as pq

        key = (part, group)
        if key not in self.cache:
            with pq.ParquetFile(self.documents.partitions[part].path) as file:
                self.cache[key] = file.read_row_group(group, columns=["text"])["text"].combine_chunks()
            if len(self.cache) > CACHED_GROUPS:
                self.cache.popitem(last=False)
        self.cache.move_to_end(key)
        return self.cache[key]
