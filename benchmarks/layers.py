"""Layers of ours beside PyTorch's, in training: convolutions, BatchNorms with what follows them, linear layers."""

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.common import Result, race
from mcl.models import layers
from mcl.models.norm import normalize

CONVOLUTIONS = ((64, 56), (128, 28), (256, 14), (512, 7), (512, 2))
"""Channels and cells of a side: 3x3 of ResNet's stages at 224 px, and of the last one at 64 px."""
NORMS = ((64, 112, False), (256, 56, True), (2048, 7, True))
"""Channels, cells of a side, whether a residual is added: ResNet-50's stem, first and last stage at 224 px."""
LINEARS = ((1280, 256, 2048), (1280, 2048, 256))
"""Rows, inputs, outputs: the released projector on both views of 128 images, five tiles each."""
TOLERANCES = {torch.float32: 1e-2, torch.bfloat16: 1e-1}
"""Relative errors of the norm. Sums near zero round to different sides, and ReLU passes other gradients; tests are
stricter."""


@dataclass(frozen=True)
class Case:
    """A layer of PyTorch's and the tensors it is given, all with gradients."""

    name: str
    module: nn.Module
    inputs: list[Tensor]

    def forward(self, module: nn.Module) -> Tensor:
        if isinstance(module, nn.BatchNorm2d):
            return normalize(module, self.inputs[0], (), *self.inputs[1:], relu=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.inputs[0].dtype == torch.bfloat16):
            y: Tensor = module(*self.inputs)
        return y


def measure(images: int, repeat: int) -> list[Result]:
    """Ours and PyTorch's, forward and backward, on so many images, after their results have been compared."""
    torch.manual_seed(0)
    return [result for case in _cases(images) for result in _compare(case, repeat)]


def _cases(images: int) -> Iterator[Case]:
    for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for channels, side in CONVOLUTIONS:
            name = f"convolution 3x3, {channels} channels, {side} x {side}, {kind}"
            convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            convolution.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            yield Case(name, convolution, [_maps(images, channels, side, dtype)])
        for channels, side, residual in NORMS:
            name = f"BatchNorm{', addition' * residual}, ReLU, {channels} channels, {side} x {side}, {kind}"
            maps = [_maps(images, channels, side, dtype) for _ in range(1 + residual)]
            yield Case(name, nn.BatchNorm2d(channels), maps)
    for rows, inputs, outputs in LINEARS:
        name = f"linear, {rows} rows, {inputs} to {outputs}, fp32"
        yield Case(name, nn.Linear(inputs, outputs), [torch.randn(rows, inputs, requires_grad=True)])


def _maps(images: int, channels: int, side: int, dtype: torch.dtype) -> Tensor:
    drawn = torch.randn(images, channels, side, side, dtype=dtype)
    return drawn.contiguous(memory_format=torch.channels_last).requires_grad_()


def _compare(case: Case, repeat: int) -> list[Result]:
    modules = {"mcl": copy.deepcopy(case.module), "PyTorch": case.module}
    layers.use(modules["mcl"])
    outputs = {who: case.forward(module) for who, module in modules.items()}
    grad = torch.randn_like(outputs["mcl"])

    def backward(who: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs[who], [*case.inputs, *modules[who].parameters()], grad, retain_graph=True)

    for a, b in zip(*((outputs[who].detach(), *backward(who)) for who in modules), strict=True):
        error = ((a - b).norm() / b.norm()).item()
        assert error < TOLERANCES[case.inputs[0].dtype], f"{case.name}: {error:.1e} between ours and PyTorch's"
    return race(
        case.name,
        {who: functools.partial(case.forward, module) for who, module in modules.items()},
        {who: functools.partial(backward, who) for who in modules},
        repeat,
    )
