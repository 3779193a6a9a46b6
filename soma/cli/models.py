"""`soma chat`, `soma serve`."""

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, hf:ID or registry:NAME@VERSION.")]
