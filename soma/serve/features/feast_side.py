"""What runs in Feast's own environment, as a program: it imports nothing of Soma.

apply REPO            register what the repository's Python files define
describe REPO         the registered feature views as JSON, on standard output
write REPO FOLDER     FOLDER/VIEW.parquet into the online store, for every view there
serve REPO PORT       the feature server on loopback; ends when its standard input does
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any


def apply(repo: Path) -> None:
    """As `feast apply`."""
    from feast.repo_config import load_repo_config
    from feast.repo_operations import apply_total

    sys.path.insert(0, str(repo))  # Feast imports the files of the repository by name
    os.chdir(repo)
    apply_total(load_repo_config(repo, repo / "feature_store.yaml"), repo, skip_source_validation=False)


def describe(repo: Path) -> list[dict[str, Any]]:
    """What a join needs to know of every view."""
    from feast import FeatureStore

    store = FeatureStore(str(repo))
    keys = {entity.name: entity.join_key for entity in store.list_entities()}
    found = []
    for view in store.list_feature_views():
        source = view.batch_source
        found.append({
            "name": view.name, "keys": [keys[name] for name in view.entities if name in keys],
            "features": [field.name for field in view.features], "event_time": source.timestamp_field,
            "created_time": source.created_timestamp_column or None,
            "ttl": view.ttl.total_seconds() if view.ttl else None, "online": view.online,
            "path": getattr(source, "path", None), "mapped": bool(source.field_mapping),
        })  # fmt: skip
    return found


def write(repo: Path, folder: Path) -> None:
    """Rows, one for each key, into the online store."""
    import pandas as pd
    from feast import FeatureStore

    store = FeatureStore(str(repo))
    for file in sorted(folder.glob("*.parquet")):
        rows = pd.read_parquet(file)
        if len(rows):
            store.write_to_online_store(file.stem, rows, transform_on_write=False)


def serve(repo: Path, port: int) -> None:
    """Feast's feature server in one process, until the standard input ends or SIGTERM comes."""
    import uvicorn
    from feast import FeatureStore
    from feast.feature_server import get_app

    def watch() -> None:
        sys.stdin.buffer.read()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    app = get_app(FeatureStore(str(repo)))
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


def main(command: str, repo: str, *more: str) -> None:
    """One of the above."""
    folder = Path(repo).resolve()
    if command == "apply":
        apply(folder)
    elif command == "describe":
        json.dump(describe(folder), sys.stdout)
    elif command == "write":
        write(folder, Path(more[0]))
    else:
        serve(folder, int(more[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
