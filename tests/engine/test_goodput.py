"""How much is drafted follows what it is worth: injected costs and acceptance."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_every_family import NoTokenizer

from soma.base.errors import UserError
from soma.engine.engine import Engine
from soma.engine.goodput import STALE, Acceptance, StepCosts, draft_lengths
from soma.engine.ngram import NgramIndex
from soma.engine.params import SamplingParams
from soma.engine.request import Request
from soma.engine.speculate import PROBE, Speculator


def costs(seconds: Callable[[int], float], sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)) -> StepCosts:
    made = StepCosts()
    for size in sizes:
        made.observe(size, seconds(size))
    return made


def test_where_a_larger_step_costs_nothing_everything_is_drafted() -> None:
    flat = costs(lambda tokens: 0.01)
    assert draft_lengths([0.9], [8], 1, 500, flat) == [8]
    assert draft_lengths([0.5, 0.9], [8, 3], 2, 500, flat) == [8, 3]
    assert draft_lengths([0.9], [8], 1, 3, flat) == [3]
    assert draft_lengths([0.9], [0], 1, 500, flat) == [0]


def test_where_time_goes_with_tokens_nothing_is_drafted() -> None:
    steep = costs(lambda tokens: 0.001 * tokens)
    assert draft_lengths([0.9] * 32, [8] * 32, 32, 400, steep) == [0] * 32


def test_the_batch_size_decides() -> None:
    """10 ms for weights and 0.2 ms a token, up to 64 tokens; then 1 ms a token: alone eight tokens, in a full batch
    none, and on the way fewer and fewer."""
    knee = costs(lambda tokens: 0.01 + 0.0002 * tokens + 0.001 * max(0, tokens - 64))
    drafted = [sum(draft_lengths([0.7] * size, [8] * size, size, 500, knee)) / size for size in (1, 8, 32, 64, 128)]
    assert drafted[0] >= 5
    assert drafted[-1] == 0
    assert drafted == sorted(drafted, reverse=True)


def test_by_hand() -> None:
    """One request, rate 0.5, 1 s for one token, 0.4 s for each more: 1, 1.5/1.4, 1.75/1.8 tokens a second."""
    made = costs(lambda tokens: 0.6 + 0.4 * tokens, (1, 2, 3, 4, 5, 6))
    assert draft_lengths([0.5], [4], 1, 100, made) == [1]
    assert draft_lengths([0.44], [4], 1, 100, made) == [0]  # 1.44/1.4 is less than 5 % more


def test_better_guesses_go_first() -> None:
    made = costs(lambda tokens: 0.01 + 0.002 * tokens)
    good, bad = draft_lengths([0.95, 0.2], [8, 8], 2, 100, made)
    assert good > bad


def test_rounds_of_a_draft_model_cost_too() -> None:
    flat = costs(lambda tokens: 0.01)
    cheap, dear = costs(lambda requests: 0.0005), costs(lambda requests: 0.02)
    assert draft_lengths([0.8], [8], 1, 100, flat, cheap)[0] >= 4
    assert draft_lengths([0.8], [8], 1, 100, flat, dear) == [0]
    middle = costs(lambda requests: 0.002)
    assert 0 < draft_lengths([0.8], [8], 1, 100, flat, middle)[0] < draft_lengths([0.8], [8], 1, 100, flat, cheap)[0]


def test_unknown_sizes_are_tried_in_small_jumps() -> None:
    made = costs(lambda tokens: 0.01, (4,))
    assert sum(draft_lengths([0.9] * 4, [8] * 4, 4, 500, made)) == 4  # twice the largest known size
    made.observe(8, 0.1)
    assert sum(draft_lengths([0.9] * 4, [8] * 4, 4, 500, made)) == 0
    for _ in range(STALE):
        made.observe(4, 0.01)
    assert sum(draft_lengths([0.9] * 4, [8] * 4, 4, 500, made)) > 0, "what was long ago is tried again"


def test_step_costs() -> None:
    made = StepCosts()
    for seconds in (0.5, 0.01, 0.3):  # others on the machine only add time
        made.observe(1, seconds)
    made.observe(5, 0.02)
    assert made.seconds(np.array([1, 3, 5, 99])).tolist() == pytest.approx([0.01, 0.015, 0.02, 0.02])


def test_acceptance() -> None:
    """Worked: from 1 of 2, a draft of 4 with 2 right: (0.9 + 2) / (1.8 + 3)."""
    made = Acceptance()
    made.learn(4, 2)
    assert made.rate == pytest.approx(2.9 / 4.8)
    for _ in range(40):
        made.learn(4, 4)
    assert made.rate > 0.97
    for _ in range(500):
        made.fade()
    assert 0.5 < made.rate < 0.75


def test_a_large_batch_that_drafts_nothing_is_left_alone() -> None:
    """It is thought about ever more seldom, down to every 16th step; one draft, and it is each step again."""

    class Offers:
        costs = None
        asked = 0

        def offer(self, request: Any, most: int) -> int:
            self.asked += 1
            return most

        def first(self, request: Any) -> int | None:
            return None

    def asked(seconds: Callable[[int], float], steps: int) -> int:
        offers = Offers()
        speculator = Speculator(offers, 4)  # type: ignore[arg-type]
        speculator.costs = costs(seconds)
        running = [Request([1], SamplingParams(max_tokens=100), NoTokenizer(), 100) for _ in range(20)]
        for request in running:
            request.tokens.append(5)
            request.computed = 1
        scheduler = SimpleNamespace(running=running, waiting=[], max_running=20, step_tokens=400)
        for _ in range(steps):
            speculator.plan(scheduler)  # type: ignore[arg-type]
        return offers.asked // len(running)

    assert asked(lambda tokens: 0.01 * tokens, 60) == 7  # steps 1, 2, 5, 12, 27, 43, 59
    assert asked(lambda tokens: 0.01, 60) == 60


def test_ngrams() -> None:
    index = NgramIndex()
    text = [1, 2, 3, 4, 5, 1, 2, 3]
    assert index.propose(text, 4) == [4, 5, 1, 2]
    assert index.propose([*text, 9], 4) == []
    assert index.propose([*text, 9, 1, 2, 3], 3) == [9, 1, 2], "the last time counts"
    assert NgramIndex().propose([7, 8, 7, 8, 7, 8], 5) == [7, 8, 7, 8, 7], "a loop goes on"
    assert NgramIndex().propose([7], 5) == []
    assert NgramIndex().propose([7, 8, 7, 8], 0) == []


def by_hand(tokens: list[int], most: int) -> list[int]:
    """The same, looked up in the whole text each time."""
    for n in (4, 3, 2):
        for end in range(len(tokens) - 1, n - 1, -1):
            if n < len(tokens) and tokens[end - n : end] == tokens[-n:]:
                period = len(tokens) - end
                return [tokens[end + i % period] for i in range(most)]
    return []


def test_the_index_finds_what_a_search_finds() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        index, text = NgramIndex(), draw.integers(0, 3, draw.integers(1, 12)).tolist()
        for _ in range(30):
            assert index.propose(text, 3) == by_hand(text, 3)
            text += draw.integers(0, 3, draw.integers(1, 4)).tolist()


def test_an_engine_stops_where_it_does_not_pay(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock on which a step takes as long as it has tokens: after a few tries nothing is drafted any more. On one
    where all steps take the same, drafts go on."""
    counts = []
    for per_token in (1.0, 0.0):
        engine = make_engine(speculate="ngram", draft_tokens=4)
        assert engine.speculator is not None
        observe = engine.speculator.observe

        def clock(tokens: int, seconds: float, per: float = per_token, observe: Any = observe) -> None:
            observe(tokens, 1.0 + per * (tokens - 1))

        monkeypatch.setattr(engine.speculator, "observe", clock)
        params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, logit_bias={5: 30.0, 6: 29.0})
        engine.generate([5, 6] * 10, params)
        counts.append(engine.stats()["draft_tokens"])
        assert engine.speculator.planned // PROBE >= (1 if per_token else 0)
    assert counts[0] < 12
    assert counts[1] > 100


