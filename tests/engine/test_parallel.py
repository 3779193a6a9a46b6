"""A model over several processes: the tokens of one process, and no process left behind, whoever dies."""

import logging
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tiny import make_model

from soma.base.errors import UserError
from soma.engine.engine import Engine
from soma.engine.parallel.group import RankGroup
from soma.engine.parallel.part import Plan
from soma.engine.params import SamplingParams
from soma.engine.process import EngineProcess
from soma.model.hub import load_model
from soma.model.tokenizer import Tokenizer

LONG = SamplingParams(max_tokens=250, ignore_eos=True)
FIGURES = ("prefix_cache_queries", "prefix_cache_hits", "preemptions")


def wait_for(condition: Callable[[], bool], seconds: float = 300.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@contextmanager
def parallel(folder: Path, tensors: int, stages: int, **options: Any) -> Iterator[EngineProcess]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        engine = EngineProcess(folder, tensor_parallel=tensors, pipeline_parallel=stages, **options)
        ranks = ranks_of(engine)
        assert len(ranks) == tensors * stages - 1
        yield engine
        engine.close()
    assert engine.process.returncode == 0
    assert wait_for(lambda: not any(rank.is_running() for rank in ranks))


def ranks_of(engine: EngineProcess) -> list[psutil.Process]:
    """The other ranks' processes."""
    return psutil.Process(engine.process.pid).children()


def check_loss(engine: EngineProcess, strike: Callable[[psutil.Process, psutil.Process], None]) -> None:
    """Every client is told, nobody of the old group is left, and a new one works."""
    (rank,), zero = ranks_of(engine), psutil.Process(engine.process.pid)
    requests = engine.submit_all([[5, 6]], LONG)
    for request in requests:
        assert request.events.get(timeout=300).id is not None
    strike(zero, rank)
    ends = [list(request)[-1] for request in requests]
    assert [(end.finish_reason, end.is_lost) for end in ends] == [("error", True)]
    assert wait_for(lambda: engine.alive)
    assert wait_for(lambda: not rank.is_running() and not zero.is_running())
    assert engine.generate([5], SamplingParams(max_tokens=3, ignore_eos=True)).finish_reason == "length"


SQUEEZED: dict[str, Any] = {"max_running": 4, "cache_tokens": 256, "prefill_chunk": 7, "step_tokens": 24}


def check_tokens(
    folder: Path, tensors: int, stages: int, then: Callable[[EngineProcess], None] | None = None, **more: Any
) -> None:
    """Greedy and seeded, in chunks, behind cached prefixes, and with a cache so small that requests are preempted."""
    draw = random.Random(tensors * 10 + stages)
    begin = [draw.randrange(4, 300) for _ in range(40)]
    prompts = [[*begin[: draw.randrange(41)], *(draw.randrange(4, 300) for _ in range(draw.randrange(1, 30)))]
               for _ in range(8)]  # fmt: skip
    params = [
        SamplingParams(temperature=0, max_tokens=50, ignore_eos=True) if place % 2 else
        SamplingParams(temperature=0.9, top_p=0.9, seed=place, max_tokens=50, ignore_eos=True)
        for place in range(len(prompts))
    ]  # fmt: skip
    scored = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    device = "cuda" if torch.cuda.device_count() >= 2 else "cpu"
    one = Engine(
        load_model(folder, device=device), Tokenizer.load(folder), cache_tokens=4096, backend="reference", **more
    )
    try:
        wanted = [request.result().ids for request in one.submit_all(prompts, params)]
        score = one.generate(prompts[0], scored)
    finally:
        one.close()
    with parallel(folder, tensors, stages, device=device, **SQUEEZED, **more) as engine:
        assert [request.result().ids for request in engine.submit_all(prompts, params)] == wanted
        assert wait_for(lambda: engine.stats()["preemptions"] > 0)
        hits = engine.stats()["prefix_cache_hits"]
        assert [engine.generate(*each).ids for each in zip(prompts, params, strict=True)] == wanted
        assert wait_for(lambda: engine.stats()["prefix_cache_hits"] > hits)
        given = engine.generate(prompts[0], scored)
        assert given.ids == score.ids
        assert [row.logprob for row in given.logprobs] == pytest.approx(
            [row.logprob for row in score.logprobs], abs=1e-4
        )
        for found, right in zip(given.prompt_logprobs[1:], score.prompt_logprobs[1:], strict=True):  # type: ignore[index]
            assert found.logprob == pytest.approx(right.logprob, abs=1e-4)  # type: ignore[union-attr]
        if then is not None:
            then(engine)


def test_two_tensor_ranks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With one key/value head, which both ranks hold; in the end one is killed."""

    def kill_one(engine: EngineProcess) -> None:
        with caplog.at_level(logging.ERROR):
            check_loss(engine, lambda zero, rank: rank.kill())

    check_tokens(make_model(tmp_path, num_key_value_heads=1), 2, 1, kill_one)
    assert "rank 1 (tensor 1, stage 0) ended with status -9" in caplog.text


def test_two_stages(tmp_path: Path) -> None:
    check_tokens(make_model(tmp_path, family="qwen3", num_hidden_layers=3, head_dim=24), 1, 2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed")
@pytest.mark.parametrize(("tensors", "stages"), [(2, 1), (1, 2)])
def test_two_gpus(tmp_path: Path, tensors: int, stages: int) -> None:
    """The same over NCCL and Triton attention, in float32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    check_tokens(make_model(tmp_path), tensors, stages)


@pytest.mark.slow
def test_two_by_two_with_experts(tmp_path: Path) -> None:
    folder = make_model(tmp_path, family="mixtral", num_experts=4, num_experts_per_tok=2, num_hidden_layers=3)
    check_tokens(folder, 2, 2)


@pytest.mark.slow
def test_two_tensor_ranks_with_rounded_weights(tmp_path: Path) -> None:
    check_tokens(make_model(tmp_path), 2, 1, weights="int8")


@pytest.mark.slow
def test_gpt2_in_two_stages_of_two(tmp_path: Path) -> None:
    check_tokens(make_model(tmp_path, family="gpt2", num_key_value_heads=4, intermediate_size=256), 2, 2)


@pytest.mark.slow
def test_rank_0_killed(tiny_folder: Path) -> None:
    with parallel(tiny_folder, 2, 1) as engine:
        assert not engine.embeds
        check_loss(engine, lambda zero, rank: zero.kill())


@pytest.mark.slow
def test_a_rank_that_hangs(tiny_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with parallel(tiny_folder, 1, 2, step_seconds=1.5) as engine, caplog.at_level(logging.ERROR):
        check_loss(engine, lambda zero, rank: rank.send_signal(signal.SIGSTOP))
    assert "a step has not ended after 1.5 s; rank 1 (tensor 0, stage 1) does not answer" in caplog.text


def test_what_cannot_be_split_starts_nothing(tiny_folder: Path) -> None:
    with pytest.raises(UserError, match="tensor_parallel 3: num_attention_heads 4 / 3"):
        RankGroup(Plan(str(tiny_folder), 3, 1), lost=lambda reason: None)
    assert not [child for child in psutil.Process().children() if "parallel.rank" in " ".join(child.cmdline())]


def test_no_adapters(make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    monkeypatch.setattr(engine.runner, "name", "parallel")
    with pytest.raises(UserError, match="over several processes takes none"):
        engine.load_adapter("mine", "folder")
