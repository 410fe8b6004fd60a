"""Exports, loaded by the libraries with their own loaders, and with the code in docs/export.md."""

import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn

from mcl.exporters import export
from mcl.objectives import MCL
from tests.conftest import ROOT
from tests.mcl.exporters.conftest import image

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)


def block(word: str) -> str:
    """The block of code in docs/export.md that contains `word`."""
    (found,) = [text for text in BLOCKS if word in text]
    return found


@torch.no_grad()
def same(ours: Any, theirs: Any) -> None:
    """Two lists of maps differ by at most 1e-5 of the largest feature."""
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(other, mine, rtol=0, atol=1e-5 * float(mine.abs().max()))


@torch.no_grad()
def backbone_maps(model: MCL) -> list[Tensor]:
    """C2 to C5 of :func:`image`."""
    return model.online.backbone(image())[::-1]


@torch.no_grad()
def pyramid(model: MCL) -> list[Tensor]:
    """P2 to P5 of :func:`image`."""
    return model.online.fpn(model.online.backbone(image()), range(4))[::-1]


@torch.no_grad()
def head(model: MCL, x: Tensor) -> Tensor:
    for conv in model.online.head.convs:
        x = conv(x).relu()
    return x


@pytest.mark.parametrize(("to", "ending"), [("torchvision", ".safetensors"), ("timm", ".pth")])
def test_torchvision_and_timm_in_their_other_format(
    to: str, ending: str, model: MCL, saved: Path, tmp_path: Path
) -> None:
    path = export(saved, to, output=tmp_path / f"x{ending}", check=True).path
    theirs: nn.Module
    if to == "timm":
        theirs = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(path))
    else:
        theirs = torchvision.models.resnet18()
        missing, unexpected = theirs.load_state_dict(safetensors.torch.load_file(path), strict=False)
        assert missing == ["fc.weight", "fc.bias"]
        assert unexpected == []
        theirs.fc = nn.Identity()
    with torch.no_grad():
        same([model.online.backbone(image())[0].mean((2, 3))], [theirs.eval()(image())])


