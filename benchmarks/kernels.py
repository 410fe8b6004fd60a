"""Operators beside what one would use without them: ``python -m benchmarks.kernels``.

Region pooling against torchvision, forward and backward; LARS and momentum network against a loop over parameters and
against PyTorch's foreach. On the GPU where there is one; else on the CPU, and there layers against PyTorch's as well.
``--ptxas`` prints what the compiler says of the CUDA kernels instead.
"""

import argparse
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import torchvision
from torch import Tensor, nn

from benchmarks import layers, ptxas, traffic
from benchmarks.common import Result, finish, interleave, markdown, parser, race, summary
from dali_pipelines import geometry
from dali_pipelines.geometry import STRIDE, Geometry
from mcl import config, ops
from mcl.models import MCL
from mcl.ops import fallback
from mcl.train import ema
from mcl.train.optim import LARS

GEOMETRY = Geometry()
STRIDES = [STRIDE / r for r in GEOMETRY.ratios]
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STEP = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-5, "trust_coefficient": 1e-3}

Regions = tuple[list[Tensor], Tensor, Tensor]
"""Maps with gradient, boxes (R, 5), maps of the boxes (R,)."""


def regions(images: int, channels: int, grid: bool, dtype: torch.dtype, layout: torch.memory_format) -> Regions:
    """Maps of the released shapes: of each level its own canvases; its tiles, or as many random boxes per canvas."""
    generator = torch.Generator().manual_seed(0)
    canvases, tiles = GEOMETRY.canvases(images), GEOMETRY.tiles(images)
    boxes = torch.from_numpy(geometry.boxes(GEOMETRY, images))
    index = torch.arange(GEOMETRY.levels).repeat_interleave(torch.tensor(tiles))
    first = torch.tensor([sum(canvases[:i]) for i in range(GEOMETRY.levels)])
    boxes[:, 0] -= first[index]
    if not grid:
        corners = torch.rand(len(boxes), 2, 2, generator=generator) * GEOMETRY.canvas
        boxes[:, 1:] = torch.cat([corners.amin(1), corners.amax(1)], 1)
    maps = []
    for n, r in zip(canvases, GEOMETRY.ratios, strict=True):
        side = GEOMETRY.cells * r
        drawn = torch.randn(n, channels, side, side, generator=generator)
        maps.append(drawn.to(_device(), dtype).contiguous(memory_format=layout).requires_grad_())
    return maps, boxes.to(_device()), index.to(_device())


def ours(maps: list[Tensor], boxes: Tensor, index: Tensor) -> Tensor:
    return ops.region_pool(maps, STRIDES, boxes, index, GEOMETRY.cells)


def theirs(maps: list[Tensor], boxes: Tensor, index: Tensor) -> Tensor:
    """torchvision, map by map; boxes are in the order of the maps. bf16, which it lacks, is converted to and from."""
    pooled = []
    for level, (f, stride) in enumerate(zip(maps, STRIDES, strict=True)):
        wide = f.float() if f.dtype == torch.bfloat16 else f
        mine = boxes[index == level]
        pooled.append(torchvision.ops.roi_align(wide, mine, GEOMETRY.cells, 1 / stride, 0, True).to(f.dtype))
    return torch.cat(pooled)


def backward(pooled: Tensor, maps: Sequence[Tensor]) -> Callable[[], object]:
    grad = torch.ones_like(pooled)
    return lambda: torch.autograd.grad(pooled, maps, grad, retain_graph=True)


def region_pool(images: int, channels: int, repeat: int) -> list[Result]:
    """Every layout, dtype and kind of boxes: forward and backward of both."""
    results = []
    for dtype_name, dtype in DTYPES.items():
        for layout_name, layout in LAYOUTS.items():
            for kind in ("grid", "random"):
                inputs = regions(images, channels, kind == "grid", dtype, layout)
                a, b = ours(*inputs), theirs(*inputs)
                tolerance = 1e-5 if dtype == torch.float32 else 3e-2
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
                results += race(
                    f"region_pool {kind} {dtype_name} {layout_name}",
                    {"mcl": lambda i=inputs: ours(*i), "torchvision": lambda i=inputs: theirs(*i)},  # type: ignore[misc]
                    {"mcl": backward(a, inputs[0]), "torchvision": backward(b, inputs[0])},
                    repeat,
                )
    return results


