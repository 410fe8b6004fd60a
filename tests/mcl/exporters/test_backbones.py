"""Every backbone in the modules of the libraries that have it, and an error for the others."""

from pathlib import Path
from typing import Any

import pytest

from dali_pipelines.geometry import Geometry
from mcl.config import ConfigError
from mcl.exporters import TARGETS, export
from mcl.models import backbones
from tests.mcl.exporters.conftest import make_model, save_model
from tests.mcl.exporters.matrix import CASES, render, written

FAST = {("mmdet", "resnet50vd"), ("timm", "resnet50vd"), ("mmpretrain", "resnext50_32x4d")}


@pytest.fixture(scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run with that backbone, and small otherwise."""
    small = {} if request.param == "resnet50" else {"width": 8, "head_convs": 1}  # torchvision's detectors have sizes
    model = make_model(Geometry(), backbone=request.param, **small)
    return save_model(model, Geometry(), tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize(
    ("checkpoint", "to"),
    [pytest.param(name, to, marks=[] if (to, name) in FAST else pytest.mark.soak) for to, name in CASES],
    indirect=["checkpoint"],
)
def test_features_are_the_same_there(checkpoint: Path, to: str, tmp_path: Path) -> None:
    """The check marks of the table in docs/export.md."""
    pytest.importorskip(TARGETS[to].twins[0].package.replace("-pretrain", ""), reason="make mmdet, make soak")
    output = tmp_path / f"x{next(iter(TARGETS[to].saves), '')}"
    report = export(checkpoint, to, check=True, statistics_of="none", output=output)
    assert report.verified is not None
    assert report.verified.difference <= 1e-5


def test_table_of_the_documentation() -> None:
    """``python -m tests.mcl.exporters.matrix`` writes it anew."""
    assert written() == render()


@pytest.mark.parametrize(
    ("to", "name", "message"),
    [
        (
            "torchvision",
            "resnet50vd",
            "torchvision has no ResNet-D; take --to mmdet, .*timm",
        ),
        ("mmdet", "resnet18vd", "resnet18vd"),
        ("torchvision-detection", "resnet152", "have a ResNet-50; take --to mmdet"),
    ],
)
def test_libraries_without_the_backbone(
    to: str, name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shallow: Any = {key: (block, [1, 1, 1, 1]) for key, (block, _) in backbones._RESNETS.items()}
    monkeypatch.setattr(backbones, "_RESNETS", shallow)
    path = save_model(make_model(Geometry(), backbone=name, width=8, head_convs=1), Geometry(), tmp_path)
    with pytest.raises(ConfigError, match=f"--to {to}: .*{message}"):
        export(path, to)
