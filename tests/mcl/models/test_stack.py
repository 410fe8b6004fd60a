"""`model.assembly=stack`: the network processes each tile of a montage separately."""

import contextlib
import dataclasses
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from dali_pipelines.batch import MontageBatch
from mcl import config, objectives
from mcl.budget import count
from mcl.config import ConfigError
from mcl.evaluation.retrieval import LevelwiseEncoder
from mcl.models import Encoder
from mcl.models.fpn import FPN
from mcl.objectives import Objective
from tests.conftest import ThinBackbone
from tests.fp64 import fast_convolutions
from tests.mcl.ranks import in_ranks
from tests.step import FOUR_LEVELS, configure, views


def images_of(view: MontageBatch, level: int) -> Tensor:
    """The pixels in the boxes of a level, one after another."""
    boxes = view.boxes[view.tiles(level)].int().tolist()
    return torch.stack([view.pixels[row, :, y1:y2, x1:x2] for row, x1, y1, x2, y2 in boxes])


def by_hand(encoder: Encoder, view: MontageBatch) -> list[Tensor]:
    """Processes each level of each view separately: the images in the boxes, whose maps are pooled as a whole."""
    embeddings = []
    for level in range(len(view.ratios)):
        images = images_of(view, level)
        maps = encoder.fpn(encoder.backbone(images), [level])
        whole = torch.tensor([[i, 0, 0, images.shape[3], images.shape[2]] for i in range(len(images))])
        embeddings.append(encoder.head(encoder.pool(maps, [level], [whole.to(images)], view.cells)))
    return embeddings


@pytest.mark.parametrize(
    ("backbone", "words"),
    [
        # Images of 24 px: 3, 2 and 1 cells.
        ("resnet18", ("montage.cells=3", "montage.ratios=[1,4]", "trainer.global_batch=2")),
        pytest.param("resnet18", ("montage.cells=1", *FOUR_LEVELS), marks=pytest.mark.soak),  # 32 to 4 px
        pytest.param("resnet18vd", ("montage.cells=3",), marks=pytest.mark.soak),
        pytest.param("resnet50", ("montage.cells=7", *FOUR_LEVELS), marks=pytest.mark.soak),
        pytest.param("swin_t", ("montage.cells=3",), marks=pytest.mark.soak),
        pytest.param("convnext_t", ("montage.cells=2",), marks=pytest.mark.soak),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else value,
)
def test_every_image_goes_through_the_network_by_itself(backbone: str, words: tuple[str, ...]) -> None:
    """In training BatchNorm processes each level of each view; in evaluation the scoring network computes the same."""
    cfg = configure("trainer.precision=fp64", f"model.backbone={backbone}", "model.assembly=stack", *words)
    torch.manual_seed(0)
    encoder = Encoder(cfg.model, cfg.montage.ratios).double()
    batch = views(cfg)
    with torch.no_grad(), fast_convolutions() if backbone == "resnet18" else contextlib.nullcontext():
        same(encoder(*batch), [by_hand(encoder, view) for view in batch])
        encoder.eval()
        same(LevelwiseEncoder(encoder).eval()(batch[0]), encoder(batch[0]))


def same(found: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        for own, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9)


def test_images_are_the_tiles_bit_for_bit() -> None:
    cfg = configure(*FOUR_LEVELS, "montage.cells=3", "trainer.global_batch=8")
    view = views(cfg)[0].first((5, 2, 3, 1))
    assert [x.shape for x in view.stacked()] == [(n, 3, s, s) for n, s in ((5, 96), (8, 48), (48, 24), (64, 12))]
    for level, images in enumerate(view.stacked()):
        assert torch.equal(images, images_of(view, level))
        assert images.is_contiguous(memory_format=torch.channels_last)


def build(words: tuple[str, ...], assembly: str, backbone: Any = None) -> Objective:
    """A model in which cells do not depend on their neighbours before the region head: all kernels are 1 x 1."""
    cfg = configure("trainer.precision=fp64", *words, f"model.assembly={assembly}", "model.temperature=0.2")
    torch.manual_seed(0)
    with mock.patch("mcl.models.encoder.Backbone", backbone) if backbone else contextlib.nullcontext():
        model = objectives.build(cfg, ["a", "b", "c"]).double()
    for encoder in filter(None, (model.online, model.target)):
        for module in [*encoder.backbone.modules(), *encoder.fpn.modules()]:
            if isinstance(module, nn.Conv2d):
                middle = module.kernel_size[0] // 2
                module.weight.data = module.weight.data[:, :, middle : middle + 1, middle : middle + 1].clone()
                module.kernel_size, module.padding = (1, 1), (0, 0)
            if isinstance(module, nn.MaxPool2d):
                module.kernel_size, module.padding = 1, 0
    return model


def step(model: Objective) -> dict[str, Tensor]:
    """Losses, scores and gradients of a step."""
    query, key = (dataclasses.replace(v, labels=torch.arange(4) % 3) for v in views(model.config))
    with fast_convolutions():
        output = model(query, key)
        output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach(), "losses": output.losses, **output.scores, **gradients}


def compare(words: tuple[str, ...], backbone: Any = None, training: bool = True) -> None:
    montage, stack = (build(words, assembly, backbone) for assembly in ("montage", "stack"))
    if not training:
        for module in montage.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = 1.0  # uses only the statistics of one batch
        step(montage)
        montage.zero_grad()
        stack.load_state_dict(montage.state_dict())
    expected, found = (step(model.train(training)) for model in (montage, stack))
    assert found.keys() == expected.keys()
    scale = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-10 * max(value.norm(), 1e-3 * scale), name


