"""Compares operators with their alternatives: ``python -m benchmarks.kernels``.

Region pooling is compared with torchvision, and BatchNorm with PyTorch, forward and backward; LARS and momentum network
are compared with a loop over parameters and with PyTorch's foreach functions. They run on the GPU if there is one.
``python -m tests.kernels.ptxas`` prints registers and spills of the CUDA kernels.
"""

import functools
import itertools
import math
import statistics
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from benchmarks.common import Result, argument_parser, finish, interleave, markdown, progress, summary
from dali_pipelines.geometry import STRIDE, Geometry
from dali_pipelines.layout import tile_boxes
from mcl import ops
from mcl.config import Config
from mcl.objectives import MCL
from mcl.ops import fallback
from mcl.ops.batch_norm import batch_norm
from mcl.train import ema
from mcl.train.optim import LARS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GEOMETRY = Geometry()
STRIDES = [STRIDE / r for r in GEOMETRY.ratios]
SIDES = [GEOMETRY.cells * r for r in GEOMETRY.ratios]
"""Cells per side of each map."""
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NORMS = ((64, 112, False), (256, 56, True), (2048, 7, True))
"""Channels, cells per side, whether a residual is added: ResNet-50's stem, first and last stage at 224 px."""
STEP = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-5, "trust_coefficient": 1e-3}


@dataclass(frozen=True)
class Case:
    """Several ways to compute the same result; the first one is ours."""

    ways: Mapping[str, Callable[[], Tensor]]
    inputs: Sequence[Tensor]  # inputs that have gradients
    tolerance: float  # relative, for outputs and gradients of the other ways against ours


def race(name: str, case: Case, repeat: int) -> list[Result]:
    """Results of each way: seconds of forward and backward together, and their ratio to ours.

    Raises:
        AssertionError: outputs or gradients differ.
    """
    ways, inputs = case.ways, case.inputs
    outputs = {who: way() for who, way in ways.items()}
    grad = torch.randn_like(next(iter(outputs.values())))

    def backward(who: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs[who], inputs, grad, retain_graph=True)

    ours, *others = ([outputs[who].detach(), *backward(who)] for who in ways)
    for other in others:
        error = max(float((a - b).norm() / b.norm()) for a, b in zip(ours, other, strict=True))
        assert error <= case.tolerance, f"{name}: a relative error of {error:.1e} between ours and another"
    with torch.no_grad():
        forwards = interleave(ways, repeat)
    backwards = interleave({who: functools.partial(backward, who) for who in ways}, repeat)
    results = []
    for who, seconds in forwards.items():
        both = [a + b for a, b in zip(seconds, backwards[who], strict=True)]
        results.append(summary(f"{name}: {who}", both, forward=statistics.median(seconds)))
    return [{**result, "ratio": result["seconds"] / results[0]["seconds"]} for result in results]


def ours(maps: list[Tensor], boxes: Tensor, index: Tensor) -> Tensor:
    return ops.region_pool(maps, STRIDES, boxes, index, GEOMETRY.cells)


def theirs(maps: list[Tensor], boxes: Tensor, index: Tensor) -> Tensor:
    """torchvision, map by map; boxes must be in the order of maps. bf16, which it lacks, is converted to and from."""
    pooled = []
    for level, (f, stride) in enumerate(zip(maps, STRIDES, strict=True)):
        wide = f.float() if f.dtype == torch.bfloat16 else f
        mine = boxes[index == level]
        pooled.append(torchvision.ops.roi_align(wide, mine, GEOMETRY.cells, 1 / stride, 0, True).to(f.dtype))
    return torch.cat(pooled)


