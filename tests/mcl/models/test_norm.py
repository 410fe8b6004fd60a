"""BatchNorm over processes, with gloo, compared with PyTorch's BatchNorm over all their rows."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from dali_pipelines.batch import MontageBatch
from dali_pipelines.geometry import Geometry
from mcl import config, distributed
from mcl.models.heads import MLP
from mcl.models.norm import BatchNorm
from mcl.objectives import MCL
from tests.conftest import ThinBackbone, random_view
from tests.fp64 import fast_convolutions
from tests.mcl.ranks import in_ranks, joined

SIZES = {1: (5,), 2: (5, 2), 4: (3, 1, 6, 2)}  # rows of each rank, by number of ranks


@dataclass(frozen=True, kw_only=True)
class Case:
    shape: tuple[int, ...] = (6, 4, 3)  # shape of a row, channels first
    affine: bool = True
    momentum: float | None = 0.1
    mean: float = 0.0
    dtype: torch.dtype = torch.float64
    layout: torch.memory_format = torch.contiguous_format

    def norm(self, kind: type[nn.BatchNorm1d | nn.BatchNorm2d | BatchNorm] | None = None) -> nn.Module:
        """PyTorch's BatchNorm, or another kind."""
        torch.manual_seed(1)
        kind = kind or (nn.BatchNorm2d if len(self.shape) == 3 else nn.BatchNorm1d)
        norm = kind(self.shape[0], affine=self.affine, momentum=self.momentum)
        if self.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
        return norm

    def rows(self, seed: int, mean: float) -> Tensor:
        """Rows of all ranks, as float64 with values that the case's dtype can represent."""
        rows = sum(SIZES[distributed.world_size()])
        x = torch.randn(rows, *self.shape, generator=torch.Generator().manual_seed(seed)) + mean
        return x.to(self.dtype).double()


def own(x: Tensor) -> Tensor:
    """The rows of this rank."""
    return x.split(SIZES[distributed.world_size()])[distributed.rank()]


def passes(norm: nn.Module, case: Case, xs: list[Tensor], grads: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and gradients of some steps, and running statistics after them; in float64."""
    norm.to(torch.promote_types(dtype, torch.float32))
    autocast = torch.autocast("cpu", dtype) if dtype in (torch.bfloat16, torch.float16) else nullcontext()
    results = {}
    for step, (x, grad) in enumerate(zip(xs, grads, strict=True)):
        x = x.to(dtype, memory_format=case.layout, copy=True).requires_grad_()
        with autocast:
            y = norm(x)
        y.backward(grad.to(dtype))
        assert x.grad is not None
        assert y.dtype == x.grad.dtype == dtype
        if case.layout is torch.channels_last:
            assert y.is_contiguous(memory_format=case.layout)
            assert x.grad.is_contiguous(memory_format=case.layout)
        results |= {f"output {step}": y.detach(), f"input's gradient {step}": x.grad}
    results |= {f"{name}'s gradient": p.grad for name, p in norm.named_parameters() if p.grad is not None}
    results |= dict(norm.named_buffers())
    return {name: value.double() for name, value in results.items()}


def errors(case: Case) -> dict[str, tuple[float, float]]:
    """Largest differences from float64, of ours and of PyTorch's over all rows in the case's dtype, relative to values
    above 1."""
    xs = [case.rows(2, case.mean), case.rows(3, case.mean)]
    grads = [case.rows(4, 0.0), case.rows(5, 0.0)]
    exact = passes(case.norm(), case, xs, grads, torch.float64)
    plain = passes(case.norm(), case, xs, grads, case.dtype)
    ours = passes(case.norm(BatchNorm), case, [own(x) for x in xs], [own(g) for g in grads], case.dtype)
    assert exact.keys() == plain.keys() == ours.keys()
    differences: dict[str, Any] = {}
    for name, value in exact.items():
        of_ours, of_plain = ours[name], plain[name]
        if value.dim() > 1:
            value, of_plain = own(value), own(of_plain)
        elif name.endswith("gradient") and dist.is_initialized():  # of weight or bias
            dist.all_reduce(of_ours)
        scale = max(1.0, value.abs().max().item())
        differences[name] = tuple((found - value).abs().max().item() / scale for found in (of_ours, of_plain))
    return differences


def errors_of(cases: list[Case]) -> list[dict[str, tuple[float, float]]]:
    return [errors(case) for case in cases]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_it_is_one_batchnorm_over_all_rows(world: int) -> None:
    """Outputs, all gradients and running statistics, for batches of different sizes."""
    cases = [
        Case(),
        Case(layout=torch.channels_last),
        Case(shape=(3, 1, 1), layout=torch.channels_last, affine=False),
        Case(shape=(5,)),
        Case(shape=(5,), affine=False),
        Case(shape=(4, 1, 7), momentum=None),
    ]
    for rank in in_ranks(world, errors_of, cases) if world > 1 else [errors_of(cases)]:
        for case, differences in zip(cases, rank, strict=True):
            assert {"num_batches_tracked", "running_var", "input's gradient 1"} <= differences.keys()
            assert ("weight's gradient" in differences) == case.affine
            for name, (ours, _) in differences.items():
                assert ours < 1e-12, (case, name)


def test_lower_precision_costs_no_more_than_in_one_batchnorm() -> None:
    """The error is at most twice that of PyTorch's BatchNorm in that dtype, or 4 roundings of fp32 if that is
    larger."""
    cases = [
        Case(dtype=torch.float32),
        Case(dtype=torch.float32, mean=1e3),
        Case(dtype=torch.float32, layout=torch.channels_last),
        Case(dtype=torch.bfloat16),
        Case(dtype=torch.bfloat16, layout=torch.channels_last),
        Case(dtype=torch.float16),
        Case(dtype=torch.float16, shape=(5,)),
    ]
    for rank in [errors_of(cases), *in_ranks(2, errors_of, cases)]:
        for case, differences in zip(cases, rank, strict=True):
            for name, (ours, plain) in differences.items():
                scale = max(1.0, case.mean)
                assert ours <= 2 * plain + 4 * scale * torch.finfo(torch.float32).eps, (case, name)


def offset_variance() -> tuple[float, float]:
    """Running variance in fp32 of rows with values around 1000, and their true variance."""
    norm = BatchNorm(1, momentum=1.0)
    case = Case(shape=(1, 64, 64), dtype=torch.float32, mean=1e3)
    x = case.rows(6, case.mean)
    norm(own(x).float())
    assert norm.running_var is not None
    return norm.running_var.item(), x.var().item()


def test_the_variance_of_values_far_from_zero_is_exact() -> None:
    for found, expected in in_ranks(2, offset_variance):
        assert found == pytest.approx(expected, rel=1e-6)


def dead_channels() -> bool:
    """Whether channels with a single value of up to a million give finite results."""
    values = torch.arange(1, 65, dtype=torch.float64) * 1e6 / 63
    norm = BatchNorm(64).double()
    return bool(norm(own(values.expand(7, 64))).isfinite().all())


def test_channels_without_variance_are_finite() -> None:
    assert in_ranks(2, dead_channels) == [True, True]


class Calls(TorchDispatchMode):
    """Records collectives and reads of tensors' values, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" or func is torch.ops.aten._local_scalar_dense.default:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def take(self) -> list[str]:
        names, self.names = self.names, []
        return names


def collectives() -> dict[str, list[str]]:
    """Calls of every kind of pass, for two norms in a row with two groups."""
    norms = MLP(BatchNorm(3), nn.ReLU(inplace=True), BatchNorm(3))
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    with Calls() as calls:
        y = norms(x, [3, 1])
        said = {"forward": calls.take()}
        y.square().sum().backward()
        said["backward"] = calls.take()
        with torch.no_grad():
            norms(x, [3, 1])
        said["no gradient"] = calls.take()
        norms.eval()(x).sum().backward()
        said["evaluation"] = calls.take()
    return said


def test_every_direction_is_one_collective_and_reads_nothing() -> None:
    gather, reduce = (["c10d._allgather_base_.default"] * 2, ["c10d.allreduce_.default"] * 2)  # for two norms
    for said in in_ranks(2, collectives):
        assert said == {"forward": gather, "backward": reduce, "no gradient": gather, "evaluation": []}


def evaluated() -> bool:
    """Whether evaluation mode equals BatchNorm bit for bit, with statistics that training has changed."""
    x = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(distributed.rank()))
    norm = BatchNorm(3)
    norm(x)
    plain = nn.BatchNorm2d(3)
    plain.load_state_dict(norm.state_dict())
    return torch.equal(norm.eval()(x), plain.eval()(x))


