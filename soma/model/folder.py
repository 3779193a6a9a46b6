"""Where a model reference lies on this machine. Loads no torch."""

from pathlib import Path

from soma.base.errors import UserError


def local_folder(ref: str | Path) -> Path:
    """The local folder of a model reference: a folder as it is, `hf:…`, `registry:…` and URLs fetched.

    Raises UserError if there is no such folder.
    """
    path = Path(ref)
    if path.is_dir():
        return path
    if isinstance(ref, str) and ":" in ref:
        from soma.base.fetch import fetch

        return fetch(ref, kind="model")
    raise UserError(f"{ref}: no such model folder (a folder, hf:ORGANISATION/NAME or registry:NAME@VERSION)")