def multiscale(images: int, channels: int, repeat: int) -> list[Result]:
    """Against MultiScaleRoIAlign, which chooses a map by a box's size: every map holds every canvas.

    It pools without the half-pixel shift (aligned=False), so values differ; boxes and maps are the same.
    """
    canvases, tiles = GEOMETRY.canvases(images), GEOMETRY.tiles(images)
    names = [f"P{5 - i}" for i in range(GEOMETRY.levels)]
    generator = torch.Generator().manual_seed(0)
    maps = [
        torch.randn(sum(canvases), channels, GEOMETRY.cells * r, GEOMETRY.cells * r, generator=generator)
        .to(_device())
        .requires_grad_()
        for r in GEOMETRY.ratios
    ]
    boxes = torch.from_numpy(geometry.boxes(GEOMETRY, images)).to(_device())
    index = torch.arange(GEOMETRY.levels).repeat_interleave(torch.tensor(tiles)).to(_device())
    pool = torchvision.ops.MultiScaleRoIAlign(names[::-1], GEOMETRY.cells, 0, canonical_scale=224, canonical_level=5)
    by_name = OrderedDict(zip(names[::-1], maps[::-1], strict=True))  # finest first
    per_canvas = [boxes[boxes[:, 0] == k, 1:] for k in range(sum(canvases))]
    sizes = [(GEOMETRY.canvas, GEOMETRY.canvas)] * sum(canvases)
    a, b = ours(maps, boxes, index), pool(by_name, per_canvas, sizes)
    assert torch.equal(GEOMETRY.levels - 1 - pool.map_levels(per_canvas), index)  # type: ignore[operator]
    return race(
        "region_pool grid fp32 NCHW, all canvases on all maps",
        {"mcl": lambda: ours(maps, boxes, index), "MultiScaleRoIAlign": lambda: pool(by_name, per_canvas, sizes)},
        {"mcl": backward(a, maps), "MultiScaleRoIAlign": backward(b, maps)},
        repeat,
    )


# --------------------------------------------------------------------------------------------------------- steps


