"""Attributes: what the signals say of each document, in columns beside it, and the filters that decide by them.

`partitions/….attributes.parquet` has a row for each row of the partition, a corpus's `attributes-<split>-00000.parquet`
one for each of its rows in the same order; `id` names the document, the other columns are of `signals.measure`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from soma.data.config import DataConfig
from soma.data.index import Index
from soma.data.partitions import Partition
from soma.data.signals.measure import decide

ROW_GROUP = 1024


def drop_filtered(config: DataConfig, index: Index) -> None:
    """Take out of the index what the filters drop, by the attributes that lie beside the partitions."""
    assert config.filters is not None
    for partition, start in zip(index.partitions, index.starts.tolist(), strict=False):
        table = read_attributes(partition)
        columns = {name: table[name].to_numpy() for name in table.column_names if name != "id"}
        reason_D, names, details = decide(columns, config.filters, table.num_rows)
        for number, name in enumerate(names):
            rows = (reason_D == number).nonzero()[0]
            if len(rows):
                index.drop(rows + start, name)
                index.details |= {start + row: details[row] for row in rows.tolist()}


def read_attributes(partition: Partition) -> Any:
    """The attributes of a partition's rows, an Arrow table."""
    import pyarrow.parquet as pq

    return pq.read_table(partition.attributes)


class AttributeFiles:
    """`attributes-<split>-00000.parquet` of a corpus, written a run of rows at a time."""

    def __init__(self, out: Path, splits: Sequence[str]) -> None:
        self.paths = [out / f"attributes-{split}-00000.parquet" for split in splits]
        self.files: list[Any] = [None] * len(splits)

    def add(self, split: int, table: Any) -> None:
        """Rows of a split, all columns."""
        import pyarrow.parquet as pq

        if self.files[split] is None:
            self.files[split] = pq.ParquetWriter(
                self.paths[split], table.schema, compression="zstd", store_schema=False
            )
        self.files[split].write_table(table, row_group_size=ROW_GROUP)

    def close(self) -> None:
        """End the files; a split without rows has none."""
        for file in self.files:
            if file is not None:
                file.close()
