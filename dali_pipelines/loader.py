"""The loader: an engine executes the steps of a plan, as pairs of :class:`~dali_pipelines.batch.MontageBatch`."""

import contextlib
import dataclasses
import importlib.util
import itertools
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from dali_pipelines import BUILD, DALI
from dali_pipelines.batch import MontageBatch, in_order
from dali_pipelines.layout import lay_out
from dali_pipelines.lending import Lending
from dali_pipelines.plan import Plan, StepPlan
from dali_pipelines.settings import ConfigError, DataConfig
from dali_pipelines.source import Source, decode

if TYPE_CHECKING:
    from dali_pipelines import pipelines
    from dali_pipelines.reference import TorchvisionEngine

READERS = 32
"""Threads that read shards and object stores, where a read may take long, and that decode with Pillow."""

READ_AHEAD = 2
"""Largest number of steps that these threads may be ahead of DALI."""

DECODED_AHEAD = 1 << 30
"""Limit for pixels that Pillow has decoded in advance, bytes. Beyond it no further step is started, so that memory
holds at most this and the pixels of one step."""

_MEMORY = re.compile(
    "out of memory|bad_alloc|cudaErrorMemoryAllocation|CUDA allocation failed|(Can't|Cannot) allocate", re.IGNORECASE
)
_READS_IMAGES = re.compile(r"operator `nvidia\.dali\.fn\.(io\.file\.read|peek_image_shape|decoders\.image)`")

ENOUGH_THREADS = 8
"""Smallest number of loader threads per GPU with which ``data.device=auto`` decodes on the CPU: three times as many as
an A100 needs with the default preset (mcl budget)."""


class BadDataError(RuntimeError):
    """More images than ``data.max_bad_fraction`` cannot be decoded."""


class LoaderMemoryError(RuntimeError):
    """The GPU or the machine has too little memory to load a step."""


