"""Configurations match the published protocols, number by number."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torchvision

pytest.importorskip("mmdet", reason="needs MMDetection: make mmdet")

import mmdet
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dali_pipelines.geometry import Geometry
from mcl.finetune import weights
from mcl.finetune.settings import innermost
from tests.mcl.exporters.conftest import make_model, save_model
from tests.mcl.finetune.conftest import CONFIGS


class Protocol(NamedTuple):
    detector: str
    lr: float
    batch: int
    steps: int
    milestones: tuple[int, ...]
    warmup: int
    weight_decay: float
    shorter: tuple[int, ...]
    longer: int
    box_head: str


COCO = (tuple(range(640, 801, 32)), 1333)
ONE_X, TWO_X = (90_000, (60_000, 80_000), 1000), (180_000, (120_000, 160_000), 1000)
THREE_X = 270_000, (210_000, 250_000), 1000
C4_COCO = (tuple(range(640, 801, 32)), 1200)
PROTOCOLS = {
    "mask_rcnn_r50_fpn_1x": Protocol("MaskRCNN", 0.02, 16, *ONE_X, 1e-4, *COCO, "Shared4Conv1FCBBoxHead"),
    "mask_rcnn_r50_fpn_1x_wd25e-6": Protocol("MaskRCNN", 0.02, 16, *ONE_X, 2.5e-5, *COCO, "Shared4Conv1FCBBoxHead"),
    "mask_rcnn_r50_fpn_2x": Protocol("MaskRCNN", 0.02, 16, *TWO_X, 1e-4, *COCO, "Shared4Conv1FCBBoxHead"),
    "mask_rcnn_r50_fpn_2x_wd25e-6": Protocol("MaskRCNN", 0.02, 16, *TWO_X, 2.5e-5, *COCO, "Shared4Conv1FCBBoxHead"),
    "mask_rcnn_r50_fpn_3x": Protocol("MaskRCNN", 0.02, 16, *THREE_X, 1e-4, *COCO, "Shared4Conv1FCBBoxHead"),
    "mask_rcnn_r50_c4_1x": Protocol("MaskRCNN", 0.02, 16, *ONE_X, 1e-4, *C4_COCO, "BBoxHead"),
    "mask_rcnn_r50_c4_2x": Protocol("MaskRCNN", 0.02, 16, *TWO_X, 1e-4, *C4_COCO, "BBoxHead"),
    "faster_rcnn_r50_fpn_1x": Protocol("FasterRCNN", 0.02, 16, *ONE_X, 1e-4, *COCO, "Shared4Conv1FCBBoxHead"),
    "mask_rcnn_r50_fpn_2fc_1x": Protocol("MaskRCNN", 0.02, 16, *ONE_X, 1e-4, *COCO, "Shared2FCBBoxHead"),
    "mask_rcnn_r50_fpn_2fc_2x": Protocol("MaskRCNN", 0.02, 16, *TWO_X, 1e-4, *COCO, "Shared2FCBBoxHead"),
    "mask_rcnn_r50_fpn_1x_lvis": Protocol("MaskRCNN", 0.02, 16, *ONE_X, 1e-4, *COCO, "Shared4Conv1FCBBoxHead"),
    "mask_rcnn_r50_fpn_2fc_24k_cityscapes": Protocol(
        *("MaskRCNN", 0.01, 8, 24_000, (18_000,), 1000, 1e-4, tuple(range(800, 1025, 32)), 2048, "Shared2FCBBoxHead")
    ),
    "retinanet_r50_fpn_1x": Protocol("RetinaNet", 0.01, 16, *ONE_X, 1e-4, *COCO, "RetinaHead"),
    "retinanet_r50_fpn_2x": Protocol("RetinaNet", 0.01, 16, *TWO_X, 1e-4, *COCO, "RetinaHead"),
    "faster_rcnn_r50_c4_24k_voc": Protocol(
        *("FasterRCNN", 0.02, 16, 24_000, (18_000, 22_000), 100, 1e-4, tuple(range(480, 801, 32)), 1333, "BBoxHead")
    ),
}
PATCHES = {
    "mask_rcnn_swin_t_fpn_1x": "swin/mask-rcnn_swin-t-p4-w7_fpn_1x",
    "mask_rcnn_convnext_t_fpn_1x": "convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x",
}
"""Backbones without BatchNorm, which are trained with AdamW, and MMDetection's configurations for them."""
C4 = [name for name in PROTOCOLS if "_c4_" in name]
MINI = "mask_rcnn_r18_fpn_mini", "faster_rcnn_r18_fpn_mini"


