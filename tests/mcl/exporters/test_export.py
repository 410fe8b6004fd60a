"""``mcl export`` to any target: files, reports and errors."""

import dataclasses
import json
import pickle
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import pytest
import safetensors
import torch
import torchvision
from torch import nn

from dali_pipelines.geometry import Geometry
from dali_pipelines.source import SourceError, open_source
from mcl import cli
from mcl import commands as run
from mcl.config import Config, ConfigError, DataConfig, ModelConfig, TrainerConfig
from mcl.exporters import TARGETS, export
from mcl.exporters.canonical import canonical_names
from mcl.exporters.files import default_path, write
from mcl.exporters.openselfsup import import_file, their_name
from mcl.objectives import MCL
from mcl.train import checkpoint
from mcl.train.checkpoint import CheckpointError
from tests.mcl.exporters.conftest import make_model, save_model


def test_canonical_names_and_shapes_are_torchvisions() -> None:
    with torch.device("meta"):
        encoder = MCL(Config(model=ModelConfig(hidden=32))).online
        detector = torchvision.models.detection.fasterrcnn_resnet50_fpn_v2(weights_backbone=None).state_dict()
    state = encoder.state_dict()
    names = canonical_names(encoder)
    kept = re.compile(r"backbone\.|roi_heads\.box_head\.[0-3]\.")
    assert {theirs: state[ours].shape for ours, theirs in names.items()} == {
        name: tensor.shape for name, tensor in detector.items() if kept.match(name)
    }
    prefixes = {"backbone.body": "backbone", "backbone.fpn": "fpn", "roi_heads.box_head": "head"}
    for ours, theirs in names.items():
        assert ours.partition(".")[0] == prefixes[".".join(theirs.split(".")[:2])]
    assert {name for name in state if name not in names} == {n for n in state if n.startswith("head.projector.")}


def test_maps_of_the_fpn_keep_their_number_where_levels_are_missing() -> None:
    with torch.device("meta"):
        geometry = Geometry(ratios=(1, 4), images_per_canvas=(1, 16))
        model = ModelConfig(backbone="resnet18", width=8, hidden=8, loss_weights=(0.5, 0.5))
        encoder = MCL(Config(model=model, montage=geometry)).online
    names = canonical_names(encoder)
    assert names["fpn.laterals.2.conv.weight"] == "backbone.fpn.inner_blocks.1.0.weight"  # C3
    assert names["fpn.outputs.1.conv.weight"] == "backbone.fpn.layer_blocks.1.0.weight"  # P3


@pytest.mark.parametrize(
    "to", [pytest.param(to, marks=[pytest.mark.soak] * (to == "ultralytics-rtdetr")) for to in TARGETS]
)
def test_report_accounts_for_every_tensor(
    to: str, model: MCL, saved: Path, resnet50: tuple[MCL, Path], resnet18vd: tuple[MCL, Path], tmp_path: Path
) -> None:
    if to == "ultralytics-rtdetr":
        pytest.importorskip("ultralytics", reason="needs ultralytics: make soak")
    if to in ("torchvision-detection", "ultralytics-rtdetr"):
        model, saved = resnet50
    if to == "transformers-rtdetr":
        model, saved = resnet18vd
    target = TARGETS[to]
    report = export(saved, to, statistics_of="none", output=tmp_path / f"x{next(iter(target.saves), '')}")
    own = model.state_dict()
    assert sorted([*report.names, *report.unmapped]) == sorted(own)
    assert {ours.split(".")[1] for ours in report.names} == set(target.parts) == set(report.metadata["parts"])
    assert list(report.names.values()) == list(report.weights)
    for ours, theirs in report.names.items():
        assert report.weights[theirs].shape == own[ours].shape
        assert report.weights[theirs].dtype == own[ours].dtype
    text = str(report)
    ours, theirs = next(iter(report.names.items()))
    for words in (
        str(report.path),
        "online network at step 3",
        f"{ours} -> {theirs} {list(own[ours].shape)}",
        f"predictors ({sum(n.startswith('predictors.') for n in own)})",
        "--verify",
        "statistics: as training left them",
        "left out  ",
        report.usage,
    ):
        assert words in text
    assert str(report.path) in report.usage


