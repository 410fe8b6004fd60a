"""Cost of a configuration: ``mcl budget CONFIG``. Needs no images, no GPU and no DALI.

:func:`budget` returns what ``--json`` prints. FLOPs and bytes are counted (:mod:`mcl.budget.count` lists what is
included, see also :mod:`mcl.budget.communication`), times are estimates unless they are marked as measured (see
:mod:`mcl.budget.hardware`).

| key | what |
|---|---|
| name, backbone, assembly, compute, precision, epochs | values of the configuration |
| images, images_from | per epoch, and the source of this number: ``--images``, ``index`` (of ``data.root``), or else ``ImageNet-1k`` |
| gpus, images_per_gpu | processes, and images of a step on each |
| gflop_per_image | GFLOP of a training step per image, both views, mean over the epochs |
| supervised | ``model`` and ``gflop_per_image`` of a supervised step of that backbone at 224 px, with its classifier |
| ratio_to_supervised | ratio of the two |
| parts | by part: ``forward``, ``backward`` (GFLOP per image, mean over the epochs), ``parameters`` (number), ``saved_bytes`` |
| stages | of the canvas schedule: ``first_epoch``, ``epochs``, ``cells``, ``canvas`` (px), ``gflop_per_image``, ``ratio_to_supervised``, ``parts`` (GFLOP per image), ``saved_bytes`` |
| memory | bytes per GPU, largest stage: ``parameters``, ``gradients``, ``optimizer``, ``momentum_network``, ``canvases`` (of both views, as often as they are held: by the loader ``data.prefetch`` times, as often by steps that the GPU has not finished, by the step, its micro-batches or graph), ``activations`` (what autograd saves; on a CPU with bf16 instructions somewhat less), ``temporaries`` (all other tensors at the peak), ``decoder`` (of a loader on the GPU; for photographs of 500 x 375 px), ``margin`` (workspaces, NCCL, fragmentation: assumed), ``total``, which a run compares with the free memory |
| time | of the whole run, a list: ``kind`` (estimate or measured), ``hardware``, ``gpus``, ``images_per_s``, ``hours``, ``gpu_hours``, ``tflop_per_s_per_gpu``, ``source``; ``loader_images_per_s_per_gpu`` (in the fastest stage), ``gate_share`` (the share of DALI's gate that this needs, H100 only), ``cpu_cores_per_gpu`` (for loading on CPUs, null unless benchmarked) |
| communication | ``nodes``; ``per_step``: a list, by ``purpose``: ``operation``, ``calls`` and ``bytes`` of one process's input, counted; ``links`` (``hardware``, ``within_gb_per_s`` and ``between_gb_per_s`` nodes, one direction, ``source``), ``latency`` (its source); ``scales``, estimates with the same number of images per GPU, a list: ``hardware``, ``gpus``, ``nodes``, ``global_batch``, seconds of a mean step: ``compute_s``, ``gradients_s``, ``targets_s``, ``batchnorm_s``, ``exposed_s`` (the part of these three that does not overlap with computing), and ``efficiency``; no lists for one GPU |
| loader | ``views`` (pixels that are made per image, in views of 224 px, largest stage), ``gate`` (``images_per_s``, ``source``), ``cpu`` (see :func:`~mcl.budget.hardware.loading_on_cpu`) |
"""  # noqa: E501  # a table

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

from dali_pipelines.source import indexed_images
from mcl.budget import communication, count, hardware
from mcl.budget.count import PARTS, Stage
from mcl.budget.memory import first_epochs, memory
from mcl.config import Config, ConfigError, override
from mcl.objectives import OBJECTIVES

_RELEASED_IMAGES = 128  # per GPU
_GIGA = 1e9


