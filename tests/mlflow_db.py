"""An empty MLflow database for a test: making its tables takes seconds, copying it does not."""

import functools
import shutil
import tempfile
from pathlib import Path

from soma.base.registry import mlflow_client


@functools.cache
def _template() -> Path:
    path = Path(tempfile.mkdtemp(prefix="soma-tests-")) / "mlflow.db"
    mlflow_client(f"sqlite:///{path}").search_experiments(max_results=1)
    return path


def empty_database(path: Path) -> str:
    """Put an empty database at `path`; its URI."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(_template(), path)
    return f"sqlite:///{path}"