def test_files_hold_the_weights_and_say_what_they_are(model: MCL, saved: Path, tmp_path: Path) -> None:
    reports = {
        (to, ending): export(saved, to, parts=["backbone"], statistics_of="none", output=tmp_path / f"{to}{ending}")
        for to, ending in (("mmdet", ".pth"), ("torchvision", ".pth"), ("timm", ".safetensors"), ("detectron2", ".pkl"))
    }
    openmmlab = torch.load(tmp_path / "mmdet.pth", weights_only=True)
    plain = torch.load(tmp_path / "torchvision.pth", weights_only=True)
    pickled = pickle.loads((tmp_path / "detectron2.pkl").read_bytes())
    with safetensors.safe_open(tmp_path / "timm.safetensors", "pt") as file:
        safe = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()["mcl"])
    arrays = {name: torch.from_numpy(array) for name, array in pickled["model"].items()}
    assert pickled["matching_heuristics"] is True
    contents = [
        (openmmlab["state_dict"], openmmlab["meta"]["mcl"]),
        (plain, plain._metadata[""]["mcl"]),
        (safe, header),
        (arrays, pickled["mcl"]),
    ]
    own = model.state_dict()
    for report, (weights, metadata) in zip(reports.values(), contents, strict=True):
        assert metadata == report.metadata
        assert weights.keys() == report.weights.keys()
        assert all(torch.equal(weights[theirs], own[ours]) for ours, theirs in report.names.items())
    told = {key: header[key] for key in ("step", "network", "parts", "backbone", "width", "head_convs", "input")}
    assert told == {
        "step": 3,
        "network": "online",
        "parts": ["backbone"],
        "backbone": "resnet18",
        "width": 16,
        "head_convs": 4,
        "input": "RGB",
    }
    assert header["mean"] == [0.485, 0.456, 0.406]


def test_parts(saved: Path, tmp_path: Path) -> None:
    report = export(saved, "mmdet", parts=["head", "backbone"], output=tmp_path / "x.pth")
    assert {ours.split(".")[1] for ours in report.names} == {"backbone", "head"}
    assert report.metadata["parts"] == ["backbone", "head"]
    assert sum(name.startswith("online.fpn.") for name in report.unmapped) == 48


