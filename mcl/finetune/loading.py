"""Makes the data of a step a pure function of seed and step, so that a run can be resumed at any step."""

import atexit
import copy
import functools
import itertools
import math
import multiprocessing
import os
import random
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmdet.registry import DATA_SAMPLERS, DATASETS, LOOPS
from mmengine.dataset import RepeatDataset
from mmengine.registry import FUNCTIONS
from mmengine.runner import IterBasedTrainLoop
from torch.utils.data import Sampler

from dali_pipelines.loader import BadDataError
from mcl.finetune import annotations
from mcl.finetune.decoding import BadImageError
from mcl.finetune.labels import choose
from mcl.finetune.settings import replace
from mcl.records.metrics import BadFiles, read


def seed_everything(*key: int) -> None:
    """Seeds the generators of Python, NumPy and PyTorch with a sequence of numbers."""
    words = np.random.SeedSequence(key).generate_state(4)
    np.random.seed(words)  # noqa: NPY002  # MMDetection uses the global generator
    random.seed(words.tobytes())
    torch.manual_seed(int(words[0]))


_leaving = multiprocessing.RawValue("b", 0)  # shared with the processes that are forked from this one


@atexit.register  # runs before multiprocessing sends SIGTERM to the remaining processes
def _leave() -> None:
    _leaving.value = 1


@FUNCTIONS.register_module()
def outlive_sigterm(worker: int) -> None:
    """Makes a loader's process ignore SIGTERM until its parent exits, and end when its parent ends.

    Schedulers and torchrun send SIGTERM to all processes, and the parent still needs batches until it has saved.
    """
    torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)  # type: ignore[attr-defined]

    def obey(number: int, frame: FrameType | None) -> None:
        if _leaving.value:
            os._exit(0)

    signal.signal(signal.SIGTERM, obey)


@DATASETS.register_module()
class SeededDataset(RepeatDataset):
    """A dataset whose augmentation depends only on seed, epoch and image, and which replaces broken images.

    Args:
        dataset: configuration of the wrapped dataset.
        seed: seed of the run.
        bad_files: file to which broken images are written; empty: none.
        max_bad_fraction: fraction of the images that may be broken.
    """

    def __init__(
        self, dataset: dict[str, Any], seed: int = 0, bad_files: str = "", max_bad_fraction: float = 0.0
    ) -> None:
        dataset = copy.deepcopy(dataset)
        replace(dataset, "type", "LoadImageFromFile", "LoadCheckedImage")
        super().__init__(dataset, times=1)
        self.seed = seed
        self._list, self._max_bad_fraction = Path(bad_files) if bad_files else None, max_bad_fraction
        self._note = BadFiles(self._list, {}) if self._list else None

    def __getitem__(self, key: tuple[int, int]) -> Any:
        """The sample of (epoch, index), from another image if that one is broken.

        Raises:
            BadDataError: too many images are broken.
        """
        for index in self._candidates(key[1]):
            seed_everything(self.seed, *key)
            try:
                return super().__getitem__(index)
            except BadImageError as error:
                self._replace(index, str(error))
        raise AssertionError("unreachable: _replace raises when all are broken")

    def _candidates(self, index: int) -> Iterator[int]:
        """The image and its replacements: the images after it, first those of the same orientation."""
        yield index
        portrait = is_portrait(self.get_data_info(index))
        for wanted in (portrait, not portrait):
            for other in itertools.chain(range(index + 1, len(self)), range(index)):
                if is_portrait(self.get_data_info(other)) == wanted:
                    yield other

    def _replace(self, index: int, said: str) -> None:
        bad = {index}
        if self._note is not None and self._list is not None:
            path = self.get_data_info(index)["img_path"]
            self._note(index, path, said.removeprefix(f"{path}: "))
            bad = {record["index"] for record in read(self._list)}  # written by all processes, also before a resume
        if len(bad) > self._max_bad_fraction * len(self) or len(bad) == len(self):
            raise BadDataError(
                f"{len(bad)} of the {len(self)} training images are broken, the last: {said}; repair them, or raise "
                f"data.max_bad_fraction={self._max_bad_fraction}"
            )