def test_every_configuration_is_pinned() -> None:
    assert {path.stem for path in CONFIGS.glob("*.py")} == PROTOCOLS.keys() | {*MINI, *PATCHES}


@functools.cache
def read(name: str) -> Any:
    return Config.fromfile(CONFIGS / f"{name}.py")


@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocol(name: str) -> None:
    config, expected = read(name), PROTOCOLS[name]
    warmup, steps = config.param_scheduler
    resize = innermost(config.train_dataloader)["pipeline"][2]
    optimizer = config.optim_wrapper.optimizer
    box_head = config.model.get("bbox_head") or config.model.roi_head.bbox_head
    assert expected == Protocol(
        detector=config.model.type,
        lr=optimizer.lr,
        batch=config.global_batch,
        steps=config.train_cfg.max_iters,
        milestones=tuple(steps.milestones),
        warmup=warmup.end,
        weight_decay=optimizer.weight_decay,
        shorter=tuple(min(scale) for scale in resize.scales),
        longer=max(resize.scales[0]),
        box_head=box_head.type,
    )
    assert (optimizer.type, optimizer.momentum, steps.gamma, warmup.start_factor) == ("SGD", 0.9, 0.1, 0.001)
    assert config.auto_scale_lr == {"enable": True, "base_batch_size": expected.batch}
    assert config.optim_wrapper.paramwise_cfg.norm_decay_mult == 0.0
    shorter = {"mask_rcnn_r50_fpn_2fc_24k_cityscapes": 1024}.get(name, 800)
    assert min(innermost(config.val_dataloader)["pipeline"][1].scale) == shorter
    hooks = {hook.type: hook for hook in config.custom_hooks}
    assert hooks.keys() == {"SeedEveryStep", "PlainMessages", "PreciseBatchNorm", "APTable"}
    assert hooks["PreciseBatchNorm"].batches == 200
    measured = ["11points", "area"] if name.endswith("voc") else ["bbox"]
    assert config.val_evaluator.metric == (["bbox", "segm"] if expected.detector == "MaskRCNN" else measured)
    evaluations = {"mask_rcnn_r50_fpn_2fc_24k_cityscapes": 8_000, "faster_rcnn_r50_c4_24k_voc": 24_000}.get(
        name, 10_000
    )
    assert config.train_cfg.val_interval == evaluations
    assert evaluations % hooks["PreciseBatchNorm"].interval == 0 or evaluations == expected.steps


def decays(detector: nn.Module, wrapper: Any) -> dict[str, tuple[float, float]]:
    """Weight decay and learning rate of every parameter of the backbone."""
    with DefaultScope.overwrite_default_scope("mmdet"):
        groups = build_optim_wrapper(detector, {**wrapper, "type": "OptimWrapper"}).optimizer.param_groups
    found = {id(p): (group["weight_decay"], group["lr"]) for group in groups for p in group["params"]}
    return {name: found[id(p)] for name, p in detector.get_submodule("backbone").named_parameters()}