def _noise(*shape: int, dtype: str = "fp32", layout: str = "NCHW") -> Tensor:
    """Random values on the device, with a gradient."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return noise.to(DEVICE, DTYPES[dtype]).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()


def _tiles(images: int) -> tuple[Tensor, Tensor]:
    """Boxes (R, 5) and levels (R,) of all tiles; canvases are numbered through all levels."""
    index = torch.arange(GEOMETRY.levels).repeat_interleave(torch.tensor(GEOMETRY.tiles(images)))
    return tile_boxes(GEOMETRY, images).clone(), index


def region_pool(images: int, channels: int, dtype: str, layout: str, random: bool) -> Case:
    """Pooling from maps with the released shapes: one map per level with its canvases, and tiles or random boxes."""
    canvases = GEOMETRY.canvases(images)
    boxes, index = _tiles(images)
    boxes[:, 0] -= torch.tensor([sum(canvases[:i]) for i in range(GEOMETRY.levels)])[index]
    if random:
        corners = torch.rand(len(boxes), 2, 2, generator=torch.Generator().manual_seed(1)) * GEOMETRY.canvas
        boxes[:, 1:] = torch.cat([corners.amin(1), corners.amax(1)], 1)
    maps = [_noise(n, channels, s, s, dtype=dtype, layout=layout) for n, s in zip(canvases, SIDES, strict=True)]
    inputs = maps, boxes.to(DEVICE), index.to(DEVICE)
    ways = {"mcl": lambda: ours(*inputs), "torchvision": lambda: theirs(*inputs)}
    return Case(ways, maps, 1e-5 if dtype == "fp32" else 3e-2)


def multiscale(images: int, channels: int) -> Case:
    """Comparison with MultiScaleRoIAlign, which chooses a map by the size of a box, so that every map has all canvases.

    It pools without the half-pixel shift (aligned=False), so values differ; boxes and maps are the same.
    """
    number = sum(GEOMETRY.canvases(images))
    maps = [_noise(number, channels, s, s) for s in SIDES]
    boxes, index = (tensor.to(DEVICE) for tensor in _tiles(images))
    names = [f"P{5 - i}" for i in range(GEOMETRY.levels)][::-1]  # finest first
    pool = torchvision.ops.MultiScaleRoIAlign(names, GEOMETRY.cells, 0, canonical_scale=224, canonical_level=5)
    by_name = OrderedDict(zip(names, maps[::-1], strict=True))
    per_canvas = [boxes[boxes[:, 0] == k, 1:] for k in range(number)]
    sizes = [(GEOMETRY.canvas, GEOMETRY.canvas)] * number
    pool(by_name, per_canvas, sizes)  # creates map_levels
    assert torch.equal(GEOMETRY.levels - 1 - pool.map_levels(per_canvas), index)  # type: ignore[operator]
    ways = {"mcl": lambda: ours(maps, boxes, index), "MultiScaleRoIAlign": lambda: pool(by_name, per_canvas, sizes)}
    return Case(ways, maps, math.inf)


def norm(images: int, dtype: str, channels: int, side: int, residual: bool) -> Case:
    """BatchNorm in training, with the addition and the ReLU of a residual block."""
    maps = [_noise(images, channels, side, side, dtype=dtype, layout="channels_last") for _ in range(1 + residual)]
    weight, bias = (torch.full((channels,), value, device=DEVICE, requires_grad=True) for value in (1.0, 0.0))
    running = torch.zeros(channels, device=DEVICE), torch.ones(channels, device=DEVICE), None

    def plain() -> Tensor:
        y = F.batch_norm(maps[0], *running[:2], weight, bias, training=True)
        return F.relu(y + maps[1] if residual else y)

    def fused() -> Tensor:
        return batch_norm(maps[0], weight, bias, running, [images], 0.1, 1e-5, maps[1] if residual else None, True)

    # Sums near zero may round to different signs, so that ReLU passes other gradients; tests are stricter.
    return Case({"mcl": fused, "PyTorch": plain}, [*maps, weight, bias], 1e-2 if dtype == "fp32" else 1e-1)


def loop(weights: Sequence[nn.Parameter], buffers: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """A step as in the released code: one parameter at a time, two reads by the host for each, and new tensors."""
    for w, buffer in zip(weights, buffers, strict=True):
        assert w.grad is not None
        weight_norm, grad_norm = w.data.norm().item(), w.grad.norm().item()
        trust = STEP["trust_coefficient"] * weight_norm / (grad_norm + STEP["weight_decay"] * weight_norm)
        step = w.grad.add(w.data, alpha=STEP["weight_decay"])
        buffer.mul_(STEP["momentum"]).add_(step, alpha=STEP["lr"] * trust)
        w.data.add_(-buffer)
    for target, w in zip(targets, weights, strict=True):
        target.data = target.data * 0.99 + w.data * 0.01


def foreach(weights: Sequence[nn.Parameter], buffers: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    grads = [w.grad for w in weights if w.grad is not None]
    fallback.lars_(list(weights), grads, list(buffers), None, *STEP.values(), True)
    fallback.ema_(list(targets), list(weights), 0.99)


PASSES = {
    # Norms 2; g + wd w: 3; buffer * m: 2; + step: 3; -buffer: 2; w + it: 3. Then k * m: 2; q * (1 - m): 2; sum: 3.
    "loop": 15 + 7,
    # g + wd w: 3; norms 2; * trust: 2; buffer * m: 2; + step: 3; w - buffer: 3. Then k * m: 2; + q: 3.
    "foreach": 15 + 5,
    # Norms 2; reads w, g, buffer, writes w, buffer: 5. Then reads k, q, writes k. Two are from the CPU's cache.
    "mcl": 7 + 3,
}
"""Passes over all parameters per step (reads and writes): LARS + momentum network."""


def steps(repeat: int) -> list[Result]:
    """LARS and momentum network of R50-FPN, in three ways on equal tensors."""
    model = MCL(Config(montage=GEOMETRY)).to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    shapes = [p.detach() for p in (*model.online.parameters(), *model.predictors.parameters()) if p.ndim > 1]
    ways: dict[str, Callable[[], object]] = {}
    final: dict[str, list[Tensor]] = {}
    for name in PASSES:
        generator = torch.Generator().manual_seed(0)
        weights = [nn.Parameter(p.clone()) for p in shapes]
        for w in weights:
            w.grad = torch.empty_like(w).copy_(torch.randn(w.shape, generator=generator))
        buffers, targets = [torch.zeros_like(w) for w in weights], [w.detach().clone() for w in weights]
        final[name] = targets
        if name == "mcl":
            optimizer = LARS(weights, **STEP)
            ways[name] = lambda o=optimizer, w=weights, t=targets: (o.step(), ema.update(t, w, 0.99))  # type: ignore[misc]
        else:
            ways[name] = functools.partial(loop if name == "loop" else foreach, weights, buffers, targets)
    with torch.no_grad():
        seconds = interleave(ways, repeat)
    for name in ("foreach", "mcl"):
        for a, b in zip(final[name], final["loop"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    number = sum(p.numel() for p in shapes)
    results = [summary(f"LARS and momentum network: {name}", s, passes=PASSES[name]) for name, s in seconds.items()]
    for result in results:
        result["ratio"] = result["seconds"] / results[-1]["seconds"]
        result["bytes_per_s"] = result["passes"] * number * 4 / result["seconds"]
    return results


def measure(images: int, fewer: int, channels: int, repeat: int) -> list[Result]:
    """Measures all cases, one after another."""
    cases: dict[str, Callable[[], Case]] = {}
    for dtype, layout, kind in itertools.product(DTYPES, LAYOUTS, ("grid", "random")):
        pool = functools.partial(region_pool, images, channels, dtype, layout, kind == "random")
        cases[f"region_pool {kind} {dtype} {layout}"] = pool
    cases["region_pool grid fp32 NCHW, all canvases on all maps"] = lambda: multiscale(fewer, channels)
    for dtype, (channels_, side, residual) in itertools.product(DTYPES, NORMS):
        name = f"BatchNorm{', addition' * residual}, ReLU, {channels_} channels, {side} x {side}, {dtype}"
        cases[name] = functools.partial(norm, fewer, dtype, channels_, side, residual)
    results = []
    for name in progress([*cases, "LARS and momentum network"], str):
        results += race(name, cases[name](), repeat) if name in cases else steps(repeat)
    return results


def table(results: Sequence[Result]) -> str:
    """The results as Markdown, with one row for each alternative to ours."""
    named = [(*r["name"].rsplit(": ", 1), r) for r in results]
    ours = {case: r for case, who, r in named if who == "mcl"}
    rows = [(case, _ms(ours[case]), who, _ms(r), f"{r['ratio']:.3g}x") for case, who, r in named if who != "mcl"]
    return markdown(["what", "ms (spread)", "beside", "its ms (spread)", "times ours"], rows)


def _ms(result: Result) -> str:
    return f"{result['seconds'] * 1e3:.3g} ({result['spread']:.0%})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__, repeat=7, plot=False)
    parser.add_argument("--images", type=int, default=128, help="images per view")
    parser.add_argument("--channels", type=int, default=256, help="channels of the maps")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's default")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    fewer = max(math.lcm(*GEOMETRY.images_per_canvas), options.images // 4)
    results = measure(options.images, fewer, options.channels, options.repeat)
    print(
        f"Measured on {DEVICE.upper()}, {torch.get_num_threads()} threads, {options.images} images, "
        f"{fewer} for all canvases on all maps and for BatchNorm; forward + backward."
    )
    print("torchvision has no bf16 kernel on CPUs: its time includes converting to fp32 and back.\n")
    print(table(results))
    print("\nPasses over all parameters (reads and writes, counted), and the resulting bandwidth:\n")
    moving = [r for r in results if "passes" in r]
    print(markdown(["way", "passes", "GB/s"], [(r["name"], r["passes"], r["bytes_per_s"] / 1e9) for r in moving]))
    finish(options, results)


if __name__ == "__main__":
    main()
