"""Passes in turns beside copies on one device, against plain stages with all experts. On a GPU where there is one."""

from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.peers.exchanges import CopyExchange
from soma.model.config import ModelConfig
from soma.model.transformer import Transformer
from soma.train.parallel.exchange import moment
from soma.train.parallel.expert import spread
from soma.train.parallel.pipeline import overlap
from soma.train.parallel.pipeline.microbatch import Microbatch
from soma.train.parallel.pipeline.overlap import OverlapWorker, in_turns
from soma.train.parallel.pipeline.pieces import Recorder
from soma.train.parallel.pipeline.schedules import SCHEDULES
from soma.train.parallel.pipeline.stage import StageWorker, cut
from tests.train.parity import LATENT

RANKS, B, T = 2, 2, 48
CPU = torch.device("cpu")
NO_HEAD: Any = None  # neither stage is the last
DEVICES = [
    CPU,
    pytest.param(
        torch.device("cuda", 0),
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
    ),
]


def stages(device: torch.device, ranks: int) -> tuple[Transformer, list[Any]]:
    """The second and third quarter of a model, where its tokens travel between `ranks` ranks that are all alike."""
    config = ModelConfig(**LATENT | {"num_hidden_layers": 6, "hidden_size": 64})
    torch.manual_seed(0)
    model = Transformer(config)
    parts = cut(model, SCHEDULES["dualpipe"](4, 8), 1, [[0], [1, 2], [3, 4], [5]])
    for layer in model.layers:
        experts = layer.mlp.experts
        local = config.num_experts // RANKS
        for name, whole in list(experts.named_parameters()):
            own = whole.detach()[:local]
            setattr(experts, name, torch.nn.Parameter(own if ranks > 1 else own.repeat(RANKS, 1, 1)))
        if ranks > 1:
            spread(experts, config.num_experts, CopyExchange(ranks, passes=3))
    return model.to(device).train(), parts


def microbatches(device: torch.device) -> list[Microbatch]:
    """Two of them, with packed documents."""
    tokens = torch.zeros(B, T, dtype=torch.long, device=device)
    positions = torch.arange(T, device=device).repeat(B, 1)
    return [Microbatch(tokens, tokens, positions, (positions >= cut).long()) for cut in (7, 30)]


def prepare(workers: list[Any], device: torch.device) -> None:
    for worker in workers:
        worker.microbatches = microbatches(device)
        worker.aux_scale = torch.tensor(0.5, device=device)


def values(device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, T, 64, generator=generator).to(device)


def plain(device: torch.device) -> dict[str, Tensor]:
    """F and B of two microbatches, one after the other, with all experts here."""
    model, (one, other) = stages(device, 1)
    workers = [
        StageWorker(stage, NO_HEAD, nullcontext, split=(), recompute=False, compiled=False) for stage in (one, other)
    ]
    prepare(workers, device)
    found = {}
    for index in (0, 1):
        found[f"a{index}"] = workers[0].forward(index, values(device, index))
        found[f"b{index}"] = workers[1].forward(index, values(device, 10 + index))
    for index in (0, 1):
        found[f"grad b{index}"] = workers[1].backward(index, values(device, 20 + index))
        found[f"grad a{index}"] = workers[0].backward(index, values(device, 30 + index))
    return found | {
        name: p.grad.unflatten(0, (RANKS, -1)).sum(0) if ".mlp.experts." in name else p.grad
        for name, p in model.named_parameters() if p.grad is not None
    }  # fmt: skip


def turns(device: torch.device, later: bool = False, recompute: bool = False) -> dict[str, Tensor]:
    """The same in pieces; the second microbatch's forwards beside the first one's backwards. `later`: W at the end."""
    model, parts = stages(device, RANKS)
    split = (0, 1) if later else ()
    one, other = (
        OverlapWorker(stage, NO_HEAD, nullcontext, split=split, recompute=recompute, apart=True) for stage in parts
    )
    prepare([one, other], device)
    found: dict[str, Any] = {"a0": one.forward(0, values(device, 0)), "b0": other.forward(0, values(device, 10))}
    found["a1"], found["grad b0"] = in_turns(
        one.forward_pass(1, values(device, 1)), other.backward_pass(0, values(device, 20))
    )
    found["b1"], found["grad a0"] = in_turns(
        other.forward_pass(1, values(device, 11)), one.backward_pass(0, values(device, 30))
    )
    found["grad b1"] = other.backward(1, values(device, 21))
    found["grad a1"] = one.backward(1, values(device, 31))
    if later:
        assert all(
            p.grad is None for name, p in model.named_parameters() if ".mlp.experts." in name or "o_proj" in name
        )
    for worker in (one, other):
        worker.weight(0)
        worker.weight(1)
        assert not worker.trails
        assert not worker.notes
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def furthest(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of a tensor, relative to its norm."""
    assert ours.keys() == expected.keys()
    return max(float((ours[name] - value).norm() / value.norm().clamp(min=1e-6)) for name, value in expected.items())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("more", [{}, {"later": True}, {"recompute": True}])
def test_turns_equal_plain_stages(device: torch.device, more: dict[str, bool]) -> None:
    with exact(device):
        expected = plain(device)
        for _ in range(1 if device == CPU else 5):  # memory is used again
            assert furthest(turns(device, **more), expected) < 3e-5


@contextmanager
def exact(device: torch.device) -> Any:
    """Products of float32 in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_copy_that_does_not_wait_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The computing stream is held up before every piece, and copies wait for an event that is long over."""
    device = torch.device("cuda", 0)
    plain_run, plain_start, early = Recorder.run, overlap.start, moment(device)

    def run(recorder: Recorder, *args: Any) -> Any:
        torch.cuda._sleep(20_000_000)
        return plain_run(recorder, *args)

    def start(exchange: Any, x_PD: Tensor, to_R: list[int], from_R: list[int], ready: Any) -> Any:
        return plain_start(exchange, x_PD, to_R, from_R, early)

    with exact(device):
        expected = plain(device)
        monkeypatch.setattr(Recorder, "run", run)
        assert furthest(turns(device), expected) < 3e-5
        monkeypatch.setattr(overlap, "start", start)
        assert not furthest(turns(device), expected) < 3e-5
