"""Several adapters on one base in one batch: each request gets the tokens of its own merged model."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_models import FAMILIES, V, make
from speculating import draft_always

from soma.base.errors import UserError
from soma.engine.adapters import Adapters
from soma.engine.batch import make_batch, segments_of
from soma.engine.engine import Engine
from soma.engine.errors import QueueFullError, RequestError
from soma.engine.native import NativeModel
from soma.engine.paged import PagedCache
from soma.engine.params import SamplingParams
from soma.engine.worker import NoText
from soma.model.adapted import AdaptedLinear, Segment
from soma.model.lora import add_lora, load_lora, lora_layers, merge_lora, read_adapter, remove_lora, save_lora
from soma.model.lora_config import LoRAConfig
from soma.model.quantized import quantize
from soma.model.transformer import Transformer

ATTENTION = r".*\.(q_proj|v_proj|kv_a_proj_with_mqa|c_attn)"
CONFIGS = {
    "one": LoRAConfig(r=4),
    "two": LoRAConfig(r=19, lora_alpha=38, target_modules=ATTENTION, rank_pattern={"q_proj": 3}),
    "three": LoRAConfig(r=7, use_rslora=True, target_modules=r".*(o_proj|mlp\.c_proj|up_proj|lm_head|kv_b_proj)"),
}


class Ids:
    """A tokenizer for those who have ids and want ids."""

    eos_ids = ()

    def encode(self, text: str) -> list[int]:
        return []

    def stream_decoder(self) -> NoText:
        return NoText()


def make_adapters(family: str, folder: Path) -> dict[str, Path]:
    """Three adapters of different ranks on different layers, wide enough that each changes the tokens."""
    for seed, (name, config) in enumerate(CONFIGS.items()):
        model = make(family)
        add_lora(model, config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in lora_layers(model).values():
                layer.lora_A.copy_(torch.randn(layer.lora_A.shape, generator=generator) * 0.2)
                layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.2)
        save_lora(model, config, folder / name)
    return {name: folder / name for name in CONFIGS}


def merged(family: str, folder: Path | None) -> Transformer:
    model = make(family)
    if folder is not None:
        load_lora(model, folder)
        merge_lora(model)
        remove_lora(model)
    return model


def alone(model: Transformer, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities, the whole text computed anew for every token."""
    ids, values = list(prompt), []
    for _ in range(count):
        with torch.no_grad():
            logprobs_V = torch.log_softmax(model(torch.tensor([ids]))[0, -1], 0)
        ids.append(int(logprobs_V.argmax()))
        values.append(float(logprobs_V[ids[-1]]))
    return ids[len(prompt) :], values


def greedy(count: int, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **more)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(V) for _ in range(draw.randrange(1, 40))] for _ in range(count)]


@pytest.fixture
def start() -> Iterator[Callable[..., Engine]]:
    """`start(model, **options)`; the engines are closed after the test, and nothing of theirs is left."""
    made: list[Engine] = []

    def engine(model: Transformer, **options: Any) -> Engine:
        made.append(Engine(model, Ids(), **{"cache_tokens": 4096, "block_size": 8, **options}))
        return made[-1]

    yield engine
    for each in made:
        each.close()
        assert each.pool.used == 0
        assert all(adapter.users == 0 for adapter in each.adapters.loaded.values())


def backends(family: str) -> list[str]:
    return ["reference"] if NativeModel.supports(make(family)) else ["native", "reference"]


