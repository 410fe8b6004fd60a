"""Launches every kernel of the compiled operators once or twice, for compute-sanitizer.

``python -m tests.gpu.launches cuda``. Shapes are odd, and chosen such that all variants of a kernel run.
"""

import sys

import torch

from mcl import ops
from mcl.ops.batch_norm import batch_norm
from tests.mcl.ops.regions import LAYOUTS, STRIDES, maps, random_boxes
from tests.mcl.ops.test_batch_norm import SHAPES, inputs
from tests.mcl.ops.test_steps import STEP, lists


def launch(device: torch.device) -> None:
    boxes, index = (t.to(device) for t in random_boxes(30, [3, 2, 1], 128, seed=0))
    for dtype, layout, channels in (
        (d, m, c) for d in (torch.float32, torch.bfloat16) for m in LAYOUTS for c in (3, 64)
    ):
        features = [f.detach().to(device).requires_grad_() for f in maps(dtype, layout, channels)]
        ops.region_pool(features, STRIDES, boxes, index, 7).sum().backward()
    for shape, counts in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            x, weight, bias, mean, var, residual, grad = (t.to(device) for t in inputs(shape, dtype))
            leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]
            y = batch_norm(x, weight, bias, (mean, var, None), counts, 0.1, 1e-5, residual, True)
            torch.autograd.grad(y, leaves, grad)
    for dtype in (torch.float32, torch.float64):
        weights, grads, momenta = ([t.to(device) for t in each] for each in lists(dtype))
        ops.lars_(weights, grads, momenta, **STEP, found_inf=torch.zeros((), device=device))
        ops.ema_(weights, grads, 0.9)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    print("launched")


if __name__ == "__main__":
    launch(torch.device(sys.argv[1]))