class DaliEngine:
    """Runs plans in a DALI pipeline.

    Args:
        plans: the plans of successive steps; taken some steps in advance, and executed in order.
        source: the images.
        name: fused or stock.
        graph: the settings of the operators.
        images: images per step, N.
        threads: threads of DALI, and of the pool that reads what DALI cannot read.
        gpu: the CUDA device that gets the canvases; None leaves them on the CPU.
    """

    def __init__(
        self,
        plans: Iterator[StepPlan],
        source: Source,
        name: str,
        graph: "pipelines.Graph",
        images: int,
        threads: int,
        gpu: int | None,
    ) -> None:
        from dali_pipelines import pipelines  # DALI takes a second to import and may be missing

        self._plans, self._source, self._gpu, self._dali = plans, source, gpu, pipelines
        self._fused = name == "fused"
        with contextlib.suppress(RuntimeError):  # stock needs it only to keep decoders' messages off the console
            pipelines.load_plugin()
        self._feed = pipelines.fused_feed if self._fused else pipelines.stock_feed
        self._by_path = ~source.by_pillow & (source.paths is not None)  # (n,) read by DALI's threads
        self._readers = ThreadPoolExecutor(max(threads, READERS))
        self._reading: deque[tuple[StepPlan, Iterator[bytes]]] = deque()
        self._fed: deque[StepPlan] = deque()  # not yet collected
        define = pipelines.fused_pipeline if self._fused else pipelines.stock_pipeline
        self._pipeline = define(
            self._next,
            graph,
            batch_size=images,
            num_threads=threads,
            device_id=gpu,
            prefetch_queue_depth=graph.data.prefetch,
            exec_dynamic=True,
        )
        self._pipeline.build()

    def collect(self) -> tuple[list[Tensor], list[Tensor]]:
        """Canvases of every view of the next step, [(K, 3, S, S) channels_last, ...], and the memory that holds them.

        On a GPU, later work of the current stream waits for the canvases; the host does not. DALI reuses their memory
        once it is freed, so all work that reads it must have finished by then.

        Raises:
            RuntimeError, OSError: an image of the steps in flight cannot be read or decoded, or has changed. The
                pipeline cannot be used again.
        """
        *made, shapes = self._pipeline.run(None if self._gpu is None else torch.cuda.current_stream(self._gpu))
        plan = self._fed.popleft()
        for i, shape in zip(plan.index.tolist(), shapes.as_array().tolist(), strict=True):
            self._source.check_size(i, (shape[1], shape[0]))
        outputs = [from_dlpack(output.as_tensor()) for output in made]
        geometry = plan.geometry
        if self._fused:
            views = [output.view(-1, geometry.canvas, geometry.canvas, 3).permute(0, 3, 1, 2) for output in outputs]
        else:
            tiles = [output.permute(0, 3, 1, 2) for output in outputs]
            views = [
                lay_out(tiles[view * geometry.levels :][: geometry.levels], shown, geometry.ratios)
                for view, shown in enumerate(plan.tile_images)
            ]
        return views, outputs

    def decodes(self, i: int) -> str | None:
        """Why image i of the source cannot be decoded as planned; None if it can."""
        try:
            encoded = self._source.encoded(i)
            try:
                _, shape = self._dali.decode_pipeline(encoded).run()
            except RuntimeError:
                decode(encoded)  # Pillow's message is clearer
                raise
            self._source.check_size(i, (shape.at(0)[1], shape.at(0)[0]))
        except OSError as error:
            return str(error)
        except RuntimeError as error:
            return None if _MEMORY.search(str(error)) else _cause(error)
        except MemoryError:  # says nothing about the image, either
            pass
        return None

    def _next(self, _: int) -> list[Any]:
        """The input of the pipeline for the next step."""
        ahead = 0 if self._by_path.all() else READ_AHEAD
        while not self._reading or (len(self._reading) <= ahead and self._decoded_ahead() < DECODED_AHEAD):
            if (plan := next(self._plans, None)) is None:
                break
            ours = plan.index[~self._by_path[plan.index]]
            self._reading.append((plan, self._readers.map(self._source.encoded, ours.tolist())))
        if not self._reading:
            raise StopIteration  # tells DALI that the earlier steps were the last ones
        plan, read = self._reading.popleft()
        is_path, paths = self._by_path[plan.index], self._source.paths or ()
        contents = [
            os.fsencode(paths[i]) if by_path else next(read)
            for i, by_path in zip(plan.index, is_path.tolist(), strict=True)
        ]
        self._fed.append(plan)
        return [[np.frombuffer(content, np.uint8) for content in contents], is_path, *self._feed(plan)]

    def _decoded_ahead(self) -> int:
        """Bytes of the pixels that Pillow decodes for the steps being read."""
        by_pillow, sizes = self._source.by_pillow, self._source.sizes
        indices = [plan.index[by_pillow[plan.index]] for plan, _ in self._reading]
        return sum(3 * int(sizes[index].prod(1, dtype=np.int64).sum()) for index in indices)

    def close(self) -> None:
        self._pipeline = None
        self._readers.shutdown(cancel_futures=True)


def _cause(error: Exception) -> str:
    """The line of DALI's message that tells the cause of an error of a pipeline."""
    text = str(error).rpartition("encountered:")[2]
    return "DALI: " + next((line.strip(" :") for line in text.splitlines() if line.strip()), "cannot decode it")


def choose_engine(data: DataConfig, cuda: bool, threads: int) -> tuple[str, str, str]:
    """Resolves ``data.engine`` and ``data.device`` as these keys document.

    Args:
        data: requested engine and device.
        cuda: whether this process has a CUDA device.
        threads: number of loader threads.

    Returns:
        engine (fused, stock or torchvision), device (cpu or gpu), and the reason in words.

    Raises:
        ConfigError: the requested engine or device is not available.
    """
    engines = ("fused", "stock", "torchvision") if data.engine == "auto" else (data.engine,)
    enough = threads >= ENOUGH_THREADS
    rule = f"{threads} loader threads per GPU, {'at least' if enough else 'fewer than'} {ENOUGH_THREADS}"
    missing: list[str] = []
    for engine in engines:
        ruled = engine == "fused" and data.device == "auto" and cuda
        both = ("cpu", "gpu") if ruled and enough else ("gpu", "cpu")
        for device in both if data.device == "auto" else (data.device,):
            obstacle = _obstacle(engine, device, cuda)
            if obstacle is None:
                return engine, device, "; ".join(dict.fromkeys(missing)) or (rule if ruled else "the first choice")
            missing.append(obstacle)
    if data.device == "gpu" and not cuda:
        raise ConfigError("data.device: gpu needs a CUDA device; use data.device=cpu")
    cpu_can = _obstacle(engines[-1], "cpu", cuda) is None
    key = "data.device: gpu is not available, cpu is" if cpu_can else f"data.engine: {data.engine} is not available"
    raise ConfigError(f"{key}: {'; '.join(dict.fromkeys(missing))}")


