"""Backbones that return feature maps, with torchvision's parameter names."""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet
from torchvision.models.convnext import CNBlockConfig, ConvNeXt, LayerNorm2d
from torchvision.models.resnet import ResNet
from torchvision.models.swin_transformer import SwinTransformer

from mcl.models.norm import BatchNorm


class BasicBlock(resnet.BasicBlock):  # type: ignore[misc]  # torchvision has no types
    """torchvision's block of two convolutions, with additions and ReLUs fused into BatchNorm."""

    def forward(self, x: Tensor, counts: Sequence[int] = ()) -> Tensor:
        y: Tensor = self.bn1(self.conv1(x), counts, relu=True)
        y = self.bn2(self.conv2(y), counts, _shortcut(self, x, counts), relu=True)
        return y


class Bottleneck(resnet.Bottleneck):  # type: ignore[misc]
    """torchvision's block of three convolutions, with additions and ReLUs fused into BatchNorm."""

    def forward(self, x: Tensor, counts: Sequence[int] = ()) -> Tensor:
        y: Tensor = self.bn1(self.conv1(x), counts, relu=True)
        y = self.bn2(self.conv2(y), counts, relu=True)
        y = self.bn3(self.conv3(y), counts, _shortcut(self, x, counts), relu=True)
        return y


def _shortcut(block: nn.Module, x: Tensor, counts: Sequence[int]) -> Tensor:
    if not isinstance(block.downsample, nn.Sequential):
        return x
    *layers, norm = block.downsample
    for layer in layers:
        x = layer(x)
    y: Tensor = norm(x, counts)
    return y


class DeepStem(nn.Sequential):
    """ResNet-D's three 3x3 convolutions, each with BatchNorm and ReLU. Module names are numbered as if ReLUs, which are
    fused into BatchNorm, were modules."""

    def __init__(self) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (inputs, outputs, stride) in enumerate([(3, 32, 2), (32, 32, 1), (32, 64, 1)]):
            layers[f"{3 * i}"] = resnet.conv3x3(inputs, outputs, stride)
            layers[f"{3 * i + 1}"] = BatchNorm(outputs)
        super().__init__(layers)

    def forward(self, x: Tensor, counts: Sequence[int] = ()) -> Tensor:
        """Maps (n, 3, S, S) to (n, 64, S / 2, S / 2)."""
        for layer in self:
            x = layer(x, counts, relu=True) if isinstance(layer, BatchNorm) else layer(x)
        return x


_RESNETS: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
    "resnet152": (Bottleneck, [3, 8, 36, 3]),
    "resnext50_32x4d": (Bottleneck, [3, 4, 6, 3]),
}
_GROUPS = {"resnext50_32x4d": {"groups": 32, "width_per_group": 4}}


class Backbone(nn.Module):
    """Base class of backbones. ``Backbone(name)`` creates an instance of the subclass of that name.

    Args:
        name: as ``model.backbone``.
        recompute: whether backward recomputes activations inside blocks instead of storing them.
        maps: number of maps that are used, coarsest first; layers that only other maps need are not trained.

    Attributes:
        channels: channels of the maps that :meth:`forward` returns.
    """

    channels: tuple[int, ...]
    recompute: bool

    def __new__(cls, name: str = "", *_: Any, **__: Any) -> "Backbone":  # copy.deepcopy passes no name
        return super().__new__((PatchNet if name in _PATCH_NETS else ConvNet) if cls is Backbone else cls)

    def forward(self, x: Tensor, counts: Sequence[int] = ()) -> list[Tensor]:
        """Maps (n, 3, S, S) to C5, C4, C3, C2: (n, channels[i], S / 32 * 2^i, S / 32 * 2^i) rounded up, coarsest first.

        Args:
            x: canvases.
            counts: number of canvases in each group that BatchNorm normalises separately; empty: one group.
        """
        raise NotImplementedError

    def _run(self, block: Callable[..., Tensor], x: Tensor, *counts: Sequence[int]) -> Tensor:
        if not (self.recompute and torch.is_grad_enabled()):
            return block(x, *counts)
        y: Tensor = checkpoint(
            block,
            x,
            *counts,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing here is random
            context_fn=lambda: (contextlib.nullcontext(), self._frozen_statistics()),
        )
        return y

    @contextlib.contextmanager
    def _frozen_statistics(self) -> Iterator[None]:
        """Within the context, running statistics are not updated: the first computation has updated them."""
        norms = [m for m in self.modules() if isinstance(m, BatchNorm) and m.training]
        before = [(n.running_mean, n.running_var, n.num_batches_tracked) for n in norms]
        for n in norms:
            n.running_mean = n.running_var = n.num_batches_tracked = None
        try:
            yield
        finally:
            for n, buffers in zip(norms, before, strict=True):
                n.running_mean, n.running_var, n.num_batches_tracked = buffers


