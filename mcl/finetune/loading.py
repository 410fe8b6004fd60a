"""Data of every step as a pure function of seed and step, so that a run can be continued at any of them."""

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
    """Seeds the generators of Python, NumPy and PyTorch by a sequence of numbers."""
    words = np.random.SeedSequence(key).generate_state(4)
    np.random.seed(words)  # noqa: NPY002  # MMDetection draws from the global one
    random.seed(words.tobytes())
    torch.manual_seed(int(words[0]))


_leaving = multiprocessing.RawValue("b", 0)  # shared with the processes that are forked from this one


@atexit.register  # and so called before multiprocessing sends SIGTERM to processes that are left
def _leave() -> None:
    _leaving.value = 1


@FUNCTIONS.register_module()
def outlive_sigterm(worker: int) -> None:
    """Lets a loader's process work on until its parent has saved, and not longer than it lives.

    Schedulers and torchrun send SIGTERM to all processes.
    """
    torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)  # type: ignore[attr-defined]

    def obey(number: int, frame: FrameType | None) -> None:
        if _leaving.value:
            os._exit(0)

    signal.signal(signal.SIGTERM, obey)


@DATASETS.register_module()
class SeededDataset(RepeatDataset):
    """A dataset whose augmentation depends on seed, epoch and image alone, and which replaces images that are broken.

    Args:
        dataset: the configuration of it.
        seed: of the run.
        bad_files: the list of broken images that is written; empty: none.
        max_bad_fraction: of the images that may be broken.
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
        """The sample of (epoch, index), made of another image where that one is broken.

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
        """The image, and what replaces it: first those behind it that are portrait or landscape as it is."""
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
            bad = {record["index"] for record in read(self._list)}  # by all processes, in all parts of the run
        if len(bad) > self._max_bad_fraction * len(self) or len(bad) == len(self):
            raise BadDataError(
                f"{len(bad)} of the {len(self)} training images are broken, the last: {said}; repair them, or raise "
                f"data.max_bad_fraction={self._max_bad_fraction}"
            )


def is_portrait(info: Mapping[str, Any]) -> bool:
    """Whether an image is higher than wide."""
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
        """pycocotools', which takes an id that is text for a list of ids."""
        return super().loadCats([ids] if isinstance(ids, str) else ids)


@DATASETS.register_module()
class COCOFolder(CocoDataset):
    """MMDetection's, of checked annotations.

    Args:
        pipeline: MMDetection's.
        fraction: of the images to take, chosen by :func:`mcl.finetune.labels.choose`.
        fraction_seed: that chooses them.
        options: MMDetection's.
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
    """LVIS v1, read as COCO is: by pycocotools, since PyPI's ``lvis`` does not run with a current NumPy."""


@DATA_SAMPLERS.register_module()
class EndlessBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index), epoch after epoch, each of images that are all portrait or all not.

    Args:
        sampler: MMEngine's ``DefaultSampler`` of a :class:`SeededDataset`.
        batch_size: images per process.
    """

    def __init__(self, sampler: Any, batch_size: int) -> None:
        self.sampler, self.batch_size = sampler, batch_size
        self.start = 0
        """Batches that the next iterator leaves out."""

        self._is_portrait = functools.cache(lambda index: is_portrait(sampler.dataset.get_data_info(index)))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return itertools.islice(self._batches(), self.start, None)

    def __len__(self) -> int:
        """Of an epoch, which MMEngine asks for."""
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
    """MMEngine's loop over steps, which goes on behind the batches of a run that it continues without loading them."""

    def run(self) -> Any:
        self.dataloader.batch_sampler.start = self.iter
        # MMEngine takes as many batches as were trained on from the iterator first.
        self.dataloader_iterator = _Batches(itertools.chain(itertools.repeat(None, self.iter), self.dataloader))
        return super().run()


class _Batches(Iterator[Any]):
    """An iterator with what the maintained fork's loop calls to leave batches out."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches

    def __next__(self) -> Any:
        return next(self._batches)

    def skip_iter(self, count: int) -> None:
        for _ in range(count):
            next(self)