@pytest.mark.parametrize("name", PATCHES)
def test_backbones_of_patches(name: str) -> None:
    """The protocol is that of ResNet-50; optimiser and backbone are those of MMDetection's own configuration."""
    config, resnet = read(name), read("mask_rcnn_r50_fpn_1x")
    theirs = Config.fromfile(Path(mmdet.__file__).parent / ".mim" / "configs" / f"{PATCHES[name]}_coco.py")
    for key in ("global_batch", "train_cfg", "param_scheduler", "train_dataloader", "val_dataloader"):
        assert config[key] == resnet[key], key
    assert config.model.roi_head == resnet.model.roi_head
    assert config.model.neck == {**resnet.model.neck, **theirs.model.neck, "norm_cfg": resnet.model.neck.norm_cfg}
    assert config.optim_wrapper.optimizer == theirs.optim_wrapper.optimizer
    detectors = [weights.build(one.model) for one in (config, theirs)]
    modules = [str(detector.get_submodule("backbone")).partition("\ninit_cfg")[0] for detector in detectors]
    assert modules[0] == modules[1]  # including sizes and stochastic depth
    assert all(parameter.requires_grad for parameter in detectors[0].parameters())
    ours, others = (decays(*pair) for pair in zip(detectors, (config.optim_wrapper, theirs.optim_wrapper), strict=True))
    assert ours == others


@pytest.mark.soak
@pytest.mark.parametrize("name", PATCHES)
def test_tensors_of_patches_load(name: str, tmp_path: Path) -> None:
    """All tensors of backbone, FPN and head are loaded."""
    model = make_model(Geometry(), backbone=name.removeprefix("mask_rcnn_").removesuffix("_fpn_1x"))
    config = read(name)
    hook = weights.load(str(save_model(model, Geometry(), tmp_path)), config.model)
    begin = ("backbone.", "neck.", "roi_head.bbox_head.shared_convs.")
    assert hook.weights.keys() == {n for n in weights.build(config.model).state_dict() if n.startswith(begin)}


@pytest.mark.soak
@pytest.mark.parametrize(("name", "norms"), [("convnext_tiny", 4), ("swin_t", 3)])
def test_supervised_weights_of_patches(name: str, norms: int, tmp_path: Path) -> None:
    """torchvision's classifiers have all other tensors of the backbone."""
    torch.save(torchvision.models.get_model(name).state_dict(), tmp_path / "x.pth")
    config = read(f"mask_rcnn_{name.replace('tiny', 't')}_fpn_1x")
    hook = weights.load(str(tmp_path / "x.pth"), config.model)
    own = {name for name in weights.build(config.model).state_dict() if name.startswith("backbone.")}
    assert own - hook.weights.keys() == {
        f"backbone.norm{i}.{leaf}" for i in range(norms) for leaf in ("weight", "bias")
    }


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name not in C4])
def test_norms_of_fpn_detectors(name: str) -> None:
    detector, protocol = weights.build(read(name).model), PROTOCOLS[name]
    maps = 3 if protocol.detector == "RetinaNet" else 4  # without P6 and P7
    with_norm = ["backbone", *(f"neck.{kind}.{i}." for kind in ("lateral_convs", "fpn_convs") for i in range(maps))]
    if protocol.box_head == "Shared4Conv1FCBBoxHead":
        with_norm += ["roi_head.bbox_head.shared_convs"]
        with_norm += ["roi_head.mask_head.convs"] if protocol.detector == "MaskRCNN" else []
    _check_norms(detector, with_norm)
    assert detector.get_submodule("backbone").style == "pytorch"


def test_p6_and_p7_of_retinanet() -> None:
    """P6 is computed from C5, P7 from P6 after a ReLU; both have biases, since they have no norm."""
    torch.manual_seed(0)
    config = read("retinanet_r50_fpn_1x").model.neck
    with DefaultScope.overwrite_default_scope("mmdet"):
        neck = MODELS.build({**config, "norm_cfg": {"type": "BN"}}).eval()
    maps = [
        torch.randn(1, channels, side, side)
        for channels, side in zip((256, 512, 1024, 2048), (32, 16, 8, 4), strict=True)
    ]
    p6, p7 = (neck.get_submodule(f"fpn_convs.{i}.conv") for i in (3, 4))
    outputs = neck(maps)
    assert torch.equal(outputs[3], F.conv2d(maps[3], p6.weight, p6.bias, 2, 1))
    assert torch.equal(outputs[4], F.conv2d(outputs[3].relu(), p7.weight, p7.bias, 2, 1))
    assert outputs[3].min() < 0


