"""Who computes how much in the next step. Loads no torch.

One rule: a sequence has `computed` tokens in the cache and `wanted` ones, and each step spends a budget of tokens on
letting sequences catch up. A prompt, a chunk of it, the one token of a decode step, what the prefix cache already
holds, and what was lost to a preemption are all the same case. So is speculation: a sequence that catches up may
compute tokens of a draft too, if there is room to spare; they count as computed when they are confirmed.

The order: urgency first (a waiting sequence gains a class each `PATIENCE` seconds, up to the most urgent one there
is), then the key that got the fewest tokens so far (Sheng et al. 2024, arXiv:2401.00588), then first come, first
served, where a sequence that has used up `TURN` tokens of prompt goes behind the others.
"""

from array import array
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Tokens
from itertools import chain, count
from typing import Generic, NamedTuple, TypeVar

from soma.engine.blocks import BlockPool, chain_name

PATIENCE = 10.0
TURN = 2048


class Sequence:
    """What the scheduler knows of one sequence.

    tokens: the prompt and what was made of it so far. needs_prompt_logits: the logits of the whole prompt are wanted,
    so that it must be computed even where the prefix cache has it. priority: lower is more urgent. key: whose it is.
    deadline: seconds on the clock of `Scheduler.schedule`. salt: sequences of different salts share no blocks.
    """

    def __init__(
        self, tokens: Tokens[int], *, priority: int = 0, key: str = "", deadline: float | None = None,
        needs_prompt_logits: bool = False, salt: bytes = b"",
    ) -> None:  # fmt: skip
        self.tokens, self.prompt_length = list(tokens), len(tokens)
        self.priority, self.key, self.deadline, self.salt = priority, key, deadline, salt
        self.needs_prompt_logits = needs_prompt_logits
        self.pending = 0  # 1 while the last token is a placeholder for one that is being drawn
        self.num_draft = 0  # tokens of a draft to compute behind `tokens`, if there is room to spare
        self.draft: list[int] = []  # these, or fewer; not part of `tokens` before they are verified
        self.computed = 0  # tokens whose keys and values are in the cache
        self.scored = 0  # places of the prompt whose logits were taken
        self.table = array("i")  # its blocks; 0 for those before `first_block`, which left the window
        self.first_block = 0
        self.published = 0  # blocks that were named, or found under their name
        self.names: list[bytes] = []  # of its full blocks, as far as they were asked for
        self.arrived = 0.0
        self.number = -1  # order of arrival
        self.ticket = -1  # place in the order among those of its key
        self.turn = 0  # prompt tokens since it took its ticket
        self.preemptions = 0
        self.cached = 0  # tokens of the prompt that came from the prefix cache

    @property
    def wanted(self) -> int:
        return len(self.tokens)

    @property
    def adoptable(self) -> int:
        """Tokens that may come from the prefix cache: the last one must be computed, for its logits."""
        return min(self.scored, self.wanted - 1) if self.needs_prompt_logits else self.wanted - 1


S = TypeVar("S", bound=Sequence)


class Work(NamedTuple, Generic[S]):
    """One sequence's share of a step: `count` tokens from `start` on."""

    sequence: S
    start: int
    count: int  # type: ignore[assignment]  # a step has no use for tuple.count

    @property
    def is_last(self) -> bool:
        """Whether the sequence has caught up afterwards, so that its next token can be drawn."""
        return self.start + self.count >= self.sequence.wanted

    @property
    def drafted(self) -> int:
        """How many of the tokens are a draft's."""
        return max(0, self.start + self.count - self.sequence.wanted)