class ConvNet(Backbone, ResNet):  # type: ignore[misc]
    """torchvision's ResNet (stride in the 3x3 convolution), or the ResNet-D of RT-DETR.

    ResNet-D (arXiv 1812.01187) has a :class:`DeepStem`, and shortcuts average over 2 x 2 cells before a convolution of
    stride 1. As in RT-DETR, the first stage has such a convolution even if it keeps the number of channels.

    Convolutions are initialised with a Kaiming normal distribution over the fan-in, and no BatchNorm scale is
    initialised with zero, as in the authors' code.
    """

    stem: DeepStem
    layer1: nn.Sequential
    conv1: nn.Conv2d
    bn1: BatchNorm
    maxpool: nn.MaxPool2d

    def __init__(self, name: str, recompute: bool = False, maps: int = 4) -> None:
        block, depths = _RESNETS[name.removesuffix("vd")]
        super().__init__(block, depths, norm_layer=BatchNorm, **_GROUPS.get(name, {}))
        del self.avgpool, self.fc
        self.recompute = recompute
        self.channels = tuple(64 * 2**i * block.expansion for i in (3, 2, 1, 0))
        self.deep = name.endswith("vd")
        if self.deep:
            self._deepen()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, x: Tensor, counts: Sequence[int] = ()) -> list[Tensor]:
        x = self._run(self._stride_4, x, counts)
        features = []
        for stage in self._stages():
            for block in stage:
                x = self._run(block, x, counts)
            features.append(x)
        return features[::-1]

    def _stride_4(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Maps (n, 3, S, S) to (n, 64, S / 4, S / 4)."""
        x = self.stem(x, counts) if self.deep else self.bn1(self.conv1(x), counts, relu=True)
        y: Tensor = self.maxpool(x)
        return y

    def _stages(self) -> list[nn.Sequential]:
        return [getattr(self, f"layer{i}") for i in range(1, 5)]

    def _deepen(self) -> None:
        """Replaces stem and shortcuts of a ResNet by those of a ResNet-D."""
        del self.conv1, self.bn1
        self.stem = DeepStem()
        inputs = 64
        for stage, outputs in zip(self._stages(), self.channels[::-1], strict=True):
            pool = nn.Identity() if stage is self.layer1 else nn.AvgPool2d(2, ceil_mode=True)
            stage[0].downsample = nn.Sequential(pool, resnet.conv1x1(inputs, outputs), BatchNorm(outputs))
            inputs = outputs


class PatchNet(Backbone):
    """torchvision's ConvNeXt or Swin Transformer, which start with patches of 4 x 4 pixels and use no BatchNorm.

    Each map is normalised by a LayerNorm, as in detectors: ``norms``, finest first. Initial values are torchvision's,
    without stochastic depth. Swin pads maps to whole windows, and does not shift windows in maps of a single window.
    """

    def __init__(self, name: str, recompute: bool = False, maps: int = 4) -> None:
        super().__init__()
        width, depths = _PATCH_NETS[name]
        widths = [width * 2**i for i in range(4)]
        self.swin = name.startswith("swin")
        if self.swin:
            heads = [w // 32 for w in widths]
            self.features = SwinTransformer([4, 4], width, depths, heads, [7, 7], stochastic_depth_prob=0.0).features
            norm = partial(nn.LayerNorm, eps=1e-5)
        else:
            stages = [CNBlockConfig(*s) for s in zip(widths, [*widths[1:], None], depths, strict=True)]
            self.features = ConvNeXt(stages, stochastic_depth_prob=0.0).features
            norm = partial(LayerNorm2d, eps=1e-6)
        self.norms = nn.ModuleList(norm(w).requires_grad_(i >= 4 - maps) for i, w in enumerate(widths))
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.register_forward_pre_hook(_in_full_precision)
        self.recompute, self.channels = recompute, tuple(widths[::-1])

    def forward(self, x: Tensor, counts: Sequence[int] = ()) -> list[Tensor]:
        features = []
        for i, norm in enumerate(self.norms):
            for block in (self.features[2 * i], *self.features[2 * i + 1]):
                x = self._run(block, x)
            y = norm(x)
            features.append(y.permute(0, 3, 1, 2) if self.swin else y)
        return features[::-1]


def _in_full_precision(norm: nn.LayerNorm, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Casts inputs as autocast does on a GPU but not on a CPU, so that both compute the same."""
    return (inputs[0].to(norm.weight.dtype),)


_PATCH_NETS: dict[str, tuple[int, list[int]]] = {"convnext_t": (96, [3, 3, 9, 3]), "swin_t": (96, [2, 2, 6, 2])}
"""Channels of the first stage, and number of blocks per stage."""