def is_portrait(info: Mapping[str, Any]) -> bool:
    """Whether an image is taller than wide."""
    return bool(info["height"] > info["width"])


class CheckedCOCO(COCO):
    """MMDetection's access to annotations, which are read by :func:`mcl.finetune.annotations.read`.

    Args:
        path: annotation file.
        masks: whether masks are needed.
    """

    def __init__(self, path: str, masks: bool) -> None:
        super().__init__()
        self.dataset = annotations.read(Path(path), masks)._asdict()
        self.createIndex()
        self.img_ann_map, self.cat_img_map = self.imgToAnns, self.catToImgs  # the wrapper's names for the index

    def loadCats(self, ids: Any = ()) -> Any:
        """pycocotools would treat an id that is a string as a list of ids."""
        return super().loadCats([ids] if isinstance(ids, str) else ids)


@DATASETS.register_module()
class COCOFolder(CocoDataset):
    """MMDetection's dataset, with checked annotations.

    Args:
        pipeline: see ``CocoDataset``.
        fraction: fraction of the images to use, selected by :func:`mcl.finetune.labels.choose`.
        fraction_seed: seed of the selection.
        options: see ``CocoDataset``.
    """

    def __init__(self, pipeline: Sequence[Any], fraction: float = 1.0, fraction_seed: int = 0, **options: Any) -> None:
        self._fraction, self._fraction_seed = fraction, fraction_seed
        masks = any(step.get("with_mask") for step in pipeline)
        self.COCOAPI = functools.partial(CheckedCOCO, masks=masks)
        super().__init__(pipeline=pipeline, **options)

    def load_data_list(self) -> Any:
        with annotations.without_collection():
            infos = super().load_data_list()
        chosen = {*choose((info["img_id"] for info in infos), self._fraction, self._fraction_seed)}
        return [info for info in infos if info["img_id"] in chosen]


@DATASETS.register_module()
class LVISFolder(COCOFolder):
    """LVIS v1, read by pycocotools as COCO is, since PyPI's ``lvis`` does not work with a current NumPy."""


@DATA_SAMPLERS.register_module()
class EndlessBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index), epoch after epoch. The images of a batch are either all portrait or all landscape.

    Args:
        sampler: MMEngine's ``DefaultSampler`` of a :class:`SeededDataset`.
        batch_size: images per process.
    """

    def __init__(self, sampler: Any, batch_size: int) -> None:
        self.sampler, self.batch_size = sampler, batch_size
        self.start = 0
        """Number of batches that the next iterator skips."""

        self._is_portrait = functools.cache(lambda index: is_portrait(sampler.dataset.get_data_info(index)))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return itertools.islice(self._batches(), self.start, None)

    def __len__(self) -> int:
        """Number of batches in an epoch, which MMEngine requires."""
        return math.ceil(len(self.sampler) / self.batch_size)

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        groups: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        for epoch in itertools.count():
            self.sampler.set_epoch(epoch)
            for index in self.sampler:
                group = groups[self._is_portrait(index)]
                group.append((epoch, index))
                if len(group) == self.batch_size:
                    yield group[:]
                    group.clear()


@LOOPS.register_module()
class ResumableLoop(IterBasedTrainLoop):
    """MMEngine's loop over steps, which skips the batches of earlier steps of a resumed run without loading them."""

    def run(self) -> Any:
        self.dataloader.batch_sampler.start = self.iter
        # MMEngine first consumes one batch for each finished step.
        self.dataloader_iterator = _Batches(itertools.chain(itertools.repeat(None, self.iter), self.dataloader))
        return super().run()


class _Batches(Iterator[Any]):
    """An iterator with the method that the maintained fork's loop calls to skip batches."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches

    def __next__(self) -> Any:
        return next(self._batches)

    def skip_iter(self, count: int) -> None:
        for _ in range(count):
            next(self)
