"""Soma: raw text in, a trained, measured and served language model out."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soma.engine.engine import Engine as Engine
    from soma.engine.params import SamplingParams as SamplingParams
    from soma.serve.batching import batched as batched

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`soma.Engine`, `soma.SamplingParams` and `soma.batched`, imported when they are first asked for: `import soma`
    loads no torch."""
    if name == "Engine":
        from soma.engine.engine import Engine

        return Engine
    if name == "SamplingParams":
        from soma.engine.params import SamplingParams

        return SamplingParams
    if name == "batched":
        from soma.serve.batching import batched

        return batched
    raise AttributeError(f"module 'soma' has no attribute {name!r}")
