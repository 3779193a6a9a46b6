"""Routing between engines: to the cached prefix, but never at the price of a long queue."""

import random
from collections import deque

import pytest

from soma.engine.blocks import BlockPool, chain_name
from soma.engine.router import FACTOR, LEAD, PrefixIndex, Router
from soma.engine.scheduler import Scheduler, Sequence

SIZE = 16


def text(draw: random.Random, length: int) -> list[int]:
    return [draw.randrange(1000) for _ in range(length)]


def test_names_are_those_of_the_engine() -> None:
    tokens = text(random.Random(0), 70)
    sequence = Sequence(tokens, salt=b"adapter")
    scheduler: Scheduler[Sequence] = Scheduler(BlockPool(8, SIZE), max_running=1, step_tokens=8)
    names = Router([1], SIZE).chain(tokens, b"adapter")
    assert names == [scheduler._name(sequence, block) for block in range(4)]
    assert names[0] == chain_name(b"adapter", tokens[:SIZE])
    assert Router([1], SIZE).chain(tokens[:15]) == []


def test_the_index_forgets_the_longest_unused_and_ends_before_beginnings() -> None:
    index = PrefixIndex(4)
    index.add([b"a", b"b", b"c"])
    index.add([b"x", b"y"])
    assert index.match([b"a", b"b", b"c"]) == 2  # c made room
    assert index.match([b"x", b"y", b"z"]) == 2
    assert index.match([b"b"]) == 1
    index.add([b"a"])  # used again
    index.add([b"m", b"n"])
    assert index.match([b"a", b"b"]) == 1
    index.clear()
    assert index.match([b"a"]) == 0


def test_the_rule() -> None:
    router = Router([100, 100, 100], 1)
    chain = [bytes([n]) for n in range(10)]
    router.add(1, chain[:4])
    assert router.choose(chain, [0, 0, 0]) == 1
    assert router.choose(chain, [0, LEAD, 5]) == 1  # busier, but not much
    assert router.choose(chain, [0, LEAD + 1, 5]) == 0
    assert router.choose(chain, [30, 44, 30]) == 1  # within the factor
    assert router.choose(chain, [30, 46, 31]) == 0
    assert router.choose(chain, [5, None, 4]) == 2  # it is not there
    router.add(2, chain[:6])
    assert router.choose(chain, [0, 0, 0]) == 2  # the longest
    assert router.choose([*chain[:3], b"q"], [0, 1, 1]) == 1  # of equals the idlest, then the first
    assert router.choose([*chain[:3], *(b"%d" % n for n in range(8))], [0, 1, 1]) == 0  # too little of it is there
    router.forget(2)
    assert router.choose(chain, [0, 0, 0]) == 1
    router.add(0, [b"w"])
    assert router.choose([], [1, 1, 1]) == 2  # of equally idle ones the emptiest cache


class Engine:
    """A stand-in that answers one request per `service` ticks and keeps an exact prefix cache."""

    def __init__(self, blocks: int) -> None:
        self.queue: deque[int] = deque()
        self.cache = PrefixIndex(blocks)
        self.asked = self.hits = 0

    def take(self, chain: list[bytes], work: int) -> None:
        self.asked += len(chain)
        self.hits += self.cache.match(chain)
        self.cache.add(chain)
        self.queue.append(work)

    def tick(self) -> None:
        for place in range(min(4, len(self.queue))):  # four at once
            self.queue[place] -= 1
        self.queue = deque(work for work in self.queue if work > 0)


def traffic(seed: int, skew: float) -> tuple[dict[str, float], dict[str, int]]:
    """Conversations over a few system prompts through three engines: hit rate and largest lead, by policy."""
    rates, leads = {}, {}
    for policy in ("router", "random"):
        draw = random.Random(seed)
        engines, router = [Engine(400) for _ in range(3)], Router([400] * 3, SIZE)
        systems = [text(draw, 20 * SIZE) for _ in range(9)]
        weights = [skew**-rank for rank in range(9)]
        talks = [draw.choices(systems, weights)[0] + text(draw, 10) for _ in range(60)]
        lead = 0
        for _ in range(1500):
            for _ in range(draw.choice([0, 0, 1, 3])):
                talk = draw.randrange(len(talks))
                talks[talk] = talks[talk] + text(draw, draw.randrange(5, 40))
                chain = router.chain(talks[talk])
                loads = [len(engine.queue) for engine in engines]
                chosen = router.choose(chain, loads) if policy == "router" else draw.randrange(3)
                router.add(chosen, chain)
                engines[chosen].take(chain, draw.randrange(2, 12))
                if len(talks[talk]) > 60 * SIZE:
                    talks[talk] = draw.choices(systems, weights)[0] + text(draw, 10)
                loads = [len(engine.queue) for engine in engines]
                if max(loads) > FACTOR * min(loads):
                    lead = max(lead, max(loads) - min(loads))
            for engine in engines:
                engine.tick()
        rates[policy] = sum(engine.hits for engine in engines) / sum(engine.asked for engine in engines)
        leads[policy] = lead
    return rates, leads


@pytest.mark.parametrize("skew", [1.0, 1.5, 4.0])
@pytest.mark.parametrize("seed", [1, 2])
def test_random_traffic(seed: int, skew: float) -> None:
    """More hits than at random, and no engine runs away from the others, however skewed the prompts are."""
    rates, leads = traffic(seed, skew)
    assert rates["router"] > rates["random"] + 0.05, rates
    assert leads["router"] <= LEAD + 2, leads