THREE = ("montage.ratios=[1,2,4]", "montage.images_per_canvas=[1,2,4]", "model.loss_weights=[0.4,0.3,0.3]")
CASES = [
    ("model.targets=all", "montage.cells=4", *THREE),
    ("montage.queries=[2,1]", "montage.cells=2"),
    ("objective=supervised", "montage.cells=2"),
    ("objective=supervised_contrastive", "montage.cells=2"),
]


@pytest.mark.parametrize("words", CASES, ids=lambda words: words[0])
def test_without_neighbours_it_has_the_losses_and_gradients_of_the_montage(words: tuple[str, ...]) -> None:
    """Tiles have 32 px, so that strides meet the same pixels; BatchNorms of FPN and head process single levels in both
    cases."""
    compare(words, ThinBackbone)


def both_losses() -> list[Tensor]:
    return [step(build(CASES[0], assembly, ThinBackbone))["losses"] for assembly in ("montage", "stack")]


def test_stack_equals_the_montage_in_two_processes() -> None:
    (montage, stack), other = in_ranks(2, both_losses)
    torch.testing.assert_close(stack, montage, rtol=1e-10, atol=0)
    torch.testing.assert_close(other[1], stack, rtol=1e-10, atol=0)  # the same views, but twice as many targets
    alone, _ = both_losses()
    assert (stack - alone).abs().min() > 1e-3


def test_a_real_backbone_without_neighbours_has_the_losses_of_the_montage() -> None:
    compare(("montage.cells=2",), training=False)


@pytest.mark.parametrize("finest", [(7, 5), (8, 6), (3, 3), (1, 1)])
def test_the_pyramid_adds_what_covers_each_cell(finest: tuple[int, int]) -> None:
    """Sides are halved and rounded up, as by convolutions of stride 2; cell i is inside cell i // 2 of the next coarser
    map."""
    sides = [finest]
    for _ in range(2):
        sides.insert(0, tuple(-(-side // 2) for side in sides[0]))
    torch.manual_seed(0)
    fpn = FPN((5, 4, 3), 2, [0, 2]).double().eval()
    maps = [torch.randn(2, c, *s, dtype=torch.float64) for c, s in zip((5, 4, 3), sides, strict=True)]
    merged = fpn.laterals[0](maps[0])
    for lateral, x in zip(fpn.laterals[1:], maps[1:], strict=True):
        rows, columns = (torch.arange(side) // 2 for side in x.shape[2:])
        merged = lateral(x) + merged[:, :, rows][..., columns]
    torch.testing.assert_close(fpn(maps, [1])[0], fpn.outputs[1](merged))
    torch.testing.assert_close(fpn(maps, [1, 1], [1, 1]), [*fpn.outputs[1](merged).split(1)])


def counted(*words: str) -> tuple[dict[str, int], int, int]:
    """FLOPs by part, calls of BatchNorm, and groups in these calls."""
    cfg = configure("trainer.global_batch=8", *words)
    result = count.step.__wrapped__(cfg, 8, 1)
    flops = {part: result.forward[part] + result.backward[part] for part in result.forward}
    return flops, len(result.norms), sum(norm.groups for norm in result.norms)


def test_a_budget_counts_stacked_images() -> None:
    """FLOPs are equal if sides are multiples of 32 px; otherwise strides round up. The backbone is called once per
    level."""
    words = ("model.targets=all", "montage.cells=2")
    (montage, calls, groups), (stack, more, further) = counted(*words), counted(*words, "model.assembly=stack")
    assert stack == montage
    backbone = 2 * 20  # BatchNorms of ResNet-18, in two networks
    assert further - groups == 2 * backbone  # views, which processed all levels at once
    assert more - calls >= backbone
    odd = ("montage.cells=1", "model.targets=all")
    (montage, _, _), (stack, _, _) = counted(*odd), counted(*odd, "model.assembly=stack")
    assert stack["backbone"] > montage["backbone"]
    assert stack["head"] == montage["head"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.compute=released"], r"model\.assembly: stack .* set model\.compute=matched"),
        (["model.backbone=convnext_t"], r"model\.assembly: .*convnext_t.*montage\.cells to multiples of 8 .*not 7"),
        (
            ["model.backbone=convnext_t", "montage.cells=8", "montage.schedule=[[9,16],[30,12]]"],
            r"model\.assembly: with stack .* model\.backbone=convnext_t.*montage\.schedule to multiples of 8 .*not 12",
        ),
    ],
)
def test_settings_that_stack_does_not_support_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load("mcl_r50_fpn_100e_in1k", ["model.assembly=stack", *words])


def test_other_backbones_follow_every_schedule() -> None:
    words = ["model.assembly=stack", "montage.cells=3", "montage.schedule=[[9,5],[30,7]]"]
    assert config.load("mcl_swin_t_fpn_100e_in1k", words).montage.fewest_cells == 3
    words += ["model.backbone=convnext_t", "montage.ratios=[1]", "montage.images_per_canvas=[1]"]
    assert config.load("mcl_r50_fpn_100e_in1k", [*words, "model.loss_weights=[1]"]).model.assembly == "stack"
