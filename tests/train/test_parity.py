"""The parity grid: every layout gives the loss, every gradient, the clipped norm and the weights of one process.

layouts × {dense, MoE} × {fp32, bf16} × {accumulation 1, 4} × {AdamW, Muon} on four Gloo processes, and layouts × models
for low-rank updates beside frozen weights, rounded or not, and for preference pairs. A slice of it that has every value
of every axis runs in `make test`, all of it in `make test-parallel`. A case trains three steps of the real loop on
packed documents with unequal numbers of targets; embeddings are tied.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

from soma.train.parallel import reduce
from soma.train.parallel.config import Layout
from soma.train.world import World
from tests.train.parity import ROWS, Case, Outcome, alone, differences, on_rank, train
from tests.train.pool import Pool

RANKS = 4
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp4": {"dp": 4},
    "zero1": {"fsdp": 4, "zero": 1},
    "zero2": {"fsdp": 4, "zero": 2},
    "zero3": {"fsdp": 4},
    "hybrid": {"dp": 2, "fsdp": 2},
    "tp4": {"tp": 4},  # two key heads on four ranks
    "dp2-tp2": {"dp": 2, "tp": 2},
    "fsdp2-tp2-sp": {"fsdp": 2, "tp": 2, "sp": True},
    "ep4": {"ep": 4},
    "fsdp4-ep2": {"fsdp": 4, "ep": 2},
    "fsdp2-tp2-ep2": {"fsdp": 2, "tp": 2, "ep": 2},
    "cp4": {"cp": 4},
    "cp4-gather": {"cp": 4, "cp_method": "all_gather"},
    "fsdp2-cp2": {"fsdp": 2, "cp": 2},
    "cp2-tp2-sp": {"cp": 2, "tp": 2, "sp": True},
    "cp2-ep2": {"dp": 2, "cp": 2, "ep": 2},
    "pp2-tp2-sp": {"pp": 2, "tp": 2, "sp": True, "schedule": "zb-h1"},
    "pp2-cp2": {"pp": 2, "cp": 2},
    "pp2-dp2-ep2": {"pp": 2, "dp": 2, "ep": 2},
    "pp2-fsdp2": {"pp": 2, "fsdp": 2, "schedule": "zb-h1"},
    "pp2-zero2": {"pp": 2, "fsdp": 2, "zero": 2, "schedule": "dualpipe"},
    "pp2-zero1-v": {"pp": 2, "fsdp": 2, "zero": 1, "schedule": "zb-v"},
    "pp2-fsdp2-v": {"pp": 2, "fsdp": 2, "schedule": "zb-v"},
    "pp2-fsdp2-ep2": {"pp": 2, "fsdp": 2, "ep": 2},
}
EIGHT: dict[str, tuple[dict[str, Any], list[Case]]] = {  # three and four dimensions
    "pp2-fsdp2-tp2-sp": ({"pp": 2, "fsdp": 2, "tp": 2, "sp": True}, [
        Case(microbatch=2), Case("latent", microbatch=4, optimizer="muon"), Case("gpt2", microbatch=2, lora="full"),
        Case(microbatch=2, checkpointing="selective"), Case("moe", "bf16", microbatch=2),
    ]),
    "pp2-dp2-fsdp2": ({"pp": 2, "dp": 2, "fsdp": 2, "schedule": "zb-v"}, [
        Case("dense4", microbatch=2), Case("moe4", microbatch=1, optimizer="muon"),
    ]),
    "pp2-fsdp2-cp2-ep2": ({"pp": 2, "fsdp": 2, "cp": 2, "ep": 2}, [
        Case("moe", microbatch=2), Case("latent", microbatch=2),
    ]),
    "pp2-fsdp2-tp2-ep2": ({"pp": 2, "fsdp": 2, "tp": 2, "ep": 2, "schedule": "zb-h1"}, [
        Case("moe", microbatch=2), Case("latent", microbatch=2, lora="full"),
    ]),
    "dp2-fsdp2-tp2": ({"dp": 2, "fsdp": 2, "tp": 2}, [Case(), Case("moe", optimizer="muon")]),
    "fsdp2-cp2-tp2": ({"fsdp": 2, "cp": 2, "tp": 2, "sp": True}, [Case(), Case("latent", checkpointing="every:2")]),
}  # fmt: skip


def accumulated(layout: dict[str, Any]) -> int:
    """The microbatch size with which a rank takes four microbatches in a step."""
    return ROWS // Layout(**layout).resolve(RANKS).data_ranks // 4


def cases(layout: dict[str, Any]) -> list[Case]:
    """All cases of a layout."""
    least = accumulated(layout)
    sizes = (least, least) if layout.get("schedule") == "dualpipe" else (None, least)  # which wants four microbatches
    deep = "4" if layout.get("schedule") in ("zb-v", "dualpipe") else ""  # two stages on each rank want four layers
    models = ("moe",) if "ep" in layout else (f"dense{deep}", f"moe{deep}")
    scaled = [Case(models[0], "fp16", sizes[1])] if "ep" not in layout else []
    every = [Case(*values) for values in product(models, ("fp32", "bf16"), sizes, ("adamw", "muon"))]
    return [*dict.fromkeys(every), *scaled]


# Every layout once or twice; together every model, precision, accumulation and optimizer.
SLICE: dict[str, list[dict[str, Any]]] = {
    "dp4": [{"optimizer": "muon", "microbatch": 1}, {"model": "moe"}],
    "zero1": [{"microbatch": 1}],
    "zero2": [{"model": "moe", "optimizer": "muon", "microbatch": 1}],
    "zero3": [{"model": "latent", "optimizer": "muon"}, {"checkpointing": True}],
    "hybrid": [{"precision": "bf16", "microbatch": 2}],
    "tp4": [{"optimizer": "muon"}],
    "dp2-tp2": [{"model": "moe"}, {"model": "gpt2"}],
    "fsdp2-tp2-sp": [{"model": "latent", "optimizer": "muon"}, {"checkpointing": True}, {"precision": "fp16"}],
    "ep4": [{"model": "moe", "microbatch": 1}],
    "fsdp4-ep2": [{"model": "latent", "optimizer": "muon"}],
    "fsdp2-tp2-ep2": [{"model": "moe", "optimizer": "muon"}],
    "cp4": [{"optimizer": "muon"}, {"precision": "bf16"}],
    "cp4-gather": [{"model": "latent"}, {"model": "gpt2", "isolate": False}],
    "fsdp2-cp2": [{"model": "moe", "microbatch": 2}],
    "cp2-tp2-sp": [{"model": "latent"}, {"checkpointing": True}],
    "cp2-ep2": [{"model": "moe"}],
    "pp2-tp2-sp": [{"model": "latent", "microbatch": 4, "optimizer": "muon"}],
    "pp2-cp2": [{"microbatch": 4, "checkpointing": True}],
    "pp2-dp2-ep2": [{"model": "moe", "microbatch": 2}],
    "pp2-fsdp2": [
        {"model": "latent", "microbatch": 2, "checkpointing": "selective"},
        {"precision": "fp16", "microbatch": 2},
    ],
    "pp2-zero2": [{"model": "dense4", "microbatch": 2, "optimizer": "muon"}],
    "pp2-zero1-v": [{"model": "moe4", "microbatch": 2}],
    "pp2-fsdp2-v": [{"model": "dense4", "microbatch": 2, "checkpointing": True}],
    "pp2-fsdp2-ep2": [{"model": "moe", "microbatch": 2}],
}


# Updates: repeated key heads; whole layers under FSDP; one A for three layers; latents; experts; stages.
LORA_SLICE: dict[str, Case] = {
    "tp4": Case(lora="full"),
    "zero3": Case("gpt2", lora="full", microbatch=1),
    "fsdp2-tp2-sp": Case("wide", lora="int8", checkpointing=True),
    "fsdp2-tp2-ep2": Case("moe", lora="full"),
    "cp2-tp2-sp": Case("latent", lora="full"),
    "pp2-tp2-sp": Case("gpt2", lora="full", microbatch=4),
}


def lora_cases(layout: dict[str, Any]) -> list[Case]:
    """All cases of a layout with updates; a weight that is cut is rounded where the pieces are whole groups."""
    if "ep" in layout:
        return [Case("moe", lora="full"), Case("latent", lora="full")]
    if layout.get("schedule") in ("zb-v", "dualpipe"):
        return [Case(model, lora="full", microbatch=accumulated(layout)) for model in ("dense4", "moe4")]
    plain = [Case(model, lora="full", microbatch=accumulated(layout)) for model in ("dense", "moe", "latent", "gpt2")]
    rounded = [Case("wide", lora="int8"), Case("wide", lora="int4", precision="bf16")]
    return plain + (rounded if layout.get("tp", 1) < 4 else [])


# Pairs: answers in pieces on several ranks; scores too; the reference in a pipeline, sharded, and with updates.
PAIRS_SLICE: dict[str, Case] = {
    "cp2-tp2-sp": Case("moe", pairs=True),
    "pp2-tp2-sp": Case("gpt2", pairs=True, microbatch=4),
    "pp2-fsdp2-v": Case("moe4", pairs=True, microbatch=2),
    "pp2-cp2": Case(pairs=True, microbatch=4, lora="full"),
}


def pairs_cases(layout: dict[str, Any]) -> list[Case]:
    """All cases of a layout with preference pairs."""
    least, deep = accumulated(layout), "4" if layout.get("schedule") in ("zb-v", "dualpipe") else ""
    dense = [] if "ep" in layout else [Case(f"dense{deep}", "bf16", least, pairs=True, checkpointing=True)]
    return [*dense, Case(f"moe{deep}", microbatch=least, pairs=True, optimizer="muon"),
            Case(f"moe{deep}", microbatch=least, pairs=True, lora="full")]  # fmt: skip


def check(pool: Pool, layout: dict[str, Any], chosen: list[Case], ranks: int = RANKS, timeout: float = 300) -> None:
    outcomes = pool.run(on_rank, ranks, layout, chosen, timeout=timeout)[0]
    for case, ours in zip(chosen, outcomes, strict=True):
        bounds = case.precision if case.model in ("dense", "dense4", "wide") or case.precision == "fp32" else "bf16 moe"
        assert differences(ours, alone(case), bounds) == [], (layout, case)


@pytest.mark.parametrize("name", LAYOUTS)
def test_slice(pool: Pool, name: str) -> None:
    check(pool, LAYOUTS[name], [Case(**values) for values in SLICE[name]])


@pytest.mark.parametrize("name", LORA_SLICE)
def test_lora_slice(pool: Pool, name: str) -> None:
    check(pool, LAYOUTS[name], [LORA_SLICE[name]])


@pytest.mark.parametrize("name", PAIRS_SLICE)
def test_pairs_slice(pool: Pool, name: str) -> None:
    check(pool, LAYOUTS[name], [PAIRS_SLICE[name]])


@pytest.mark.parallel
@pytest.mark.parametrize("name", LAYOUTS)
def test_pairs_grid(pool: Pool, name: str) -> None:
    check(pool, LAYOUTS[name], pairs_cases(LAYOUTS[name]))


@pytest.mark.parallel
@pytest.mark.parametrize("name", LAYOUTS)
def test_lora_grid(pool: Pool, name: str) -> None:
    check(pool, LAYOUTS[name], lora_cases(LAYOUTS[name]))


@pytest.mark.parallel
@pytest.mark.parametrize("name", LAYOUTS)
def test_grid(pool: Pool, name: str) -> None:
    check(pool, LAYOUTS[name], cases(LAYOUTS[name]))


@pytest.mark.parallel
@pytest.mark.parametrize("name", EIGHT)
def test_eight_ranks(name: str) -> None:
    """In processes of their own: torch remembers meshes by their shape, and finds a group of one that has ended."""
    layout, chosen = EIGHT[name]
    pool = Pool()
    try:
        for case in chosen:  # each with a process group of its own
            check(pool, layout, [case], ranks=8)
    finally:
        pool.close()


@pytest.mark.parallel
@pytest.mark.parametrize("layout", [{"fsdp": 2}, {"tp": 2, "sp": True}, {"cp": 2}, {"dp": 2, "ep": 2}])
def test_compiled_layers(pool: Pool, layout: dict[str, Any]) -> None:
    case = Case(compile=True, model="moe" if "ep" in layout else "dense")
    outcome = pool.run(on_rank, 2, layout, [case], timeout=500)[0][0]
    assert differences(outcome, alone(case), "fp32") == []


# --- Negative controls: the grid notices what is wrong. ---


def without_one_sum(world: World) -> Outcome:
    """Rank 0 takes its own gradients of one bucket for the sum."""
    finish = reduce.Reducer.finish

    def forgetful(self: reduce.Reducer) -> None:
        kept = [grad.clone() for grad in map(reduce.local_gradient, self.buckets[0])]
        finish(self)
        for parameter, grad in zip(self.buckets[0], kept, strict=True):
            reduce.local_gradient(parameter).copy_(grad)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduce.Reducer, "finish", forgetful)
        return train(Case(), world)


def with_one_loss_scaled(world: World) -> Outcome:
    """One rank's loss counts a quarter too much."""
    from soma.train.objective import LanguageModeling

    backward = LanguageModeling.backward

    def louder(self: LanguageModeling, part: Any, scale: torch.Tensor, aux_scale: torch.Tensor) -> torch.Tensor:
        return backward(self, part, scale * (1.25 if world.rank == 1 else 1.0), aux_scale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModeling, "backward", louder)
        return train(Case(), world)


