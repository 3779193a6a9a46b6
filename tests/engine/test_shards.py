"""Shards of every family over real Gloo ranks give the logits of the whole model; what cannot be split says why."""

import random
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from family_models import BASE, FAMILIES, V, make

from soma.base.errors import UserError
from soma.engine.backends.reference import ReferenceModel
from soma.engine.batch import Batch, make_batch
from soma.engine.paged import PagedCache, PagedStep
from soma.engine.parallel.links import Links
from soma.engine.parallel.parts import pack, ranges, unpack
from soma.engine.parallel.stage import StageModel
from soma.model.config import ModelConfig
from soma.model.hub import load_config, load_model, save_model
from soma.model.shard import Shard, build_shard, check_split, load_shard
from tests.train.pool import Pool

TRITON = find_spec("triton") is not None
BLOCKS, BLOCK = 40, 8
MORE: dict[str, dict[str, Any]] = {
    "mixtral": {**FAMILIES["mixtral"], "moe_intermediate_size": 96},  # what its config.json can say
    "one-kv-head": {**BASE, "num_key_value_heads": 1},
    "odd-vocabulary": {**BASE, "vocab_size": 5, "tie_word_embeddings": True},
    "dense-among-experts": {**FAMILIES["qwen3_moe"], "decoder_sparse_step": 2, "num_hidden_layers": 4},
}


