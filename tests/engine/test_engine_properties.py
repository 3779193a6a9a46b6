"""A real engine under random arrivals, cancellations, deadlines, priorities, keys and memory pressure.

Before every step the blocks are held against the tokens: what a step writes has one owner and no name; two requests
hold one block only where their texts are equal up to its end. Afterwards every request has ended, with the greedy
tokens that it gets alone, or a beginning of them; and every block is free.
"""

import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from speculating import Guesses, draft_always

from soma.engine.batch import Batch
from soma.engine.blocks import BlockPool
from soma.engine.engine import Engine
from soma.engine.params import SamplingParams
from soma.engine.request import Request
from soma.model.hub import load_model
from soma.model.tokenizer import Tokenizer

SIZE = 4
LONGEST = 16  # tokens of an answer
Answers = dict[tuple[int, ...], list[int]]


def texts() -> list[list[int]]:
    draw = random.Random(11)
    return [[draw.randrange(4, 300) for _ in range(60)] for _ in range(3)]


class Watch:
    """Checks the blocks of an engine before every step; `wrong` is what it found."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.wrong, self.steps = engine, [], 0
        self.real = engine.runner.step
        engine.runner.step = self.step  # type: ignore[method-assign]

    wrong: list[str]

    def step(self, batch: Batch) -> torch.Tensor:
        self.steps += 1
        try:
            self.check(batch)
        except AssertionError as error:
            self.wrong.append(str(error))
        return self.real(batch)

    def check(self, batch: Batch) -> None:
        pool, running = self.engine.pool, self.engine.running
        held = Counter(block for request in running for block in request.table[request.first_block :])
        assert {block: count for block, count in enumerate(pool.references) if count} == held, "a count is wrong"
        for block in {slot // SIZE for slot in batch.slots_T.tolist()}:
            assert held[block] == 1, "a block that is written has one owner"
            assert pool.name_of[block] is None, "a block that is written has no name"
        texts: dict[int, list[int]] = {}
        for request in running:
            for place, block in enumerate(request.table):
                text = request.tokens[: (place + 1) * SIZE]
                assert texts.setdefault(block, text) == text, "a block is shared by different texts"


@pytest.fixture(scope="module")
def answers(tiny_folder: Path) -> Answers:
    """What each beginning of the three texts is answered with, by an engine that does one thing at a time."""
    torch.set_num_threads(1)
    engine = Engine(load_model(tiny_folder), Tokenizer.load(tiny_folder), cache_tokens=2048, prefix_cache=False)
    params = SamplingParams(temperature=0, max_tokens=LONGEST, ignore_eos=True)
    found = {
        tuple(text[:length]): engine.generate(text[:length], params).ids
        for text in texts()
        for length in range(6, 61, 6)
    }
    engine.close()
    return found


SUBMIT = st.tuples(
    st.just("submit"), st.integers(0, 2), st.integers(1, 10), st.integers(1, LONGEST), st.integers(-1, 1),
    st.sampled_from("ab"), st.sampled_from([None, None, None, 0.002]), st.integers(1, 3),
)  # fmt: skip
ACTIONS = st.lists(
    st.one_of(SUBMIT, SUBMIT, st.tuples(st.just("cancel"), st.integers(0, 99)), st.tuples(st.just("pause"))),
    min_size=1, max_size=25,
)  # fmt: skip


def play(engine: Engine, actions: list[Any]) -> list[tuple[tuple[int, ...], int, Request]]:
    """Do what the actions say, without waiting for the engine: prompt, wanted tokens and request of each."""
    live: list[tuple[tuple[int, ...], int, Request]] = []
    for action, *rest in actions:
        if action == "submit":
            which, sixths, count, priority, key, timeout, n = rest
            prompt = texts()[which][: sixths * 6]
            params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
            requests = engine.submit_all([prompt] * n, params, priority=priority, key=key, timeout=timeout)
            live += [(tuple(prompt), count, request) for request in requests]
        elif action == "cancel" and live:
            live[rest[0] % len(live)][2].cancel()
        elif action == "pause":
            time.sleep(0.001)
    return live


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    actions=ACTIONS, blocks=st.sampled_from([22, 30, 80]), prefix_cache=st.booleans(),
    chunk=st.sampled_from([3, 8, 64]), draft=st.sampled_from([None, None, "guesses", "model"]),
)  # fmt: skip
def test_random_use(
    make_engine: Callable[..., Engine], tiny_folder: Path, answers: Answers, actions: list[Any], blocks: int,
    prefix_cache: bool, chunk: int, draft: str | None,
) -> None:  # fmt: skip
    engine = make_engine(
        cache_tokens=blocks * SIZE, block_size=SIZE, prefix_cache=prefix_cache, prefill_chunk=chunk, max_running=5,
        step_tokens=32,
    )  # fmt: skip
    if draft == "guesses":
        draft_always(engine, Guesses(answers, engine.config.vocab_size), most=6)
    elif draft == "model":
        draft_always(engine, load_model(tiny_folder), most=3)
    watch = Watch(engine)
    for prompt, count, request in play(engine, actions):
        done = request.result()
        right = answers[prompt][:count]
        if done.finish_reason == "length":
            assert done.ids == right
        else:
            assert done.finish_reason == "abort" or done.error == "the request was not done in time"
            assert done.ids == right[: len(done.ids)]
    assert watch.wrong == []
    engine.close(drain=True)
    assert engine.idle
    assert engine.pool.used == 0
    assert engine.pool.available == blocks
    assert engine.scheduler.spent == {}


@pytest.mark.parametrize("fault", ["shared", "named"])
def test_the_watch_sees_faults(make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    engine = make_engine(cache_tokens=80 * SIZE, block_size=SIZE, max_running=5, step_tokens=32)
    if fault == "shared":
        real = BlockPool.find
        # any block will do
        monkeypatch.setattr(BlockPool, "find", lambda pool, name: real(pool, next(iter(pool.named), name)))
    else:
        commit = engine.scheduler.commit

        def early(plan: Any) -> None:  # names the block that the next token goes into
            plan = list(plan)
            commit(plan)
            for work in plan:
                block = work.sequence.table[-1]
                engine.pool.publish(block, bytes([block]))

        monkeypatch.setattr(engine.scheduler, "commit", early)
    watch = Watch(engine)
    params = SamplingParams(temperature=0, max_tokens=LONGEST, ignore_eos=True)
    for request in engine.submit_all([text[:40] for text in texts()] * 2, params):
        request.result()
    assert watch.wrong


def test_several_answers_share_the_prompts_blocks(make_engine: Callable[..., Engine]) -> None:
    """Six answers to one prompt of 50 tokens: its 12 full blocks exist once and are computed once, in one request's
    share; only the last 2 tokens are computed by each."""
    engine = make_engine(cache_tokens=400, block_size=SIZE, max_running=6)
    most: list[int] = []
    written: Counter[int] = Counter()
    real = engine.runner.step

    def step(batch: Batch) -> torch.Tensor:
        held = [set(request.table[:12]) for request in engine.running if len(request.table) >= 12]
        most.append(len(set().union(*held)) if held else 0)
        written.update(position for position in batch.positions_T.tolist() if position < 50)
        return real(batch)

    engine.runner.step = step  # type: ignore[method-assign]
    params = [SamplingParams(temperature=1, seed=seed, max_tokens=10, ignore_eos=True) for seed in range(6)]
    requests = engine.submit_all([texts()[0][:50]] * 6, params)
    assert len({tuple(request.result().ids) for request in requests}) == 6
    assert max(most) == 12
    assert [written[position] for position in range(50)] == [1] * 48 + [6] * 2
