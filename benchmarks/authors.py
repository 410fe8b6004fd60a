"""The authors' training step in plain PyTorch: what :mod:`benchmarks.step` compares with, and an oracle for tests.

:class:`Authors` computes what the released code of MCL does (GuoQiushan/MCL, commit 1912aa9), in its order, from modules
of PyTorch and torchvision, in their default memory format. It shares no layer with :mod:`mcl.models`. Tensors of the
state dict have the names of the released code.

The released code also waits for the device, which has nothing to do with the method. We leave that out, in favour of the
authors: their LARS reads two norms per parameter with ``item()``, and logging reads every loss. The optimiser and the
momentum network update all parameters with ``torch._foreach_*`` instead of one after the other. Montages are given, as
they are to our model; the authors' code assembles them within the step.
"""

import contextlib
import copy
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models._utils import IntermediateLayerGetter

from mcl.config import Config, ModelConfig, OptimConfig
from mcl.montage import MontageBatch
from mcl.optim import AUTOCAST

_EXCLUDED = re.compile(r"(bn|gn)(\d+)?.(weight|bias)|bias")
"""The authors' expressions for parameters without weight decay and trust ratio."""


class ConvModule(nn.Module):
    """Convolution without bias, BatchNorm and, optionally, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, relu: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True) if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.bn(self.conv(x)))
        return y


class Pyramid(nn.Module):
    """FPN over all maps of the backbone, finest first."""

    def __init__(self, channels: list[int], width: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(ConvModule(c, width, 1, relu=False) for c in channels)
        self.fpn_convs = nn.ModuleList(ConvModule(width, width, 3, relu=False) for _ in channels)

    def forward(self, features: dict[str, Tensor]) -> list[Tensor]:
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, features.values(), strict=True)]
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] += F.interpolate(laterals[i], size=laterals[i - 1].shape[2:], mode="nearest")
        return [conv(x) for conv, x in zip(self.fpn_convs, laterals, strict=True)]


class Head(nn.Module):
    """Region head and projector on all tiles of all maps, which are cut by a reshape."""

    def __init__(self, config: ModelConfig, cells: int) -> None:
        super().__init__()
        width, hidden = config.width, config.hidden
        self.cells = cells
        self.cls_convs = nn.ModuleList(ConvModule(width, width, 3, relu=True) for _ in range(config.head_convs))
        self.mlp = nn.Sequential(*_mlp(width, hidden), nn.BatchNorm1d(width, affine=False))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps (n, C, h, w), finest first, to embeddings (n, tiles of a canvas, C)."""
        embeddings = []
        for x in maps:
            (n, c, h, w), side = x.shape, self.cells
            x = x.reshape(n, c, h // side, side, w // side, side)
            x = x.permute(0, 2, 4, 1, 3, 5).reshape(-1, c, side, side)
            for conv in self.cls_convs:
                x = conv(x)
            embeddings.append(self.mlp(F.avg_pool2d(x, side).reshape(-1, c)).reshape(n, -1, c))
        return embeddings


def _mlp(width: int, hidden: int) -> list[nn.Module]:
    return [nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, width)]