class Scheduler(Generic[S]):
    """Plans steps over one pool of blocks.

    max_running: sequences that hold blocks at once. step_tokens: tokens of a step, more than `max_running` so that
    each decoding sequence gets its token in each step. prefill_chunk: of one sequence in a step. window: if all
    layers have sliding windows, the widest of them: blocks that left it are given back.

    Use: `add`, then `schedule` → compute → `commit` → append tokens, and `confirm` those that were a draft, again and
    again; `remove` at any time between.
    """

    def __init__(
        self, pool: BlockPool, *, max_running: int, step_tokens: int, prefill_chunk: int | None = None,
        window: int | None = None,
    ) -> None:  # fmt: skip
        assert step_tokens > max_running > 0
        self.pool, self.max_running, self.step_tokens, self.window = pool, max_running, step_tokens, window
        self.prefill_chunk = prefill_chunk or step_tokens
        self.waiting: list[S] = []
        self.running: list[S] = []
        self.spent: dict[str, float] = {}  # tokens computed for each key that has sequences here
        self.members: Counter[str] = Counter()
        self.numbers, self.tickets = count(), count()
        self.prefix_queries = self.prefix_hits = self.preemptions = 0

    def add(self, sequence: S, now: float = 0.0) -> None:
        """Queue a sequence that fits into the pool alone."""
        if not self.members[sequence.key]:  # who was away does not save up
            self.spent[sequence.key] = min(self.spent.values(), default=0.0)
        self.members[sequence.key] += 1
        sequence.arrived, sequence.number, sequence.ticket = now, next(self.numbers), next(self.tickets)
        self.waiting.append(sequence)

    def remove(self, sequence: S) -> None:
        """Take a sequence out, finished or not, and free what it holds."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.waiting.remove(sequence)
        self.members[sequence.key] -= 1
        if not self.members[sequence.key]:
            del self.spent[sequence.key], self.members[sequence.key]

    def preempt(self, sequence: S) -> None:
        """Take all blocks from a running sequence. It waits, and computes again what the prefix cache does not keep."""
        self.preemptions += 1
        sequence.preemptions += 1
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.append(sequence)

    def expired(self, now: float) -> list[S]:
        """Those whose deadline has passed."""
        every = chain(self.running, self.waiting)
        return [sequence for sequence in every if sequence.deadline is not None and sequence.deadline < now]

    def schedule(self, now: float = 0.0) -> list[Work[S]]:
        """The next step: shares of at most `step_tokens` tokens in all. Empty only if there is nothing to do."""
        plan: list[Work[S]] = []
        self.planned: set[S] = set()
        self.in_step: set[bytes] = set()  # names of blocks that become full in this step
        budget, short = self.step_tokens, False
        self.spare = self.step_tokens - self.max_running  # for drafts: nobody's next token waits for them
        waiting = set(self.waiting)
        order = self._order([*self.running, *self.waiting], now)
        # Nobody's next token waits for prompts; among prompts, new ones take turns with those that are in.
        order.sort(key=lambda sequence: sequence in waiting or sequence.wanted - sequence.computed > 1)
        for sequence in order:
            if budget == 0:
                break
            if sequence in waiting:
                short = short or not self._admit(sequence)
                if short:
                    continue
            elif sequence not in self.running:  # preempted meanwhile
                continue
            share = self._share(sequence, budget)
            short |= share == 0 and sequence.computed < sequence.wanted and not self._waits(sequence)
            budget -= self._plan(plan, sequence, share)
        return plan

    def commit(self, plan: Iterable[Work[S]]) -> None:
        """The keys and values of a step are in the cache. Those of drafts are nothing yet: see `confirm`."""
        for work in plan:
            sequence, tokens = work.sequence, work.count - work.drafted
            assert sequence.computed == work.start
            self._advance(sequence, tokens)
            if tokens > 1:
                sequence.turn += tokens
                if sequence.turn >= TURN:
                    sequence.turn, sequence.ticket = 0, next(self.tickets)

    def confirm(self, sequence: S, tokens: int) -> None:
        """So many tokens of the draft were right, and have been appended to `tokens`."""
        assert sequence.computed + tokens < sequence.wanted
        self._advance(sequence, tokens)

    def _advance(self, sequence: S, tokens: int) -> None:
        sequence.computed += tokens
        self.spent[sequence.key] += tokens
        for block in range(sequence.published, sequence.computed // self.pool.block_size):
            self.pool.publish(sequence.table[block], self._name(sequence, block))
            sequence.published = block + 1
        self._leave_window(sequence)

    # Order:

    def _order(self, sequences: list[S], now: float) -> list[S]:
        best = min((sequence.priority for sequence in (*self.running, *self.waiting)), default=0)
        ahead: dict[tuple[int, str], int] = {}

        def rank(sequence: S) -> tuple[int, float, int]:
            level = max(best, sequence.priority - int((now - sequence.arrived) / PATIENCE))
            before = ahead.get((level, sequence.key), 0)
            ahead[level, sequence.key] = before + sequence.wanted - sequence.computed
            return level, self.spent[sequence.key] + before, sequence.ticket

        return sorted(sorted(sequences, key=lambda sequence: sequence.ticket), key=rank)

    # Shares:

    def _share(self, sequence: S, budget: int) -> int:
        """Tokens that a sequence can compute now, its blocks taken; those that others have computed are adopted."""
        self._count(sequence, self._adopt(sequence))
        if self._waits(sequence):
            return 0
        share = min(sequence.wanted - sequence.computed, budget, self.prefill_chunk)
        missing = self.pool.blocks_for(sequence.computed + share) - len(sequence.table)
        for _ in range(missing):
            block = self.pool.take()
            while block is None and self._preempt_for(sequence):
                block = self.pool.take()
            if block is None:
                break
            sequence.table.append(block)
        share = min(share, len(sequence.table) * self.pool.block_size - sequence.computed)
        if sequence.num_draft and sequence.computed + share == sequence.wanted:
            share += self._draft_share(sequence, min(sequence.num_draft, budget - share, self.spare))
        return share

    def _draft_share(self, sequence: S, most: int) -> int:
        """Tokens of a draft that fit behind `wanted`. Blocks are taken for them only while every running sequence
        could take one too, and from nobody."""
        missing = self.pool.blocks_for(sequence.wanted + most) - len(sequence.table)
        while missing > 0 and self.pool.available > len(self.running):
            block = self.pool.take()
            assert block is not None
            sequence.table.append(block)
            missing -= 1
        share = max(0, min(most, len(sequence.table) * self.pool.block_size - sequence.wanted))
        self.spare -= share
        return share

    def _plan(self, plan: list[Work[S]], sequence: S, share: int) -> int:
        if share:
            plan.append(Work(sequence, sequence.computed, share))
            self.planned.add(sequence)
            if self.pool.prefix_cache:
                size = self.pool.block_size
                known = min(sequence.computed + share, sequence.wanted - sequence.pending)  # a draft has no names
                ends = range(sequence.computed // size, known // size)
                self.in_step.update(self._name(sequence, block) for block in ends)
        return share

    def _adopt(self, sequence: S) -> int:
        """Take over the blocks that come next and that are in the prefix cache; their tokens."""
        size, found = self.pool.block_size, 0
        while self._may_adopt(sequence):
            block = self.pool.find(self._name(sequence, sequence.computed // size))
            if block is None:
                break
            sequence.table.append(block)
            sequence.computed += size
            sequence.published += 1
            found += size
        if found:
            self._leave_window(sequence)
        return found

    def _count(self, sequence: S, hits: int) -> None:
        if sequence.preemptions == 0:  # after that it finds what it has computed itself
            self.prefix_hits += hits
            sequence.cached += hits

    def _may_adopt(self, sequence: S) -> bool:
        size, computed = self.pool.block_size, sequence.computed
        return (
            self.pool.prefix_cache and computed + size <= sequence.adoptable and computed == len(sequence.table) * size
        )

    def _waits(self, sequence: S) -> bool:
        """Whether another sequence computes in this step what comes next: it can be adopted in the step after."""
        if not self.in_step or not self._may_adopt(sequence):
            return False
        return self._name(sequence, sequence.computed // self.pool.block_size) in self.in_step

    # Blocks:

    def _admit(self, sequence: S) -> bool:
        """Let a waiting sequence in if there is a place, and blocks for all that is in and one each to go on."""
        if len(self.running) == self.max_running:
            return False
        hits = self._adopt(sequence)
        promised = sum(self._ahead(other) for other in self.running)
        if self.running and promised + self._ahead(sequence) + len(self.running) > self.pool.available:
            self._release(sequence)
            return False
        self._count(sequence, hits)
        if sequence.preemptions == 0:
            self.prefix_queries += sequence.wanted
        self.waiting.remove(sequence)
        self.running.append(sequence)
        return True

    def _ahead(self, sequence: S) -> int:
        """Blocks that a sequence has still to take until it has caught up."""
        ahead = self.pool.blocks_for(sequence.wanted) - len(sequence.table)
        if self.window is not None:
            ahead = min(ahead, self.pool.blocks_for(self.window + self.prefill_chunk) + 1)
        return max(ahead, 0)

    def _preempt_for(self, sequence: S) -> bool:
        """Take all blocks from the running sequence that should come last, if it comes after `sequence`."""
        others = [other for other in self.running if other not in self.planned]
        victim = max(others, key=_standing, default=sequence)
        if _standing(victim) <= _standing(sequence):
            return False
        self.preempt(victim)
        return True

    def _release(self, sequence: S) -> None:
        for block in reversed(sequence.table[sequence.first_block :]):
            self.pool.release(block)
        sequence.table = array("i")
        sequence.computed = sequence.first_block = sequence.published = sequence.num_draft = 0

    def _leave_window(self, sequence: S) -> None:
        """Give back blocks of which the next token sees nothing: it sees the `window` last ones, itself included."""
        if self.window is None:
            return
        past = max(0, sequence.computed - self.window + 1) // self.pool.block_size
        for place in range(sequence.first_block, past):
            self.pool.release(sequence.table[place])
            sequence.table[place] = 0
        sequence.first_block = max(past, sequence.first_block)

    def _name(self, sequence: S, block: int) -> bytes:
        """The name of a full block; those before it are made on the way."""
        size, names = self.pool.block_size, sequence.names
        while len(names) <= block:
            before = names[-1] if names else sequence.salt
            names.append(chain_name(before, sequence.tokens[len(names) * size : (len(names) + 1) * size]))
        return names[block]


def _standing(sequence: Sequence) -> tuple[int, int]:
    """Who keeps blocks when they run out. It never changes, so that the first in it always gets on."""
    return sequence.priority, sequence.number
