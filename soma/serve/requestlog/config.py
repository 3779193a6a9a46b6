"""What of the requests is kept: the block `request_log` of the gateway's file, `--request-log…` of `soma serve`."""

from pathlib import Path
from typing import Any

from pydantic import Field

from soma.base.errors import UserError
from soma.serve.limits.config import Span, Strict


class RequestLogConfig(Strict):
    """Nothing is kept unless this is there."""

    folder: Path = Field(description="Where the files go; it is made.")
    sample: float = Field(1.0, ge=0, le=1, description="Share of requests that are kept. Those with feedback always.")
    redact: bool = Field(True, description="Replace personal data and secrets by their kind, as <email>.")
    rotate: Span = Field(60_000, ge=50, description="A file holds so much time at most; this may be lost by kill -9.")
    rotate_bytes: int = Field(32 << 20, ge=1 << 10, description="And so many bytes of text.")


def request_log_config(folder: str | Path | None, **options: Any) -> RequestLogConfig | None:
    """From options; None without a folder. Raises UserError."""
    if folder is None:
        return None
    try:
        return RequestLogConfig(folder=Path(folder), **options)
    except ValueError:
        raise UserError(f"request_log_sample {options.get('sample')}: expected a share from 0 to 1") from None
