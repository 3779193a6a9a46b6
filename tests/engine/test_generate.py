"""`Engine(model).generate(prompts, params)`: many prompts, text or ids, in their order; and streaming them."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from adapter_folders import greedy_alone, make_adapter

import soma
from soma.base import progress
from soma.base.errors import UserError
from soma.engine.engine import Engine
from soma.engine.errors import QueueFullError, RequestError
from soma.engine.params import SamplingParams
from soma.engine.prompts import encode_prompt
from soma.model.lora_config import LoRAConfig
from soma.model.tokenizer import Tokenizer

Make = Callable[..., Engine]
PARAMS = SamplingParams(temperature=0.8, seed=3, max_tokens=6, ignore_eos=True)


def test_prompts_in_their_order(make_engine: Make, tokenizer: Tokenizer) -> None:
    """More of them than there are places, text and ids mixed: each as if asked for alone with its seed."""
    engine = make_engine(max_running=2, max_waiting=1)
    prompts: list[Any] = [f"hello {place}" if place % 2 else [5 + place, 6, 7] for place in range(9)]
    steps: list[int] = []

    class Counter(progress.Reporter):
        def task(self, name: str, total: int | None = None, unit: str = "") -> Any:
            steps.append(total or 0)
            return super().task(name, total, unit)

    with progress.use(Counter()):
        done = engine.generate(prompts, PARAMS)
    assert steps == [9]
    for place, (prompt, answer) in enumerate(zip(prompts, done, strict=True)):
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        alone = engine.generate(ids, replace(PARAMS, seed=3 + place))
        assert (answer.ids, answer.text, answer.finish_reason) == (alone.ids, alone.text, "length")
    each = [replace(PARAMS, max_tokens=place + 1) for place in range(3)]
    assert [len(answer.ids) for answer in engine.generate(prompts[:3], each)] == [1, 2, 3]
    assert engine.generate("hello 1", PARAMS).ids == engine.generate(tokenizer.encode("hello 1"), PARAMS).ids


def test_what_is_wrong_is_said_before_anything_runs(make_engine: Make) -> None:
    engine = make_engine(max_running=1, max_waiting=0)
    with pytest.raises(RequestError, match="prompt 1: token id 9999 is outside") as caught:
        engine.generate([[5], [9999]], PARAMS)
    assert caught.value.param == "prompt"
    with pytest.raises(RequestError, match="2 prompts and 1 sampling"):
        engine.generate([[5], [6]], [PARAMS])
    with pytest.raises(RequestError, match="no tokens"):
        engine.generate([], PARAMS)
    with pytest.raises(RequestError, match="does not exist"):
        engine.generate([[5]], PARAMS, adapter="none")
    gate = threading.Event()
    other = engine.submit([5], PARAMS, lambda event: gate.wait() and None)
    with pytest.raises(QueueFullError):  # by somebody else
        engine.generate([[5], [6]], PARAMS)
    gate.set()
    while other.finish_reason is None:
        pass
    assert engine.generate([[5]], PARAMS)[0].finish_reason == "length"


def test_interrupted_it_leaves_nothing_running(make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(max_running=2)

    def interrupt(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(progress.Task, "advance", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[5], [6], [7]], replace(PARAMS, max_tokens=3000))
    monkeypatch.undo()
    assert engine.generate([8], PARAMS).finish_reason == "length"  # at once: the others were cancelled
    while not engine.idle:
        pass


def test_from_a_folder_with_an_adapter(tiny_folder: Path, tmp_path: Path) -> None:
    folder = make_adapter(tiny_folder, tmp_path / "adapter", LoRAConfig(r=4), 1)
    engine = soma.Engine(str(tiny_folder), cache_tokens=1024)
    try:
        engine.load_adapter("mine", folder)
        tokenizer = Tokenizer.load(tiny_folder)
        params = soma.SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
        for name, path in ((None, None), ("mine", folder)):
            right = [greedy_alone(tiny_folder, path, encode_prompt(tokenizer, text), 5) for text in ("hello", "world")]
            assert [done.ids for done in engine.generate(["hello", "world"], params, adapter=name)] == right

            async def stream(name: str | None = name) -> list[int | None]:
                return [event.id async for event in engine.stream("hello", params, adapter=name)]

            assert asyncio.run(stream()) == right[0]
    finally:
        engine.close()
    with pytest.raises(UserError, match="no such model folder"):
        Engine("/nowhere")
    with pytest.raises(AttributeError, match="'soma' has no attribute 'engines'"):
        _ = soma.engines  # type: ignore[attr-defined]


def test_import_soma_loads_no_torch() -> None:
    code = "import soma, sys; assert 'torch' not in sys.modules; soma.SamplingParams; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
