"""Which of several engines gets a request: the one that has most of its prompt in the cache, unless that one is much
busier than another. Loads no torch.

The rule is that of SGLang's cache-aware router (cache_threshold 0.3, balance_rel_threshold 1.5), with two changes: the
engine that holds the prefix is compared with the idlest one, not the busiest, and its lead may be 8 requests, not 64:
ours stand behind one front, where a wrong guess costs one prefill and a long queue costs every request in it.
"""

from collections import OrderedDict
from collections.abc import Sequence

from soma.engine.blocks import chain_name

MATCHED = 0.3  # share of the prompt that an engine must hold to be preferred
LEAD, FACTOR = 8, 1.5  # it may have so many requests more than the idlest, or so many times its requests


class PrefixIndex:
    """What an engine's prefix cache should hold: names of full blocks, the longest unused forgotten first.

    A guess: the engine may have evicted a block that is named here, and frees what it holds only under pressure.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.names: OrderedDict[bytes, None] = OrderedDict()

    def match(self, chain: Sequence[bytes]) -> int:
        """How many blocks of a chain are there, from its start on."""
        for place, name in enumerate(chain):
            if name not in self.names:
                return place
        return len(chain)

    def add(self, chain: Sequence[bytes]) -> None:
        """Note that the engine computes these blocks. The last of a chain is forgotten before its first."""
        for name in reversed(chain):
            self.names[name] = None
            self.names.move_to_end(name)
        while len(self.names) > self.blocks:
            self.names.popitem(last=False)

    def clear(self) -> None:
        self.names.clear()


class Router:
    """Chooses among engines 0 to `len(blocks)` - 1. blocks: how many of `block_size` tokens each one's cache has."""

    def __init__(self, blocks: Sequence[int], block_size: int) -> None:
        self.block_size = block_size
        self.indexes = [PrefixIndex(each) for each in blocks]

    def chain(self, tokens: Sequence[int], salt: bytes = b"") -> list[bytes]:
        """Names of the full blocks of a text, as the engine names them."""
        names, before, size = [], salt, self.block_size
        for start in range(0, len(tokens) - size + 1, size):
            before = chain_name(before, tokens[start : start + size])
            names.append(before)
        return names

    def choose(self, chain: Sequence[bytes], loads: Sequence[float | None]) -> int:
        """The engine for a prompt. loads: open requests of each, None where it takes none; one at least must."""
        open_ = {engine: load for engine, load in enumerate(loads) if load is not None}
        least = min(open_.values())
        matches = {engine: self.indexes[engine].match(chain) for engine in open_}
        best = max(open_, key=lambda engine: (matches[engine], -open_[engine]))
        is_much_busier = open_[best] - least > LEAD and open_[best] > FACTOR * least
        if matches[best] > MATCHED * len(chain) and not is_much_busier:
            return best
        # Of those that are equally idle, the one whose cache holds least.
        return min(open_, key=lambda engine: (open_[engine], len(self.indexes[engine].names), engine))

    def add(self, engine: int, chain: Sequence[bytes]) -> None:
        """Note that an engine computes these blocks."""
        self.indexes[engine].add(chain)

    def forget(self, engine: int) -> None:
        """The engine was started anew: its cache is empty."""
        self.indexes[engine].clear()
