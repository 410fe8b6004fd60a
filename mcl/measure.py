"""Loading speed on this machine for each available engine and device: ``mcl doctor --measure``."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

import mcl
from dali_pipelines.geometry import nearest_legal
from dali_pipelines.loader import MontageLoader, choose_engine, default_threads
from dali_pipelines.plan import Plan
from dali_pipelines.source import Source, open_images
from mcl import config, doctor
from mcl.budget import budget
from mcl.config import Config, ConfigError, DataConfig

PRESET = "mcl_r50_fpn_100e_in1k"
_PHOTOS = Path(mcl.__path__[0]).parent / "data/photos/train"
_IMAGES = 128
"""Most images per step: the share of one of 32 GPUs in a batch of 4,096."""


def measure(words: Sequence[str], seconds: float = 5.0) -> Iterator[str]:
    """Times every available engine and device in turn, with the threads of one process of a run; yields lines.

    Args:
        words: a preset or YAML file (default: PRESET) and ``key=value`` words. Without ``data.root``, the
            photographs of the repository are loaded.
        seconds: duration of each measurement, after a warm-up.

    Raises:
        ConfigError, SourceError, BadDataError: images or keys that cannot be used.
    """
    preset, *overrides = words if words and "=" not in words[0] else [PRESET, *words]
    cfg = config.load(preset, [f"data.root={_PHOTOS}"] * _PHOTOS.exists() + overrides)
    source, cuda = open_images(cfg.data), torch.cuda.is_available()
    gpus = torch.cuda.device_count() if cuda else 1
    threads = cfg.data.threads or default_threads(gpus)
    batch = min(_IMAGES, max(1, cfg.trainer.global_batch // gpus), len(source))
    plan = cfg.plan(len(source), nearest_legal(cfg.montage, batch)[0])
    if busy := doctor.busy():
        yield busy
    yield f"{preset}, canvas {plan.geometry.canvas} px, {len(source)} images in {source.root}"
    yield (
        f"one process of {gpus}, {plan.images} images a step, {threads} loader thread{'s' * (threads != 1)}; "
        f"{seconds:g} s each after a warm-up"
    )
    rates, state = {}, {"position": 0, "bad": {}}
    for data in _candidates(cfg.data, cuda):
        name = f"data.engine={data.engine} data.device={data.device}"
        rates[name] = _images_per_s(source, plan, data, 0 if cuda else None, threads, seconds, state)
        yield f"  {name:45} {rates[name]:8,.0f} images/s"
    best = max(rates, key=rates.__getitem__)
    need, said = _need(cfg, torch.cuda.get_device_name() if cuda else "")
    yield said
    if cuda:
        enough = [name for name in rates if name.endswith("=cpu") and rates[name] >= need]
        best = max(enough, key=rates.__getitem__, default=best)  # leaves the GPU to training
    yield f"recommended: {best}"


def _candidates(data: DataConfig, cuda: bool) -> list[DataConfig]:
    """Available engines and devices among the requested ones."""
    found: list[DataConfig] = []
    for engine in ("fused", "stock", "torchvision") if data.engine == "auto" else (data.engine,):
        for device in ("cpu", "gpu") if data.device == "auto" else (data.device,):
            one = dataclasses.replace(data, engine=engine, device=device)
            try:
                choose_engine(one, cuda, 1)
            except ConfigError:
                continue
            found.append(one)
    if not found:
        choose_engine(data, cuda, 1)  # says why
    return found


def _images_per_s(
    source: Source,
    plan: Plan,
    data: DataConfig,
    gpu: int | None,
    threads: int,
    seconds: float,
    state: dict[str, Any],
) -> float:
    """The rate of one engine; `state` is that of the loader before it, so that each reads other files from the disk."""
    with MontageLoader(source, plan, data, gpu=gpu, threads=threads) as loader:
        loader.load_state_dict(state)
        for _ in range(1 + data.prefetch):  # batches that were prepared ahead
            next(loader)
        steps, start = 0, time.perf_counter()
        while steps == 0 or time.perf_counter() - start < seconds:
            next(loader)
            steps += 1
        if gpu is not None:
            torch.cuda.synchronize()
        rate = steps * plan.images / (time.perf_counter() - start)
        state |= loader.state_dict()
        return rate


def _need(cfg: Config, gpu: str) -> tuple[float, str]:
    """Images per second that training on a GPU consumes, by ``mcl budget``, and a line that says so.

    Args:
        cfg: the configuration.
        gpu: name of the GPU; if it contains none that is in the estimates, the line lists all of these.
    """
    rates = [r for r in budget(cfg)["time"] if r["kind"] == "estimate"]  # of one GPU and of several, which is less
    rates.sort(key=itemgetter("loader_images_per_s_per_gpu"))
    rows = {r["hardware"]: r["loader_images_per_s_per_gpu"] for r in rates}
    rows = {name: rate for name, rate in rows.items() if name in gpu} or rows
    if not rows:
        return float("inf"), f"mcl budget has no estimate for trainer.precision={cfg.trainer.precision}"
    said = ", ".join(f"{name} {rate:,.0f}" for name, rate in rows.items())
    return max(rows.values()), f"images/s that training consumes per GPU, estimated by mcl budget: {said}"
