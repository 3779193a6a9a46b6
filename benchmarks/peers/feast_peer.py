"""Runs in Feast's environment: for every line on standard input one join of the questions; seconds, rows and how many
of them have the value of the file `expected.parquet` on standard output."""

import json
import sys
import time
from datetime import timedelta
from pathlib import Path

import pandas as pd
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.types import Int64


def main() -> None:
    folder = Path(sys.argv[1])
    (folder / "feature_store.yaml").write_text(
        "project: p\nprovider: local\nregistry: registry.db\noffline_store: {type: file}\nonline_store: null\n"
        "entity_key_serialization_version: 3\n"
    )
    store = FeatureStore(str(folder))
    key = Entity(name="key", join_keys=["key"], value_type=ValueType.INT64)
    source = FileSource(name="s", path=str(folder / "rows.parquet"), timestamp_field="event",
                        created_timestamp_column="created")  # fmt: skip
    view = FeatureView(name="v", entities=[key], ttl=timedelta(0), schema=[Field(name="x", dtype=Int64)], source=source)
    store.apply([key, source, view])
    questions = pd.read_parquet(folder / "questions.parquet")
    expected = pd.read_parquet(folder / "expected.parquet").set_index("id")["x"]
    for _ in sys.stdin:
        began = time.perf_counter()
        made = store.get_historical_features(questions, features=["v:x"], filter_by_created_timestamp=True).to_df()
        seconds = time.perf_counter() - began
        right = int((made.set_index("id")["x"] == expected.loc[made["id"]]).sum())
        print(json.dumps({"seconds": seconds, "rows": len(made), "right": right}), flush=True)


main()