def test_options(make_engine: Callable[..., Engine], tiny_folder: Path, tmp_path: Path) -> None:
    """A folder is a draft model; its tokenizer must be the model's; no draft of no tokens."""
    from tiny import make_model

    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    expected = make_engine().generate([5, 6, 7], params).ids
    engine = make_engine(speculate=str(tiny_folder))
    assert engine.generate([5, 6, 7], params).ids == expected
    assert engine.stats()["accepted_tokens"] > 0
    with pytest.raises(UserError, match="draft_tokens"):
        make_engine(speculate="ngram", draft_tokens=0)
    other = make_model(tmp_path)
    settings = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(settings.replace('"the"', '"tge"').replace('"Ġthe"', '"Ġtge"'))
    with pytest.raises(UserError, match="vocabulary"):
        make_engine(speculate=str(other))
    with pytest.raises(UserError):
        make_engine(speculate=str(tmp_path / "nothing"))


def test_the_engine_process_speculates(tiny_folder: Path) -> None:
    """`soma serve --speculate ngram --draft-tokens 3` gives these options to the engine process."""
    from soma.engine.process import EngineProcess

    process = EngineProcess(tiny_folder, speculate="ngram", draft_tokens=3)
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logit_bias={5: 30.0})
    assert process.generate([5] * 9, params).ids == [5] * 60
    deadline = time.monotonic() + 120
    while not process.stats()["accepted_tokens"] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.stats()["draft_tokens"] >= process.stats()["accepted_tokens"] > 0
    process.close()
