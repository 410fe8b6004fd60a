"""The loss, compared with values by hand and with its bounds."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from mcl.train.loss import info_nce, over_levels, total_loss

SHARP = partial(info_nce, temperature=0.2)


def test_two_tiles_by_hand() -> None:
    """Prediction (1, 0) and (0, 2) against targets (1, 0), (0, 1), (-1, 0), at temperature 0.5."""
    bank = torch.tensor([[1.0, 0], [0, 1], [-1, 0]], dtype=torch.float64)
    predictions = torch.tensor([[1.0, 0], [0, 2]], dtype=torch.float64)
    loss, positive, negative = info_nce(predictions, torch.tensor([0, 2]), bank, 0.5)
    first = -math.log(math.exp(2) / (math.exp(2) + 1 + math.exp(-2)))  # cosines 1, 0, -1
    second = -math.log(1 / (1 + math.exp(2) + 1))  # cosines 0, 1, 0; its own image is the third
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-12)
    assert positive.item() == pytest.approx(0.5)
    assert negative.item() == pytest.approx(((0 - 1) + (0 + 1)) / 4)


def test_levels_are_separate() -> None:
    torch.manual_seed(0)
    bank, a, b = F.normalize(torch.randn(8, 5), dim=1), torch.randn(6, 5), torch.randn(4, 5)
    rows = [torch.arange(6), torch.arange(4)]
    losses, positives, negatives = over_levels([a, b], rows, [bank], [[0], [0]], SHARP)
    for i, p in enumerate((a, b)):
        assert torch.equal(torch.stack([losses[i], positives[i], negatives[i]]), torch.stack(SHARP(p, rows[i], bank)))


def test_total_of_uniform_losses_is_four_times_the_cross_entropy() -> None:
    """With temperature 1 and the released weights: about 33.27 at the start with 4,096 targets."""
    losses = torch.full((2, 4), math.log(4096))
    assert total_loss(losses, (0.5, 0.25, 0.125, 0.125), 2).item() == pytest.approx(33.27, abs=0.01)
    assert total_loss(losses, (0.5, 0.25, 0.125, 0.125), 0.4).item() == pytest.approx(0.2 * 33.27, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    bank, predictions, rows = torch.randn(8, 5), torch.randn(6, 5).to(dtype), torch.arange(6)
    with torch.autocast("cpu", torch.bfloat16):
        losses, _, _ = over_levels([predictions], [rows], [bank], [[0]], SHARP)
    expected, _, _ = over_levels([predictions.float()], [rows], [bank], [[0]], SHARP)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, expected)


def test_gradient() -> None:
    torch.manual_seed(0)
    bank = F.normalize(torch.randn(7, 4, dtype=torch.float64), dim=1)
    predictions = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: info_nce(p, torch.arange(5), bank, 0.3)[0], predictions)
