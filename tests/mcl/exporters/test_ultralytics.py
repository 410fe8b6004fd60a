"""A folder for ultralytics, loaded by its own functions: its forward computes our features."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcl.config import ConfigError
from mcl.exporters import export
from mcl.exporters.ultralytics import adapt
from mcl.objectives import MCL
from tests.mcl.exporters.conftest import image
from tests.mcl.exporters.test_libraries import backbone_maps, same


def test_without_ultralytics(resnet50: tuple[MCL, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    with pytest.raises(ConfigError, match=r"needs ultralytics \(.*AGPL-3\.0, suits you: pip install ultralytics"):
        export(resnet50[1], "ultralytics-rtdetr")


def test_scales_make_up_for_what_its_batch_norm_adds() -> None:
    """Also if the added value is far larger than the variance, and in training, if the batch has the running
    statistics."""
    torch.manual_seed(0)
    variance, x = torch.tensor([0, 1e-7, 1e-4, 1e-2, 1.0, 100.0]), torch.randn(64, 6, dtype=torch.float64)
    x = (x - x.mean(0)) / x.std(0) * variance.double().sqrt()
    ours = {"bn.weight": torch.randn(6), "bn.running_var": variance}
    theirs = adapt(ours)
    assert torch.equal(theirs["bn.running_var"], variance)
    wanted, got = (
        F.batch_norm(x, torch.zeros_like(x[0]), state["bn.running_var"].double(), state["bn.weight"].double(), eps=eps)
        for state, eps in ((ours, 1e-5), (theirs, 1e-3))
    )
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
    in_training = F.batch_norm(x, None, None, theirs["bn.weight"].double(), training=True, eps=1e-3)
    torch.testing.assert_close(in_training, wanted, rtol=0.02, atol=1e-6)


@torch.no_grad()
def maps(detector: nn.Module) -> list[Tensor]:
    """C2 to C5 of :func:`image`, computed by the library's forward."""
    seen: list[Tensor] = []
    layers: Any = detector.model
    for layer in layers[1:5]:
        layer.register_forward_hook(lambda _, __, out: seen.append(out))
    detector.eval()(image())
    return seen


@pytest.mark.soak
def test_its_rt_detr_takes_our_weights(resnet50: tuple[MCL, Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    ultralytics = pytest.importorskip("ultralytics", reason="needs ultralytics: make soak")
    model, path = resnet50
    report = export(path, "ultralytics-rtdetr", check=True, output=tmp_path / "out")
    assert report.verified is not None
    names: dict[str, Any] = {}
    exec(report.usage, names)
    same(backbone_maps(model), maps(names["model"].model))
    same(backbone_maps(model), maps(ultralytics.RTDETR(str(tmp_path / "out" / "rtdetr.pt")).model))
    # A strict load does not notice this: names and shapes are the same, but features differ.
    other = ultralytics.RTDETR("rtdetr-resnet50.yaml").load(str(tmp_path / "out" / "rtdetr.pt"))
    coarsest, wanted = maps(other.model)[-1], backbone_maps(model)[-1]
    assert float((coarsest - wanted).norm() / wanted.norm()) > 0.1