@pytest.mark.parametrize(
    ("to", "parts", "output", "message"),
    [
        ("mmdet", ["neck"], "x.pth", "--parts: no part 'neck'; parts are backbone, fpn, head"),
        ("mmdet", [""], "x.pth", "--parts: no part ''"),
        ("timm", ["fpn"], "x.pth", "--parts: timm has no place for the fpn; it takes backbone"),
        ("mmdet-retinanet", ["head"], "x.pth", "--parts: mmdet-retinanet has no place for the head"),
        ("mmdet", [], "x.safetensors", r"--output: .*x\.safetensors: mmdet reads only files that end in \.pth"),
        ("timm", [], "x", r"end in \.safetensors or \.pth"),
        (
            "torchvision-detection",
            [],
            "x.pth",
            "model.backbone=resnet18 is not supported: torchvision's detectors .* have a ResNet-50; .* it: mmdet, ",
        ),
    ],
)
def test_what_a_target_does_not_take(
    to: str, parts: Sequence[str], output: str, message: str, saved: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        export(saved, to, parts=parts, output=tmp_path / output)
    assert not list(tmp_path.iterdir())


def test_what_a_checkpoint_does_not_have(tmp_path: Path) -> None:
    geometry = Geometry(ratios=(1, 2, 4), images_per_canvas=(1, 4, 16))
    short = make_model(geometry, backbone="resnet18", width=8, head_convs=0, loss_weights=(0.5, 0.25, 0.25))
    path = save_model(short, geometry, tmp_path)
    with pytest.raises(ConfigError, match=r"reads P2, P3, P4, P5 .* trained no P2.* --parts backbone,head"):
        export(path, "mmdet")
    with pytest.raises(ConfigError, match=r"model.head_convs=0.*--parts backbone,fpn"):
        export(path, "mmdet", parts=["head"])
    names = {name for name in export(path, "mmdet-retinanet").weights if name.startswith("neck.")}
    assert len(names) == 36
    assert {".".join(name.split(".")[:3]) for name in names} == {
        f"neck.{kind}_convs.{i}" for kind in ("lateral", "fpn") for i in range(3)
    }


def test_library_that_is_not_installed(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    output = tmp_path / "timm.safetensors"
    with pytest.raises(ConfigError, match=r"--verify: needs timm \(.*\); install it: pip install timm"):
        export(saved, "timm", check=True, output=output)
    assert not output.exists()
    assert export(saved, "timm", output=output).verified is None
    assert output.exists()
    with pytest.raises(ConfigError, match="--verify: detectron2 is on no package index"):
        export(saved, "detectron2", statistics_of="none", check=True)


def test_verification_fails_where_the_library_differs(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_epsilon(config: ModelConfig) -> nn.Module:
        return torchvision.models.resnet18(norm_layer=lambda n: nn.BatchNorm2d(n, eps=1e-3))

    target = TARGETS["torchvision"]
    for build, message in (
        (lambda config: torchvision.models.resnet34(), "96 tensors are missing, unexpected or of another"),
        (lambda config: torchvision.models.wide_resnet50_2(), r"unexpected.*the first: layer1\.0\.bn3\.bias"),
        (other_epsilon, r"features of the backbone differ by 0\.\d+ in ResNet of torchvision"),
    ):
        twin = dataclasses.replace(target.twins[0], build=build)
        monkeypatch.setitem(TARGETS, "torchvision", dataclasses.replace(target, twins=[*target.twins, twin]))
        with pytest.raises(CheckpointError, match=message):
            export(saved, "torchvision", check=True, output=tmp_path / "x.pth")
        assert not list(tmp_path.iterdir())


def test_target_network_gets_statistics_of_its_own(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mcl.exporters.statistics._BATCHES", 2)
    geometry = Geometry(cells=1)
    model = make_model(geometry, backbone="resnet18", width=8)
    path = save_model(model, geometry, tmp_path, root="/no/where")
    with pytest.raises(SourceError, match=r"data\.root: /no/where"):
        export(path, "torchvision", network="target")
    few = tmp_path / "few"
    few.symlink_to(min((photos / "val").iterdir()))
    with pytest.raises(ConfigError, match=r"data.root: .*few has only \d images.* needs at least 32"):
        export(path, "torchvision", network="target", overrides=[f"data.root={few}"])

    overrides = [f"data.root={photos / 'val'}"]
    report = export(path, "torchvision", network="target", check=True, overrides=overrides)
    assert report.metadata["network"] == "target"
    assert report.verified is not None
    weights = torch.load(report.path)
    own = model.target.backbone.state_dict()
    for name, tensor in weights.items():
        statistic = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        assert torch.equal(tensor, own[name]) != statistic, name

    trainer = TrainerConfig(global_batch=64)
    config = dataclasses.replace(model.config, data=DataConfig(root=str(photos / "val")), trainer=trainer)
    query, key = run.batch(config, 0, open_source(str(photos / "val")))
    with torch.no_grad():
        stem = model.target.backbone.conv1(torch.cat([query.pixels, key.pixels]))
    mean, variance = stem.mean((0, 2, 3)), stem.var((0, 2, 3))
    assert float(((weights["bn1.running_mean"] - mean) / variance.sqrt()).abs().max()) < 0.2
    assert float((weights["bn1.running_var"] / variance).log().abs().max()) < 0.5


def test_authors_weights_go_through_the_same_exports(tmp_path: Path) -> None:
    """Both the authors' FPN and MMDetection's number maps from the finest."""
    model = make_model(Geometry(), backbone="resnet18", width=8, compute="released")
    authors = {
        their_name(name): tensor for name, tensor in model.state_dict().items() if not name.startswith("target.")
    }
    torch.save({"state_dict": authors}, tmp_path / "authors.pth")
    ours = import_file(tmp_path / "authors.pth", tmp_path / "ours.pt").path
    weights = torch.load(export(ours, "mmdet").path)["state_dict"]
    names = {name.replace("neck.", "encoder_q.1.", 1): tensor for name, tensor in weights.items()}
    assert sum(name.startswith("encoder_q.1.") for name in names) == 48
    for name, tensor in names.items():
        name = name.replace("backbone.", "encoder_q.0.", 1)
        name = name.replace("roi_head.bbox_head.shared_convs.", "encoder_q.2.cls_convs.", 1)
        assert torch.equal(tensor, authors[name]), name


def test_command_line(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(TARGETS) == cli.TARGETS
    cli.main(["export", str(saved), "--to", "torchvision", "--parts", "backbone", "--verify"])
    text, usage = capsys.readouterr().out.split("\n\n")
    output = saved.parent.parent / "exports" / "torchvision.pth"
    assert text.startswith(f"wrote     {output}\n")
    assert f"torchvision {torchvision.__version__.partition('+')[0]} (ResNet)" in text
    assert "no key missing or unexpected, features differ by at most 0\n" in text
    assert text.endswith("fresh     fc (2)")
    names = {"torch": torch, "torchvision": torchvision}
    exec(usage, names)
    assert torch.equal(names["model"].conv1.weight, torch.load(output)["conv1.weight"])  # type: ignore[attr-defined]


def test_exports_go_into_the_run_or_next_to_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "last.pt").symlink_to("step_00000003.pt")
    assert default_path(folder / "last.pt", "x.pth") == tmp_path / "run" / "exports" / "x.pth"
    assert default_path(tmp_path / "released.pt", "x.pth") == tmp_path / "released.x.pth"
    monkeypatch.chdir(folder)
    assert default_path(Path("last.pt"), "x.pth") == tmp_path / "run" / "exports" / "x.pth"


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    def full(file: BinaryIO) -> None:
        file.write(b"half")
        raise RuntimeError("No space left on device")

    output = tmp_path / "torchvision.pth"
    output.write_bytes(b"old")
    with pytest.raises(CheckpointError, match=r"torchvision\.pth: cannot write .*No space left"):
        write(output, tmp_path / "source.pt", full)
    assert output.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [output]


def test_output_in_the_way(tmp_path: Path) -> None:
    source = tmp_path / "source.pt"
    source.write_bytes(b"source")
    (tmp_path / "link.pt").symlink_to(source)
    for output, message in (
        (tmp_path, "cannot write"),  # a folder
        (source / "below" / "a.pth", "cannot write"),
        (source, "choose another output"),
        (tmp_path / "link.pt", "choose another output"),
    ):
        with pytest.raises(CheckpointError, match=message):
            write(output, source, lambda file: torch.save({}, file))
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
            export(path, "torchvision")
        assert not (tmp_path / f"{path.stem}.torchvision.pth").exists()
