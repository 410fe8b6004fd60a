"""``mcl export --to torchvision``: what it writes loads in torchvision and computes the same there."""

from pathlib import Path
from typing import BinaryIO

import pytest
import torch
import torchvision
from torch import nn

from mcl import checkpoint
from mcl.checkpoint import FORMAT, CheckpointError
from mcl.config import Config, ModelConfig, to_dict
from mcl.export import TARGETS, Report
from mcl.export.common import default_path, write
from mcl.export.torchvision import export
from mcl.models import MCL
from mcl.montage import Geometry

CLASSIFIER = {"fc.weight", "fc.bias"}
to_torchvision = TARGETS["torchvision"]


@pytest.fixture(scope="module")
def model() -> MCL:
    """A model whose running statistics and target network are not the initial ones."""
    torch.manual_seed(0)
    model = MCL(ModelConfig(backbone="resnet18", width=16, hidden=32), Geometry())
    for name, tensor in model.state_dict().items():
        if name.endswith("running_mean"):
            tensor.normal_(0, 0.1)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif name.startswith("target.") and tensor.ndim > 1:
            tensor.mul_(0.5)
    return model


@pytest.fixture(scope="module")
def saved(model: MCL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in a run folder."""
    path = tmp_path_factory.mktemp("run") / "checkpoints" / "step_00000003.pt"
    path.parent.mkdir()
    config = to_dict(Config(model=model.config))
    torch.save({"format": FORMAT, "config": config, "step": 3, "model": model.state_dict()}, path)
    return path


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_every_backbone_has_torchvisions_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        ours = export(MCL(ModelConfig(backbone=name, width=16, hidden=32), Geometry()))  # type: ignore[arg-type]
        theirs = getattr(torchvision.models, name)().state_dict()
    assert {k: t.shape for k, t in ours.items()} == {k: t.shape for k, t in theirs.items() if k not in CLASSIFIER}


@pytest.fixture(scope="module")
def report(saved: Path) -> Report:
    return to_torchvision(saved, None)


def test_file_loads_in_torchvision_and_gives_the_same_features(model: MCL, saved: Path, report: Report) -> None:
    assert report.path == saved.parent.parent / "exports" / "torchvision.pth"
    theirs = torchvision.models.resnet18()
    missing, unexpected = theirs.load_state_dict(torch.load(report.path, weights_only=True), strict=False)
    assert set(missing) == CLASSIFIER
    assert unexpected == []
    theirs.fc = nn.Identity()
    image = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        expected = model.online.backbone.eval()(image)[0].mean((2, 3))
        assert torch.equal(theirs.eval()(image), expected)


def test_report_accounts_for_every_tensor(model: MCL, report: Report) -> None:
    assert report.mapped + sum(report.unmapped.values()) == len(model.state_dict())
    assert list(report.unmapped) == ["fpn", "head", "predictors", "target"]
    assert set(report.missing) == CLASSIFIER
    assert report.difference == 0
    text = str(report)
    for word in (str(report.path), f"{report.mapped} written", "fpn 48", "fc.weight, fc.bias", "image: 0"):
        assert word in text


def test_exports_go_into_the_run_or_next_to_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "last.pt").symlink_to("step_00000003.pt")
    assert default_path(folder / "last.pt", "x.pth") == tmp_path / "run" / "exports" / "x.pth"
    assert default_path(tmp_path / "released.pt", "x.pth") == tmp_path / "released.x.pth"
    monkeypatch.chdir(folder)
    assert default_path(Path("last.pt"), "x.pth") == tmp_path / "run" / "exports" / "x.pth"


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(content: object, file: BinaryIO) -> None:
        file.write(b"half")
        raise RuntimeError("No space left on device")

    output = tmp_path / "torchvision.pth"
    output.write_bytes(b"old")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"torchvision\.pth: cannot write .*No space left"):
        write({}, output, tmp_path / "source.pt")
    assert output.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [output]


def test_output_in_the_way(tmp_path: Path) -> None:
    source = tmp_path / "source.pt"
    source.write_bytes(b"source")
    (tmp_path / "link.pt").symlink_to(source)
    for output, message in (
        (tmp_path, "cannot write"),  # a folder
        (source / "below" / "a.pth", "cannot write"),
        (source, "name another output"),
        (tmp_path / "link.pt", "name another output"),
    ):
        with pytest.raises(CheckpointError, match=message):
            write({}, output, source)
    assert source.read_bytes() == b"source"
    assert {path.name for path in tmp_path.iterdir()} == {"source.pt", "link.pt"}


def test_unusable_checkpoints_are_named(saved: Path, tmp_path: Path) -> None:
    half, text, empty, other, foreign, nan = (
        tmp_path / f"{name}.pt" for name in ("half", "text", "empty", "other", "foreign", "nan")
    )
    half.write_bytes(saved.read_bytes()[:10000])
    text.write_text("not a checkpoint\n")
    empty.touch()
    torch.save({"state_dict": {}}, foreign)
    state = checkpoint.load(saved)
    state["model"] = {name: tensor.flatten()[0].clone().expand(tensor.shape) for name, tensor in state["model"].items()}
    state["model"]["online.backbone.conv1.weight"] = torch.tensor(torch.nan).expand(64, 3, 7, 7)
    torch.save(state, nan)
    state["config"]["model"]["backbone"] = "resnet34"
    torch.save(state, other)
    for path, message in (
        (tmp_path / "none.pt", "no such checkpoint"),
        (half, "incomplete or not a checkpoint"),
        (text, "incomplete or not a checkpoint"),
        (empty, "incomplete or not a checkpoint"),
        (foreign, "import-openselfsup"),
        (other, "weights of another model"),
        (nan, "weights are not finite"),
    ):
        with pytest.raises(CheckpointError, match=f"{path.name}: .*{message}"):
            to_torchvision(path, None)
        assert not (tmp_path / f"{path.stem}.torchvision.pth").exists()
