"""Blocks of the key/value cache: who uses them, and what full ones hold, so that equal beginnings are computed once.

A block holds the keys and values of `block_size` tokens in every layer. One that is full is named by a hash over its
tokens and everything before them, so equal names mean equal content. Blocks that nobody uses keep their content until
they are needed for something else, the longest unused first (paged attention, arXiv:2309.06180; the hash chain as in
vLLM). Loads no torch.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b


def chain_name(before: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a full block of `tokens` behind the block named `before` (of the first block: any salt)."""
    return blake2b(before + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockPool:
    """`num_blocks` blocks with reference counts. A block is used (count above 0), idle (named, count 0) or empty."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = True) -> None:
        assert num_blocks > 0
        assert block_size > 0
        assert block_size & (block_size - 1) == 0, "a power of two"
        self.num_blocks, self.block_size, self.prefix_cache = num_blocks, block_size, prefix_cache
        self.references = [0] * num_blocks
        self.name_of: list[bytes | None] = [None] * num_blocks
        self.named: dict[bytes, int] = {}
        self.empty = list(range(num_blocks - 1, -1, -1))
        self.idle: OrderedDict[int, None] = OrderedDict()  # longest unused first

    @property
    def available(self) -> int:
        """Blocks that can be taken."""
        return len(self.empty) + len(self.idle)

    @property
    def used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - self.available

    def blocks_for(self, tokens: int) -> int:
        """Blocks that so many tokens fill or begin."""
        return -(-tokens // self.block_size)

    def take(self) -> int | None:
        """A block for new content, held once; None if all are used."""
        if self.empty:
            block = self.empty.pop()
        elif self.idle:
            block, _ = self.idle.popitem(last=False)
            self._forget(block)
        else:
            return None
        self.references[block] = 1
        return block

    def find(self, name: bytes) -> int | None:
        """The block of that name, held once more; None if there is none."""
        block = self.named.get(name)
        if block is None:
            return None
        if self.references[block] == 0:
            del self.idle[block]
        self.references[block] += 1
        return block

    def publish(self, block: int, name: bytes) -> None:
        """Name a full block so that others find it. Its content must not change from now on."""
        assert self.references[block] > 0
        if self.prefix_cache and name not in self.named and self.name_of[block] is None:
            self.named[name], self.name_of[block] = block, name

    def release(self, block: int) -> None:
        """Hold a block once less. Release the last block of a text first: it is then given away first."""
        assert self.references[block] > 0
        self.references[block] -= 1
        if self.references[block] == 0:
            if self.name_of[block] is None:
                self.empty.append(block)
            else:
                self.idle[block] = None

    def clear(self) -> None:
        """Forget what blocks hold: nothing computed until now is found any more."""
        self.empty.extend(self.idle)
        self.idle.clear()
        self.named.clear()
        self.name_of = [None] * self.num_blocks

    def _forget(self, block: int) -> None:
        name = self.name_of[block]
        assert name is not None
        del self.named[name]
        self.name_of[block] = None
