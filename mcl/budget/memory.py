"""GPU memory of a step."""

import dataclasses

from mcl.budget import count
from mcl.config import Config

_BATCH_BYTES = {"float32": 4, "float16": 2}
_LIBRARIES = 2 * 10**9
"""Bytes that libraries use: workspaces of cuDNN and cuBLAS, NCCL's buffers, kernel modules. An assumption."""
_FRAGMENTED = 0.05
"""Fraction of PyTorch's memory that fragmentation wastes. An assumption."""
_DECODED = 3
"""Decoded images that the loader holds on a GPU per image of a step, including the decoder's memory. An assumption."""
_PHOTOGRAPH = 3 * 500 * 375
"""Bytes of a decoded image of unknown size: a typical one of ImageNet."""
_SCRATCH = 50
"""Words per pixel of a tile's side that our DALI operator needs on a GPU, for a strip of the image and two filters,
beside two words per pixel of the tile (``scratch_of`` in kernels/dali/cuda/montage.cuh)."""


def first_epochs(config: Config) -> list[int]:
    """First epoch of each size in the canvas schedule."""
    return [0, *(epoch for epoch, _ in config.montage.schedule if epoch < config.trainer.epochs)]


def memory(config: Config, processes: int, image: float | None = None) -> dict[str, int]:
    """Bytes per GPU, at the largest canvases of the run; see :mod:`mcl.budget.cost`. Takes a second or a few.

    Args:
        config: configuration of the run.
        processes: number of processes.
        image: mean bytes of a decoded image on the GPU; 0 if a CPU decodes, None if unknown.

    Raises:
        ConfigError: trainer.global_batch or trainer.accumulate is not legal for this number of processes.
    """
    trainer, data = config.trainer, config.loading
    geometry = max((config.montage.at(epoch) for epoch in first_epochs(config)), key=lambda g: g.cells)
    images = config.images_per_rank(processes)
    part = images // trainer.accumulate
    while geometry.query_canvases(part)[0] < 2:
        part *= 2  # BatchNorm needs two rows, and here it has only those of one process
    banks = processes * trainer.accumulate
    counted = count.step(dataclasses.replace(config, montage=geometry), part, banks)
    batch = 2 * sum(geometry.canvases(images)) * 3 * geometry.canvas**2 * _BATCH_BYTES[data.dtype]
    # Batches of the loader, of steps that the GPU has not finished, of the step; copies for micro-batches and graphs.
    batches = 2 * data.prefetch + 1 + (trainer.accumulate > 1) + trainer.cuda_graph
    saved = sum(counted.saved.values())
    sizes = {
        **count.state(config),
        "canvases": batches * batch,
        "activations": saved,
        "temporaries": counted.peak - saved,
    }
    if image is None:
        image = 0 if data.device == "cpu" else _PHOTOGRAPH
    sides = [geometry.canvas // (1 if data.tile_sampling == "released" else ratio) for ratio in geometry.ratios]
    scratch = 4 * 2 * sum(2 * side**2 + _SCRATCH * side for side in sides)  # of an image, for both views
    sizes["decoder"] = int(images * (_DECODED * image + scratch)) if image else 0
    sizes["margin"] = _LIBRARIES + int(_FRAGMENTED * sum(sizes.values()))
    return {**sizes, "total": sum(sizes.values())}
