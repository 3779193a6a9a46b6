"""The files of a corpus: `<split>-00000.parquet`… with rows in the order of their id, and `dropped.parquet`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from soma.base.errors import UserError
from soma.data.readers import Dropped

SHARD_BYTES = 256 << 20  # of text, in one Parquet file
ROW_GROUP = 1024
DROPPED_COLUMNS = ("source", "reason", "detail", "excerpt")
SPILL_ROWS = 4096  # dropped documents that wait as Python objects


def _schema(names: Iterable[str]) -> Any:
    import pyarrow

    return pyarrow.schema([(name, pyarrow.int64() if name.startswith("n_") else pyarrow.string()) for name in names])


class ShardWriter:
    """Appends rows to `<split>-00000.parquet`…, each of at most `SHARD_BYTES` of text (one file at least).

    Holds the rows of one row group (`ROW_GROUP` rows) in memory. The bytes written depend on the rows alone, not on how
    they come in.
    """

    def __init__(self, out: Path, split: str, names: Sequence[str]) -> None:
        self.out, self.split, self.schema = out, split, _schema(names)
        self.waiting: dict[str, list[Any]] = {name: [] for name in names}
        self.rows, self.size, self.shard = 0, 0, 0
        self.file: Any = None

    def add(self, columns: Mapping[str, Sequence[Any]], row_bytes: Sequence[int]) -> None:
        """Rows as columns, with the bytes of text of each."""
        start = 0
        for end, size in enumerate(row_bytes):
            if self.rows and self.size + size > SHARD_BYTES:
                self._take(columns, start, end)
                start = end
                self._finish_shard()
            elif end - start + len(self.waiting["id"]) >= ROW_GROUP:
                self._take(columns, start, end)
                start = end
                self._write_group()
            self.rows, self.size = self.rows + 1, self.size + size
        self._take(columns, start, len(row_bytes))

    def close(self) -> None:
        """Write what waits; a split without rows gets an empty file."""
        if self.rows or self.shard == 0:
            self._finish_shard()

    def _take(self, columns: Mapping[str, Sequence[Any]], start: int, end: int) -> None:
        for name, values in columns.items():
            self.waiting[name].extend(values[start:end])

    def _write_group(self) -> None:
        import pyarrow
        import pyarrow.parquet as pq

        if self.file is None:
            path = self.out / f"{self.split}-{self.shard:05d}.parquet"
            self.file = pq.ParquetWriter(path, self.schema, compression="zstd", store_schema=False)
        self.file.write_table(pyarrow.table(self.waiting, self.schema), row_group_size=ROW_GROUP)
        self.waiting = {name: [] for name in self.waiting}

    def _finish_shard(self) -> None:
        self._write_group()
        self.file.close()
        self.file, self.rows, self.size, self.shard = None, 0, 0, self.shard + 1


def write_shards(out: Path, split: str, columns: dict[str, list[Any]], row_bytes: Sequence[int]) -> None:
    """All rows of a split at once; see `ShardWriter`."""
    writer = ShardWriter(out, split, list(columns))
    writer.add(columns, row_bytes)
    writer.close()


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    """One Parquet file whose bytes depend on the values alone. Lists of int become int64, all others strings."""
    import pyarrow
    import pyarrow.parquet as pq

    table = pyarrow.table(columns, _schema(columns))
    pq.write_table(table, path, compression="zstd", row_group_size=ROW_GROUP, store_schema=False)


class DropLog:
    """What was set aside, kept as Arrow columns (some 300 bytes each) rather than as objects."""

    def __init__(self) -> None:
        self.waiting: list[Dropped] = []
        self.tables: list[Any] = []

    def add(self, item: Dropped) -> None:
        self.waiting.append(item)
        if len(self.waiting) >= SPILL_ROWS:
            self._spill()

    def extend(self, table: Any) -> None:
        """The rows of an Arrow table with `DROPPED_COLUMNS`."""
        self.tables.append(table)

    def _spill(self) -> None:
        import pyarrow

        columns = {name: [getattr(item, name) for item in self.waiting] for name in DROPPED_COLUMNS}
        self.tables.append(pyarrow.table(columns, _schema(DROPPED_COLUMNS)))
        self.waiting = []

    def table(self) -> Any:
        """All of them, by reason, source, detail, excerpt: an order that does not show the order of reading."""
        import pyarrow

        self._spill()
        table = pyarrow.concat_tables([part.cast(_schema(DROPPED_COLUMNS)) for part in self.tables])
        keys = [(name, "ascending") for name in ("reason", "source", "detail", "excerpt")]
        return table.sort_by(keys).combine_chunks()

    def items(self) -> Iterator[Dropped]:
        """All of them in that order."""
        for batch in self.table().to_batches(max_chunksize=SPILL_ROWS):
            yield from (Dropped(**row) for row in batch.to_pylist())

    def write(self, path: Path) -> None:
        """As one Parquet file."""
        import pyarrow.parquet as pq

        pq.write_table(self.table(), path, compression="zstd", row_group_size=ROW_GROUP, store_schema=False)


def write_dropped(out: Path, dropped: Iterable[Dropped]) -> None:
    """`dropped.parquet`, in an order that does not depend on the order of reading."""
    log = DropLog()
    for item in dropped:
        log.add(item)
    log.write(out / "dropped.parquet")


def read_corpus(corpus: Path, split: str, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a split as dictionaries, in order of their id. Raises UserError where a file is missing or broken."""
    import pyarrow
    import pyarrow.parquet as pq

    files = sorted(corpus.glob(f"{split}-[0-9]*.parquet"))
    if not files:
        raise UserError(f"{corpus}: no {split}-00000.parquet; this is not a corpus folder (`soma run` makes one)")
    for path in files:
        try:
            for batch in pq.ParquetFile(path).iter_batches(batch_size=256, columns=list(columns) if columns else None):
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
