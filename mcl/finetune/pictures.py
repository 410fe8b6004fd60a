"""Draws detected or annotated objects onto images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.colors import to_rgb
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from mcl.config import ConfigError

COLORS = [tuple(round(255 * c) for c in to_rgb(f"C{i}")) for i in range(10)]
"""Colours of the categories, repeated cyclically."""

FONT = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
LONG = 480  # pixels; images with a shorter longest side are enlarged, so that their labels can be read
MASK = 0.4  # opacity
HEADING, GAP = 22, 6  # pixels
SHOWN = (640, 640)  # pixels; maximum size of each picture of a pair


@dataclass(frozen=True)
class Objects:
    """n objects of an image."""

    boxes: Tensor
    """(n, 4), x1, y1, x2, y2 in pixels."""
    labels: Tensor
    """(n), int64."""
    scores: Tensor | None = None
    """(n), from 0 to 1."""
    masks: Tensor | None = None
    """(n, height, width), bool."""


@dataclass(frozen=True)
class Detections:
    """Detections in an image."""

    image: Path
    picture: Path
    """The file that was written."""
    names: list[str]
    """Category of each object."""
    objects: Objects
    """Best first."""

    def __str__(self) -> str:
        scores = self.objects.scores
        assert scores is not None
        found = [f"{name} {score:.2f}" for name, score in zip(self.names, scores.tolist(), strict=True)]
        return f"{self.picture}: {', '.join(found) or 'nothing found'}"


def draw(pixels: Tensor, objects: Objects, classes: Sequence[str]) -> Image.Image:
    """Draws boxes, masks, names and scores of objects onto an image. Small images are enlarged by a whole factor.

    Args:
        pixels: (3, height, width), RGB, uint8.
        objects: objects to draw; those with the highest scores are drawn last, on top.
        classes: names by label.
    """
    scale = max(1, round(LONG / max(pixels.shape[1:])))
    picture = _enlarged(pixels, scale)
    order = range(len(objects.labels)) if objects.scores is None else objects.scores.argsort().tolist()
    for i in order:
        label = int(objects.labels[i])
        color, text = COLORS[label % len(COLORS)], classes[label]
        if objects.masks is not None:  # one by one: torchvision draws overlaps of masks black
            picture = draw_segmentation_masks(picture, _enlarged(objects.masks[i], scale), MASK, color)
        if objects.scores is not None:
            text += f" {objects.scores[i]:.2f}"
        box = objects.boxes[i : i + 1] * scale
        font = {"font": FONT, "font_size": 13, "fill_labels": True}
        picture = draw_bounding_boxes(picture, box, [text], [color], width=2, **font)
    drawn: Image.Image = to_pil_image(picture)
    return drawn


def _enlarged(pixels: Tensor, scale: int) -> Tensor:
    return pixels.repeat_interleave(scale, -1).repeat_interleave(scale, -2)


def beside(rows: Sequence[tuple[str, Image.Image, Image.Image]], headings: tuple[str, str]) -> Image.Image:
    """Arranges pairs of pictures on a sheet, two pairs side by side; large pictures are reduced.

    Args:
        rows: a name and two pictures for each pair.
        headings: headings of the two pictures.
    """
    pictures = [[picture.copy() for picture in pair] for _, *pair in rows]
    for pair in pictures:
        for picture in pair:
            picture.thumbnail(SHOWN)
    width, height = (max(sides) for sides in zip(*(pair[0].size for pair in pictures), strict=True))
    sheet = Image.new("RGB", (4 * (width + GAP), -(-len(rows) // 2) * (height + HEADING)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.truetype(FONT, 13)
    for i, (name, *_) in enumerate(rows):
        for j in range(2):
            x, y = (i % 2 * 2 + j) * (width + GAP), i // 2 * (height + HEADING)
            pen.text((x, y + 3), f"{headings[j]}: {name}", "black", font)
            sheet.paste(pictures[i][j], (x, y + HEADING))
    return sheet


def save(picture: Image.Image, path: Path) -> None:
    """Writes a PNG and creates missing folders.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot write the picture ({error.strerror}); choose another folder") from None
