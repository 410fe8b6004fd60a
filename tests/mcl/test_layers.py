"""Layers that become ours in place."""

from torch import nn

from mcl.models import layers


def test_layers_become_ours_and_pytorchs_again() -> None:
    kinds = [nn.Conv2d(3, 4, 3, bias=False), nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.ReLU()]
    model = nn.Sequential(*kinds)
    before = [type(m) for m in model]
    layers.use(model)
    assert [type(m).__module__.split(".")[0] for m in model] == ["mcl"] * 4 + ["torch"]
    layers.use(model, False, nn.Linear)
    assert [type(m).__module__.split(".")[0] for m in model] == ["mcl", "torch", "mcl", "mcl", "torch"]
    layers.use(model, ours=False)
    assert [type(m) for m in model] == before