class Predictors(nn.Module):
    """One MLP per level."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        mlps = [nn.Sequential(*_mlp(config.width, config.hidden)) for _ in config.loss_weights]
        self.predictor = nn.ModuleList(nn.ModuleDict({"mlp": mlp}) for mlp in mlps)


class Authors(nn.Module):
    """Loss of a step on one process.

    Args:
        config: section ``model`` of the configuration; of ``compute`` nothing is read.
        cells: feature cells per tile side.
    """

    def __init__(self, config: ModelConfig, cells: int) -> None:
        super().__init__()
        self.config = config
        layers = {f"layer{i}": f"layer{i}" for i in (1, 2, 3, 4)}
        backbone = IntermediateLayerGetter(get_model(config.backbone), layers)
        block = backbone["layer1"][0]
        expansion = 4 if hasattr(block, "conv3") else 1
        pyramid = Pyramid([64 * 2**i * expansion for i in range(4)], config.width)
        self.encoder_q = nn.Sequential(backbone, pyramid, Head(config, cells))
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.head = Predictors(config)

    def forward(self, query: MontageBatch, key: MontageBatch) -> dict[str, Tensor]:
        """Loss and cosines of each level and direction, named as in the authors' log; their losses add up."""
        online = [self.encoder_q(view.images) for view in (query, key)]
        with torch.no_grad():
            coarsest = [self.encoder_k(view.images)[-1] for view in (query, key)]
        targets = [F.normalize(z[: len(query.index)].flatten(0, 1), dim=1) for z in coarsest]
        losses: dict[str, Tensor] = {}
        for letter, view, embeddings, target in zip("qk", (query, key), online, reversed(targets), strict=True):
            first = 0
            for level, canvases in enumerate(view.canvases):
                z = embeddings[-1 - level][first : first + canvases]
                labels = view.sources[view.tiles(level)]
                for name, value in self._contrast(z.flatten(0, 1), target, labels, level).items():
                    losses[f"{name}_{letter}_level_{level}"] = value
                first += canvases
        return losses

    def _contrast(self, z: Tensor, targets: Tensor, labels: Tensor, level: int) -> dict[str, Tensor]:
        predicted = F.normalize(self.head.predictor[level]["mlp"](z), dim=1)
        cosines = predicted @ targets.t()
        temperature, weight = self.config.temperature, self.config.loss_weights[level]
        loss = F.cross_entropy(cosines / temperature, labels) * (2 * temperature * weight)
        positive = cosines.gather(1, labels[:, None]).mean()
        negative = (cosines.sum() - positive * len(labels)) / (cosines.numel() - len(labels))
        return {"loss": loss, "pos_cos_dist": positive, "neg_cos_dist": negative}


class Lars(torch.optim.Optimizer):
    """The authors' optimiser; groups have `adapt`, whether the trust ratio applies."""

    def __init__(self, config: OptimConfig, model: nn.Module) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in named if not _EXCLUDED.search(name)], "adapt": True},
            {"params": [p for name, p in named if _EXCLUDED.search(name)], "adapt": False},
        ]
        super().__init__(groups, {"lr": 0.0})
        self.config = config

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            weights = group["params"]
            steps, momenta = [w.grad for w in weights], [self._momentum(w) for w in weights]
            if group["adapt"]:
                decay = self.config.weight_decay
                norms, of_gradients = (torch.stack(torch._foreach_norm(tensors)) for tensors in (weights, steps))
                trust = self.config.trust_coefficient * norms / (of_gradients + decay * norms)
                steps = torch._foreach_add(steps, weights, alpha=decay)
                torch._foreach_mul_(steps, list((group["lr"] * trust).unbind()))
            else:
                steps = torch._foreach_mul(steps, group["lr"])
            torch._foreach_mul_(momenta, self.config.momentum)
            torch._foreach_add_(momenta, steps)
            torch._foreach_sub_(weights, momenta)

    def _momentum(self, weight: Tensor) -> Tensor:
        if not self.state[weight]:
            self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        buffer: Tensor = self.state[weight]["momentum_buffer"]
        return buffer


class AuthorsStep:
    """Forward, backward, clip, optimiser and momentum network, in the arithmetic of ``trainer.precision``.

    Args:
        config: of a run with LARS.
        model: on its device.
    """

    def __init__(self, config: Config, model: Authors) -> None:
        self.config, self.model = config, model
        self.device = next(model.parameters()).device
        self.optimizer = Lars(config.optim, model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.trainer.precision == "fp16")

    def __call__(self, query: MontageBatch, key: MontageBatch, lr: float, momentum: float) -> dict[str, Tensor]:
        """Updates the model; returns what it did."""
        dtype = AUTOCAST.get(self.config.trainer.precision)
        with torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext():
            losses = self.model(query, key)
            loss = torch.stack([value for name, value in losses.items() if name.startswith("loss")]).sum()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_norm or float("inf"))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            target = list(self.model.encoder_k.parameters())
            torch._foreach_mul_(target, momentum)
            torch._foreach_add_(target, list(self.model.encoder_q.parameters()), alpha=1 - momentum)
        return losses