def loop(weights: Sequence[nn.Parameter], buffers: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """A step in the style of the released code: parameter by parameter, two host reads each, and new tensors."""
    for w, buffer in zip(weights, buffers, strict=True):
        assert w.grad is not None
        weight_norm, grad_norm = w.data.norm().item(), w.grad.norm().item()
        trust = STEP["trust_coefficient"] * weight_norm / (grad_norm + STEP["weight_decay"] * weight_norm)
        step = w.grad.add(w.data, alpha=STEP["weight_decay"])
        buffer.mul_(STEP["momentum"]).add_(step, alpha=STEP["lr"] * trust)
        w.data.add_(-buffer)
    for target, w in zip(targets, weights, strict=True):
        target.data = target.data * 0.99 + w.data * 0.01


PASSES = {
    # Norms 2; g + wd w: 3; buffer * m: 2; + step: 3; -buffer: 2; w + it: 3. Then k * m: 2; q * (1 - m): 2; sum: 3.
    "loop": (15, 7),
    # g + wd w: 3; norms 2; * trust: 2; buffer * m: 2; + step: 3; w - buffer: 3. Then k * m: 2; + q: 3.
    "foreach": (15, 5),
    # Norms 2; reads w, g, buffer, writes w, buffer: 5. Then reads k, q, writes k. The CPU has two of them in its cache.
    "mcl": (7, 3),
}
"""Reads and writes of all parameters, per step: of LARS, of the momentum network."""


def steps(repeat: int) -> list[Result]:
    """LARS and momentum network of R50-FPN, three ways on equal tensors."""
    model = MCL(config.from_dict({}).model, GEOMETRY).to(_device(), memory_format=torch.channels_last)  # type: ignore[call-overload]
    shapes = [p.detach() for p in (*model.online.parameters(), *model.predictors.parameters()) if p.ndim > 1]
    ways: dict[str, Callable[[], object]] = {}
    final: dict[str, list[Tensor]] = {}
    for name in PASSES:
        generator = torch.Generator().manual_seed(0)
        weights = [nn.Parameter(p.clone()) for p in shapes]
        for w in weights:
            noise = torch.randn(w.shape, generator=generator).to(_device())
            w.grad = torch.empty_like(w).copy_(noise)
        buffers, targets = [torch.zeros_like(w) for w in weights], [w.detach().clone() for w in weights]
        final[name] = targets
        if name == "loop":
            ways[name] = lambda w=weights, b=buffers, t=targets: loop(w, b, t)  # type: ignore[misc]
        elif name == "foreach":
            ways[name] = lambda w=weights, b=buffers, t=targets: _foreach(w, b, t)  # type: ignore[misc]
        else:
            optimizer = LARS(weights, **STEP)
            ways[name] = lambda o=optimizer, w=weights, t=targets: (o.step(), ema.update(t, w, 0.99))  # type: ignore[misc]
    with torch.no_grad():
        seconds = interleave(ways, repeat)
    for name in ("foreach", "mcl"):
        for a, b in zip(final[name], final["loop"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    number = sum(p.numel() for p in shapes)
    results = [
        summary(f"LARS and momentum network: {name}", s, passes=sum(PASSES[name])) for name, s in seconds.items()
    ]
    for result in results:
        result["ratio"] = result["seconds"] / results[-1]["seconds"]
        result["bytes_per_s"] = result["passes"] * number * 4 / result["seconds"]
    return results


def _foreach(weights: list[nn.Parameter], buffers: list[Tensor], targets: list[Tensor]) -> None:
    grads = [w.grad for w in weights if w.grad is not None]
    fallback.lars_(list(weights), grads, buffers, None, *STEP.values(), True)
    fallback.ema_(targets, list(weights), 0.99)


# --------------------------------------------------------------------------------------------------------- output


def model_table(images: int, channels: int) -> str:
    """:mod:`benchmarks.traffic` of a step's operators, bf16 maps."""
    canvases = GEOMETRY.canvases(images)
    cells = sum(n * channels * (GEOMETRY.cells * r) ** 2 for n, r in zip(canvases, GEOMETRY.ratios, strict=True))
    boxes = sum(GEOMETRY.tiles(images))
    with torch.device("meta"):
        model = MCL(config.from_dict({}).model, GEOMETRY)
    averaged = sum(p.numel() for p in model.online.parameters())
    trained = averaged + sum(p.numel() for p in model.predictors.parameters())
    rows = traffic.region_pool(cells, boxes * channels * GEOMETRY.cells**2, 2, boxes, sum(canvases))
    rows += traffic.steps(trained, averaged)
    return markdown(
        ["kernel", "MB moved", "of the least possible", *(f"µs on {name}" for name in traffic.BANDWIDTH)],
        [
            (t.kernel, t.moved / 1e6, f"{t.moved / t.least:.2f}x", *(t.microseconds(d) for d in traffic.BANDWIDTH))
            for t in rows
        ],
    )


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def table(results: Sequence[Result]) -> str:
    """What was measured, as Markdown: a row for each of those that ours is compared with."""
    named = [(*r["name"].rsplit(": ", 1), r) for r in results]
    ours = {case: r for case, who, r in named if who == "mcl"}
    rows = [(case, _ms(ours[case]), who, _ms(r), f"{r['ratio']:.3g}x") for case, who, r in named if who != "mcl"]
    return markdown(["what", "ms (spread)", "beside", "its ms (spread)", "times ours"], rows)


def _ms(result: Result) -> str:
    return f"{result['seconds'] * 1e3:.3g} ({result['spread']:.0%})"


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    if options.ptxas:
        print(ptxas.table())
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    results = region_pool(options.images, options.channels, options.repeat)
    fewer = max(math.lcm(*GEOMETRY.images_per_canvas), options.images // 4)
    results += multiscale(fewer, options.channels, options.repeat)
    results += steps(options.repeat)
    if _device() == "cpu":  # on GPUs all layers are PyTorch's
        results += layers.measure(fewer, options.repeat)
    print(
        f"Measured on {_device().upper()}, {torch.get_num_threads()} threads, {options.images} images, "
        f"{fewer} for all canvases on all maps and for layers; forward + backward."
    )
    print("torchvision has no bf16 kernel on CPUs: its time includes converting to fp32 and back.\n")
    print(table(results))
    counts = [(name, lars, average, lars + average) for name, (lars, average) in PASSES.items()]
    print("\nReads and writes of all parameters, counted:\n")
    print(markdown(["way", "LARS", "momentum network", "both"], counts))
    print("\nA MODEL, NOT A MEASUREMENT: CUDA kernels on the grid, bf16, channels_last.\n")
    print(model_table(options.images, options.channels))
    finish(options, results)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__ or "")
    options.add_argument("--images", type=int, default=128, help="images per view")
    options.add_argument("--channels", type=int, default=256, help="of the maps")
    options.add_argument("--threads", type=int, default=0, help="of the CPU; 0: PyTorch's default")
    options.add_argument("--ptxas", action="store_true", help="only print what the compiler says of the CUDA kernels")
    return options.parse_args(arguments)


if __name__ == "__main__":
    main()
