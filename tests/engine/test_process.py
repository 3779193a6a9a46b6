"""The engine in its own process: the same answers, errors for everybody when it is killed, and a new start."""

import asyncio
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from adapter_folders import greedy_alone, make_adapter

from soma.base import progress
from soma.base.errors import UserError
from soma.engine.channel import Channel
from soma.engine.embed import Embedder
from soma.engine.engine import Engine
from soma.engine.errors import EngineClosedError, EngineRestartingError, QueueFullError, RequestError
from soma.engine.launch import Launched, launch
from soma.engine.params import SamplingParams
from soma.engine.process import EngineProcess
from soma.engine.request import TokenEvent
from soma.model.hub import load_model
from soma.model.lora_config import LoRAConfig
from soma.model.tokenizer import Tokenizer

LONG = SamplingParams(max_tokens=4000, ignore_eos=True)


def wait_for(condition: Callable[[], bool], seconds: float = 300.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@contextmanager
def no_new_engine() -> Iterator[None]:
    """Within it an engine that has died is not started again: its absence can be looked at for as long as it takes."""
    may_start = threading.Event()

    def late(*given: Any) -> Launched:
        assert may_start.wait(600)
        return launch(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("soma.engine.process.launch", late)
        try:
            yield
        finally:
            may_start.set()


@pytest.fixture(scope="module")
def shared_process(tiny_folder: Path) -> Iterator[EngineProcess]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        engine = EngineProcess(tiny_folder, max_running=60, max_waiting=4)
        yield engine
        engine.close()
    assert engine.process.returncode == 0


@pytest.fixture
def process(shared_process: EngineProcess) -> EngineProcess:
    """Running, and at rest, whatever the test before did to it."""
    assert wait_for(lambda: shared_process.alive and shared_process.idle)
    return shared_process


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
        SamplingParams(seed=3, max_tokens=40, logprobs=2, prompt_logprobs=1),
        SamplingParams(seed=4, max_tokens=60, ignore_eos=True, stop=("e", "zz")),
        SamplingParams(temperature=0, max_tokens=1),
    ],
)
def test_the_same_answers(
    process: EngineProcess, make_engine: Callable[..., Engine], tokenizer: Tokenizer, params: SamplingParams
) -> None:
    ids = tokenizer.encode("hello world, the fox")
    wanted = make_engine().generate(ids, params)
    assert process.generate(ids, params) == wanted
    assert wanted.ids


def test_a_stop_string_frees_the_place(
    process: EngineProcess, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokenizer.encode("hello")
    text = process.generate(ids, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)).text
    params = SamplingParams(temperature=0, max_tokens=4000, ignore_eos=True, stop=(text[3:6],))
    ends, take = [], process._take

    def seen(kind: str, *rest: Any) -> None:
        if kind == "event" and rest[1].finish_reason is not None:
            ends.append(rest[1].finish_reason)
        take(kind, *rest)

    monkeypatch.setattr(process, "_take", seen)
    done = process.generate(ids, params)
    assert (done.finish_reason, done.text) == ("stop", text[: text.index(text[3:6])])
    assert wait_for(lambda: process.idle)
    assert ends == ["abort"]  # and not "length", after 4000 tokens


def test_bad_input_never_reaches_the_engine(process: EngineProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*message: Any) -> None:
        raise AssertionError(message)

    assert process.channel is not None
    monkeypatch.setattr(process.channel, "put", fail)
    for ids, params, param in (
        ([], LONG, "prompt"), ([5000], LONG, "prompt"), ([-1], LONG, "prompt"), ([5] * 4096, LONG, "prompt"),
        ([5] * 97, LONG, "max_tokens"), ([5], SamplingParams(stop_token_ids=(9999,)), "stop_token_ids"),
    ):  # fmt: skip
        with pytest.raises(RequestError) as caught:
            process.submit(ids, params)
        assert caught.value.param == param
    with pytest.raises(RequestError) as caught:
        process.embedder.submit([[5], []])
    assert caught.value.param == "input"
    with pytest.raises(AssertionError):
        process.submit([5])
    process.requests.clear()


def test_cancelling_and_the_bound(process: EngineProcess) -> None:
    assert process.submit_all([]) == []
    requests = process.submit_all([[5]] * 64, LONG)
    with pytest.raises(QueueFullError) as caught:
        process.submit([5], LONG)
    assert caught.value.retry_after >= 1
    assert wait_for(lambda: process.stats()["running"] == 60 and process.stats()["waiting"] == 4)
    assert 0 < process.stats()["kv_cache_usage"] <= 1
    for request in requests:
        request.cancel()
    assert {request.result().finish_reason for request in requests} == {"abort"}
    assert process.idle
    assert process.stats()["running"] == 0


