"""Scheduler and blocks under random arrivals, cancellations and memory pressure: nothing leaks, nothing is shared
wrongly, nobody starves, every sequence ends. No model: a block's content is what the texts say it must be."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soma.engine import scheduler as scheduler_module
from soma.engine.blocks import BlockPool, chain_name
from soma.engine.scheduler import PATIENCE, TURN, Scheduler, Sequence, Work

SIZE = 4
WRONG = -1  # a drafted token that is not what the text says


@dataclass
class World:
    """A scheduler on a pretended cache: `content[block][place]` is the text up to that token, as it was written."""

    scheduler: Scheduler[Sequence]
    content: dict[tuple[int, int], tuple[bytes, tuple[int, ...]]] = field(default_factory=dict)
    ends: dict[Sequence, int] = field(default_factory=dict)  # texts' final lengths
    finished: list[Sequence] = field(default_factory=list)
    steps: int = 0
    clock: float = 0.0
    draft: int = 0  # tokens that are drafted for each sequence that has caught up, half of them right
    confirmed: int = 0

    @property
    def live(self) -> list[Sequence]:
        return [*self.scheduler.running, *self.scheduler.waiting]

    def add(self, tokens: list[int], answer: int, **more: object) -> Sequence:
        sequence = Sequence(tokens, **more)  # type: ignore[arg-type]
        self.ends[sequence] = len(tokens) + answer
        self.scheduler.add(sequence, self.clock)
        return sequence

    def step(self) -> list[Work[Sequence]]:
        had = bool(self.live)
        for sequence in self.scheduler.running:
            sequence.num_draft = min(self.draft, self.ends[sequence] - sequence.wanted - 1)
            if sequence.wanted - sequence.computed > 1 or sequence.num_draft < 0:
                sequence.num_draft = 0
        plan = self.scheduler.schedule(self.clock)
        assert bool(plan) == had, "a step does something as long as there is something to do"
        assert sum(work.count for work in plan) <= self.scheduler.step_tokens
        for work in plan:
            sequence = work.sequence
            next_ = [place % 7 for place in range(sequence.wanted, sequence.wanted + work.drafted)]
            right = (self.steps + work.drafted) % (work.drafted + 1)
            sequence.draft = [*next_[:right], *([WRONG] * (work.drafted - right))]
            self.compute(*work)
        self.check()
        drafted = {work.sequence: work.drafted for work in plan}
        caught_up = {work.sequence for work in plan if work.is_last}
        self.scheduler.commit(plan)
        self.check()
        for sequence in drafted:
            if sequence in caught_up:
                sequence.scored = sequence.prompt_length
                if sequence.wanted == self.ends[sequence]:
                    self.finish(sequence)
                else:
                    self.answer(sequence, drafted[sequence])
        self.check()
        self.steps += 1
        self.clock += 0.1
        return plan

    def answer(self, sequence: Sequence, drafted: int) -> None:
        """The next token; with a draft those of it that are right, and the one behind them."""
        right = [token == (sequence.wanted + i) % 7 for i, token in enumerate(sequence.draft)]
        accepted = right.index(False) if False in right else drafted
        for _ in range(accepted + 1):
            sequence.tokens.append(len(sequence.tokens) % 7)
        sequence.draft = []
        if drafted:
            self.scheduler.confirm(sequence, accepted)
            self.confirmed += accepted

    def compute(self, sequence: Sequence, start: int, count: int) -> None:
        """Each token reads what its window shows before it and writes itself."""
        window = self.scheduler.window or 10**9
        for block in set(sequence.table[start // SIZE : (start + count - 1) // SIZE + 1]):
            assert self.scheduler.pool.references[block] == 1, "a block that is written has one owner"
            assert self.scheduler.pool.name_of[block] is None, "a block that is written has no name"
        for place in range(start, start + count):
            mine = (sequence.salt, tuple((sequence.tokens + sequence.draft)[: place + 1]))
            self.content[sequence.table[place // SIZE], place % SIZE] = mine
        for place in range(max(0, start - window + 1), start + count):
            salt, text = self.content[sequence.table[place // SIZE], place % SIZE]
            assert salt == sequence.salt, "a block of another salt"
            assert text == tuple((sequence.tokens + sequence.draft)[: place + 1]), "a block with another text"

    def finish(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        self.finished.append(sequence)
        self.check()

    def check(self) -> None:
        """Reference counts are exactly the tables' entries, and every block is used, idle or empty."""
        pool = self.scheduler.pool
        counts = [0] * pool.num_blocks
        for sequence in self.live:
            for block in sequence.table[sequence.first_block :]:
                counts[block] += 1
        assert counts == pool.references
        free = [*pool.idle, *pool.empty]
        assert len(free) == len(set(free)) == pool.available
        assert all(counts[block] == 0 for block in free)
        assert pool.used == sum(count > 0 for count in counts)
        assert {pool.named[name] for name in pool.named} == {b for b, name in enumerate(pool.name_of) if name}
        assert all(not sequence.table for sequence in self.scheduler.waiting)
        for name, block in pool.named.items():  # what is found under a name was verified
            assert all(WRONG not in self.content[block, place][1] for place in range(SIZE)), name
        assert len(self.scheduler.running) <= self.scheduler.max_running
        assert set(self.scheduler.spent) == {sequence.key for sequence in self.live}


