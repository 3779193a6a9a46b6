"""Dropout by stamps: the generator's words, the share that is dropped, independence, pieces of a layer, gradients."""

from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from soma.base.errors import UserError
from soma.model.dropout import GAMMA, dropped, kept_share, mix, signed, stamped, steps_of
from soma.model.lora import LoRALinear

WORDS = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # SplitMix64's first ones from the seed 0
COUNT = 512


def mask(stamps: Tensor, salt: int = 0, first: int = 0, count: int = COUNT, share: float = 0.5) -> Tensor:
    with stamped(stamps):
        return dropped(torch.Size((*stamps.shape, count)), torch.tensor(salt), first, share)


def stamps_of(seed: int, *shape: int) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, shape, generator=torch.Generator().manual_seed(seed))


def by_hand(word: int) -> int:
    """The same with Python's whole numbers."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        word = (word ^ (word >> shift)) * factor % 2**64
    return word


def test_the_words_of_the_generator() -> None:
    numbers = torch.arange(1, 4) * signed(GAMMA)
    assert mix(numbers).tolist() == [signed(word) for word in WORDS]
    stamps = stamps_of(0, 200)
    assert mix(stamps.clone()).tolist() == [signed(by_hand(stamp % 2**64)) for stamp in stamps.tolist()]


def test_a_mask_by_hand() -> None:
    """From the definition: word number n of the seed mix(stamp ^ salt) has inputs 4n to 4n+3, 16 bits each."""
    stamp, salt, share = -123456789, 987654321, 0.3
    seed = by_hand((stamp ^ salt) % 2**64)
    expected = []
    for number in range(5):
        word = by_hand((seed + (number + 1) * GAMMA) % 2**64)
        expected += [signed((word >> 16 * place & 0xFFFF) << 48) >> 48 for place in range(4)]
    found = mask(torch.tensor([stamp]), salt, count=20, share=share)
    assert found.tolist() == [[bits < round(share * 65536) - 32768 for bits in expected]]


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped(share: float) -> None:
    """The probability is a whole number of 1/65,536; in 2^20 draws it is met within four standard deviations."""
    exact = 1 - kept_share(share)
    assert exact == steps_of(share) / 65536
    assert abs(exact - share) <= 0.5 / 65536
    drawn = mask(stamps_of(1, 2048), share=share).double()
    assert abs(drawn.mean() - exact) < 4 * (exact * (1 - exact) / drawn.numel()) ** 0.5
    for side in (0, 1):  # of each input, and of each token
        deviations = (drawn.mean(side) - exact) / (exact * (1 - exact) / drawn.size(side)) ** 0.5
        assert abs(deviations.square().mean() - 1) < 5 * (2 / len(deviations)) ** 0.5


def test_the_ends_of_the_range() -> None:
    assert (steps_of(0.0), steps_of(0.1), steps_of(1 - 1e-9)) == (0, 6554, 65535)
    assert kept_share(0.5) == 0.5
    assert not mask(stamps_of(2, 64), share=1e-9).any()


def dependent(stamps: Tensor, salt: int = 0) -> Tensor:
    """A generator that adds in place of mixing: a negative control."""
    words = (stamps + salt)[:, None] + torch.arange(COUNT) * 999
    return words % 1000 < 500


def furthest(draw: Callable[..., Tensor]) -> float:
    """The largest correlation, in standard deviations, of masks that should have nothing to do with each other: of
    layers, of stamps that differ in one bit, of inputs and of tokens beside each other."""
    stamps = stamps_of(3, 1024)
    near = torch.stack([stamps ^ (1 << bit) for bit in (0, 1, 31, 32, 62)])
    masks = [draw(stamps, salt) for salt in (0, 3, 2**40 + 5)] + [draw(row) for row in near]
    pairs = list(combinations(masks, 2))
    for step in (1, 2, 3, 4, 5, 64):
        pairs += [(one[:, step:], one[:, :-step]) for one in masks[:1]]
        pairs += [(one[step:], one[:-step]) for one in [draw(torch.arange(1024))]]
    signs = [(one.float() * 2 - 1, other.float() * 2 - 1) for one, other in pairs]
    return max(float((a * b).sum().abs()) / a.numel() ** 0.5 for a, b in signs)


def test_masks_of_layers_and_tokens_are_independent() -> None:
    assert furthest(mask) < 4.5
    assert furthest(dependent) > 100


def test_inputs_that_lie_on_several_ranks() -> None:
    stamps = stamps_of(4, 3, 5)
    whole = mask(stamps, 7, count=51)
    for first in range(12):
        for count in (1, 2, 7, 26, 39):
            assert torch.equal(mask(stamps, 7, first, count), whole[..., first : first + count])


def layer(share: float = 0.25) -> LoRALinear:
    torch.manual_seed(0)
    base = nn.Linear(32, 8)
    return LoRALinear(base, nn.Parameter(torch.randn(4, 32)), nn.Parameter(torch.randn(8, 4)), 2.0, share, salt=5)


def test_a_layer_drops_forwards_and_backwards() -> None:
    """It is the layer of inputs that were masked by hand, and its gradients are those; their mean is eval mode's."""
    ours, x = layer(), torch.randn(6, 32, requires_grad=True)
    stamps = stamps_of(5, 6)
    with stamped(stamps):
        ours(x).square().sum().backward()
    found = [x.grad, ours.lora_A.grad, ours.lora_B.grad]
    x.grad = ours.lora_A.grad = ours.lora_B.grad = None
    kept = ~mask(stamps, 5, count=32, share=0.25) / 0.75
    (ours.base(x) + 2.0 * (x * kept) @ ours.lora_A.T @ ours.lora_B.T).square().sum().backward()
    for mine, right in zip(found, [x.grad, ours.lora_A.grad, ours.lora_B.grad], strict=True):
        torch.testing.assert_close(mine, right, atol=1e-3, rtol=1e-5)
    with torch.no_grad(), stamped(stamps_of(6, 40_000)):
        mean = ours(x[:1].expand(40_000, 32)).mean(0)
        assert (mean - ours.eval()(x[0])).abs().max() < 0.05 * ours(x[0]).abs().max()


def test_training_without_stamps_is_refused() -> None:
    ours, x = layer(), torch.randn(2, 32)
    with pytest.raises(UserError, match="must know which tokens it is about"):
        ours(x)
    ours.eval()(x)
    layer(0.0)(x)


def test_batches_that_numpy_has_turned_round() -> None:
    """A part of the columns, as context parallelism takes them, is not contiguous."""
    stamps = stamps_of(7, 4, 16)
    part = torch.from_numpy(stamps.numpy()[:, np.array([1, 2, 9, 10])])
    assert torch.equal(mask(part, count=8), mask(stamps, count=8)[:, [1, 2, 9, 10]])
    assert torch.equal(mask(stamps.T.contiguous().T, count=8), mask(stamps, count=8))


@pytest.mark.slow
def test_compiled_masks_have_the_same_bits() -> None:
    torch._dynamo.reset()
    ours = layer()
    compiled = torch.compile(lambda shape, first: dropped(shape, ours.salt, first, 0.3))
    for seed in range(3):
        with stamped(stamps_of(seed, 4, 16)):
            assert torch.equal(
                compiled(torch.Size((4, 16, 30)), 2), dropped(torch.Size((4, 16, 30)), ours.salt, 2, 0.3)
            )