@pytest.mark.parametrize(
    ("family", "backend"), [(family, backend) for family in FAMILIES for backend in backends(family)]
)
def test_a_mixed_batch_gives_each_its_own_tokens(
    start: Callable[..., Engine], tmp_path: Path, family: str, backend: str
) -> None:
    """Three adapters and the base, chunked prompts, the same prompt under each: tokens equal, log-probs within 1e-4."""
    folders = make_adapters(family, tmp_path)
    engine = start(make(family), backend=backend, prefill_chunk=16, max_running=7)
    if isinstance(engine.runner.backend, NativeModel):
        engine.runner.backend.threads = 3 if family.startswith("qwen") else 1
    for name, folder in folders.items():
        engine.load_adapter(name, folder)
    names = [None, *folders]
    shared = prompts(1, seed=5)[0] * 2
    texts = [*prompts(7), shared, shared, shared, shared]
    chosen = [names[place % 4] for place in range(7)] + names
    requests = [
        engine.submit(text, greedy(7, logprobs=0), adapter=name) for text, name in zip(texts, chosen, strict=True)
    ]
    models = {name: merged(family, folders.get(name or "")) for name in names}
    shown = set()
    for text, name, request in zip(texts, chosen, requests, strict=True):
        done, (ids, values) = request.result(), alone(models[name], text, 7)
        assert done.ids == ids
        assert [row.logprob for row in done.logprobs] == pytest.approx(values, abs=1e-4)
        shown |= {tuple(ids)} if text is shared else set()
    assert len(shown) == 4  # negative control: each adapter matters


