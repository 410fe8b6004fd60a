"""The authors' training step in plain PyTorch: a contender of :mod:`benchmarks.step`, and a reference for tests.

:class:`Authors` computes the same as the released code (GuoQiushan/MCL, commit 1912aa9), in the same order, with
modules of PyTorch and torchvision in their default memory format. It uses no layer of :mod:`mcl`, and its tensors have
the names of the released ``state_dict``.

Some costs of the released code are not part of the method, and are left out in favour of the authors: LARS and the
momentum network process parameters one by one, and LARS reads two norms of each from the device; logging reads every
loss; and montages are assembled within the step, whereas they are inputs here.
"""

import contextlib
import copy
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models._utils import IntermediateLayerGetter

from dali_pipelines.batch import MontageBatch
from mcl.config import Config, ModelConfig
from mcl.train.optim import AUTOCAST

LOSS_SCALE = 2.0**14
"""Loss scale in fp16: the upper bound of the authors' scale, and constant here."""


class ConvModule(nn.Module):
    """Convolution without bias, BatchNorm, and optionally ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, relu: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.activate = nn.ReLU(inplace=True) if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(self.bn(self.conv(x)))


class Pyramid(nn.Module):
    """FPN over all maps of the backbone, finest first."""

    def __init__(self, channels: list[int], width: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(ConvModule(c, width, 1, relu=False) for c in channels)
        self.fpn_convs = nn.ModuleList(ConvModule(width, width, 3, relu=False) for _ in channels)

    def forward(self, features: dict[str, Tensor]) -> list[Tensor]:
        maps = [conv(x) for conv, x in zip(self.lateral_convs, features.values(), strict=True)]
        for i in range(len(maps) - 1, 0, -1):
            maps[i - 1] += F.interpolate(maps[i], size=maps[i - 1].shape[2:], mode="nearest")
        return [conv(x) for conv, x in zip(self.fpn_convs, maps, strict=True)]


class Head(nn.Module):
    """Convolutions, average pooling and projector on all tiles of all maps, one map after another."""

    def __init__(self, config: ModelConfig, cells: int) -> None:
        super().__init__()
        self.cells = cells
        convs = (ConvModule(config.width, config.width, 3, relu=True) for _ in range(config.head_convs))
        self.cls_convs = nn.Sequential(*convs)
        self.mlp = nn.Sequential(*mlp(config), nn.BatchNorm1d(config.width, affine=False))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps (n, C, h, w) to embeddings (n, tiles of a canvas, C)."""
        embeddings = []
        for x in maps:
            (n, c, h, w), side = x.shape, self.cells
            grid = x.reshape(n, c, h // side, side, w // side, side)
            tiles = self.cls_convs(grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, c, side, side))
            embeddings.append(self.mlp(F.avg_pool2d(tiles, side).reshape(-1, c)).reshape(n, -1, c))
        return embeddings


