"""Operators and layers beside those of others: what is compared, and how it is shown."""

import pytest
import torch
from torch import nn

from benchmarks import kernels, layers
from benchmarks.common import summary


def convolution() -> layers.Case:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 32, 16, 16, generator=generator, requires_grad=True)
    return layers.Case("a convolution", nn.Conv2d(32, 32, 3, padding=1, bias=False), [x])


def test_a_layer_is_raced_with_pytorchs_forward_and_backward() -> None:
    ours, theirs = layers._compare(convolution(), 2)
    assert (ours["name"], theirs["name"]) == ("a convolution: mcl", "a convolution: PyTorch")
    assert ours["n"] == theirs["n"] == 2
    assert 0 < theirs["forward"] < theirs["seconds"]
    assert (ours["ratio"], theirs["ratio"]) == (1, theirs["seconds"] / ours["seconds"])


def test_layers_that_differ_are_not_raced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers.layers, "use", lambda model: nn.init.zeros_(model.weight))
    with pytest.raises(AssertionError, match=r"a convolution: .* between ours and PyTorch's"):
        layers._compare(convolution(), 1)


def test_the_table_has_a_row_for_each_that_ours_is_compared_with() -> None:
    """Ours may come first or last."""
    seconds = {"a: mcl": 0.001, "a: PyTorch": 0.0024, "b: loop": 0.03, "b: foreach": 0.04, "b: mcl": 0.02}
    results = [summary(name, [s] * 3, ratio=s / seconds[f"{name[0]}: mcl"]) for name, s in seconds.items()]
    assert kernels.table(results).splitlines()[2:] == [
        "| a | 1 (0%) | PyTorch | 2.4 (0%) | 2.4x |",
        "| b | 20 (0%) | loop | 30 (0%) | 1.5x |",
        "| b | 20 (0%) | foreach | 40 (0%) | 2x |",
    ]
