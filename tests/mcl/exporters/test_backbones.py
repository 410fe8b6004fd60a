"""Every backbone in the modules of the libraries that have it, and an error for the others."""

from pathlib import Path
from typing import Any, get_args

import pytest

from dali_pipelines.geometry import Geometry
from mcl.config import ConfigError, ModelConfig
from mcl.exporters import TARGETS, export
from mcl.models import backbones
from tests.mcl.exporters.conftest import make_model, save_model

NAMES: tuple[str, ...] = get_args(ModelConfig.__annotations__["backbone"])
FAST = {("mmdet", "resnet50vd"), ("timm", "resnet50vd"), ("mmpretrain", "resnext50_32x4d")}


@pytest.fixture(scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run with that backbone, and small otherwise."""
    model = make_model(Geometry(), backbone=request.param, width=8, head_convs=1)
    return save_model(model, Geometry(), tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize(
    ("checkpoint", "to"),
    [
        pytest.param(name, to, marks=[] if (to, name) in FAST else pytest.mark.soak)
        for name in NAMES
        for to, target in TARGETS.items()
        if name in target.backbones and target.twin and to != "torchvision-detection"
    ],
    indirect=["checkpoint"],
)
def test_features_are_the_same_there(checkpoint: Path, to: str, tmp_path: Path) -> None:
    if "mm" in to and to != "timm":
        pytest.importorskip("mmdet", reason="needs MMDetection: make mmdet")
    report = export(checkpoint, to, check=True, output=tmp_path / f"x{next(iter(TARGETS[to].saves))}")
    assert report.verified is not None
    assert report.verified.difference <= 1e-5


@pytest.mark.parametrize(
    ("to", "name", "message"),
    [
        (
            "torchvision",
            "resnet50vd",
            "no module for model.backbone=resnet50vd; take --to mmdet, .*timm",
        ),
        ("mmdet", "resnet18vd", "resnet18vd"),
        ("torchvision-detection", "resnet152", "runs with model.backbone=resnet50"),
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
