"""The loader: steps of a plan, carried out by an engine, as pairs of :class:`~mcl.montage.MontageBatch`."""

import importlib.util
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from dali_pipelines.plan import VIEWS, Plan, StepPlan
from dali_pipelines.source import Source
from mcl import montage
from mcl.config import AugmentConfig, ConfigError, DataConfig
from mcl.montage import Geometry, MontageBatch


class Engine(Protocol):
    """Draws plans from the iterator that it is made with, some steps ahead, and carries them out in that order."""

    def collect(self) -> list[Tensor]: ...
    def decodes(self, path: str) -> str | None: ...
    def close(self) -> None: ...


class BadDataError(RuntimeError):
    """More images than ``data.max_bad_fraction`` cannot be decoded."""


class DaliEngine:
    """Runs plans in a DALI pipeline on the CPU (``gpu=None``) or on a GPU."""

    def __init__(
        self,
        plans: Iterator[StepPlan],
        geometry: Geometry,
        augment: AugmentConfig,
        data: DataConfig,
        paths: Sequence[str],
        threads: int,
        images: int,
        gpu: int | None,
    ) -> None:
        from dali_pipelines import pipelines  # DALI takes a second to import and may be missing

        self._plans, self._paths, self._geometry, self._gpu, self._dali = plans, paths, geometry, gpu, pipelines
        self._copied = None if gpu is None else torch.cuda.Event()
        self._pastes = [montage.slabs(geometry, level, images) for level in range(geometry.levels)]
        self._pipeline = pipelines.montage_pipeline(
            self._feed,
            geometry,
            augment,
            data,
            gpu is not None,
            pipelines.inputs(geometry),
            batch_size=images,
            num_threads=threads,
            device_id=gpu,
            prefetch_queue_depth=data.prefetch,
        )
        self._pipeline.build()

    def collect(self) -> list[Tensor]:
        """Canvases of every view of the next step: [(K, 3, S, S) channels_last, ...].

        Raises:
            RuntimeError: an image of the steps in flight cannot be decoded; the pipeline cannot be used any more.
        """
        if self._copied is not None:
            self._copied.synchronize()  # waits for the copies out of the buffers that DALI is about to reuse
        slabs = self._pipeline.run()
        size = self._geometry.canvas
        views = []
        for view in range(VIEWS):
            levels = slabs[view * self._geometry.levels : (view + 1) * self._geometry.levels]
            # DALI reuses its buffers; concatenating copies out of them.
            dense = [from_dlpack(level.as_tensor()).reshape(-1, size, size, 3) for level in levels]
            views.append(torch.cat(dense).permute(0, 3, 1, 2))
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._gpu))
        return views

    def decodes(self, path: str) -> str | None:
        """Why a file cannot be decoded; None if it can."""
        try:
            self._dali.decode_pipeline(path).run()
        except RuntimeError as error:
            # DALI quotes the pipeline's source first, says what happened, then that the pipeline is lost.
            text = str(error).rpartition("encountered:")[2]
            return "DALI: " + next((line.strip(" :") for line in text.splitlines() if line.strip()), "cannot decode it")
        return None

    def close(self) -> None:
        self._pipeline = None

    def _feed(self, _: int) -> list[Any]:
        plan = next(self._plans)
        return self._dali.feed_arrays(plan, [self._paths[i] for i in plan.index], self._pastes)


def choose_engine(data: DataConfig, cuda: bool) -> tuple[str, str, str]:
    """Resolves ``data.engine`` and ``data.device``.

    Returns:
        engine (stock or torchvision), device (cpu or gpu), and the reason in words.

    Raises:
        ConfigError: what was asked for is not there.
    """
    dali = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    if data.engine == "stock" and not dali:
        raise ConfigError(
            "data.engine: stock needs NVIDIA DALI; pip install nvidia-dali-cuda130, or data.engine=torchvision"
        )
    if data.device == "gpu" and not (cuda and dali and data.engine != "torchvision"):
        raise ConfigError("data.device: gpu needs a CUDA device and data.engine=stock; use data.device=cpu")
    if data.engine == "torchvision":
        return "torchvision", "cpu", "asked for"
    if not dali:
        return "torchvision", "cpu", "NVIDIA DALI is not installed; pip install nvidia-dali-cuda130 for speed"
    device = "gpu" if cuda and data.device != "cpu" else "cpu"
    reason = "DALI is installed" + ("" if cuda else ", no CUDA device") if data.device == "auto" else "asked for"
    return "stock", device, reason


