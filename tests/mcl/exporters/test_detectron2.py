"""``mcl export --to detectron2``: names and shapes, compared with a list of those of detectron2's Mask R-CNN.

detectron2 is on no package index. Its models name a BatchNorm ``<convolution>.norm``, and read a tensor from the
longest name in the file that is a suffix of their own name, starting at a dot.
"""

import pickle
from pathlib import Path

import pytest

from mcl.exporters import export
from mcl.objectives import MCL

Shapes = dict[str, tuple[int, ...]]
NORM = ("weight", "bias", "running_mean", "running_var")


def conv(name: str, *shape: int) -> Shapes:
    """A convolution with BatchNorm."""
    return {f"{name}.weight": shape} | {f"{name}.norm.{leaf}": shape[:1] for leaf in NORM}


def resnet50(prefix: str) -> Shapes:
    shapes = conv(f"{prefix}.stem.conv1", 64, 3, 7, 7)
    inputs = 64
    for stage, blocks, inner, outputs in ((2, 3, 64, 256), (3, 4, 128, 512), (4, 6, 256, 1024), (5, 3, 512, 2048)):
        for block in range(blocks):
            name = f"{prefix}.res{stage}.{block}"
            if block == 0:
                shapes |= conv(f"{name}.shortcut", outputs, inputs, 1, 1)
            shapes |= conv(f"{name}.conv1", inner, inputs, 1, 1)
            shapes |= conv(f"{name}.conv2", inner, inner, 3, 3)
            shapes |= conv(f"{name}.conv3", outputs, inner, 1, 1)
            inputs = outputs
    return shapes


def resnet18(prefix: str) -> Shapes:
    shapes = conv(f"{prefix}.stem.conv1", 64, 3, 7, 7)
    inputs = 64
    for stage, outputs in ((2, 64), (3, 128), (4, 256), (5, 512)):
        for block in range(2):
            name = f"{prefix}.res{stage}.{block}"
            if inputs != outputs:
                shapes |= conv(f"{name}.shortcut", outputs, inputs, 1, 1)
            shapes |= conv(f"{name}.conv1", outputs, inputs, 3, 3)
            shapes |= conv(f"{name}.conv2", outputs, outputs, 3, 3)
            inputs = outputs
    return shapes


def fpn(channels: tuple[int, ...], width: int) -> Shapes:
    shapes: Shapes = {}
    for stage, inputs in enumerate(channels, start=2):
        shapes |= conv(f"backbone.fpn_lateral{stage}", width, inputs, 1, 1)
        shapes |= conv(f"backbone.fpn_output{stage}", width, width, 3, 3)
    return shapes


def box_head(width: int) -> Shapes:
    shapes: Shapes = {}
    for i in range(1, 5):
        shapes |= conv(f"roi_heads.box_head.conv{i}", width, width, 3, 3)
    return shapes


OTHERS: Shapes = {
    "roi_heads.box_head.fc1.weight": (1024, 12544),
    "roi_heads.box_head.fc1.bias": (1024,),
    "roi_heads.box_predictor.cls_score.weight": (81, 1024),
    "roi_heads.mask_head.mask_fcn1.weight": (256, 256, 3, 3),
    "roi_heads.mask_head.mask_fcn1.norm.weight": (256,),
    "proposal_generator.rpn_head.conv.weight": (256, 256, 3, 3),
    "proposal_generator.rpn_head.conv.bias": (256,),
}
"""Other tensors of the detector, none of which may match an exported name."""


def match(file: Shapes, model: Shapes) -> dict[str, str]:
    """Names in the file by the model's names, as detectron2 matches them; each name of the file is used at most
    once."""
    found = {}
    for name in model:
        endings = [theirs for theirs in file if name == theirs or name.endswith("." + theirs)]
        if endings:
            found[name] = max(endings, key=len)
    assert len(set(found.values())) == len(found)
    return found


@pytest.mark.parametrize("depth", [18, 50])
def test_names_and_shapes(depth: int, saved: Path, resnet50_file: Path, tmp_path: Path) -> None:
    path = saved if depth == 18 else resnet50_file
    width = 16 if depth == 18 else 256
    report = export(path, "detectron2", statistics_of="none", output=tmp_path / "x.pkl")
    content = pickle.loads(report.path.read_bytes())
    file = {name: array.shape for name, array in content["model"].items()}
    bottom_up = (resnet18 if depth == 18 else resnet50)("backbone.bottom_up")
    channels = (64, 128, 256, 512) if depth == 18 else (256, 512, 1024, 2048)
    ours = bottom_up | fpn(channels, width) | box_head(width)
    found = match(file, ours | OTHERS)
    assert found.keys() == ours.keys()
    assert set(found.values()) == file.keys()
    assert {name: file[theirs] for name, theirs in found.items()} == ours
    assert {array.dtype.name for array in content["model"].values()} == {"float32"}


def test_c4_models_find_the_backbone(resnet50_file: Path, tmp_path: Path) -> None:
    """These have stages 2 to 4 in ``backbone``, and stage 5 in ``roi_heads``."""
    content = pickle.loads(
        export(
            resnet50_file, "detectron2", parts=["backbone"], statistics_of="none", output=tmp_path / "x.pkl"
        ).path.read_bytes()
    )
    file = {name: array.shape for name, array in content["model"].items()}
    model = {name.replace("backbone.res5", "roi_heads.res5"): shape for name, shape in resnet50("backbone").items()}
    found = match(file, model)
    assert {name: file[theirs] for name, theirs in found.items()} == model
    assert len(found) == len(file)


@pytest.fixture
def resnet50_file(request: pytest.FixtureRequest) -> Path:
    made: tuple[MCL, Path] = request.getfixturevalue("resnet50")
    return made[1]
