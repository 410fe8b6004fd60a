"""The loss, by hand and by its bounds."""

import math

import pytest
import torch
import torch.nn.functional as F

from mcl.train.loss import contrast, info_nce, total_loss


def test_two_tiles_by_hand() -> None:
    """Prediction (1, 0) and (0, 2) against targets (1, 0), (0, 1), (-1, 0), at temperature 0.5."""
    bank = torch.tensor([[1.0, 0], [0, 1], [-1, 0]], dtype=torch.float64)
    predictions = torch.tensor([[1.0, 0], [0, 2]], dtype=torch.float64)
    loss, positive, negative = info_nce(predictions, torch.tensor([0, 2]), bank, 0.5)
    first = -math.log(math.exp(2) / (math.exp(2) + 1 + math.exp(-2)))  # cosines 1, 0, -1
    second = -math.log(1 / (1 + math.exp(2) + 1))  # cosines 0, 1, 0; its own is the third
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-12)
    assert positive.item() == pytest.approx(0.5)
    assert negative.item() == pytest.approx(((0 - 1) + (0 + 1)) / 4)


def test_levels_are_separate_and_the_bank_is_normalised() -> None:
    torch.manual_seed(0)
    bank, a, b = torch.randn(8, 5), torch.randn(6, 5), torch.randn(4, 5)
    rows = [torch.arange(6), torch.arange(4)]
    losses, positives, negatives = contrast([a, b], rows, 3 * bank, 0.2)
    for i, p in enumerate((a, b)):
        expected = info_nce(p, rows[i], F.normalize(bank, dim=1), 0.2)
        torch.testing.assert_close(torch.stack([losses[i], positives[i], negatives[i]]), torch.stack(expected))


def test_total_of_uniform_losses_is_four_times_the_cross_entropy() -> None:
    """At temperature 1 and the released weights: about 33.27 at the start with 4,096 targets."""
    losses = torch.full((2, 4), math.log(4096))
    assert total_loss(losses, (0.5, 0.25, 0.125, 0.125), 1.0).item() == pytest.approx(33.27, abs=0.01)
    assert total_loss(losses, (0.5, 0.25, 0.125, 0.125), 0.2).item() == pytest.approx(0.2 * 33.27, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    bank, predictions, rows = torch.randn(8, 5).to(dtype), torch.randn(6, 5).to(dtype), torch.arange(6)
    with torch.autocast("cpu", torch.bfloat16):
        losses, _, _ = contrast([predictions], [rows], bank, 0.2)
    expected, _, _ = contrast([predictions.float()], [rows], bank.float(), 0.2)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, expected)


def test_gradient() -> None:
    torch.manual_seed(0)
    bank = F.normalize(torch.randn(7, 4, dtype=torch.float64), dim=1)
    predictions = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: info_nce(p, torch.arange(5), bank, 0.3)[0], predictions)