@pytest.mark.parametrize("name", C4)
def test_norms_of_c4(name: str) -> None:
    detector = weights.build(read(name).model)
    _check_norms(detector, ["backbone", "roi_head.shared_head.layer4", "roi_head.shared_head.norm"])
    assert detector.get_submodule("backbone").style == "pytorch"
    assert detector.get_submodule("roi_head.shared_head.layer4.0").conv2_stride == 2


def test_masks_of_c4() -> None:
    """As in detectron2: a deconvolution and a convolution after the last stage, from 7 x 7 to 14 x 14 cells."""
    detector, rcnn = weights.build(read("mask_rcnn_r50_c4_1x").model), read("mask_rcnn_r50_c4_1x").model.train_cfg.rcnn
    head = detector.get_submodule("roi_head.mask_head")
    shapes = {name: list(tensor.shape) for name, tensor in head.named_parameters() if name.endswith("weight")}
    assert shapes == {"upsample.weight": [2048, 256, 2, 2], "conv_logits.weight": [80, 256, 1, 1]}
    assert rcnn.mask_size == 14
    assert read("mask_rcnn_r50_c4_1x").model.train_cfg.rpn.allowed_border == -1


@pytest.mark.parametrize(("masks", "boxes"), [MINI, ("mask_rcnn_r50_fpn_1x", "faster_rcnn_r50_fpn_1x")])
def test_boxes_alone_are_the_same_detector_without_masks(masks: str, boxes: str) -> None:
    with_masks, alone = (weights.build(read(name).model) for name in (masks, boxes))
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (with_masks, alone)]
    assert shapes[1] == {name: shape for name, shape in shapes[0].items() if "mask_head" not in name}
    pipelines = [innermost(read(name).train_dataloader)["pipeline"] for name in (masks, boxes)]
    assert pipelines[0].pop(1) == {**pipelines[1].pop(1), "with_mask": True}
    assert pipelines[0] == pipelines[1]
    assert read(boxes).val_evaluator.metric == ["bbox"]
    same = ("optim_wrapper", "param_scheduler", "train_cfg", "global_batch", "custom_hooks")
    assert all(read(masks)[key] == read(boxes)[key] for key in same)


def _check_norms(detector: nn.Module, parts: list[str]) -> None:
    """All parameters are trained. The BatchNorms are exactly those of these parts; they are synchronised and
    trained."""
    assert all(parameter.requires_grad for parameter in detector.parameters())
    detector.train()
    norms = {name: module for name, module in detector.named_modules() if isinstance(module, _BatchNorm)}
    assert all(isinstance(norm, nn.SyncBatchNorm) and norm.training for norm in norms.values())
    assert {part for part in parts if any(name.startswith(part) for name in norms)} == set(parts)
    assert all(name.startswith(tuple(parts)) for name in norms)


@pytest.mark.parametrize("name", [*PROTOCOLS, *PATCHES])
def test_input_and_initial_values(name: str) -> None:
    """Images are normalised as in pre-training, and no weights are downloaded."""
    model = read(name).model
    assert "Pretrained" not in str(model)
    preprocessor = model.data_preprocessor
    assert preprocessor.mean == [123.675, 116.28, 103.53]
    assert preprocessor.std == [58.395, 57.12, 57.375]
    assert preprocessor.bgr_to_rgb


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the paper's backbone, FPN and head."""
    return save_model(make_model(Geometry(), backbone="resnet50"), Geometry(), tmp_path_factory.mktemp("r50"))


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("mask_rcnn_r50_fpn_1x", 318 + 8 * 6 + 4 * 6),
        ("retinanet_r50_fpn_1x", 318 + 6 * 6),
        ("faster_rcnn_r50_c4_24k_voc", 318),
        ("mask_rcnn_r50_c4_1x", 318),
    ],
)
def test_all_expected_tensors_load(name: str, tensors: int, pretrained: Path) -> None:
    """318 tensors of ResNet-50, and six (weight, four of BatchNorm, a count) of each convolution of FPN and head."""
    config = read(name)
    hook = weights.load(str(pretrained), config.model)
    assert len(hook.weights) == tensors
