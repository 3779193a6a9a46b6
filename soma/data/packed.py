"""What each way of packing does to a split, as a table."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from soma.base.secrets import URL
from soma.data.config import StreamConfig
from soma.data.packing import Blocks, ConcatPacker, Packer, Waste, WholePacker, blocks_of, waste
from soma.data.store import TokenStore
from soma.data.streaming import StreamedStore


def wastes(store: TokenStore, length: int, buffers: Sequence[int] = ()) -> dict[str, Waste]:
    """Waste by way of packing: `concat`, `whole`, and `whole` in blocks of so many documents."""
    pairs = np.maximum(np.diff(store.starts) - int(store.masked), 0)

    def whole(documents: np.ndarray) -> Packer:
        return WholePacker(pairs[documents], length, cut_longer=not store.masked)

    found = {
        "concat": waste(
            Blocks(lambda one: ConcatPacker(pairs[one], length), *blocks_of(pairs, None, ()), length), pairs
        )
    }
    for buffer in (None, *buffers):
        name = "whole" if buffer is None else f"whole, {buffer:,} at a time"
        found[name] = waste(Blocks(whole, *blocks_of(pairs, buffer, ()), length), pairs)
    return found


def waste_table(tokens: str, split: str, length: int, buffers: Sequence[int] = ()) -> str:
    """A table for people; reads the offsets alone, of a folder or a URL."""
    store = (
        StreamedStore(tokens, split, StreamConfig())
        if URL.match(tokens)
        else TokenStore(Path(tokens), split, verify=False)
    )
    lines = [
        f"{store.documents:,} documents, {store.tokens:,} tokens, sequences of {length:,}",
        f"{'packing':<26}{'sequences':>11}{'padding':>10}{'cut':>10}{'needlessly':>12}{'left out':>10}",
    ]
    for name, one in wastes(store, length, buffers).items():
        shares = [f"{count / max(store.documents, 1):.2%}" for count in (one.cut, one.needless)]
        lines.append(
            f"{name:<26}{one.sequences:>11,}{one.padding:>10.3%}{shares[0]:>10}{shares[1]:>12}{one.left_out:>10,}"
        )
    return "\n".join(lines)
