"""``mcl export --to hub``: a folder for sharing."""

import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
import yaml
from torch import Tensor

from dali_pipelines.geometry import Geometry
from mcl import config
from mcl.exporters import export
from mcl.exporters.files import write_folder
from mcl.objectives import MCL
from mcl.train.checkpoint import CheckpointError
from mcl.weights import files
from tests.mcl.exporters.conftest import image, make_model, save_model
from tests.mcl.exporters.test_libraries import backbone_maps, same

RECORDS = (
    {"kind": "train", "step": 2, "epoch": 0.5, "loss": 9.0},
    {"kind": "train", "step": 3, "epoch": 0.75, "loss": 8.25},
    {"kind": "train", "step": 4, "epoch": 1.0, "loss": 7.5},
    {"kind": "eval", "step": 3, "name": "knn", "split": "val", "accuracy": 0.5, "random": 0.25, "chance": 0.125,
     "classes": 8, "k": 10},
    {"kind": "eval", "step": 3, "name": "knn", "split": "val", "accuracy": 0.5, "random": 0.25, "chance": 0.125,
     "classes": 8, "k": 10, "by": "mcl evaluate"},
    {"kind": "eval", "step": 3, "name": "retrieval", "split": "train", "levels": [0.75, 0.5], "levels_se": [0.0, 0.0],
     "random": [0.25, 0.125], "random_se": [0.0, 0.0], "chance": 0.03125, "gallery": 32},
    {"kind": "eval", "step": 4, "name": "knn", "split": "val", "accuracy": 0.9, "random": 0.25, "chance": 0.125,
     "classes": 8, "k": 10},
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[MCL, Path]:
    """A model, and its checkpoint at step 3 in the folder of a run that continued to step 4."""
    folder = tmp_path_factory.mktemp("secret") / "runs" / "birds"
    model = make_model(Geometry(), backbone="resnet18", width=8, head_convs=1).eval()
    path = save_model(model, Geometry(), folder, root="/home/someone/secret")
    for name, kind in (("metrics.jsonl", "train"), ("evaluations.jsonl", "eval")):  # as runs write them
        (folder / name).write_text("".join(json.dumps(r) + "\n" for r in RECORDS if r["kind"] == kind))
    return model, path


def test_folder(run: tuple[MCL, Path]) -> None:
    model, path = run
    report = export(path, "hub", check=True)
    assert report.path == path.parent.parent / "exports" / "hub"
    (file,) = report.path.glob("*.safetensors")
    assert {file.name for file in report.path.iterdir()} == {file.name, "config.json", "README.md"}
    assert file.name == f"model-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}.safetensors"
    assert report.verified is not None
    assert report.usage.startswith(f"hf upload USER/NAME {report.path}  #")

    weights = safetensors.torch.load_file(file)
    backbone = torchvision.models.resnet18()
    body = {name.removeprefix("backbone.body."): tensor for name, tensor in weights.items() if ".body." in name}
    missing, unexpected = backbone.load_state_dict(body, strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    seen: list[Tensor] = []
    backbone.layer4.register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        backbone.eval()(image())
    same(backbone_maps(model)[-1:], seen)

    about = json.loads((report.path / "config.json").read_text())
    cfg = config.from_dict(about["config"])  # without private keys
    assert (cfg.model, cfg.montage) == (model.config.model, Geometry())
    assert about["figures"]["training"] == [{"step": 3, "epoch": 0.75, "loss": 8.25}]
    assert [record["name"] for record in about["figures"]["scores"]] == ["knn", "retrieval"]


def test_card(run: tuple[MCL, Path], tmp_path: Path) -> None:
    folder = export(run[1], "hub", output=tmp_path / "hub").path
    card = (folder / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "mcl",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["object-detection", "resnet18"],
        "license": "unknown",
        "datasets": [],
    }
    (file,) = folder.glob("*.safetensors")
    for words in (
        hashlib.sha256(file.read_bytes()).hexdigest(),
        f'load_file("{file.name}")',
        "epoch 0.75, loss 8.2500",
        "val   top-1  50.0%   random network  25.0%",
        " 75.0% ±0.0%",
    ):
        assert words in text
    assert "90.0%" not in text  # a score of a later step
    for file in folder.iterdir():
        assert b"secret" not in file.read_bytes()
    assert all(len(line) <= 200 for line in card.splitlines())


def test_of_several_weights_the_latest_are_read(run: tuple[MCL, Path], tmp_path: Path) -> None:
    """The same weights have the same file name; other weights are added to the folder."""
    for _ in range(4):
        folder = export(run[1], "hub", parts=["backbone"], output=tmp_path / "hub").path
    assert len(list(folder.glob("*.safetensors"))) == 1
    whole = export(run[1], "hub", output=folder)
    assert len(list(folder.glob("*.safetensors"))) == 2
    assert files.load(folder).keys() == whole.weights.keys()


def test_a_folder_keeps_its_other_files_and_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "clone"
    folder.mkdir()
    (folder / "a").write_text("old")
    (folder / ".gitattributes").write_text("theirs")
    with pytest.raises(CheckpointError, match="clone: cannot write"):
        write_folder(folder, tmp_path / "x.pt", {"a": b"new", "b" * 300: b"new"})
    assert {file.name for file in folder.iterdir()} == {"a", ".gitattributes"}
    with pytest.raises(CheckpointError, match="choose another output"):
        write_folder(folder, folder / "a", {"a": b"new"})
    assert (folder / "a").read_text() == "old"