def test_asyncio_stream(process: EngineProcess) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)

    async def run() -> list[TokenEvent]:
        return [event async for event in process.stream([5], params)]

    events = asyncio.run(run())
    assert [event.id for event in events] == process.generate([5], params).ids
    assert [event.finish_reason for event in events] == [None] * 7 + ["length"]


def test_embeddings_are_those_of_the_model(process: EngineProcess, tiny_folder: Path) -> None:
    prompts = [[5, 6, 7], [9], list(range(4, 90))]
    vectors = process.embedder.submit(prompts).result(60)
    assert np.allclose(vectors, Embedder(load_model(tiny_folder), tiny_folder).embed(prompts), atol=1e-5)


def test_killed_in_the_middle_of_50_streams(process: EngineProcess, caplog: pytest.LogCaptureFixture) -> None:
    """Each gets an error as its last event; asking again is refused with a time until the new process is there."""
    before = process.restarts
    requests = process.submit_all([[5, 6]] * 50, LONG)
    firsts = [request.events.get(timeout=300) for request in requests]
    assert all(event.id is not None for event in firsts)
    assert process.generate([5], SamplingParams(max_tokens=2, ignore_eos=True)).finish_reason == "length"
    pid = process.process.pid
    with caplog.at_level(logging.ERROR), no_new_engine():
        os.kill(pid, signal.SIGKILL)
        ends = [list(request)[-1] for request in requests]
        assert {event.finish_reason for event in ends} == {"error"}
        assert all(event.error and "send the request again" in event.error for event in ends)
        assert "status -9" in caplog.text
        assert not process.alive
        for ask in (lambda: process.submit([5]), lambda: process.embedder.submit([[5]])):
            with pytest.raises(EngineRestartingError) as caught:
                ask()
            assert 1 <= caught.value.retry_after <= 1 + process.load_seconds
        assert process.idle
    assert wait_for(lambda: process.alive and process.restarts == before + 1)
    assert process.process.pid != pid
    assert process.generate([5], SamplingParams(max_tokens=3, ignore_eos=True)).finish_reason == "length"


def test_counters_go_on_over_a_restart(tiny_folder: Path) -> None:
    engine = EngineProcess(tiny_folder)

    def ask() -> None:
        engine.generate(list(range(10, 50)), SamplingParams(max_tokens=1))

    def queries() -> float:
        return engine.stats()["prefix_cache_queries"]

    ask()
    assert wait_for(lambda: queries() == 40)
    with no_new_engine():
        engine.process.kill()
        assert wait_for(lambda: not engine.alive)
        assert queries() == 40
    assert wait_for(lambda: engine.alive)
    ask()
    assert wait_for(lambda: queries() == 80)
    engine.close()


def test_killed_in_the_middle_of_embeddings(process: EngineProcess) -> None:
    process.process.send_signal(signal.SIGSTOP)
    assert wait_for(lambda: psutil.Process(process.process.pid).status() == psutil.STATUS_STOPPED)
    future = process.embedder.submit([[5]])
    process.process.kill()
    with pytest.raises(EngineRestartingError):
        future.result(60)
    assert wait_for(lambda: process.alive)
    assert process.embedder.submit([[5]]).result(60).shape == (1, 64)