def test_evaluation_is_that_of_batchnorm() -> None:
    assert in_ranks(2, evaluated) == [True, True]


MODEL: dict[str, Any] = {
    "montage": {"cells": 1, "images_per_canvas": [1, 2, 2, 2]},
    "model": {"backbone": "resnet18", "width": 16, "head_convs": 1, "hidden": 32, "loss_weights": [0.4, 0.3, 0.2, 0.1]},
}


def build(compute: str) -> MCL:
    cfg = config.from_dict(MODEL | {"model": MODEL["model"] | {"compute": compute}})
    torch.manual_seed(0)
    with mock.patch("mcl.models.encoder.Backbone", ThinBackbone):
        return MCL(cfg).double()


def step(module: nn.Module, model: MCL, query: MontageBatch, key: MontageBatch) -> dict[str, np.ndarray]:
    """Losses, gradients and running statistics of a step."""
    with fast_convolutions():
        output = module(query, key)
        output.loss.backward()
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    values = {"losses": output.losses} | gradients | dict(model.named_buffers())
    return {name: value.numpy() for name, value in values.items()}


def two_views(rank: int) -> list[MontageBatch]:
    return [random_view(Geometry(**MODEL["montage"]), 8, 2 * rank + side, torch.float64) for side in range(2)]


def shared_step(compute: str) -> dict[str, np.ndarray]:
    model = build(compute)
    module = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    return step(module, model, *two_views(distributed.rank()))


@pytest.mark.parametrize("compute", ["matched", "released"])
def test_ranks_compute_what_one_process_does(compute: str) -> None:
    """Losses, averaged gradients and running statistics of MCL; each of two ranks has half of the images."""
    alone = build(compute)
    whole = [joined(Geometry(**MODEL["montage"]), views) for views in zip(two_views(0), two_views(1), strict=True)]
    expected = step(alone, alone, *whole)
    first, second = in_ranks(2, shared_step, compute)
    assert first.keys() == second.keys() == expected.keys()
    assert {"losses", "gradient of online.backbone.convs.0.weight", "target.head.projector.4.running_var"} <= set(first)
    first["losses"] = second["losses"] = (first["losses"] + second["losses"]) / 2
    for name, value in expected.items():
        # The gradient of a bias before a BatchNorm consists of rounding errors.
        bound = 1e-10 * max(np.abs(value).max(), 1e-3)
        for ours in (first, second):
            assert np.abs(ours[name] - value).max() <= bound, name
