"""A COCO-format detection set: cut-out photographs of objects pasted onto photographs of places."""

from __future__ import annotations

import json
import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from .packages import DataError, Packages, as_rgb, fresh_folder, shrink
from .selection import SPLITS, read_selection

CUTOUTS = Path(__file__).parents[1] / "cutouts.json"
SCENE_SIZES = ((500, 375), (500, 375), (375, 500), (640, 480))  # pixels, drawn evenly
OBJECTS = (1, 1, 2, 2, 3, 3, 4, 5, 6)  # objects tried in a scene, drawn evenly
OBJECT_SIDE = (40.0, 300.0)  # pixels along the long side, drawn evenly on a log scale
LARGEST_STORED = 420  # pixels; larger cut-outs are scaled down when read
MAX_ENLARGEMENT = 1.5
MAX_ROTATION = 15.0  # degrees
VAL_SHARE = 0.25  # of a category's identity groups, at least 2 groups
SMALLEST_MASK = 60  # pixels visible
LEAST_VISIBLE = 0.45  # of an object's own area, after later objects were pasted over it
OPAQUE = 127  # alpha above it belongs to the mask
JPEG_QUALITY = 92
UPSAMPLING = 4  # outlines are traced on a mask this many times larger
OUTLINE_TOLERANCE = 1.5  # pixels of the enlarged mask
SMALLEST_PART = 64  # square pixels of the enlarged mask; smaller specks get no polygon

Entry = dict[str, Any]  # one object of a COCO file


@dataclass(frozen=True)
class Cutout:
    """One image with alpha; cut-outs of the same ``group`` show the same individual."""

    category: str
    group: str
    package: str
    path: str


@dataclass
class Placed:
    """An object in a scene: its category, the mask of its visible pixels, and its pixel count before any occlusion."""

    category: str
    mask: np.ndarray
    full_area: int


def build_cutouts(packages: Packages, out: Path, train: int, val: int, seed: int) -> str:
    """Write ``out/{train,val}/*.jpg`` and ``out/instances_{train,val}.json``; return a summary line.

    ``train`` and ``val`` count scenes. Individuals and places of one split never occur in the other; places follow the
    split of ``photos.csv``. The same packages and seed give the same files. Raises ``DataError`` without OpenCV.
    """
    _opencv()
    cutouts = read_cutouts()
    categories = list(dict.fromkeys(c.category for c in cutouts))
    objects = split_groups(cutouts, random.Random(f"{seed} groups"))
    parts = []
    with fresh_folder(out) as folder:
        for split, scenes in zip(SPLITS, (train, val), strict=True):
            (folder / split).mkdir()
            painter = ScenePainter(packages, objects[split], split, random.Random(f"{seed} {split}"))
            images: list[Entry] = []
            annotations: list[Entry] = []
            for number in range(1, scenes + 1):
                canvas, placed = painter.paint()
                name = f"{number:06d}.jpg"
                canvas.save(folder / split / name, "JPEG", quality=JPEG_QUALITY)
                images.append({"id": number, "file_name": name, "width": canvas.width, "height": canvas.height})
                for item in placed:
                    annotation = annotate(item.mask)
                    if annotation:
                        ids = {"id": len(annotations) + 1, "image_id": number}
                        category = {"category_id": categories.index(item.category) + 1}
                        annotations.append({**ids, **category, **annotation})
            _write_json(folder / f"instances_{split}.json", images, annotations, categories)
            parts.append(f"{split}: {scenes} scenes, {len(annotations)} instances, {painter.places} backgrounds")
    return "; ".join(parts)


def read_cutouts(path: Path = CUTOUTS) -> list[Cutout]:
    """The curated cut-outs, in file order."""
    rows = json.loads(path.read_text())
    return [Cutout(row["category"], row["group"], row["package"], row["path"]) for row in rows]


def split_groups(cutouts: Sequence[Cutout], generator: random.Random) -> dict[str, dict[str, list[Cutout]]]:
    """Cut-outs by split and category. All cut-outs of a group are in the same split."""
    result: dict[str, dict[str, list[Cutout]]] = {split: defaultdict(list) for split in SPLITS}
    for category in dict.fromkeys(c.category for c in cutouts):
        members = [c for c in cutouts if c.category == category]
        groups = sorted({c.group for c in members})
        generator.shuffle(groups)
        held_out = set(groups[: max(2, round(VAL_SHARE * len(groups)))])
        for cutout in members:
            result["val" if cutout.group in held_out else "train"][category].append(cutout)
        if not all(result[split][category] for split in SPLITS):
            raise DataError(f"category {category} has too few groups ({len(groups)}) for both splits")
    return result