def _obstacle(engine: str, device: str, cuda: bool) -> str | None:
    """Why an engine cannot run on a device, and the remedy; None if it can."""
    if device == "gpu" and not cuda:
        return "no CUDA device"
    if engine == "torchvision":
        return None if device == "cpu" else "the torchvision engine runs on CPUs only"
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return f"NVIDIA DALI is not installed; pip install {DALI}"
    if engine == "stock":
        return None
    from dali_pipelines import pipelines

    if not pipelines.PLUGIN.exists():
        return f"mcl's DALI plugin is not installed; {BUILD} installs it"
    try:
        devices = pipelines.load_plugin()
    except RuntimeError as error:
        return f"mcl's DALI plugin cannot be loaded: {error}"
    return None if device in devices else "mcl's DALI plugin was built without CUDA; MCL_BUILD_CUDA=1 builds it with"


def default_threads(local_world_size: int = 1) -> int:
    """Number of cores that this process may use, divided by the processes of the machine."""
    return max(1, len(os.sched_getaffinity(0)) // local_world_size)


class MontageLoader:
    """An iterator over pairs (query view, key view), which is endless unless its plan ends. It can start at any step.

    The state of a loader is its position and the list of bad files. A loader that loads the state of another continues
    exactly where the other stopped, regardless of prefetching.

    Args:
        source: the images.
        plan: order, crops, augmentations and montages.
        data: engine, device, threads, prefetch and limits.
        gpu: CUDA device that gets the canvases; None leaves them on the CPU.
        threads: number of loader threads; None: as ``data.threads`` says.

    Raises:
        ConfigError: there are fewer images than a step needs, or the engine is not available.
        BadDataError: there are too many bad files; raised when they are found.
        LoaderMemoryError: there is too little memory; raised when a step is loaded.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan,
        data: DataConfig,
        *,
        gpu: int | None = None,
        threads: int | None = None,
    ) -> None:
        if not plan.steps_per_epoch:
            raise ConfigError(
                f"data.root: {source.root} has {len(source)} images, fewer than "
                f"trainer.global_batch={plan.global_batch}; add images or lower the batch"
            )
        self.source, self.plan = source, plan
        self._threads = threads or data.threads or default_threads()
        self.engine_name, self.device, self.reason = choose_engine(data, gpu is not None, self._threads)
        self._data, self._gpu = data, gpu  # data.dtype may still be auto, which is float32 outside of training
        self._lending = None if gpu is None else Lending(gpu, data.prefetch)
        self._on_bad: Callable[[int, str, str], None] | None = None
        self._engine: DaliEngine | TorchvisionEngine | None = None
        self._ahead: deque[StepPlan] = deque()  # taken by the engine, not yet collected
        self.position = 0
        self.bad: dict[int, str] = {}
        self._add_bad(source.bad)

    def __iter__(self) -> Iterator[tuple[MontageBatch, ...]]:
        return self

    def __next__(self) -> tuple[MontageBatch, ...]:
        if self.position == self.plan.steps:
            raise StopIteration
        while True:
            if self._engine is None:
                self._engine = self._make_engine()
            try:
                views, memory = self._engine.collect()
            except (RuntimeError, MemoryError, OSError, UnicodeDecodeError) as error:
                self._find_bad(error)
                continue
            if self._lending is not None:
                self._lending.lend(memory)
            plan = self._ahead.popleft()
            self.position += 1
            return tuple(self._batch(plan, view, pixels) for view, pixels in enumerate(views))

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "bad": dict(self.bad)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.close()
        self.position = state["position"]
        self._add_bad({int(i): reason for i, reason in state["bad"].items() if int(i) not in self.bad})

    def share(self, bad: dict[int, str]) -> None:
        """Adds images that other processes found to be bad and have reported.

        Raises:
            BadDataError: there are too many bad images in all.
        """
        self.bad.update(bad)
        self._check_bad()

    def report_bad(self, to: Callable[[int, str, str], None]) -> None:
        """Calls `to` with (index, path, reason) for every bad file that has been or will be found."""
        self._on_bad = to
        self._report(self.bad)

    def close(self) -> None:
        """Stops the threads; the next step starts them again."""
        if self._lending is not None:
            self._lending.settle()
        if self._engine is not None:
            self._engine.close()
        self._engine = None
        self._ahead.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _plans(self) -> Iterator[StepPlan]:
        end = self.plan.steps
        for step in itertools.count(self.position) if end is None else range(self.position, end):
            plan = self.plan.step(step, self.source.sizes, self.bad)
            self._ahead.append(plan)
            yield plan

    def _make_engine(self) -> "DaliEngine | TorchvisionEngine":
        plan, source = self.plan, self.source
        if self.engine_name == "torchvision":
            from dali_pipelines.reference import TorchvisionEngine

            return TorchvisionEngine(self._plans(), plan.augment, self._data, source, self._threads)
        from dali_pipelines.pipelines import Graph

        # Not the largest size: memory is allocated for a whole batch of such images.
        width, height = np.percentile(source.sizes, 99, 0).astype(int).tolist()
        graph = Graph(
            plan.geometry,
            plan.augment,
            self._data,
            device="gpu" if self.device == "gpu" else "cpu",
            upload=self._gpu is not None and self.device == "cpu",
            usual=(width, height),
            views=plan.views,
        )
        return DaliEngine(self._plans(), source, self.engine_name, graph, plan.images, self._threads, self._gpu)

    def _find_bad(self, error: Exception) -> None:
        """Decodes the files of the steps in flight one by one, notes the broken ones and restarts the engine.

        Raises:
            LoaderMemoryError: the error was a lack of memory.
            Exception: `error` itself, if images cannot be its cause.
        """
        assert self._engine is not None
        text, remedies = (
            str(error),
            {
                "cpu": "lower data.prefetch, data.threads or trainer.global_batch",
                "gpu": "lower data.prefetch, set data.device=cpu, or raise trainer.accumulate, which frees GPU memory",
            },
        )
        if isinstance(error, MemoryError) or _MEMORY.search(text):
            cause = next(filter(_MEMORY.search, text.splitlines()), "out of memory").strip()
            raise LoaderMemoryError(
                f"not enough memory to load a step on the {self.device.upper()} ({cause}); {remedies[self.device]}"
            ) from error
        # DALI quotes file names in its errors, and a name need not be valid UTF-8.
        if not isinstance(error, (OSError, UnicodeDecodeError)) and not _READS_IMAGES.search(text):
            raise error
        engine, suspects = self._engine, np.unique(np.concatenate([plan.index for plan in self._ahead]))
        self.close()  # frees its memory
        reasons = {int(i): engine.decodes(int(i)) for i in suspects}
        found = {i: reason for i, reason in reasons.items() if reason is not None}
        if not found:
            raise LoaderMemoryError(
                f"the {len(suspects)} images of the next steps can be decoded one by one, but not together "
                f"({_cause(error)}), probably for lack of memory: {remedies[self.device]}"
            ) from error
        self._add_bad(found)

    def _add_bad(self, found: dict[int, str]) -> None:
        self.bad.update(found)
        self._report(found)
        self._check_bad()

    def _report(self, found: dict[int, str]) -> None:
        if self._on_bad is not None:
            for i, reason in found.items():
                self._on_bad(i, self.source.names[i], reason)

    def _check_bad(self) -> None:
        # If all images are bad, none is left to replace them with, whatever fraction is allowed.
        if len(self.bad) > self._data.max_bad_fraction * len(self.source) or len(self.bad) == len(self.source):
            i, reason = min(self.bad.items())
            raise BadDataError(
                f"{len(self.bad)} of the {len(self.source)} images in {self.source.root} cannot be used "
                f"(data.max_bad_fraction={self._data.max_bad_fraction}); the first: {self.source.names[i]}: {reason}"
            )

    def _batch(self, plan: StepPlan, view: int, pixels: Tensor) -> MontageBatch:
        width_height = np.tile(self.source.sizes[plan.index], 2)
        crops = [
            np.column_stack([a.window / width_height, a.flip])[shown]
            for a, shown in zip(plan.augmentations[view], plan.tile_images[view], strict=True)
        ]
        return dataclasses.replace(
            in_order(plan.geometry, len(plan.index), pixels),
            labels=torch.from_numpy(self.source.labels[plan.index]),
            index=torch.from_numpy(plan.index),
            tile_images=torch.from_numpy(np.concatenate(plan.tile_images[view])),
            crops=torch.from_numpy(np.concatenate(crops).astype(np.float32)),
            epoch=plan.epoch,
            step=plan.step,
        )
