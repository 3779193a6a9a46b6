"""A model is laid out before it has memory: every rank then holds its part and one tensor, never the whole."""

import ctypes
import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from soma.base.errors import UserError
from soma.model.config import ModelConfig
from soma.model.hub import load_model, save_model
from soma.model.lora import add_lora, lora_layers
from soma.model.lora_config import LoRAConfig
from soma.model.quantized import quantize
from soma.model.reader import WeightReader
from soma.model.transformer import Transformer
from soma.train.compute import Compute
from soma.train.config import TrainConfig
from soma.train.parallel.apply import parallelize
from soma.train.parallel.config import Layout
from soma.train.parallel.export import save_whole
from soma.train.start import Start, fill
from soma.train.trainer import lay_out
from soma.train.world import World
from tests.train.parity import MODELS
from tests.train.pool import Pool

CPU = torch.device("cpu")
# 16 layers of 1.6M numbers: 106 MB in float32, the largest tensor 1.6 MB.
LARGE = ModelConfig(vocab_size=512, hidden_size=320, num_hidden_layers=16, num_attention_heads=8, num_key_value_heads=8,
                    intermediate_size=1280)  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_filled_model_is_the_model(name: str, tmp_path: Path) -> None:
    """From a shape as `init_weights`, from a folder as `load_model`, to the bit."""
    config = ModelConfig(**MODELS[name])
    whole = Transformer(config, device="cpu", dtype=torch.float32)
    whole.init_weights(5)
    save_model(whole, tmp_path)
    for start in (Start(config, 5), Start(tmp_path, 0)):
        model = Transformer(start.config, device="meta", dtype=torch.float32)
        fill(model, start, CPU)
        start.close()
        assert model.state_dict().keys() == whole.state_dict().keys()
        assert all(torch.equal(value, whole.state_dict()[key]) for key, value in model.state_dict().items())
    tokens_BT = torch.arange(16)[None]
    torch.testing.assert_close(model.eval()(tokens_BT), load_model(tmp_path)(tokens_BT), rtol=0, atol=0)


def test_updates_and_rounded_layers_too(tmp_path: Path) -> None:
    config, lora = ModelConfig(**MODELS["gpt2"]), LoRAConfig(r=4)
    whole = Transformer(config, device="cpu", dtype=torch.float32)
    whole.init_weights(5)
    start = Start(config, 5, lora)
    for bits in (None, 8):
        expected = Transformer(config, device="cpu", dtype=torch.float32)
        expected.load_state_dict(whole.state_dict())
        model = Transformer(config, device="meta", dtype=torch.float32)
        if bits is not None:
            quantize(expected, bits, head=False)
            quantize(model, bits, head=False, fetch=start.plain)
        add_lora(expected, lora, 5)
        add_lora(model, lora, 5)
        fill(model, start, CPU)
        ours, theirs = model.state_dict(), expected.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
        layers = lora_layers(model)
        assert layers["layers.0.self_attn.q_proj"].lora_A is layers["layers.0.self_attn.v_proj"].lora_A


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config.json there"):
        Start(tmp_path, 0)
    model = Transformer(ModelConfig(**MODELS["moe"]), dtype=torch.bfloat16)
    save_model(model, tmp_path)
    with WeightReader(tmp_path) as reader:
        assert reader.dtype == torch.bfloat16
        assert all(torch.equal(reader(name), value) for name, value in model.state_dict().items())
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(UserError, match="truncated: tensor"):
        Start(tmp_path, 0)


M_MMAP_THRESHOLD = -3  # <malloc.h>
PR_SET_THP_DISABLE = 41  # <linux/prctl.h>


class Growth:
    """Within it: how much more memory of its own this process has at most than when it began, in bytes.

    Pages of files do not count (the code of torch that runs for the first time is many megabytes, of which a busy
    machine has dropped more or less), large pages neither (they round up). A thread looks every half millisecond: on a
    busy machine it may miss a peak that is shorter than its turn, and never sees one that was not there.
    """

    def __enter__(self) -> "Growth":
        gc.collect()
        libc = ctypes.CDLL(None)
        libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 18)  # else freed tensors stay in a heap whose holes earlier tests have made
        libc.malloc_trim(0)  # else what an earlier test has freed hides what this one takes
        self.before = self.peak = own_memory()
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self.look)
        self.thread.start()
        return self

    def look(self) -> None:
        while not self.ending.wait(0.0005):
            self.peak = max(self.peak, own_memory())

    def __exit__(self, *error: object) -> None:
        self.ending.set()
        self.thread.join()
        self.peak = max(self.peak, own_memory())

    @property
    def bytes(self) -> int:
        return self.peak - self.before


def own_memory() -> int:
    """Anonymous memory of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def can_measure() -> bool:
    path = Path("/proc/self/status")
    return path.exists() and "RssAnon:" in path.read_text()


def grown(rank: int, world_size: int, layout: dict[str, Any], folder: str | None, out: str | None) -> tuple[int, int]:
    """Bytes that starting takes at most, and writing the model folder."""
    world = World.join(Layout(**layout), "cpu")
    config = TrainConfig(steps=1, batch_size=8, microbatch_size=1, sequence_length=32, layout=world.mesh.layout)
    for shape in (LARGE.model_copy(update={"hidden_size": 32, "intermediate_size": 64}), LARGE):  # imports come first
        with Growth() as starting:
            start = Start(shape if folder is None else Path(folder), 0)
            model = Transformer(start.config, device="meta", dtype=torch.float32)
            parallel, _ = lay_out(config, model, start, world, Compute(CPU, "fp32", False))
        if folder is not None:
            break
    with Growth() as exporting:
        if out is not None:
            save_whole(parallel, start.config, torch.float32, Path(out), None)
    return starting.bytes, exporting.bytes


@pytest.mark.skipif(not can_measure(), reason="no /proc/self/status with RssAnon")
@pytest.mark.parametrize(
    "layout",
    [
        {"fsdp": 4},
        pytest.param({"tp": 4}, marks=pytest.mark.parallel),
        pytest.param({"pp": 2, "fsdp": 2}, marks=pytest.mark.parallel),
        pytest.param({"pp": 4}, marks=pytest.mark.parallel),
    ],
    ids=str,
)
def test_no_rank_holds_the_whole_model(pool: Pool, tmp_path: Path, layout: dict[str, Any]) -> None:
    """A quarter, and what is on its way (0.27 to 0.30 of the whole were seen): at the start from a shape, in writing
    the folder (0.03 to 0.07), at the start from it."""
    whole = sum(value.nbytes for value in Transformer(LARGE, device="meta", dtype=torch.float32).state_dict().values())
    assert whole > 100e6
    for started, exported in pool.run(grown, 4, layout, None, str(tmp_path), timeout=400):
        assert whole / 8 < started < 0.45 * whole, (started, exported)
        assert exported < whole / 5, (started, exported)
    for started, _ in pool.run(grown, 4, layout, str(tmp_path), None, timeout=400):
        assert whole / 8 < started < 0.45 * whole, started


def held_whole(rank: int, world_size: int) -> int:
    world = World.join(Layout(fsdp=2), "cpu")
    with Growth() as growth:
        model = Transformer(LARGE, device="cpu", dtype=torch.float32)
        model.init_weights(0)
        assert parallelize(model, world.mesh)
    return growth.bytes


@pytest.mark.parallel
@pytest.mark.skipif(not can_measure(), reason="no /proc/self/status with RssAnon")
def test_a_whole_model_would_be_seen(pool: Pool) -> None:
    assert min(pool.run(held_whole, 2, timeout=400)) > 0.8 * 106e6
