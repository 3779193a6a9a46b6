"""Runs in Feast's environment: cases as JSON lines on standard input, what Feast's own join and materialization make of
each on standard output. Times are days since 2020."""

import json
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.types import Int64

START = pd.Timestamp("2020-01-01", tz="UTC")


def day(number: int) -> Any:
    return START + pd.Timedelta(days=number)


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    (folder / "feature_store.yaml").write_text(
        "project: p\nprovider: local\nregistry: registry.db\noffline_store: {type: file}\n"
        f"online_store: {{type: sqlite, path: {folder}/online.db}}\nentity_key_serialization_version: 3\n"
    )
    rows_file = folder / "rows.parquet"
    store = FeatureStore(str(folder))
    key = Entity(name="key", join_keys=["key"], value_type=ValueType.STRING)
    source = FileSource(name="s", path=str(rows_file), timestamp_field="event", created_timestamp_column="created")
    view = FeatureView(name="v", entities=[key], ttl=timedelta(0), schema=[Field(name="x", dtype=Int64)], source=source)
    pd.DataFrame({"key": ["a"], "event": [day(0)], "created": [day(0)], "x": [0]}).to_parquet(rows_file)
    store.apply([key, source, view])
    for line in sys.stdin:
        case = json.loads(line)
        table = pd.DataFrame(case["rows"], columns=["key", "event", "created"])
        table["x"] = range(len(table))
        table["event"], table["created"] = table["event"].map(day), table["created"].map(day)
        table.to_parquet(rows_file)
        asked = pd.DataFrame(case["asked"], columns=["key", "event_timestamp"])
        asked["id"] = range(len(asked))
        asked["event_timestamp"] = asked["event_timestamp"].map(day)
        made: dict[str, Any] = {}
        for name, cutoff in (("plain", False), ("cutoff", True)):
            frame = store.get_historical_features(asked, features=["v:x"], filter_by_created_timestamp=cutoff).to_df()
            made[name] = [
                [int(i), None if pd.isna(x) else int(x)] for i, x in zip(frame["id"], frame["x"], strict=True)
            ]
        print(json.dumps(made), flush=True)


main()