def default_threads(local_world_size: int = 1) -> int:
    """Cores this process may use, shared among the processes of the machine."""
    return max(1, len(os.sched_getaffinity(0)) // local_world_size)


class MontageLoader:
    """Yields (query view, key view) for ever, from any step on.

    Its state is a position and the list of bad files: whatever was prefetched, a loader that is given another's state
    goes on exactly where that one stood.

    Args:
        source: the images.
        plan: what is done to them.
        data: engine, device, threads, prefetch and limits.
        gpu: CUDA device to load on when the engine chosen runs on one.
        on_bad: called with (index, path, reason) for every file found to be bad, those of the headers included.

    Raises:
        ConfigError: fewer images than a step needs, or an engine that is not there.
        BadDataError: too many bad files; raised when they are found.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan,
        data: DataConfig,
        *,
        gpu: int | None = None,
        threads: int | None = None,
        on_bad: Callable[[int, str, str], None] | None = None,
    ) -> None:
        if len(source) < plan.global_batch:
            raise ConfigError(
                f"data.root: {source.root} has {len(source)} images, fewer than "
                f"trainer.global_batch={plan.global_batch}; add images or lower the batch"
            )
        self.source, self.plan = source, plan
        self.engine_name, self.device, self.reason = choose_engine(data, gpu is not None)
        self._data, self._on_bad = data, on_bad
        self._gpu = gpu if self.device == "gpu" else None
        self._threads = threads or data.threads or default_threads()
        self._boxes = torch.from_numpy(montage.boxes(plan.geometry, plan.images))
        self._engine: Engine | None = None
        self._ahead: deque[StepPlan] = deque()  # drawn by the engine, not yet collected
        self.position = 0
        self.bad: dict[int, str] = {}
        self._add_bad(source.bad)

    def __iter__(self) -> Iterator[tuple[MontageBatch, MontageBatch]]:
        return self

    def __next__(self) -> tuple[MontageBatch, MontageBatch]:
        while True:
            if self._engine is None:
                self._engine = self._make_engine()
            try:
                images = self._engine.collect()
            except (RuntimeError, OSError) as error:
                self._find_bad(error)
                continue
            plan = self._ahead.popleft()
            self.position += 1
            query, key = (self._batch(plan, view, canvases) for view, canvases in enumerate(images))
            return query, key

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "bad": dict(self.bad)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.close()
        self.position = state["position"]
        self._add_bad({int(i): reason for i, reason in state["bad"].items() if int(i) not in self.bad})

    def close(self) -> None:
        """Stops the threads; the next step starts them again."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None
        self._ahead.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _plans(self) -> Iterator[StepPlan]:
        for step in itertools.count(self.position):
            plan = self.plan.step(step, self.source.sizes, self.bad)
            self._ahead.append(plan)
            yield plan

    def _make_engine(self) -> Engine:
        geometry, augment, paths = self.plan.geometry, self.plan.augment, self.source.paths
        if self.engine_name == "stock":
            images = self.plan.images
            return DaliEngine(self._plans(), geometry, augment, self._data, paths, self._threads, images, self._gpu)
        from dali_pipelines.reference import TorchvisionEngine

        return TorchvisionEngine(self._plans(), geometry, augment, self._data, paths, self._threads)

    def _find_bad(self, error: Exception) -> None:
        """Decodes the files of the steps in flight one by one, notes the broken ones and restarts the engine."""
        assert self._engine is not None
        suspects = np.unique(np.concatenate([plan.index for plan in self._ahead]))
        reasons = {int(i): self._engine.decodes(self.source.paths[i]) for i in suspects}
        found = {i: reason for i, reason in reasons.items() if reason is not None}
        self.close()
        if not found:
            raise error
        self._add_bad(found)

    def _add_bad(self, found: dict[int, str]) -> None:
        self.bad.update(found)
        if self._on_bad is not None:
            for i, reason in found.items():
                self._on_bad(i, self.source.paths[i], reason)
        # Were all of them bad, there would be nothing to replace them with, whatever fraction is allowed.
        if len(self.bad) > self._data.max_bad_fraction * len(self.source) or len(self.bad) == len(self.source):
            i, reason = next(iter(self.bad.items()))
            raise BadDataError(
                f"{len(self.bad)} of the {len(self.source)} images in {self.source.root} cannot be used "
                f"(data.max_bad_fraction={self._data.max_bad_fraction}); the first: {self.source.paths[i]}: {reason}"
            )

    def _batch(self, plan: StepPlan, view: int, images: Tensor) -> MontageBatch:
        geometry = self.plan.geometry
        canvases = geometry.canvases(self.plan.images)
        crops = []
        for a, slots in zip(plan.augmentations[view], plan.sources[view], strict=True):
            width_height = np.tile(self.source.sizes[plan.index], 2)
            crops.append(np.column_stack([a.window / width_height, a.flip])[slots])
        return MontageBatch(
            images=images,
            labels=torch.from_numpy(self.source.labels[plan.index]),
            index=torch.from_numpy(plan.index),
            sources=torch.from_numpy(np.concatenate(plan.sources[view])),
            boxes=self._boxes,
            crops=torch.from_numpy(np.concatenate(crops).astype(np.float32)),
            canvases=canvases,
            queries=canvases,
            ratios=geometry.ratios,
            cells=geometry.cells,
            epoch=plan.epoch,
            step=plan.step,
        )