def world(blocks: int = 16, *, prefix_cache: bool = True, **options: object) -> World:
    options = {"max_running": 4, "step_tokens": 12, **options}
    return World(Scheduler(BlockPool(blocks, SIZE, prefix_cache=prefix_cache), **options))  # type: ignore[arg-type]


PROMPT = st.tuples(st.integers(0, 2), st.integers(1, 40))  # which text, how much of it: many share beginnings
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), PROMPT, st.integers(0, 20), st.integers(-1, 2), st.integers(0, 2), st.booleans(),
                  st.sampled_from([None, None, 0.3, 20.0])),
        st.tuples(st.just("cancel"), st.integers(0, 100)),
        st.tuples(st.just("step"), st.integers(1, 4)),
        st.tuples(st.just("wait"), st.floats(0, 30)),
    ),
    max_size=60,
)  # fmt: skip
TEXTS = [[(place * place + which) % 7 for place in range(100)] for which in range(3)]


def play(made: World, actions: list[tuple]) -> None:  # type: ignore[type-arg]
    for action, *given_ in actions:
        if action == "add":
            (which, length), answer, priority, key, needs, time_left = given_
            made.add(
                TEXTS[which][:length], answer, priority=priority, key=str(key), needs_prompt_logits=needs,
                salt=b"x" if which == 2 else b"", deadline=None if time_left is None else made.clock + time_left,
            )  # fmt: skip
        elif action == "cancel" and made.live:
            made.finish(made.live[given_[0] % len(made.live)])
        elif action == "step":
            for _ in range(given_[0]):
                made.step()
                for late in made.scheduler.expired(made.clock):
                    made.finish(late)
        elif action == "wait":
            made.clock += given_[0]


@settings(max_examples=150, deadline=None)
@given(
    actions=ACTIONS, blocks=st.integers(16, 40), prefix_cache=st.booleans(), chunk=st.sampled_from([None, 1, 3, 8]),
    window=st.sampled_from([None, None, 5, 9]), draft=st.sampled_from([0, 0, 1, 3, 6]),
)  # fmt: skip
def test_nothing_leaks_and_everything_ends(
    actions: list[tuple],
    blocks: int,
    prefix_cache: bool,
    chunk: int | None,
    window: int | None,  # type: ignore[type-arg]
    draft: int,
) -> None:
    made = world(blocks, prefix_cache=prefix_cache, prefill_chunk=chunk, window=window)
    made.draft = draft
    play(made, actions)
    todo = sum(made.ends[sequence] for sequence in made.live)
    for _ in range(20 * todo + 100):
        made.step()
        if not made.live:
            break
    assert not made.live, "every sequence ends"
    assert set(made.finished) == set(made.ends)
    assert made.scheduler.pool.used == 0
    assert made.scheduler.pool.available == blocks
    assert made.scheduler.spent == {}


def spoil_names(pool: BlockPool) -> None:
    """Every block of the same length of text has the same name, whatever the text."""


