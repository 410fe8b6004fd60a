"""Backbones, compared with the same backbones in other libraries, and in training."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torchvision.models.feature_extraction import create_feature_extractor

from mcl import config
from mcl.budget import count
from mcl.config import Config
from mcl.exporters import export
from mcl.exporters.convert import TARGETS
from mcl.exporters.timm import rename
from mcl.models import backbones
from mcl.models.backbones import Backbone
from mcl.models.norm import BatchNorm
from mcl.records.metrics import read
from mcl.train import checkpoint
from mcl.train.optim import build_optimizer
from mcl.train.trainer import Trainer
from tests.mcl.tiny import resumed_without_its_end
from tests.mcl.train.test_no_waiting import check_whole_step
from tests.mcl.train.test_step import same_bits, state_after
from tests.step import FOUR_LEVELS, build, configure, views

THIN = {"convnext_t": (32, [1, 1, 2, 1]), "swin_t": (32, [2, 1, 2, 1])}
"""Channels and blocks; with two blocks, Swin has a plain and a shifted one."""
OTHERS = ["resnext50_32x4d", "resnet18vd", *THIN]
"""Backbones other than plain ResNets."""


@pytest.fixture
def thin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives all backbones few blocks; ConvNeXt and Swin also get few channels."""
    shallow: Any = {name: (block, [1, 1, 1, 1]) for name, (block, _) in backbones._RESNETS.items()}
    monkeypatch.setattr(backbones, "_RESNETS", shallow)
    monkeypatch.setattr(backbones, "_PATCH_NETS", THIN)


def image() -> Tensor:
    """(2, 3, 64, 96) of random values."""
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def make(name: str) -> Backbone:
    """A backbone in evaluation mode, whose statistics are not the initial ones."""
    torch.manual_seed(0)
    backbone = Backbone(name).eval()
    for module in backbone.modules():
        if isinstance(module, BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
        elif isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias, 0, 0.1)
    for name, parameter in backbone.named_parameters():
        if name.endswith(("layer_scale", "relative_position_bias_table")):
            nn.init.normal_(parameter)
    return backbone


@torch.no_grad()
def same(backbone: Backbone, maps: list[Tensor]) -> None:
    """C2 to C5 of :func:`image` equal `maps` to 1e-5 of the largest feature, and have the sizes that the backbone
    states."""
    ours = backbone(image())[::-1]
    assert [tuple(x.shape) for x in ours] == [
        (2, channels, 64 // stride, 96 // stride)
        for channels, stride in zip(backbone.channels[::-1], (4, 8, 16, 32), strict=True)
    ]
    for mine, other in zip(ours, maps, strict=True):
        torch.testing.assert_close(other, mine, rtol=0, atol=1e-5 * float(mine.abs().max()))


@pytest.mark.parametrize("name", ["resnext50_32x4d", pytest.param("resnet152", marks=pytest.mark.soak)])
def test_torchvisions(name: str) -> None:
    backbone = make(name)
    theirs: nn.Module = torchvision.models.get_model(name).eval()
    missing, unexpected = theirs.load_state_dict(backbone.state_dict(), strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    with torch.no_grad():
        same(backbone, list(create_feature_extractor(theirs, [f"layer{i}" for i in range(1, 5)])(image()).values()))


@pytest.mark.parametrize(("name", "theirs"), [("convnext_t", "convnext_tiny"), ("swin_t", "swin_t")])
def test_torchvisions_with_a_norm_of_every_map(name: str, theirs: str) -> None:
    backbone = make(name)
    model = torchvision.models.get_model(theirs).eval()
    maps = [f"features.{i}" for i in (1, 3, 5, 7)]
    state = backbone.state_dict()
    missing, _ = model.load_state_dict({n: t for n, t in state.items() if n.startswith("features.")}, strict=False)
    assert not [n for n in missing if n.startswith("features.")]
    with torch.no_grad():
        features = create_feature_extractor(model, maps)(image()).values()
        last = [x if name == "swin_t" else x.permute(0, 2, 3, 1) for x in features]
        sizes = [(x.shape[-1:], state[f"norms.{i}.weight"], state[f"norms.{i}.bias"]) for i, x in enumerate(last)]
        eps = 1e-5 if name == "swin_t" else 1e-6
        same(backbone, [F.layer_norm(x, *size, eps).permute(0, 3, 1, 2) for x, size in zip(last, sizes, strict=True)])


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("resnet18vd", "resnet18d"),
        ("resnet50vd", "resnet50d"),
        *(pytest.param(f"resnet{n}vd", f"resnet{n}d", marks=pytest.mark.soak) for n in (34, 101)),
    ],
)
def test_resnet_d(name: str, theirs: str) -> None:
    """timm's model, to which RT-DETR's shortcut is added in the first stage if it has none."""
    backbone = make(name)
    model = timm.create_model(theirs, num_classes=0)
    if model.layer1[0].downsample is None:
        model.layer1[0].downsample = nn.Sequential(nn.Conv2d(64, 64, 1, bias=False), nn.BatchNorm2d(64))
        model.layer1[0].downsample.insert(0, nn.Identity())
    model.load_state_dict({rename(name): tensor for name, tensor in backbone.state_dict().items()})
    with torch.no_grad():
        same(backbone, model.eval().forward_intermediates(image(), indices=(1, 2, 3, 4), intermediates_only=True))


