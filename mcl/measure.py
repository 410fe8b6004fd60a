"""Loading speed on this machine for each available engine and device: ``mcl doctor --measure``."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import mcl
from dali_pipelines.geometry import nearest_legal
from dali_pipelines.loader import MontageLoader, choose_engine, default_threads
from dali_pipelines.plan import Plan
from dali_pipelines.source import Source, open_images
from mcl import config
from mcl.budget import budget
from mcl.config import Config, ConfigError, DataConfig

_PRESET = "mcl_r50_fpn_100e_in1k"
_PHOTOS = Path(mcl.__path__[0]).parent / "data/photos/train"
_IMAGES = 128
"""Most images per step: a batch of 4,096 on 32 GPUs."""


def measure(words: Sequence[str], seconds: float = 5.0) -> Iterator[str]:
    """Times every available engine and device in turn, with the threads of one process; yields lines.

    Args:
        words: a preset or YAML file (default: that of the paper) and ``key=value`` words. Without ``data.root``, the
            photographs of the repository are loaded.
        seconds: duration of each measurement, after a warm-up.

    Raises:
        ConfigError, SourceError, BadDataError: images or keys that cannot be used.
    """
    preset, *overrides = words if words and "=" not in words[0] else [_PRESET, *words]
    cfg = config.load(preset, [f"data.root={_PHOTOS}"] * _PHOTOS.exists() + overrides)
    source, cuda = open_images(cfg.data), torch.cuda.is_available()
    threads = cfg.data.threads or default_threads(torch.cuda.device_count() if cuda else 1)
    plan = cfg.plan(len(source), nearest_legal(cfg.montage, min(_IMAGES, len(source)))[0])
    yield (
        f"{len(source)} images in {source.root}, {plan.images} a step, {threads} loader threads; "
        f"{seconds:g} s each after a warm-up"
    )
    rates = {}
    for data in _candidates(cfg.data, cuda):
        name = f"data.engine={data.engine} data.device={data.device}"
        rates[name] = _images_per_s(source, plan, data, 0 if cuda else None, threads, seconds)
        yield f"  {name:45} {rates[name]:8,.0f} images/s"
    best = max(rates, key=rates.__getitem__)
    if cuda:
        need, said = _need(cfg)
        yield said
        enough = [name for name in rates if name.endswith("=cpu") and rates[name] >= need]
        best = max(enough, key=rates.__getitem__, default=best)  # leaves the GPU to training
    yield f"recommended: {best}"


def _candidates(data: DataConfig, cuda: bool) -> list[DataConfig]:
    """Available engines and devices among the requested ones; torchvision only if there is no other."""
    found: list[DataConfig] = []
    for engine in ("fused", "stock", "torchvision") if data.engine == "auto" else (data.engine,):
        for device in ("cpu", "gpu") if data.device == "auto" else (data.device,):
            one = dataclasses.replace(data, engine=engine, device=device)
            try:
                choose_engine(one, cuda, 1)
            except ConfigError:
                continue
            if engine != "torchvision" or not found:
                found.append(one)
    if not found:
        choose_engine(data, cuda, 1)  # says why
    return found


def _images_per_s(source: Source, plan: Plan, data: DataConfig, gpu: int | None, threads: int, seconds: float) -> float:
    with MontageLoader(source, plan, data, gpu=gpu, threads=threads) as loader:
        for _ in range(1 + data.prefetch):  # batches that were prepared ahead
            next(loader)
        steps, start = 0, time.perf_counter()
        while steps == 0 or time.perf_counter() - start < seconds:
            next(loader)
            steps += 1
        if gpu is not None:
            torch.cuda.synchronize()
        return steps * plan.images / (time.perf_counter() - start)


def _need(cfg: Config) -> tuple[float, str]:
    """Images per second that training on this GPU consumes, by ``mcl budget``, and a line that says so."""
    rows = [row for row in budget(cfg)["time"] if row["kind"] == "estimate"]
    name = torch.cuda.get_device_name()
    rows = [row for row in rows if row["hardware"] in name] or rows
    most = max(rows, key=lambda row: row["loader_images_per_s_per_gpu"], default=None)
    if most is None:
        return float("inf"), f"mcl budget has no estimate for trainer.precision={cfg.trainer.precision}"
    need = most["loader_images_per_s_per_gpu"]
    return need, f"{name}: training consumes about {need:,.0f} images/s (mcl budget, {most['hardware']})"
