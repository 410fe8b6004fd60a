"""Checkpoints to export."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dali_pipelines.geometry import Geometry
from mcl.config import Config, DataConfig, ModelConfig, to_dict
from mcl.objectives import MCL
from mcl.train.checkpoint import FORMAT


def make_model(geometry: Geometry, **model: Any) -> MCL:
    """A model whose running statistics and target network are not the initial ones."""
    torch.manual_seed(0)
    made = MCL(Config(model=ModelConfig(hidden=32, **model), montage=geometry))
    for name, tensor in made.state_dict().items():
        if name.endswith("running_mean"):
            tensor.normal_(0, 0.1)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif name.endswith(("layer_scale", "relative_position_bias_table")):
            tensor.normal_()
        elif ".norm" in name and tensor.ndim == 1 and name.endswith(("weight", "bias")):
            tensor.normal_(float(name.endswith("weight")), 0.1)
        elif name.startswith("target.") and tensor.ndim > 1:
            tensor.mul_(0.5)
    return made


def save_model(model: MCL, geometry: Geometry, folder: Path, root: str = "") -> Path:
    """Writes a checkpoint into a run folder."""
    config = to_dict(dataclasses.replace(model.config, montage=geometry, data=DataConfig(root=root)))
    path = folder / "checkpoints" / "last.pt"
    path.parent.mkdir(parents=True)
    torch.save({"format": FORMAT, "config": config, "step": 3, "model": model.state_dict()}, path)
    return path


def image() -> Tensor:
    """(2, 3, 96, 64) of random values."""
    return torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def model() -> MCL:
    """A small model with the head that detectors call 4conv-1fc."""
    return make_model(Geometry(), backbone="resnet18", width=16).eval()


@pytest.fixture(scope="session")
def saved(model: MCL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(model, Geometry(), tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def resnet18vd(tmp_path_factory: pytest.TempPathFactory) -> tuple[MCL, Path]:
    """A small model with a backbone of RT-DETR, and its checkpoint."""
    model = make_model(Geometry(), backbone="resnet18vd", width=16).eval()
    return model, save_model(model, Geometry(), tmp_path_factory.mktemp("vd") / "runs" / "vd")


@pytest.fixture(scope="session")
def resnet50(tmp_path_factory: pytest.TempPathFactory) -> tuple[MCL, Path]:
    """A model with the paper's backbone, FPN and head, and its checkpoint."""
    model = make_model(Geometry(), backbone="resnet50").eval()
    return model, save_model(model, Geometry(), tmp_path_factory.mktemp("runs") / "runs" / "mcl")
