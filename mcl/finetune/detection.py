"""Pictures of the detections of a fine-tuned detector."""

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
import torch
from mmdet.apis import inference_detector, init_detector
from mmdet.datasets.transforms import LoadAnnotations
from torch import Tensor

from dali_pipelines.source import SourceError
from mcl.config import ConfigError
from mcl.finetune import THRESHOLD, pictures, resume
from mcl.finetune.pictures import Detections, Objects

IMAGES = 8
"""Number of images that :func:`compare` draws."""

_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}  # of images in folders


def detect(run: Path, images: Sequence[Path], output: Path | None, threshold: float) -> Iterator[Detections]:
    """Draws the detections of a detector; see :func:`mcl.detect`."""
    if not 0 <= threshold <= 1:
        raise ConfigError(f"--threshold: {threshold} must be from 0 to 1")
    folder = run if run.is_dir() else run.parent
    configurations = sorted(folder.glob("*.py"))
    if not run.exists() or len(configurations) != 1:
        seeds = [f"; it holds {part.name} and others" for part in sorted(folder.glob("seed-*"))[:1]]
        raise ConfigError(f"{run}: neither the folder of a run of mcl finetune nor a checkpoint in one{''.join(seeds)}")
    files = _pictures(images, folder / "detections" if output is None else output)
    checkpoint, _ = resume.newest(resume.checkpoints(folder) if run.is_dir() else [run])
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    with contextlib.redirect_stdout(io.StringIO()):
        detector = init_detector(str(configurations[0]), str(checkpoint), device=device)
    classes, drawn = detector.dataset_meta["classes"], 0
    for picture, image in files.items():
        try:
            pixels = _read(image)
        except SourceError as error:
            warnings.warn(f"{error}; left out", stacklevel=2)
            continue
        found = predicted(inference_detector(detector, pixels), threshold)
        pictures.save(pictures.draw(_tensor(pixels), found, classes), picture)
        yield Detections(image, picture, [classes[i] for i in found.labels.tolist()], found)
        drawn += 1
    if not drawn:
        raise SourceError(f"none of the {len(files)} images could be read")


def _pictures(images: Sequence[Path], output: Path) -> dict[Path, Path]:
    """Images by the picture to write; pictures of a folder keep its subfolders.

    Raises:
        SourceError: an image does not exist, or two images would be drawn to the same file.
    """
    files: dict[Path, Path] = {}
    for given in images:
        inside = sorted(p for p in given.rglob("*") if p.suffix.lower() in _SUFFIXES) if given.is_dir() else [given]
        if not given.exists() or not inside:
            raise SourceError(f"{given}: {'no image in it' if given.exists() else 'no such file'}")
        for image in inside:
            picture = (output / image.relative_to(given if given.is_dir() else given.parent)).with_suffix(".png")
            if files.setdefault(picture, image) != image:
                raise SourceError(f"{files[picture]} and {image}: both would be drawn as {picture}; draw one elsewhere")
    return files


def _read(path: Path) -> Any:
    """Pixels as MMDetection reads them, rotated by their EXIF orientation: (height, width, 3), BGR.

    Raises:
        SourceError: the image cannot be read.
    """
    try:
        pixels = mmcv.imread(str(path))
    except (OSError, cv2.error) as error:
        raise SourceError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'empty'})") from None
    if pixels is None:
        raise SourceError(f"{path}: cannot be decoded")
    return pixels


def _tensor(pixels: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels[..., ::-1].transpose(2, 0, 1)))


def predicted(sample: Any, threshold: float) -> Objects:
    """Detections of a ``DetDataSample`` with at least this score, on the CPU, best first."""
    found = sample.pred_instances.cpu()
    found = found[found.scores.argsort(descending=True)]
    found = found[found.scores >= threshold]
    return Objects(found.bboxes, found.labels, found.scores, found.get("masks"))


def annotated(info: Any) -> Objects:
    """Objects of an entry of a :class:`~mcl.finetune.loading.COCOFolder`, with masks if all objects have one."""
    masks = all("mask" in instance for instance in info["instances"])
    shape = {"ori_shape": (info["height"], info["width"])}
    loaded = LoadAnnotations(with_mask=masks, box_type=None)({**info, **shape})
    boxes, labels = (torch.from_numpy(loaded[key]) for key in ("gt_bboxes", "gt_bboxes_labels"))
    return Objects(boxes, labels, None, torch.from_numpy(loaded["gt_masks"].to_ndarray() > 0) if masks else None)


def compare(detector: Any, loader: Any, path: Path) -> None:
    """Draws detections and annotations of some images of a loader side by side."""
    dataset, rows = loader.dataset, []
    classes = dataset.metainfo["classes"]
    detector.eval()
    for i in range(0, len(dataset), max(1, len(dataset) // IMAGES))[:IMAGES]:
        info = dataset.get_data_info(i)
        with torch.no_grad():
            (found,) = detector.val_step(loader.collate_fn([dataset[i]]))
        pixels = _tensor(_read(Path(info["img_path"])))
        truth, prediction = annotated(info), predicted(found, THRESHOLD)
        both = pictures.draw(pixels, truth, classes), pictures.draw(pixels, prediction, classes)
        rows.append((Path(info["img_path"]).name, *both))
    pictures.save(pictures.beside(rows, ("annotated", f"found, score at least {THRESHOLD}")), path)