def with_microbatches_swapped(world: World) -> Outcome:
    """Ranks 0 and 1 take each other's rows, so steps see the right rows but the targets of the other rank."""
    from tests.train import parity

    make = parity.make_batch

    def swapped(step: int) -> Any:
        batch = make(step)
        targets = batch.targets.copy()
        targets[:4], targets[4:8] = batch.targets[4:8], batch.targets[:4]
        return type(batch)(batch.tokens, targets, batch.positions, batch.document_ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "make_batch", swapped)
        return train(Case(), world)


def with_an_update_not_summed(rank: int, world_size: int) -> Outcome | None:
    """Each rank keeps its own part of A's gradient for the whole."""
    from soma.train.parallel import tensor

    whole_cut = tensor.cut

    def wrong(module: Any, name: str, mesh: Any, how: Any, partial: bool = False, view: Any = None) -> None:
        whole_cut(module, name, mesh, how, partial and name != "lora_A", view)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor, "cut", wrong)
        outcome = train(Case(lora="full"), World.join(Layout(tp=4), "cpu"))
    return outcome if rank == 0 else None


def test_an_update_that_is_not_summed_is_seen(pool: Pool) -> None:
    found = differences(pool.run(with_an_update_not_summed, RANKS)[0], alone(Case(lora="full")), "fp32")
    assert any(text.startswith("gradient 1, ") and "q_proj.lora_A" in text for text in found)
    assert not any(text.startswith("gradient 1, ") and "o_proj.lora_A" in text for text in found)


