"""Stamps of tokens: the same whoever has them, others in another step, row or column; layers that run again."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from soma.data.loader import Batch, PreferenceBatch
from soma.model.config import ModelConfig
from soma.model.dropout import GAMMA, mix, signed, stamped
from soma.model.lora import add_lora, lora_layers
from soma.model.lora_config import LoRAConfig
from soma.model.transformer import Transformer
from soma.train.recompute import recompute_layers
from soma.train.stamps import next_word, stamp, stamps
from tests.train.parity import GPT2, make_batch, make_pairs, rows_of


def of(batch: Batch) -> np.ndarray:
    assert batch.stamps is not None
    return batch.stamps


def test_ranks_have_the_stamps_of_one_process() -> None:
    whole = make_batch(1)
    alone = of(stamp(whole, 3, 7, 0))
    for ranks in (2, 4):
        count = len(whole.tokens) // ranks
        parts = [stamp(rows_of(whole, slice(r * count, r * count + count)), 3, 7, r) for r in range(ranks)]
        assert np.array_equal(np.concatenate([of(part) for part in parts]), alone)
    longer = stamps(3, 7, np.arange(16), 100)
    assert np.array_equal(longer[:, :32], alone)  # a padded sequence has those of the sequence


def test_pairs_too() -> None:
    whole = make_pairs(1)
    alone = stamp(whole, 3, 7, 0)
    half = PreferenceBatch(
        rows_of(whole.chosen, slice(8, 16)), rows_of(whole.rejected, slice(8, 16)), whole.is_pair[8:]
    )
    part = stamp(half, 3, 7, 1)
    for side in ("chosen", "rejected"):
        assert np.array_equal(of(getattr(part, side)), of(getattr(alone, side))[8:])
    both = np.concatenate((of(alone.chosen), of(alone.rejected)))
    assert len(np.unique(both)) == both.size


def test_no_two_tokens_have_one_stamp() -> None:
    """Of seeds, steps, rows and columns: 2^19 stamps, of which any two are one with a probability of 7e-9."""
    found = [stamps(seed, step, np.arange(32), 256) for seed in range(8) for step in range(8)]
    assert len(np.unique(np.stack(found))) == 2**19


def test_the_same_generator_as_the_masks() -> None:
    seeds = np.random.default_rng(0).integers(0, 2**63, 50).astype(np.uint64)
    for number in (0, 5):
        theirs = mix(torch.from_numpy(seeds.view(np.int64)) + signed((number + 1) * GAMMA % 2**64))
        assert np.array_equal(next_word(seeds, np.array([number])).view(np.int64), theirs.numpy())


def gradients(
    shape: Any, mode: bool | str, numbers: torch.Tensor, compiled: bool = False
) -> dict[str, torch.Tensor | None]:  # fmt: skip
    model = Transformer(shape, dtype=torch.float32)
    add_lora(model, LoRAConfig(r=4, lora_dropout=0.5))
    for layer in lora_layers(model).values():
        torch.nn.init.ones_(layer.lora_B)
    recompute_layers(model, mode)
    if compiled:
        for layer in model.layers:
            layer.forward = torch.compile(layer.forward, dynamic=False, backend="aot_eager")
    with stamped(numbers):
        loss = model.train()(torch.arange(24)[None]).square().sum()
    with stamped(numbers + 1):  # another pass is under way when the layers are computed again
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("mode", [True, "every:2", "selective"])
def test_a_layer_that_is_computed_again_has_the_same_mask(shape: Any, mode: bool | str) -> None:
    numbers = torch.arange(24)[None]
    plain, again = gradients(shape, False, numbers), gradients(shape, mode, numbers)
    other = gradients(shape, False, numbers + 1)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert gradient is not None
        assert torch.equal(gradient, again[name])
        assert not torch.equal(gradient, other[name])


@pytest.mark.slow
@pytest.mark.parametrize("mode", [False, True])
def test_compiled_layers_share_one_graph_and_have_the_same_mask(shape: Any, mode: bool) -> None:
    """A layer's salt is no constant of its graph: ten layers are compiled at most twice."""
    shape = shape.model_copy(update={"num_hidden_layers": 10})
    numbers = torch.arange(24)[None]
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        found = gradients(shape, mode, numbers, compiled=True)
    for name, gradient in gradients(shape, False, numbers).items():
        assert gradient is not None
        torch.testing.assert_close(found[name], gradient, atol=0, rtol=1e-4)


def test_layers_that_share_one_input_share_its_mask() -> None:
    """GPT-2's q, k and v are one layer in transformers, whose input is dropped once."""
    model = Transformer(ModelConfig(**GPT2), dtype=torch.float32)
    add_lora(model, LoRAConfig(r=4, lora_dropout=0.5))
    salts = {name: int(layer.salt) for name, layer in lora_layers(model).items()}
    attention = "layers.0.self_attn."
    assert salts[attention + "q_proj"] == salts[attention + "k_proj"] == salts[attention + "v_proj"]
    assert len(set(salts.values())) == len(salts) - 2 * len(model.layers)


def test_a_batch_is_changed_with_its_stamps() -> None:
    batch = make_batch(1)
    assert batch.map(lambda array: array[:2]).stamps is None
    assert of(replace(batch, stamps=batch.tokens).map(lambda array: array[:2])).shape == (2, 32)