def test_a_model_that_went_away_and_came_back(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An engine that cannot be started again is tried again, and `close` does not wait for the next attempt."""
    folder = tmp_path / "model"
    folder.symlink_to(tiny_folder)
    engine = EngineProcess(folder)
    folder.unlink()
    engine.process.kill()
    with caplog.at_level(logging.ERROR):
        assert wait_for(lambda: "does not come up again" in caplog.text)
    assert not engine.alive
    folder.symlink_to(tiny_folder)
    assert wait_for(lambda: engine.alive)
    folder.unlink()
    monkeypatch.setattr("soma.engine.process.FIRST_DELAY", 500.0)
    engine.process.kill()
    assert wait_for(lambda: engine.next_start > time.monotonic())
    engine.close()
    assert not engine.thread.is_alive()
    assert time.monotonic() < engine.next_start
    with pytest.raises(EngineClosedError):
        engine.submit([5])


def test_closing(tiny_folder: Path) -> None:
    engine = EngineProcess(tiny_folder)
    request = engine.submit([5], SamplingParams(max_tokens=200, ignore_eos=True))
    engine.close(drain=True)
    assert len(request.result().ids) == 200
    engine = EngineProcess(tiny_folder)
    request = engine.submit([5], LONG)
    engine.close()
    assert request.result().finish_reason == "abort"
    assert engine.process.returncode == 0


def test_what_is_wrong_with_the_model_is_said(tmp_path: Path, tiny_folder: Path) -> None:
    with pytest.raises(UserError, match="no such model folder"):
        EngineProcess(tmp_path / "none")
    with pytest.raises(UserError, match="cannot be loaded"):
        EngineProcess(tiny_folder, colour="blue")


def test_notes_of_loading_come_through(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []

    class Ear(progress.Reporter):
        def note(self, text: str) -> None:
            heard.append(text)

    site = "import soma.engine.worker as w; old = w.load_weights\n"
    site += "def new(*a, **k):\n    w.progress.current().note('it is late')\n    return old(*a, **k)\n"
    site += "w.load_weights = new\n"
    monkeypatch.setattr("soma.engine.launch.PROGRAM", site + "import sys; w.main(int(sys.argv[1]))")
    with progress.use(Ear()):
        EngineProcess(tiny_folder).close()
    assert "it is late" in heard


def test_the_engine_ends_with_its_front(tiny_folder: Path) -> None:
    """Also when the front is killed while the engine is computing."""
    code = (
        "import sys, time; from soma.engine.process import EngineProcess;"
        "from soma.engine.params import SamplingParams;"
        "e = EngineProcess(sys.argv[1]); r = e.submit([5], SamplingParams(max_tokens=4000, ignore_eos=True));"
        "r.events.get(); print(e.process.pid, flush=True); time.sleep(60)"
    )
    front = subprocess.Popen([sys.executable, "-c", code, str(tiny_folder)], stdout=subprocess.PIPE, text=True)
    assert front.stdout is not None
    child = psutil.Process(int(front.stdout.readline()))
    front.kill()
    front.wait()
    front.stdout.close()
    # Where nobody takes orphans in, they stay as zombies.
    assert wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_a_frame_cut_off_is_the_end() -> None:
    import socket

    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    theirs.sendall((100).to_bytes(8, "little") + b"short")
    theirs.close()
    assert list(channel) == []
    channel.put("nobody hears this")
    channel.close()


def test_messages_gather_into_frames() -> None:
    """What was put while the writer was held up travels in one frame, in order."""
    import socket

    ours, theirs = socket.socketpair()
    gate = threading.Event()

    def hold(message: Any) -> Any:
        assert gate.wait(60)
        return message

    sender, receiver = Channel(ours, hold), Channel(theirs)
    for number in range(101):
        sender.put(number)
    gate.set()
    frames = iter(receiver)
    seen, sizes = [], []
    while len(seen) < 101:
        frame = next(frames)
        seen += frame
        sizes.append(len(frame))
    assert seen == [(number,) for number in range(101)]
    assert max(sizes) >= 50
    sender.close()
    assert list(frames) == []
    receiver.close()


def test_adapters_in_the_process(tiny_folder: Path, tmp_path: Path) -> None:
    """Loaded at the start and later, there again after a kill; one whose folder is gone is left out then."""
    folders = {
        name: make_adapter(tiny_folder, tmp_path / name, LoRAConfig(r=4), seed)
        for seed, name in enumerate(("one", "two", "three"))
    }
    right = {name: greedy_alone(tiny_folder, folder, [5, 6, 7], 6) for name, folder in folders.items()}
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    engine = EngineProcess(tiny_folder, adapters={"one": str(folders["one"])})
    try:
        for name in ("two", "three"):
            engine.load_adapter(name, folders[name])
            with pytest.raises(UserError, match="loaded already"):
                engine.load_adapter(name, folders[name])
        assert list(engine.adapter_folders) == ["one", "two", "three"]
        requests = {name: engine.submit([5, 6, 7], params, adapter=name) for name in folders}
        assert {name: request.result().ids for name, request in requests.items()} == right
        engine.unload_adapter("three")
        with pytest.raises(RequestError, match="`three` does not exist"):
            engine.submit([5], params, adapter="three")
        with pytest.raises(RequestError, match="`three` does not exist"):
            engine.unload_adapter("three")
        shutil.rmtree(folders["two"])
        engine.process.kill()
        assert wait_for(lambda: engine.alive and engine.restarts == 1)
        assert list(engine.adapter_folders) == ["one"]
        assert engine.submit([5, 6, 7], params, adapter="one").result().ids == right["one"]
    finally:
        engine.close()
    with pytest.raises(UserError, match="no such model folder"):
        EngineProcess(tiny_folder, adapters={"two": str(folders["two"])})