class ScenePainter:
    """Paints the scenes of one split, one after another, with a generator of random numbers."""

    def __init__(
        self, packages: Packages, objects: dict[str, list[Cutout]], split: str, generator: random.Random
    ) -> None:
        self._packages = packages
        self._objects = objects
        self._categories = list(objects)
        self._random = generator
        self._read: dict[Cutout, Image.Image] = {}
        photos = [p for p in read_selection() if p.background and p.split == split]
        self._places = [shrink(as_rgb(packages.image(p.package, p.path, p.archive)), short=768) for p in photos]
        if not self._places:
            raise DataError(f"photos.csv marks no {split} photograph as a background")

    @property
    def places(self) -> int:
        """Number of background photographs."""
        return len(self._places)

    def paint(self) -> tuple[Image.Image, list[Placed]]:
        """Returns a scene and its objects; masks contain visible pixels only."""
        width, height = self._random.choice(SCENE_SIZES)
        canvas = self._place(width, height)
        placed: list[Placed] = []
        for _ in range(self._random.choice(OBJECTS)):
            category = self._random.choice(self._categories)
            layer = self._vary(self._cutout(self._random.choice(self._objects[category])))
            left = self._random.randint(-layer.width // 5, width - layer.width * 4 // 5)
            top = self._random.randint(-layer.height // 5, height - layer.height * 4 // 5)
            alpha = Image.new("L", (width, height))
            alpha.paste(layer.getchannel("A"), (left, top))
            mask = np.asarray(alpha) > OPAQUE
            if mask.sum() < SMALLEST_MASK or any(_buried(other, mask) for other in placed):
                continue
            for other in placed:
                other.mask = other.mask & ~mask
            canvas.paste(layer.convert("RGB"), (left, top), layer.getchannel("A"))
            placed.append(Placed(category, mask, int(mask.sum())))
        return canvas, placed

    def _place(self, width: int, height: int) -> Image.Image:
        photo = self._random.choice(self._places)
        factor = max(width / photo.width, height / photo.height) * self._random.uniform(1.0, 1.4)
        size = (math.ceil(photo.width * factor), math.ceil(photo.height * factor))
        left = self._random.randint(0, size[0] - width)
        top = self._random.randint(0, size[1] - height)
        scaled = photo.resize(size, Image.Resampling.BICUBIC)
        return scaled.crop((left, top, left + width, top + height))

    def _cutout(self, cutout: Cutout) -> Image.Image:
        if cutout not in self._read:
            image = self._packages.image(cutout.package, cutout.path).convert("RGBA")
            opaque = image.getchannel("A").point([0] * (OPAQUE + 1) + [255] * (255 - OPAQUE))
            box = opaque.getbbox()
            if box is None:
                raise DataError(f"{cutout.package}: {cutout.path} has no opaque pixel")
            self._read[cutout] = shrink(image.crop(box), long=LARGEST_STORED)
        return self._read[cutout]

    def _vary(self, image: Image.Image) -> Image.Image:
        low, high = map(math.log, OBJECT_SIDE)
        side = min(math.exp(self._random.uniform(low, high)), MAX_ENLARGEMENT * max(image.size))
        factor = side / max(image.size)
        size = (max(8, round(image.width * factor)), max(8, round(image.height * factor)))
        image = image.resize(size, Image.Resampling.LANCZOS)
        if self._random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        angle = self._random.uniform(-MAX_ROTATION, MAX_ROTATION)
        image = image.rotate(angle, expand=True, resample=Image.Resampling.BICUBIC)
        colour = image.convert("RGB")
        for enhance, weakest, strongest in (
            (ImageEnhance.Brightness, 0.75, 1.25),
            (ImageEnhance.Contrast, 0.8, 1.2),
            (ImageEnhance.Color, 0.7, 1.2),
        ):
            colour = enhance(colour).enhance(self._random.uniform(weakest, strongest))
        colour.putalpha(image.getchannel("A"))
        return colour


def _buried(item: Placed, cover: np.ndarray) -> bool:
    visible = int((item.mask & ~cover).sum())
    return visible < max(SMALLEST_MASK, LEAST_VISIBLE * item.full_area)


def annotate(mask: np.ndarray) -> Entry | None:
    """COCO fields of one visible mask, in pixels: polygons of its outer outlines, and the box and area inside them.

    Holes are filled in the polygons, as in COCO, but not counted in the area. Specks are left out of all three.
    ``None`` if the mask has only specks.
    """
    cv2 = _opencv()
    enlarged = np.pad(mask, 1).astype(np.uint8).repeat(UPSAMPLING, axis=0).repeat(UPSAMPLING, axis=1)
    outlines, _ = cv2.findContours(enlarged, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    outlines = [outline for outline in outlines if cv2.contourArea(outline) >= SMALLEST_PART]
    traced = [cv2.approxPolyDP(outline, OUTLINE_TOLERANCE, True).reshape(-1, 2) for outline in outlines]
    corners = [polygon for polygon in traced if len(polygon) >= 3]
    if not corners:
        return None
    filled = np.zeros_like(enlarged)
    cv2.drawContours(filled, outlines, -1, 1, cv2.FILLED)
    middle = UPSAMPLING // 2
    kept = mask & filled[middle::UPSAMPLING, middle::UPSAMPLING][1:-1, 1:-1].astype(bool)
    rows, columns = np.flatnonzero(kept.any(axis=1)), np.flatnonzero(kept.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    return {
        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        "area": int(kept.sum()),
        "iscrowd": 0,
        "segmentation": [np.round((polygon + 0.5) / UPSAMPLING - 1, 2).ravel().tolist() for polygon in corners],
    }


def _write_json(path: Path, images: list[Entry], annotations: list[Entry], categories: list[str]) -> None:
    content = {
        "info": {"description": "photographed objects pasted onto photographed places; made by scripts/build_data.py"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in enumerate(categories, start=1)],
    }
    path.write_text(json.dumps(content))


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise DataError(
            "the coco sub-command traces outlines with OpenCV: pip install opencv-python-headless "
            "(pinned in scripts/requirements.txt)"
        ) from error
    return cv2
