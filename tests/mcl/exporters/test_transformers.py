"""Folders for transformers, loaded by its own functions: its forward computes our features."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor

from dali_pipelines.geometry import Geometry
from mcl.config import ConfigError
from mcl.exporters import export
from mcl.objectives import MCL
from tests.mcl.exporters.conftest import image, make_model, save_model
from tests.mcl.exporters.test_libraries import backbone_maps, block, same

transformers = pytest.importorskip("transformers", reason="needs transformers: make setup")

SHALLOW = {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 10, "num_labels": 3}


@pytest.fixture(scope="module")
def folders(saved: Path, resnet18vd: tuple[MCL, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exported folders, by target."""
    folder, files = tmp_path_factory.mktemp("transformers"), (saved, saved, resnet18vd[1])
    return {
        to: export(file, to, statistics_of="none", output=folder / to).path
        for to, file in zip(
            ("transformers-detr", "transformers-detr-resnet", "transformers-rtdetr"), files, strict=True
        )
    }


@torch.no_grad()
def maps(detector: Any, pixels: Tensor) -> list[Tensor]:
    """The maps that the library's forward computes, finest first."""
    seen: list[Tensor] = []
    detector.model.backbone.register_forward_hook(lambda _, __, out: seen.extend(pixels for pixels, _ in out))
    detector.eval()(pixel_values=pixels)
    return seen


@pytest.mark.parametrize(
    ("to", "name"),
    [
        (f"transformers-{to}", name)
        for to in ("detr", "detr-resnet")
        for name in ("Detr", "ConditionalDetr", "DeformableDetr")
    ]
    + [("transformers-rtdetr", name) for name in ("RTDetr", "RTDetrV2")],
)
def test_detectors_take_our_weights(
    to: str, name: str, folders: dict[str, Path], model: MCL, resnet18vd: tuple[MCL, Path]
) -> None:
    ours = resnet18vd[0] if name.startswith("RT") else model
    detector_class = getattr(transformers, f"{name}ForObjectDetection")
    keys: dict[str, Any] = SHALLOW
    if name not in ("Detr", "RTDetr"):  # another class gets its own configuration, with the folder's backbone
        configured = transformers.AutoConfig.from_pretrained(folders[to])
        own = {"backbone_config": configured.backbone_config}
        if name == "RTDetrV2":
            own["encoder_in_channels"] = configured.encoder_in_channels
        keys = {"config": getattr(transformers, f"{name}Config")(**own, **SHALLOW)}
    detector, info = detector_class.from_pretrained(folders[to], output_loading_info=True, **keys)
    assert not [key for key in info["missing_keys"] if "backbone" in key]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    got = maps(detector, image())
    assert len(got) >= 3
    same(backbone_maps(ours)[-len(got) :], got)


@pytest.mark.parametrize(
    ("name", "keys"), [("DetrModel", {}), ("DetrForSegmentation", {"key_mapping": {"^model": "detr.model"}})]
)
def test_classes_with_another_prefix(name: str, keys: dict[str, Any], folders: dict[str, Path], model: MCL) -> None:
    made, info = getattr(transformers, name).from_pretrained(
        folders["transformers-detr-resnet"], output_loading_info=True, **keys, **SHALLOW
    )
    assert not [key for key in info["missing_keys"] if "backbone" in key]
    assert not info["unexpected_keys"]
    backbone = (made.detr.model if name == "DetrForSegmentation" else made).backbone
    assert torch.equal(backbone.model.embedder.embedder.convolution.weight, model.online.backbone.conv1.weight)


@pytest.mark.parametrize("to", ["transformers-detr", "transformers-detr-resnet", "transformers-rtdetr"])
def test_images_are_normalised_as_in_pretraining(to: str, folders: dict[str, Path]) -> None:
    """By default, RT-DETR's processor would not normalise them."""
    photo = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    processor = transformers.AutoImageProcessor.from_pretrained(folders[to])
    (got,) = processor(photo, do_resize=False, return_tensors="pt")["pixel_values"]
    wanted = F.normalize(photo.float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_rt_detr_needs_a_resnet_d(saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"resnet18 is not supported: RT-DETR needs a ResNet-D; targets .*: mmdet, "):
        export(saved, "transformers-rtdetr")


@pytest.mark.soak
@pytest.mark.parametrize("name", ["AutoImageProcessor", "DeformableDetr", "RTDetrV2"])
def test_lines_of_the_documentation(
    name: str,
    resnet50: tuple[MCL, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, path = resnet50
    to = "transformers-detr" if name == "DeformableDetr" else "transformers-rtdetr"
    if to == "transformers-rtdetr":
        model = make_model(Geometry(), backbone="resnet50vd").eval()
        path = save_model(model, Geometry(), tmp_path / "runs" / "mcl")
    export(path, to, statistics_of="none", output=tmp_path / "runs" / "mcl" / "exports" / to)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block(name), names)
    pixels = torch.randn(1, 3, 160, 160)  # has more cells than the detector has queries
    got = maps(names["model"], pixels)
    with torch.no_grad():
        same(model.online.backbone(pixels)[: len(got)][::-1], got)