def budget(
    config: Config,
    gpus: int | None = None,
    nodes: int | None = None,
    bandwidth: Sequence[float] | None = None,
    images: int | None = None,
) -> dict[str, Any]:
    """Counts the steps of a configuration; takes seconds per stage of its canvas schedule.

    ``trainer.accumulate=auto`` counts as 1.

    Args:
        config: the configuration.
        gpus: number of GPUs; None: 128 images on each, or more if the batch cannot be divided so.
        nodes: number of machines; None: 8 GPUs in each.
        bandwidth: GB/s within a node and between nodes; None: published figures.
        images: images per epoch; None: the number in the index of ``data.root``, or that of ImageNet-1k.

    Raises:
        ConfigError: the global batch cannot be divided among the GPUs, or the GPUs among the machines.
        CheckpointError: the run folder has checkpoints, but none can be read.
    """
    OBJECTIVES[config.objective].check(config)
    if gpus is not None and gpus < 1:
        raise ConfigError(f"--gpus: {gpus} must be at least 1")
    if images is not None and images < 1:
        raise ConfigError(f"--images: {images} must be at least 1")
    if not config.trainer.accumulate:  # auto depends on the GPUs
        config = override(config, ["trainer.accumulate=1"])
    images, images_from = _images(config, images)
    gpus = gpus or _processes(config)
    nodes, links = communication.nodes_of(gpus, nodes), communication.links_of(bandwidth)
    stages, precision = _stages(config, gpus), config.trainer.precision
    supervised, resnet50 = count.supervised(config.model.backbone), count.supervised("resnet50")
    mean = sum(s.epochs * s.flops for s in stages) / config.trainer.epochs
    measured = hardware.measurement(config, {s.geometry.cells: s.flops for s in stages})
    loading = hardware.loading_on_cpu()
    return {
        "name": config.name,
        "backbone": config.model.backbone,
        "assembly": config.model.assembly,
        "compute": config.model.compute,
        "precision": precision,
        "epochs": config.trainer.epochs,
        "images": images,
        "images_from": images_from,
        "gpus": gpus,
        "images_per_gpu": config.images_per_rank(gpus),
        "gflop_per_image": mean / _GIGA,
        "supervised": {"model": config.model.backbone, "gflop_per_image": supervised / _GIGA},
        "ratio_to_supervised": mean / supervised,
        "parts": _parts(stages),
        "stages": [_describe(s, supervised) for s in stages],
        "memory": memory(config, gpus),
        "time": hardware.times(stages, images, resnet50, precision, measured, loading),
        "communication": communication.describe(stages, resnet50, precision, gpus, nodes, links),
        "loader": {
            "views": max(s.views for s in stages),
            "gate": {"images_per_s": hardware.GATE, "source": hardware.GATE_SOURCE},
            "cpu": loading,
        },
    }


def _images(config: Config, given: int | None) -> tuple[int, str]:
    """Images per epoch, and the source of this number."""
    if given is not None:
        return given, "--images"
    indexed = indexed_images(config.data)
    return (indexed, "index") if indexed else (hardware.IMAGENET, "ImageNet-1k")


def _processes(config: Config) -> int:
    """The largest number of GPUs with 128 images each, or more."""
    for processes in range(config.trainer.global_batch // _RELEASED_IMAGES, 1, -1):
        with contextlib.suppress(ConfigError):
            config.images_per_rank(processes)
            return processes
    return 1


def _stages(config: Config, gpus: int) -> list[Stage]:
    trainer, epochs = config.trainer, config.trainer.epochs
    images, processes = config.images_per_rank(gpus) // trainer.accumulate, gpus * trainer.accumulate
    firsts = first_epochs(config)
    stages = []
    for first, end in zip(firsts, [*firsts[1:], epochs], strict=True):
        geometry = config.montage.at(first)
        counted = count.step(dataclasses.replace(config, montage=geometry), images, processes)
        crops = [1.0 if config.data.tile_sampling == "released" else 1 / r**2 for r in geometry.ratios]
        views = 2 * sum(crops) * (geometry.canvas / 224) ** 2
        stages.append(Stage(first, end - first, geometry, counted, images, trainer.accumulate, views))
    return stages


def _parts(stages: list[Stage]) -> dict[str, dict[str, float]]:
    largest = _largest(stages).count
    images = sum(s.epochs * s.images for s in stages)  # a step of every epoch
    return {
        part: {
            "forward": sum(s.epochs * s.count.forward[part] for s in stages) / images / _GIGA,
            "backward": sum(s.epochs * s.count.backward[part] for s in stages) / images / _GIGA,
            "parameters": largest.parameters[part],
            "saved_bytes": largest.saved[part],
        }
        for part in PARTS
    }


def _describe(stage: Stage, supervised: float) -> dict[str, Any]:
    counted = stage.count
    return {
        "first_epoch": stage.first,
        "epochs": stage.epochs,
        "cells": stage.geometry.cells,
        "canvas": stage.geometry.canvas,
        "gflop_per_image": stage.flops / _GIGA,
        "ratio_to_supervised": stage.flops / supervised,
        "parts": {p: (counted.forward[p] + counted.backward[p]) / stage.images / _GIGA for p in PARTS},
        "saved_bytes": stage.saved,
    }


def _largest(stages: list[Stage]) -> Stage:
    return max(stages, key=lambda s: s.saved)