def with_answers_not_joined(rank: int, world_size: int) -> Outcome | None:
    """Each rank takes its piece of an answer for the whole."""
    from soma.train.parallel.apply import Parallel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parallel, "across", lambda self, logprobs_B: logprobs_B)
        outcome = train(Case(pairs=True), World.join(Layout(cp=4), "cpu"))
    return outcome if rank == 0 else None


def test_answers_that_are_not_joined_are_seen(pool: Pool) -> None:
    found = differences(pool.run(with_answers_not_joined, RANKS)[0], alone(Case(pairs=True)), "fp32")
    assert found[0].startswith("loss of step 1")
    assert any(text.startswith("gradient 1") for text in found)


def broken(rank: int, world_size: int, fault: Callable[[World], Outcome]) -> Outcome | None:
    outcome = fault(World.join(Layout(dp=4), "cpu"))
    return outcome if rank == 0 else None


@pytest.mark.parametrize("fault", [without_one_sum, with_one_loss_scaled, with_microbatches_swapped])
def test_faults_are_seen(pool: Pool, fault: Callable[[World], Outcome]) -> None:
    for precision in ("fp32", "bf16"):
        found = differences(pool.run(broken, RANKS, fault)[0], alone(Case()), precision)
        assert any(text.startswith("gradient 1") for text in found), precision
