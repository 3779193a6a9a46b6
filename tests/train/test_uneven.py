"""What does not come out even: sequences that are padded, vocabularies and widths in unequal pieces, layers by count,
and a rotation that is stretched by a length of which each rank has a piece."""

from typing import Any

import pytest

from soma.base.errors import UserError
from soma.model.transformer import Transformer
from soma.train.parallel import apply
from soma.train.parallel.config import Layout
from soma.train.parallel.tensor import used_keys
from soma.train.world import World
from tests.train import parity
from tests.train.bounds import differences
from tests.train.parity import Case, Outcome, alone, train
from tests.train.pool import Pool
from tests.train.test_parity import check

# Sequences of 32 on three ranks have pieces of 6.
UNEVEN: list[Any] = [
    ({"cp": 3}, 3, Case("moe")),
    ({"pp": 3, "stage_layers": [1, 2, 1]}, 3, Case("moe4", microbatch=4)),
    ({"cp": 2}, 2, Case("odd", microbatch=1)),
    ({"tp": 2, "sp": True}, 2, Case("odd", microbatch=1)),
    pytest.param({"fsdp": 2, "tp": 2, "sp": True}, 4, Case("odd", microbatch=1), marks=pytest.mark.parallel),
    ({"tp": 4}, 4, Case("shared", lora="full")),
    pytest.param({"cp": 2, "tp": 2}, 4, Case("shared", optimizer="muon"), marks=pytest.mark.parallel),
    pytest.param({"tp": 4}, 4, Case("odd", microbatch=1, optimizer="muon"), marks=pytest.mark.parallel),
    pytest.param(
        {"cp": 3, "cp_method": "all_gather"}, 3, Case(pairs=True, microbatch=4), marks=pytest.mark.parallel
    ),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "ranks", "case"), UNEVEN, ids=lambda value: str(value))
def test_uneven(pool: Pool, layout: dict[str, Any], ranks: int, case: Case) -> None:
    check(pool, layout, [case], ranks)


def with_own_length_alone(rank: int, world_size: int) -> Outcome | None:
    """Each rank stretches by the largest position that it has itself."""
    whole_apply = apply.apply_context

    def wrong(model: Transformer, group: Any, method: str) -> None:
        whole_apply(model, group, method)
        assert model.rope is not None
        model.rope.largest = None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apply, "apply_context", wrong)
        outcome = train(Case("odd", microbatch=1), World.join(Layout(cp=2), "cpu"))
    return outcome if rank == 0 else None


def test_a_length_that_is_not_shared_is_seen(pool: Pool) -> None:
    found = differences(pool.run(with_own_length_alone, 2)[0], alone(Case("odd", microbatch=1)), "fp32")
    assert any(text.startswith("gradient 1") for text in found)


def refused(rank: int, world_size: int) -> str:
    """What a rank says of rounded weights whose key heads are shared unevenly."""
    wide = parity.MODELS["shared"] | {"head_dim": 32, "intermediate_size": 128}  # the pieces are whole groups
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(parity.MODELS, "shared", wide)
        with pytest.raises(UserError) as said:
            train(Case("shared", lora="int8"), World.join(Layout(tp=4), "cpu"))
    return str(said.value)


def test_rounded_key_heads_are_refused_on_all_ranks(pool: Pool) -> None:
    """Also on those whose own heads would do: they would wait for the others."""
    assert [used_keys(12, 3, 4, rank) for rank in range(4)] == [[0], [0, 1, 1], [1, 1, 2], [2]]
    said = "layout: tp 4 divides query heads so that they share 3 key heads unevenly"
    for text in pool.run(refused, 4):
        assert text.startswith(said)