@pytest.mark.parametrize(
    ("name", "giga"),
    [
        *(
            (name, torchvision.models.get_model_weights(theirs).DEFAULT.meta["_ops"])
            for name, theirs in {
                **{name: name for name in ("resnet152", "resnext50_32x4d", "swin_t")},
                "convnext_t": "convnext_tiny",
            }.items()
        ),
        *(("resnet18vd", 2.06), ("resnet34vd", 3.91), ("resnet50vd", 4.35), ("resnet101vd", 8.08)),
    ],
)
def test_flops_are_the_published_ones(name: str, giga: float) -> None:
    """Multiply-adds for an image of 224 px, of torchvision or timm. A step takes three times as many, except that the
    first convolution has no gradient of its input."""
    assert count.supervised(name) / 6e9 == pytest.approx(giga, rel=0.02)


@pytest.mark.usefixtures("thin")
@pytest.mark.parametrize(("name", "words"), [*((name, FOUR_LEVELS) for name in OTHERS), *((name, ()) for name in THIN)])
def test_a_step_moves_all_that_is_trained(name: str, words: tuple[str, ...]) -> None:
    """With two levels, the norms of the two finest maps are not trained."""
    cfg = configure(*words, f"model.backbone={name}", "montage.cells=2", "optim.name=adamw")
    step = build(cfg)
    before = copy.deepcopy(step.model.online.backbone)
    output, _ = step(*views(cfg), lr=1e-3, momentum=0.9)
    assert output.loss.isfinite()
    frozen = []
    for (key, p), old in zip(step.model.online.backbone.named_parameters(), before.parameters(), strict=True):
        if p.requires_grad:
            assert p.grad is not None, key
            assert p.grad.isfinite().all(), key
            assert p.grad.any(), key
        else:
            frozen.append(key)
        assert torch.equal(p, old) != p.requires_grad, key
    unread = [f"norms.{i}.{leaf}" for i in range(2) for leaf in ("weight", "bias")]
    assert frozen == (unread if name in THIN and not words else [])


@pytest.mark.usefixtures("thin")
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *(("resnet18vd", "fp32"), ("convnext_t", "bf16"), ("swin_t", "bf16")),
        *(pytest.param(name, precision, marks=pytest.mark.soak) for name in OTHERS for precision in ("fp32", "bf16")),
    ],
)
def test_resumed_and_recomputed_steps_are_plain_steps(name: str, precision: str) -> None:
    words = (f"model.backbone={name}", f"trainer.precision={precision}", "optim.name=adamw")
    batches = [views(configure(*words), seed) for seed in (1, 3)]
    plain = state_after(build(configure(*words)), batches)
    first, second = build(configure(*words, "trainer.recompute=true")), build(configure(*words))
    state_after(first, batches[:1])
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    again = state_after(second, batches[1:])
    assert same_bits({key.replace(" 1", " 0"): value for key, value in plain.items() if " 0" not in key}, again)


