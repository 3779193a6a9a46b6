"""`soma doctor`, `soma runs`."""

from pathlib import Path
from typing import Annotated

import typer

runs_app = typer.Typer(no_args_is_help=True, help="List, compare and prune runs.")
RunsFolder = Annotated[Path, typer.Option("--runs", help="Folder of runs and artefacts.", envvar="SOMA_RUNS")]
