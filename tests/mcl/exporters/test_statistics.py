"""BatchNorm's statistics of exports, on photographs."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dali_pipelines.geometry import Geometry
from dali_pipelines.source import open_source
from mcl.config import Config, ConfigError
from mcl.evaluation.features import photos
from mcl.exporters import TARGETS, export
from mcl.objectives import MCL
from tests.mcl.exporters.conftest import make_model, save_model

GEOMETRY = Geometry(cells=1)
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(scope="module")
def small() -> MCL:
    return make_model(GEOMETRY, backbone="resnet18", width=8)


@torch.no_grad()
def stem(model: MCL, root: Path) -> Tensor:
    """(C, values) of the first convolution's output on whole photographs."""
    ((pixels, _),) = photos(Config(montage=GEOMETRY), open_source(str(root)), torch.device("cpu"))
    maps: Tensor = model.online.backbone.conv1(pixels)
    return maps.transpose(0, 1).flatten(1)


def test_readers_that_freeze_batch_norm_get_those_of_the_runs_photographs(
    small: MCL, few_photos: Path, tmp_path: Path
) -> None:
    path = save_model(small, GEOMETRY, tmp_path, root=str(few_photos))
    report = export(path, "detectron2")
    assert report.metadata["statistics"] == "re-estimated on 32 photographs (backbone only)"
    assert "re-estimated on 32 photographs" in str(report)
    values = stem(small, few_photos)
    torch.testing.assert_close(report.weights["stem.conv1.norm.running_mean"], values.mean(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(report.weights["stem.conv1.norm.running_var"], values.var(1), rtol=1e-4, atol=0)
    own = small.online.state_dict()
    for ours, theirs in report.names.items():
        changed = ours.endswith(STATISTICS) and ours.startswith("online.backbone.")
        assert torch.equal(report.weights[theirs], own[ours.removeprefix("online.")]) != changed, ours


def test_named_folder_and_none(small: MCL, few_photos: Path, tmp_path: Path) -> None:
    path = save_model(small, GEOMETRY, tmp_path, root="/no/where")
    own = small.online.backbone.bn1.running_mean
    for to, name in (("detectron2", "stem.conv1.norm.running_mean"), ("torchvision", "bn1.running_mean")):
        report = export(path, to, statistics_of="none")
        assert torch.equal(report.weights[name], own)
        assert report.metadata["statistics"] == "as training left them"
    folder = min(few_photos.iterdir())  # a flat folder, whose layout is not that of the run
    report = export(path, "torchvision", statistics_of=str(folder), check=True)
    assert report.metadata["statistics"] == "re-estimated on 8 photographs (backbone only)"
    torch.testing.assert_close(report.weights["bn1.running_mean"], stem(small, folder).mean(1), rtol=0, atol=1e-5)
    with pytest.raises(
        ConfigError, match=r"--statistics: no photographs .*data\.root: /no/where.*set it to a folder, or to none"
    ):
        export(path, "detectron2")


def test_targets_that_freeze_batch_norm() -> None:
    assert {name for name, target in TARGETS.items() if target.freezes} == {
        "detectron2",
        "transformers-detr",
        "transformers-detr-resnet",
        "transformers-rtdetr",
    }