def test_torchvision_detectors(resnet50: tuple[MCL, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = resnet50
    report = export(path, "torchvision-detection", check=True)
    assert report.verified is not None
    assert report.verified.difference <= 1e-5
    assert {name.split(".")[0] for name in report.verified.fresh} == {"rpn", "roi_heads"}
    monkeypatch.chdir(path.parents[3])
    names: dict[str, Any] = {}
    exec(block("maskrcnn_resnet50_fpn_v2"), names)
    detector = names["model"].eval()
    with torch.no_grad():
        maps = list(detector.backbone(image()).values())[:4]
        tiles = torch.randn(2, 256, 7, 7)
        same(pyramid(model), maps)
        same([head(model, tiles)], [nn.Sequential(*list(detector.roi_heads.box_head)[:4])(tiles)])


@pytest.mark.parametrize(("to", "word"), [("torchvision", "resnet50()"), ("timm", "timm.create_model")])
def test_lines_of_the_documentation(
    to: str, word: str, resnet50: tuple[MCL, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = resnet50
    export(path, to)
    monkeypatch.chdir(path.parents[3])
    names: dict[str, Any] = {}
    exec(block(word), names)
    first, last = names["model"].conv1.weight, names["model"].layer4[2].bn3.running_var
    assert torch.equal(first, model.online.backbone.conv1.weight)
    assert torch.equal(last, model.online.backbone.layer4[2].bn3.running_var)


def test_mmpretrain(model: MCL, saved: Path, resnet50: tuple[MCL, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mmpretrain", reason="needs MMDetection: make mmdet")
    report = export(saved, "mmpretrain", check=True)
    assert report.verified is not None
    assert report.verified.fresh == ()
    large, path = resnet50
    export(path, "mmpretrain")
    monkeypatch.chdir(path.parents[3])
    names: dict[str, Any] = {}
    from mmengine.registry import DefaultScope

    with DefaultScope.overwrite_default_scope("mmpretrain"):  # tests of fine-tuning leave MMDetection's
        exec(block("mmpretrain"), names)
    with torch.no_grad():
        same(backbone_maps(large)[-1:], names["model"].eval().backbone(image()))


class TestMMDetection:
    """The configurations in docs/export.md, built and loaded like MMEngine's runner does."""

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("mmdet", reason="needs MMDetection: make mmdet")

    @pytest.mark.parametrize("to", ["mmdet", "mmdet-retinanet"])
    def test_small_model_is_verified(self, to: str, saved: Path, tmp_path: Path) -> None:
        report = export(saved, to, check=True, output=tmp_path / "x.pth")
        assert report.verified is not None
        assert report.verified.difference <= 1e-5
        assert report.verified.library == "mmdet 3.3.0"

    def configure(self, word: str, folder: Path) -> Any:
        """A configuration of the documentation."""
        from mmengine.config import Config

        file = folder / "config.py"
        file.write_text(block(word))
        return Config.fromfile(file)

    def build(self, config: Any) -> Any:
        """A model or a part of one, with the initial values of a training."""
        import mmdet.models  # registers its modules
        from mmdet.registry import MODELS
        from mmengine.registry import DefaultScope

        assert mmdet.models
        with DefaultScope.overwrite_default_scope("mmdet"):
            model = MODELS.build(config)
            model.init_weights()
        return model

    def load(self, config: Any) -> tuple[Any, list[str], list[str]]:
        """The detector of a configuration, with ``load_from`` loaded, and the missing and unexpected names."""
        from mmengine.runner.checkpoint import load_checkpoint

        detector = self.build(config.model)
        weights = load_checkpoint(detector, config.load_from, map_location="cpu")["state_dict"]
        own = detector.state_dict()
        assert all(torch.equal(own[name], tensor) for name, tensor in weights.items() if name in own)
        return detector.eval(), [n for n in own if n not in weights], [n for n in weights if n not in own]

    def test_mask_rcnn(self, resnet50: tuple[MCL, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model, path = resnet50
        export(path, "mmdet")
        monkeypatch.chdir(path.parents[3])
        detector, missing, unexpected = self.load(self.configure("mask-rcnn_r50_fpn_mcl.py", tmp_path))
        assert unexpected == []
        assert {".".join(name.split(".")[:3]) for name in missing if name.startswith("roi_head.bbox")} == {
            "roi_head.bbox_head.fc_cls",
            "roi_head.bbox_head.fc_reg",
            "roi_head.bbox_head.shared_fcs",
        }
        assert not [name for name in missing if name.startswith(("backbone.", "neck."))]
        tiles = torch.randn(2, 256, 7, 7)
        with torch.no_grad():
            same(pyramid(model), detector.extract_feat(image())[:4])
            same([head(model, tiles)], [nn.Sequential(*detector.roi_head.bbox_head.shared_convs)(tiles)])

    def test_backbone_alone(self, resnet50: tuple[MCL, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model, path = resnet50
        export(path, "mmdet", parts=["backbone"])
        monkeypatch.chdir(path.parents[3])
        backbone = self.build(self.configure("mcl-backbone.py", tmp_path).model.backbone)
        backbone.eval()  # returns nothing
        with torch.no_grad():
            same(backbone_maps(model), backbone(image()))

    def test_retinanet(self, resnet50: tuple[MCL, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model, path = resnet50
        export(path, "mmdet-retinanet")
        monkeypatch.chdir(path.parents[3])
        detector, missing, unexpected = self.load(self.configure("retinanet_r50_fpn_mcl.py", tmp_path))
        assert unexpected == []
        assert {".".join(n.split(".")[:3]) for n in missing if n.startswith("neck.")} == {
            "neck.fpn_convs.3",
            "neck.fpn_convs.4",
        }
        with torch.no_grad():
            same(pyramid(model)[1:], detector.extract_feat(image())[:3])