class Predictors(nn.Module):
    """One predictor per level."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        levels = (nn.ModuleDict({"mlp": nn.Sequential(*mlp(config))}) for _ in config.loss_weights)
        self.predictor = nn.ModuleList(levels)

    def forward(self, x: Tensor, level: int) -> Tensor:
        return self.predictor[level]["mlp"](x)


def mlp(config: ModelConfig) -> list[nn.Module]:
    width, hidden = config.width, config.hidden
    return [nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, width)]


class Authors(nn.Module):
    """The losses of a step in one process.

    Args:
        config: section ``model`` of the configuration.
        cells: feature cells per tile side.
    """

    def __init__(self, config: ModelConfig, cells: int) -> None:
        super().__init__()
        self.config = config
        backbone = IntermediateLayerGetter(get_model(config.backbone), {f"layer{i}": str(i) for i in (1, 2, 3, 4)})
        channels = [list(backbone[f"layer{i}"][-1].parameters())[-1].numel() for i in (1, 2, 3, 4)]
        self.encoder_q = nn.Sequential(backbone, Pyramid(channels, config.width), Head(config, cells))
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.head = Predictors(config)

    def forward(self, query: MontageBatch, key: MontageBatch) -> dict[str, Tensor]:
        """The values that the authors log for each direction and level: cosines, and losses that sum to the step's."""
        views = {"q": query, "k": key}
        pixels = {name: view.pixels.contiguous() for name, view in views.items()}
        online = {name: self.encoder_q(x) for name, x in pixels.items()}
        with torch.no_grad():
            coarsest = {name: self.encoder_k(x)[-1][: len(query.index)] for name, x in pixels.items()}
        targets = {name: F.normalize(z.flatten(0, 1), dim=1) for name, z in coarsest.items()}
        log = {}
        for (name, view), other in zip(views.items(), "kq", strict=True):
            rows = zip(*(z.split(view.canvas_counts) for z in reversed(online[name])), strict=True)
            for level, of_level in enumerate(rows):
                z, labels = of_level[level].flatten(0, 1), view.tile_images[view.tiles(level)]
                contrast = self.contrast(self.head(z, level), targets[other], labels, self.config.loss_weights[level])
                log |= {f"{key}_{name}_level_{level}": value for key, value in contrast.items()}
        return log

    def contrast(self, predicted: Tensor, targets: Tensor, labels: Tensor, weight: float) -> dict[str, Tensor]:
        """Loss and cosines of one level, from predictions (R, C), normalised targets (N, C) and their labels (R,)."""
        cosines = F.normalize(predicted, dim=1) @ targets.t()
        temperature = self.config.temperature
        loss = F.cross_entropy(cosines / temperature, labels) * (2 * temperature * weight)
        positive = cosines.gather(1, labels[:, None]).mean()
        negative = (cosines.sum() - positive * len(labels)) / (cosines.numel() - len(labels))
        return {"loss": loss, "pos_cos_dist": positive, "neg_cos_dist": negative}


class AuthorsStep:
    """Forward, backward, clipping, LARS and momentum network, in the precision ``trainer.precision``.

    Args:
        config: configuration of a run with LARS.
        model: the model, on its device.
    """

    def __init__(self, config: Config, model: Authors) -> None:
        self.model, self.optim, self.precision = model, config.optim, config.trainer.precision
        excluded = re.compile(r"(bn|gn)(\d+)?.(weight|bias)|bias")  # the authors' expressions
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.excluded = [p for name, p in named if excluded.search(name)]
        self.adapted = [p for name, p in named if not excluded.search(name)]
        self.momenta = {p: torch.zeros_like(p) for _, p in named}

    def __call__(self, query: MontageBatch, key: MontageBatch, lr: float, momentum: float) -> dict[str, Tensor]:
        """Updates the model and returns the result of its forward."""
        dtype, scale = AUTOCAST.get(self.precision), LOSS_SCALE if self.precision == "fp16" else 1.0
        with torch.autocast(query.pixels.device.type, dtype) if dtype else contextlib.nullcontext():
            log = self.model(query, key)
        loss = sum(value for name, value in log.items() if "loss" in name)
        self.model.zero_grad()
        (loss * scale).backward()
        with torch.no_grad():
            if scale != 1:
                torch._foreach_div_([p.grad for p in self.momenta], scale)
            nn.utils.clip_grad_norm_(self.momenta, self.optim.clip_norm or float("inf"))
            self.update(self.adapted, lr, self.optim.weight_decay, self.optim.trust_coefficient)
            self.update(self.excluded, lr, 0.0, None)
            target, online = list(self.model.encoder_k.parameters()), list(self.model.encoder_q.parameters())
            torch._foreach_mul_(target, momentum)
            torch._foreach_add_(target, online, alpha=1 - momentum)
        return log

    def update(self, weights: list[Tensor], lr: float, decay: float, trust_coefficient: float | None) -> None:
        """LARS; without a trust coefficient, SGD with momentum."""
        grads, momenta = [w.grad for w in weights], [self.momenta[w] for w in weights]
        steps = torch._foreach_add(grads, weights, alpha=decay)
        torch._foreach_mul_(steps, lr)
        if trust_coefficient is not None:
            of_weights, of_grads = (torch.stack(torch._foreach_norm(tensors)) for tensors in (weights, grads))
            trust = trust_coefficient * of_weights / (of_grads + decay * of_weights)
            torch._foreach_mul_(steps, list(trust.unbind()))
        torch._foreach_mul_(momenta, self.optim.momentum)
        torch._foreach_add_(momenta, steps)
        torch._foreach_sub_(weights, momenta)