@pytest.mark.usefixtures("thin")
@pytest.mark.parametrize("name", THIN)
def test_a_step_reads_nothing_back(name: str) -> None:
    check_whole_step((f"model.backbone={name}", "optim.name=adamw", "montage.cells=2"))


@pytest.mark.usefixtures("thin")
@pytest.mark.parametrize("name", THIN)
def test_views_go_through_it_one_by_one_or_together(name: str) -> None:
    """They have no statistics of a batch."""
    backbone = make(name)
    for mine, other in zip(backbone(image(), [1, 1]), backbone(image()[:1]), strict=True):
        torch.testing.assert_close(mine[:1], other)


@pytest.mark.usefixtures("thin")
@pytest.mark.parametrize("name", THIN)
def test_a_cpu_keeps_what_a_gpu_keeps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, so that counts on CPU tensors are valid for a GPU."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    kept = []
    for device in ("cpu", "cuda"):
        with torch.device("meta"):
            backbone = Backbone(name)
        with FakeTensorMode(allow_non_fake_inputs=True):
            backbone.to_empty(device=device)
            sizes = []
            torch.set_autocast_enabled(device, True)
            torch.set_autocast_dtype(device, torch.bfloat16)
            with torch.autograd.graph.saved_tensors_hooks(lambda t, to=sizes: to.append((t.shape, t.dtype)), id):
                maps = backbone(torch.empty(2, 3, 64, 64, device=device))
            torch.set_autocast_enabled(device, False)
            torch.clear_autocast_cache()
        kept.append((sizes, [x.dtype for x in maps]))
    assert kept[0] == kept[1]


def test_what_adamw_does_not_decay() -> None:
    """Vectors, also in other shapes."""
    for name, keys in (("convnext_t", {"layer_scale"}), ("swin_t", {"relative_position_bias_table"})):
        cfg = configure(f"model.backbone={name}", "optim.name=adamw", "optim.weight_decay=0.05")
        with torch.device("meta"):
            backbone = Backbone(name)
            _, vectors = build_optimizer(cfg.optim, backbone).param_groups
        names = {id(p): n.rpartition(".")[2] for n, p in backbone.named_parameters()}
        assert vectors["weight_decay"] == 0
        assert {names[id(p)] for p in vectors["params"]} == {"weight", "bias", *keys}
        assert all(p.ndim < 2 for p in vectors["params"] if names[id(p)] == "weight")


@pytest.mark.soak
@pytest.mark.parametrize("name", ["resnet152", *(f"resnet{n}vd" for n in (34, 50, 101)), *OTHERS])
def test_a_run_of_the_real_one(name: str, tiny: Config, tmp_path: Path) -> None:
    """The loss decreases, the run resumes bit for bit, and its weights are exported."""
    words = "model.temperature=0.2", "optim.name=adamw", "optim.base_lr=8e-3", "optim.clip_norm=5"
    cfg = config.override(
        tiny, [*words, f"model.backbone={name}", "trainer.epochs=6", "trainer.global_batch=16", "trainer.keep=3"]
    )
    Trainer(cfg).fit()
    losses = [record["loss"] for record in read(cfg.run_folder / "metrics.jsonl")]
    assert np.mean(losses[3:]) < 0.96 * losses[0], losses
    resumed_without_its_end(cfg, tmp_path / "again")
    to = next(to for to, target in TARGETS.items() if name in target.backbones)
    last = cfg.run_folder / "checkpoints" / checkpoint.LAST
    assert export(last, to, parts=["backbone"], statistics_of="none").path.exists()