@pytest.mark.parametrize("fault", ["leak", "names", "window", "early release"])
def test_the_checks_see_faults(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls: each of these must fail somewhere in a hundred random plays."""
    if fault == "leak":
        monkeypatch.setattr(BlockPool, "release", lambda pool, block: None)
    elif fault == "names":
        monkeypatch.setattr(scheduler_module, "chain_name", lambda before, tokens: chain_name(b"", tokens[:1]))
    elif fault == "early release":
        real = BlockPool.find

        def find(pool: BlockPool, name: bytes) -> int | None:  # forgets to count
            block = real(pool, name)
            if block is not None:
                pool.release(block)
            return block

        monkeypatch.setattr(BlockPool, "find", find)
    draw = random.Random(0)

    def run() -> None:
        for _ in range(100):
            made = world(16, window=9 if fault == "window" else None)
            if fault == "window":  # gives back one block too early
                leave: Callable[[Sequence], None] = made.scheduler._leave_window
                made.scheduler.window = 5

                def wrong(sequence: Sequence, made: World = made, leave: Callable[[Sequence], None] = leave) -> None:
                    made.scheduler.window = 5
                    leave(sequence)
                    made.scheduler.window = 9

                monkeypatch.setattr(made.scheduler, "_leave_window", wrong)
            for _ in range(20):
                made.add(TEXTS[draw.randrange(3)][: draw.randrange(1, 40)], draw.randrange(20))
                made.step()
            while made.live and made.steps < 1000:
                made.step()

    with pytest.raises(AssertionError):
        run()


def test_drafts_take_only_what_is_spare() -> None:
    """Drafts come after everybody's next token and before prompts; they take blocks from nobody."""
    made = world(100, max_running=4, step_tokens=12)
    made.draft = 6
    decoding = [made.add([which], 40) for which in range(3)]
    made.step()
    counts = {work.sequence: work.count for work in made.step()}
    assert [counts[sequence] for sequence in decoding] == [1 + 6, 1 + 2, 1]  # 12 tokens less 4 places are spare
    while made.live:
        made.step()
    assert made.confirmed > 20
    tight = world(6, max_running=2, step_tokens=12, prefix_cache=False)
    tight.draft = 6
    tight.add([1] * 4, 18)
    tight.add([2] * 4, 18)
    while tight.live:
        tight.step()
    assert tight.scheduler.preemptions >= 1
    plain = world(6, max_running=2, step_tokens=12, prefix_cache=False)
    plain.add([1] * 4, 18)
    plain.add([2] * 4, 18)
    while plain.live:
        plain.step()
    assert tight.scheduler.preemptions <= plain.scheduler.preemptions


def test_unverified_tokens_are_never_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: if a step's drafts counted as computed at once, the checks would see it."""
    monkeypatch.setattr(Work, "drafted", property(lambda work: 0))
    made = world(100, max_running=4, step_tokens=12)
    sequence = made.add([1], 40)
    made.step()
    sequence.num_draft, sequence.draft = 6, [WRONG] * 6
    plan = made.scheduler.schedule()
    made.compute(*plan[0])
    made.scheduler.commit(plan)
    with pytest.raises(AssertionError):
        made.check()


def test_decoding_never_waits_for_prompts() -> None:
    made = world(200, max_running=4, step_tokens=12)
    decoding = [made.add([which], 30) for which in range(2)]
    made.step()
    long = made.add(list(range(90)), 1)
    while long.computed < 90:
        plan = {work.sequence: work.count for work in made.step()}
        assert [plan[sequence] for sequence in decoding] == [1, 1]
        assert plan[long] <= 10


def test_equal_prompts_are_computed_once() -> None:
    """Four equal prompts in one step: their full blocks are computed by one of them, also with chunks."""
    made = world(100, max_running=8, step_tokens=16)
    prompt = list(range(30))  # seven full blocks and two tokens
    sequences = [made.add(prompt, 3) for _ in range(4)]
    total = 0
    while any(sequence.computed < 30 for sequence in sequences if sequence in made.ends) and made.live:
        total += sum(min(count, 30 - start) for _, start, count in made.step() if start < 30)
    assert total == 28 + 4 * 2
    assert made.scheduler.prefix_queries == 4 * 30
    assert made.scheduler.prefix_hits == 3 * 28
    tables = [made.add(prompt, 1) for _ in range(2)]
    made.step()
    assert tables[0].table[:7] == tables[1].table[:7]
    assert tables[0].table[7] != tables[1].table[7]


def test_without_a_prefix_cache_each_computes_its_own() -> None:
    made = world(100, prefix_cache=False, max_running=8, step_tokens=16)
    for _ in range(4):
        made.add(list(range(30)), 0)
    total = 0
    while made.live:
        total += sum(work.count for work in made.step())
    assert total == 4 * 30
    assert made.scheduler.prefix_hits == 0


def test_the_longest_unused_goes_first() -> None:
    made = world(16, max_running=1)
    first, second = list(range(24)), list(range(50, 74))
    for prompt in (first, second):
        made.add(prompt, 0)
        while made.live:
            made.step()
    made.add(list(range(100, 140)), 0)  # 10 blocks: the 4 that are empty, and 6 of the first text
    while made.live:
        made.step()
    hits = made.scheduler.prefix_hits
    made.add(second, 0)
    while made.live:
        made.step()
    assert made.scheduler.prefix_hits - hits == 20
    made.add(first, 0)
    while made.live:
        made.step()
    assert made.scheduler.prefix_hits - hits == 20


def test_a_preempted_sequence_goes_on_where_it_was() -> None:
    made = world(16, max_running=2, prefix_cache=False)
    first, second = made.add([1] * 20, 40), made.add([2] * 20, 40)
    while first in made.live:
        made.step()
    assert made.scheduler.preemptions >= 1
    assert (first.preemptions, second.preemptions >= 1) == (0, True)
    while made.live:
        made.step()
    assert second.wanted == 60


def test_urgent_first_but_nobody_waits_for_ever() -> None:
    made = world(100, max_running=1)
    made.add([1], 2)
    made.step()
    low = made.add([2], 0, priority=5)
    urgent = made.add([3], 0)
    while low in made.live and urgent in made.live:
        made.step()
    assert made.finished[-1] is urgent

    low = made.add([2], 0, priority=5)
    for _ in range(int(5 * PATIENCE * 10) + 20):  # a stream of urgent ones that never ends
        if low not in made.live:
            break
        made.add([3], 0)
        made.step()
    assert low in made.finished


def test_keys_share_alike() -> None:
    """One key with a hundred requests and one with a few that come later: half of the tokens each."""
    made = world(400, max_running=2, step_tokens=8, prefix_cache=False)
    for which in range(40):
        made.add([which] * 20, 0, key="many")
    for _ in range(10):
        made.step()
    few = [made.add([99] * 20, 0, key="few") for _ in range(5)]
    before = len(made.finished)
    while any(sequence in made.live for sequence in few):
        made.step()
    others = len(made.finished) - before - len(few)
    assert others <= len(few) + 3


def test_long_prompts_take_turns() -> None:
    made = World(Scheduler(BlockPool(4000, SIZE), max_running=4, step_tokens=600))
    long = made.add([1] * 6000, 0)
    made.scheduler.commit(made.scheduler.schedule())
    short = made.add([2] * 1000, 0)
    steps = 0
    while short.computed < 1000:
        made.scheduler.commit(made.scheduler.schedule())
        steps += 1
    assert long.computed < TURN + 3 * 600
    assert steps < 8


def test_windows_bound_the_blocks() -> None:
    made = world(10, max_running=1, step_tokens=9, window=8)
    made.add(list(range(200)), 100)
    most = 0
    while made.live:
        made.step()
        most = max(most, made.scheduler.pool.used)
    assert made.finished
    assert most <= 8 // SIZE + 9 // SIZE + 3


def test_deadlines() -> None:
    made = world()
    late, kept = made.add([1], 5, deadline=1.0), made.add([2], 5, deadline=9.0)
    made.step()
    assert made.scheduler.expired(0.5) == []
    assert made.scheduler.expired(1.5) == [late]
    assert kept in made.live


def test_prompt_logits_need_the_prompt_computed() -> None:
    made = world(100, step_tokens=64)
    made.add(TEXTS[0][:32], 0)
    made.step()
    made.add(TEXTS[0][:32], 0, needs_prompt_logits=True)
    assert [(work.start, work.count) for work in made.step()] == [(0, 32)]
    made.add(TEXTS[0][:32], 0)
    assert [(work.start, work.count) for work in made.step()] == [(28, 4)]


def test_clearing_forgets_what_was_computed() -> None:
    made = world(100, step_tokens=64)
    made.add(TEXTS[0][:32], 0)
    made.step()
    made.scheduler.pool.clear()
    made.check()
    made.add(TEXTS[0][:32], 0)
    assert [(work.start, work.count) for work in made.step()] == [(0, 32)]