def steps(vocab_size: int, seed: int) -> list[Batch]:
    """Three sequences: prompts in one step, a chunk and single tokens in the next two."""
    draw = random.Random(seed)
    lengths, made = [0, 0, 0], []
    tables = [np.arange(s * 8, s * 8 + 8, dtype=np.int32) for s in range(3)]
    for counts in ([13, 5, 1], [7, 1, 1], [1, 1, 1]):
        tokens = [[draw.randrange(vocab_size) for _ in range(count)] for count in counts]
        used = [table[: -(-(length + count) // BLOCK)] for table, length, count in zip(tables, lengths, counts)]  # noqa: B905
        rows = np.arange(sum(counts), dtype=np.int64)[-12:]  # of the first step also some of the first prompt
        made.append(make_batch(tokens, lengths, counts, used, rows, BLOCK))
        lengths = [length + count for length, count in zip(lengths, counts)]  # noqa: B905
    return made


def logits_of(folder: str, rank: int, tensors: int, stages: int, seed: int, parts: int) -> list[torch.Tensor]:
    shard = Shard.of_rank(rank, tensors, stages)
    model = load_shard(folder, shard)
    whole = load_config(folder)
    stage = StageModel(model, PagedCache(model.config, BLOCKS, BLOCK), Links(shard), whole)
    with torch.inference_mode():
        made = [stage.step(unpack(pack(batch), parts, torch.device("cpu"))) for batch in steps(whole.vocab_size, seed)]
    return [logits for logits in made if logits is not None]


def on_a_rank(rank: int, world: int, cases: list[tuple[str, int, int, int, int]]) -> list[list[torch.Tensor]]:
    """Several cases (folder, tensor ranks, stages, seed, microbatches) one after the other."""
    made = [logits_of(folder, rank, *case) for folder, *case in cases]
    dist.barrier()
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every family on disk."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, values in MORE.items():
            patch.setitem(FAMILIES, name, values)
        for name in FAMILIES:
            made[name] = tmp_path_factory.mktemp(name)
            save_model(make(name), made[name])
    return made


@pytest.fixture(scope="module")
def wanted(folders: dict[str, Path]) -> dict[str, list[torch.Tensor]]:
    """Logits of the whole models."""
    made = {}
    for name, folder in folders.items():
        model = load_model(folder)
        reference = ReferenceModel(model.fuse(), PagedCache(model.config, BLOCKS, BLOCK))
        with torch.inference_mode():
            made[name] = [reference.step(batch) for batch in steps(model.config.vocab_size, 7)]
    return made


@pytest.mark.parametrize(("tensors", "stages", "parts"), [(2, 1, 1), (1, 2, 2), (1, 3, 2), (2, 2, 3), (4, 1, 1)])
def test_logits_are_those_of_the_whole(
    pool: Pool, folders: dict[str, Path], wanted: dict[str, list[torch.Tensor]], tensors: int, stages: int, parts: int
) -> None:
    cases = [(str(folder), tensors, stages, 7, parts) for folder in folders.values()]
    answers = pool.run(on_a_rank, tensors * stages, cases)
    assert not any(made for rank in answers[1:] for made in rank)
    for name, given in zip(folders, answers[0], strict=True):
        for found, right in zip(given, wanted[name], strict=True):
            assert found.shape == right.shape
            assert torch.allclose(found, right, atol=2e-4, rtol=1e-4), (name, (found - right).abs().max())


def broken(rank: int, world: int, folder: str) -> list[torch.Tensor]:
    """The second rank does not take part in the sums of its last MLP."""
    whole = Links.sum
    try:
        if rank == 1:
            Links.sum = lambda links, x: whole(links, x * 0.9)  # type: ignore[method-assign]
        return logits_of(folder, rank, 2, 1, 7, 1)
    finally:
        Links.sum = whole  # type: ignore[method-assign]


def test_a_wrong_sum_shows(pool: Pool, folders: dict[str, Path], wanted: dict[str, list[torch.Tensor]]) -> None:
    given = pool.run(broken, 2, str(folders["llama"]))[0]
    assert not torch.allclose(given[0], wanted["llama"][0], atol=1e-1)


def meets(rank: int, world: int, folder: str, meeting: str) -> int:
    """How many of its two microbatches this stage has worked on. The second one of the first stage and the first one
    of the second stage are done when both have begun: in a step whose stages do not overlap they never are."""
    done = 0

    def work(*_: object) -> None:
        nonlocal done
        if (rank, done) in ((0, 1), (1, 0)):
            Path(meeting, str(rank)).touch()
            deadline = time.monotonic() + 60
            while not Path(meeting, str(1 - rank)).exists():
                assert time.monotonic() < deadline, "the stages do not overlap"
                time.sleep(0.002)
        done += 1

    shard = Shard.of_rank(rank, 1, 2)
    model = load_shard(folder, shard)
    stage = StageModel(model, PagedCache(model.config, BLOCKS, BLOCK), Links(shard), load_config(folder))
    model.layers[0].register_forward_pre_hook(work)
    with torch.inference_mode():
        stage.step(unpack(pack(steps(V, 7)[2]), 2, torch.device("cpu")))
    dist.barrier()
    return done


def test_stages_overlap(pool: Pool, folders: dict[str, Path], tmp_path: Path) -> None:
    """The second stage has the first microbatch while the first stage has the second."""
    assert pool.run(meets, 2, str(folders["llama"]), str(tmp_path)) == [2, 2]


def test_every_weight_is_in_exactly_the_shards_that_need_it(folders: dict[str, Path]) -> None:
    """Bytes of all shards together: the whole, norms and routers once more for each rank."""
    whole = load_shard(folders["llama"], Shard())
    for tensors, stages in ((2, 1), (1, 3), (2, 3)):
        shards = [
            load_shard(folders["llama"], Shard.of_rank(rank, tensors, stages)) for rank in range(tensors * stages)
        ]
        split = [sum(p.numel() for p in shard.parameters() if p.dim() > 1) for shard in shards]
        total = sum(p.numel() for p in whole.parameters() if p.dim() > 1)
        assert sum(split) == total
        assert max(split) < 1.3 * total / len(shards)


def test_parts_are_the_batch() -> None:
    for seed in range(5):
        for batch in steps(50, seed):
            (same,) = unpack(pack(batch), 1, torch.device("cpu"))
            for name, value in vars(batch).items():
                given = getattr(same, name)
                assert (
                    torch.equal(given, value) and given.dtype == value.dtype
                    if name[-1].isupper() or name.endswith("S1")
                    else given == value
                )
            halves = unpack(pack(batch), 2, torch.device("cpu"))
            assert torch.equal(torch.cat([half.slots_T for half in halves]), batch.slots_T)
            assert sum(len(half.logit_rows_R) for half in halves) == len(batch.logit_rows_R)
            assert [half.num_sequences for half in halves] == [
                e - s for s, e in ranges(batch.query_starts_S1.numpy(), 2)
            ]
    assert ranges(np.array([0, 6, 7, 8, 12]), 2) == [(0, 1), (1, 4)]
    assert ranges(np.array([0, 100]), 4) == [(0, 1)]
    assert ranges(np.array([0, 1, 2, 3, 4]), 2) == [(0, 2), (2, 4)]


@pytest.mark.skipif(not TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("name", ["llama", "mixed-windows", "mixtral"])
def test_attention_in_triton_is_that_of_the_reference(name: str) -> None:
    """Under Triton's interpreter, in float32; on GPUs `test_parallel.py` compares tokens."""
    from soma.engine.parallel.triton_step import TritonStep

    model = make(name).fuse()
    caches = [PagedCache(model.config, BLOCKS, BLOCK) for _ in range(2)]
    assert TritonStep.supports(model.config, model.dtype)
    assert not TritonStep.supports(ModelConfig(**FAMILIES["deepseek_v2"]), model.dtype)
    with torch.inference_mode():
        for batch in steps(V, 3):
            given, right = (
                model.features(batch.tokens_T[None], batch.positions_T[None], cache=kind(cache, batch))[0]
                for kind, cache in zip((TritonStep, PagedStep), caches, strict=True)
            )
            assert torch.allclose(given, right, atol=1e-4, rtol=1e-4), (given - right).abs().max()


def test_what_cannot_be_split_says_why() -> None:
    nine = ModelConfig(**{**BASE, "hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3})
    for tensors, stages, words in (
        (2, 1, "num_attention_heads 9 / 2 = 4.50.*can be split over 1, 3$"), (1, 4, "only 3 layers"),
        (0, 1, "1 or more"), (1, 0, "1 or more"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            check_split(nine, tensors, stages)
    check_split(nine, 3, 3)
    with pytest.raises(UserError, match=r"num_key_value_heads 3 neither divides by it \(3 / 2"):
        check_split(
            ModelConfig(**{**BASE, "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}), 2, 1
        )
    with pytest.raises(UserError, match="moe_intermediate_size 41 / 2"):
        build_shard(ModelConfig(**{**FAMILIES["mixtral"], "moe_intermediate_size": 41}), Shard(tensors=2))
