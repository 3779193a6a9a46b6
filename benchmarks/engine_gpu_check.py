"""The engine's GPU path against the reference on the same GPU: run by `engine_gpu.py --check`."""

import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from engine_gpu import DEVICE, SHAPE, Ids, random_model

from soma.engine.backends.reference import ReferenceModel
from soma.engine.backends.triton import TritonModel
from soma.engine.batch import Batch, make_batch
from soma.engine.engine import Engine
from soma.engine.paged import FP8, PagedCache
from soma.engine.params import SamplingParams
from soma.engine.request import Request
from soma.model.config import ModelConfig
from soma.model.kernels.reference import relative_error
from soma.model.transformer import Transformer

BLOCK = 16
LOGITS_BOUND = 1.1  # largest error of bf16 logits against float32, relative to that of the reference in bf16


def check() -> None:
    """Raises AssertionError at the first difference that is too large."""
    check_logits()
    check_greedy()
    print("check: the GPU path agrees with the reference", file=sys.stderr, flush=True)


def check_logits() -> None:
    """bf16, four layers of the 8B shape: chunks mixed with single tokens, then a decode step, eager and as a graph."""
    model = random_model(num_hidden_layers=4).fuse()
    draw = random.Random(3)
    lengths = [700, 33, 130, 1, 257]
    ids = [[draw.randrange(SHAPE["vocab_size"]) for _ in range(length + 8)] for length in lengths]
    outputs: list[list[torch.Tensor]] = []
    exact = random_model(torch.float32, num_hidden_layers=4)
    exact.load_state_dict(model.state_dict())
    with torch.inference_mode():
        reference = ReferenceModel(exact, PagedCache(model.config, 100, BLOCK, torch.float32, DEVICE))
        right = [reference.step(batch) for batch in steps(ids, lengths)]
        for kind, graphs in ((ReferenceModel, False), (TritonModel, False), (TritonModel, True)):
            cache = PagedCache(model.config, 100, BLOCK, model.dtype, DEVICE)
            backend = TritonModel(model, cache, (8, 1024)) if graphs else kind(model, cache)
            outputs.append([backend.step(batch) for batch in steps(ids, lengths)])
    rows = [[relative_error(a.float(), b) for a, b in zip(found, right, strict=True)] for found in outputs]
    for name, errors in zip(("reference", "Triton", "Triton, graphs"), rows, strict=True):
        shown = " ".join(f"{error:.2e}" for error in errors)
        print(f"  check bf16 logits against float32, {name}: {shown}", file=sys.stderr, flush=True)
        assert all(error < LOGITS_BOUND * usual for error, usual in zip(errors, rows[0], strict=True)), name
    check_fp8(model, steps(ids, lengths), right)
    wrong = relative_error(outputs[1][2].flip(0).float(), right[2])
    assert wrong > 10 * max(rows[0]), "logits of other sequences passed"


def check_fp8(model: Transformer, batches: list[Batch], right: list[torch.Tensor]) -> None:
    """Over an FP8 cache Triton's logits are as near to float32 as the reference's over such a cache."""
    rows = []
    with torch.inference_mode():
        for kind in (ReferenceModel, TritonModel):
            backend = kind(model, PagedCache(model.config, 100, BLOCK, FP8, DEVICE))
            found = [backend.step(batch) for batch in batches]
            rows.append([relative_error(a.float(), b) for a, b in zip(found, right, strict=True)])
    for name, errors in zip(("reference", "Triton"), rows, strict=True):
        shown = " ".join(f"{error:.2e}" for error in errors)
        print(f"  check bf16 logits over an FP8 cache against float32, {name}: {shown}", file=sys.stderr, flush=True)
    assert all(error < LOGITS_BOUND * usual for error, usual in zip(rows[1], rows[0], strict=True))


def steps(ids: list[list[int]], lengths: list[int]) -> list[Batch]:
    """All prompts at once, one of them with its last token in a step of its own; decode steps of five and of one."""
    tables, first = [], 0
    for row in ids:
        blocks = -(-len(row) // BLOCK)
        tables.append(np.arange(first, first + blocks, dtype=np.int32)[::-1].copy())
        first += blocks
    batches, done = [], [0] * len(ids)
    for counts in ([lengths[0] - 1, *lengths[1:]], [1, 5, 1, 1, 1], [1] * 5, [0, 0, 1, 0, 0]):
        chosen = [s for s, count in enumerate(counts) if count]
        tokens = [ids[s][done[s] : done[s] + counts[s]] for s in chosen]
        new = [counts[s] for s in chosen]
        rows = np.cumsum(new, dtype=np.int64) - 1
        batches.append(
            make_batch(tokens, [done[s] for s in chosen], new, [tables[s] for s in chosen], rows, BLOCK, DEVICE)
        )
        done = [start + count for start, count in zip(done, counts, strict=True)]
    return batches


def trained() -> Transformer:
    """A byte-level model of four layers, float32, trained for some seconds on this repository's own text."""
    root = Path(__file__).resolve().parent.parent / "soma"
    text = b"".join(path.read_bytes() for path in sorted(root.rglob("*.py")))
    data = torch.tensor(list(text), device=DEVICE)
    config = ModelConfig(
        vocab_size=256, hidden_size=256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
        intermediate_size=768, max_position_embeddings=2048,
    )  # fmt: skip
    model = Transformer(config, device=DEVICE, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(400):
        starts = torch.randint(len(data) - 257, (32,), device=DEVICE)
        rows = data[starts[:, None] + torch.arange(257, device=DEVICE)]
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"  check: trained to a loss of {loss.item():.2f} nats a byte", file=sys.stderr, flush=True)
    assert loss.item() < 2.5, "it has not learned"
    return model


def check_greedy() -> None:
    """The same greedy tokens in float32: alone, batched, in chunks, behind a cached prefix, after preemption."""
    model = trained()
    root = Path(__file__).resolve().parent.parent / "soma" / "engine"
    text = (root / "scheduler.py").read_bytes()
    draw = random.Random(5)
    cuts = [draw.randrange(len(text) - 600) for _ in range(24)]
    prompts = [list(text[cut : cut + draw.randrange(1, 500)]) for cut in cuts]

    def ids(requests: list[Request]) -> list[list[int]]:
        return [request.result().ids for request in requests]

    greedy = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    plain = Engine(model, Ids(), backend="reference", cache_tokens=32768, prefix_cache=False)
    expected = [plain.generate(prompt, greedy).ids for prompt in prompts]
    plain.close()
    for name, options in {
        "batched": {}, "no graphs": {"cuda_graphs": False}, "chunks of 37": {"prefill_chunk": 37, "max_running": 5},
        "preemption": {"cache_tokens": 2048, "max_running": 20},
    }.items():  # fmt: skip
        engine = Engine(model, Ids(), backend="triton", **{"cache_tokens": 32768, **options})
        assert ids(engine.submit_all(prompts, greedy)) == expected, name
        assert ids(engine.submit_all(prompts, greedy)) == expected, f"{name}, behind a cached prefix"
        figures = engine.stats()
        assert name == "preemption" or figures["prefix_cache_hits"] > 0
        assert name != "preemption" or figures["preemptions"] > 0, "nothing was preempted"
        if name == "batched":
            assert [engine.generate(prompt, greedy).ids for prompt in prompts[:6]] == expected[:6], "alone"
        engine.close()
        print(f"  check greedy tokens, {name}: the same", file=sys.stderr, flush=True)