def test_the_prefix_cache_is_not_shared(start: Callable[..., Engine], tmp_path: Path) -> None:
    """Nor with an adapter that was loaded under the same name before; with itself it is."""
    folders = make_adapters("llama", tmp_path)
    engine = start(make("llama"))
    engine.load_adapter("one", folders["one"])
    prompt = prompts(1, seed=3)[0] * 3
    right = {name: alone(merged("llama", folders.get(name)), prompt, 4)[0] for name in ("base", "one", "two")}
    assert engine.submit(prompt, greedy(4)).result().ids == right["base"]
    assert engine.submit(prompt, greedy(4), adapter="one").result().ids == right["one"]
    assert engine.stats()["prefix_cache_hits"] == 0
    assert engine.submit(prompt, greedy(4), adapter="one").result().ids == right["one"]
    hits = engine.stats()["prefix_cache_hits"]
    assert hits > 0
    engine.unload_adapter("one")
    engine.load_adapter("one", folders["two"])
    assert engine.submit(prompt, greedy(4), adapter="one").result().ids == right["two"]
    assert engine.stats()["prefix_cache_hits"] == hits


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_loading_and_unloading_under_traffic(start: Callable[..., Engine], tmp_path: Path, backend: str) -> None:
    """Unloading waits for requests that are in and refuses others; slots are used again; nothing leaks."""
    folders = make_adapters("llama", tmp_path)
    engine = start(make("llama"), backend=backend, max_running=8)
    right = {name: alone(merged("llama", folder), [1, 2, 3], 25)[0] for name, folder in folders.items()}
    base = alone(make("llama"), [1, 2, 3], 25)[0]
    stop, wrong = threading.Event(), []

    def traffic() -> None:
        while not stop.is_set():
            if engine.generate([1, 2, 3], greedy(25)).ids != base:
                wrong.append("base")

    threads = [threading.Thread(target=traffic) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for round_ in range(6):
            names = random.Random(round_).sample(list(folders), 2)
            for name in names:
                engine.load_adapter(name, folders[name])
            requests = [(name, engine.submit([1, 2, 3], greedy(25), adapter=name)) for name in names * 2]
            requests[0][1].cancel()
            for name in names:
                engine.unload_adapter(name)
                with pytest.raises(RequestError, match="does not exist"):
                    engine.submit([1], greedy(1), adapter=name)
            for name, request in requests:
                if not request.cancelled:
                    assert request.finish_reason is not None  # unloading waited
                    assert request.result().ids == right[name]
            assert engine.adapter_folders == {}
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert isinstance(engine.adapters, Adapters)
    assert engine.adapters.loaded == {}
    if isinstance(engine.runner.backend, NativeModel):
        assert engine.runner.backend.updates.slots == 0
    else:
        assert not any(module.updates for module in engine.runner.model.modules() if isinstance(module, AdaptedLinear))


def test_unloading_waits_for_what_runs(start: Callable[..., Engine], tmp_path: Path) -> None:
    engine = start(make("llama"))
    engine.load_adapter("one", make_adapters("llama", tmp_path)["one"])
    gate = threading.Event()
    first = engine.submit([1, 2], greedy(3), lambda event: gate.wait() and None, adapter="one")
    thread = threading.Thread(target=engine.unload_adapter, args=("one",))
    thread.start()
    deadline = time.monotonic() + 120
    while engine.adapter_folders and time.monotonic() < deadline:
        time.sleep(0.005)
    assert engine.adapter_folders == {}
    assert thread.is_alive()
    with pytest.raises(UserError, match="being unloaded"):
        engine.load_adapter("one", tmp_path / "two")
    with pytest.raises(RequestError, match="does not exist"):
        engine.unload_adapter("one")
    gate.set()
    thread.join(120)
    assert not thread.is_alive()
    assert first.finish_reason == "length"


def test_what_is_refused_leaves_nothing(start: Callable[..., Engine], tmp_path: Path) -> None:
    folders = make_adapters("llama", tmp_path)
    engine = start(make("llama"), max_running=1, max_waiting=0)
    engine.load_adapter("one", folders["one"])
    with pytest.raises(UserError, match="loaded already"):
        engine.load_adapter("one", folders["two"])
    with pytest.raises(UserError, match="no such model folder"):
        engine.load_adapter("two", tmp_path / "nowhere")
    with pytest.raises(UserError, match="needs a name"):
        engine.load_adapter("", folders["two"])
    with pytest.raises(RequestError, match="`two` does not exist") as caught:
        engine.submit([1], adapter="two")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    with pytest.raises(RequestError, match="no tokens"):
        engine.submit([], adapter="one")
    with pytest.raises(QueueFullError):
        engine.submit_all([[1], [2]], greedy(1), adapter="one")
    engine.unload_adapter("one")  # would wait for ever if one of these were still counted
    folder = make_adapters("gpt2", tmp_path / "others")["one"]
    with pytest.raises(UserError, match="no such linear layer"):
        engine.load_adapter("other", folder)


def test_speculation_proposes_for_adapters_too(start: Callable[..., Engine], tmp_path: Path) -> None:
    folders = make_adapters("llama", tmp_path)
    engine = start(make("llama"))
    draft_always(engine, "ngram", 4)
    for name, folder in folders.items():
        engine.load_adapter(name, folder)
    prompt = prompts(1, seed=6)[0] * 3
    requests = {name: engine.submit(prompt, greedy(30), adapter=name) for name in (None, *folders)}
    for name, request in requests.items():
        assert request.result().ids == alone(merged("llama", folders.get(name or "")), prompt, 30)[0]
    assert engine.stats()["draft_tokens"] > 0


@pytest.mark.parametrize("bits", [8, 4])
def test_over_rounded_weights(start: Callable[..., Engine], tmp_path: Path, bits: int) -> None:
    """C over 8 and 4 bits with an adapter against the layers of QLoRA over the same rounded weights: the activations'
    rounding costs less than 10 % of what the adapter changes."""
    folder = make_adapters("llama", tmp_path)["one"]
    engine = start(quantize(make("llama"), bits), backend="native")
    engine.load_adapter("one", folder)
    prompt = prompts(1, seed=8)[0] * 2
    scored = engine.submit(prompt, greedy(1, prompt_logprobs=0), adapter="one").result().prompt_logprobs
    assert scored is not None
    right_model = quantize(make("llama"), bits)
    with torch.no_grad():
        base_TV = torch.log_softmax(right_model(torch.tensor([prompt]))[0], -1)
        load_lora(right_model, folder)
        right_TV = torch.log_softmax(right_model(torch.tensor([prompt]))[0], -1)
    places = range(len(prompt) - 1)
    right, base = (torch.tensor([float(x_TV[t, prompt[t + 1]]) for t in places]) for x_TV in (right_TV, base_TV))
    ours = torch.tensor([row.logprob for row in scored[1:] if row is not None])
    assert (ours - right).abs().mean() < 0.1 * (base - right).abs().mean()


def test_a_model_with_an_unmerged_adapter_takes_no_others(start: Callable[..., Engine], tmp_path: Path) -> None:
    """But it runs, through the reference."""
    folders = make_adapters("llama", tmp_path)
    model = make("llama")
    load_lora(model, folders["one"])
    engine = start(model)
    assert engine.runner.name == "reference"
    assert engine.generate([1, 2, 3], greedy(9)).ids == alone(merged("llama", folders["one"]), [1, 2, 3], 9)[0]
    with pytest.raises(UserError, match="not merged"):
        engine.load_adapter("two", folders["two"])


def test_c_refuses_an_adapter_that_is_not_there() -> None:
    model = make("llama")
    cache = PagedCache(model.config, 4, 8)
    native = NativeModel(model, cache.keys, cache.values, 8)
    batch = make_batch([[1, 2]], [0], [2], [np.arange(1, dtype=np.int32)], np.arange(2), 8, adapters=[1])
    assert batch.adapters == batch.row_adapters == (Segment(1, 0, 2),)
    with pytest.raises(AssertionError, match=r"an? adapter of the batch"):
        native.step(batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_c_a_token_does_not_depend_on_its_company(tmp_path: Path, dtype: torch.dtype) -> None:
    """One token alone, or among those of other adapters and of none: the same logits to the last bit."""
    model = make("llama", dtype=dtype)
    layers = {
        slot: read_adapter(folder, model.config).layers
        for slot, folder in enumerate(make_adapters("llama", tmp_path).values())
    }

    def logits(tokens: list[int], slots: list[int | None]) -> torch.Tensor:
        cache = PagedCache(model.config, 8, 8, dtype)
        native = NativeModel(model, cache.keys, cache.values, 8)
        native.set_adapters(layers)
        count, tables = len(tokens), [np.array([place], dtype=np.int32) for place in range(len(tokens))]
        batch = make_batch([[t] for t in tokens], [0] * count, [1] * count, tables, np.arange(count), 8, adapters=slots)
        with torch.inference_mode():
            return native.step(batch)

    slots: list[int | None] = [None, None, 0, 0, 1, 2, 2]
    together = logits([*range(7)], slots)
    for token, slot in enumerate(slots):
        assert torch.equal(logits([token], [slot])[0], together[token])
    assert not torch.equal(logits([3], [1])[0], together[3])  # negative control


def test_segments_worked_example() -> None:
    """Sequences of 3, 1 and 2 tokens, the last two with the adapter in slot 4; of the logits the last of each."""
    starts = np.array([0, 3, 4, 6])
    assert segments_of([None, 4, 4], starts, np.array([2, 3, 5])) == ((Segment(4, 3, 6),), (Segment(4, 1, 3),))
    assert segments_of([0, None, 4], starts, np.array([3])) == ((Segment(0, 0, 3), Segment(4, 4, 6)), ())
    assert segments_of([], starts, np.array([3])) == ((), ())


def test_triton_with_adapters(start: Callable[..., Engine], tmp_path: Path) -> None:
    """In the interpreter: what the reference gives."""
    pytest.importorskip("triton")
    folders = make_adapters("qwen3", tmp_path)
    engine = start(make("qwen3"), backend="triton")
    engine.load_adapter("one", folders["one"])
    engine.load_adapter("three", folders["three"])
    requests = {name: engine.submit([1, 2, 3], greedy(3), adapter=name) for name in ("one", "three", None)}
    for name, request in requests.items():
        assert request.result().ids == alone(merged("qwen3", folders.get(name or "")), [1, 2, 3], 3)[0]
