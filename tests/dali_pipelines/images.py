"""Small image files of every kind, good and broken."""

from pathlib import Path

import numpy as np
from PIL import Image


def choose(photos: Path) -> list[str]:
    """The first photograph of eight of the classes in ``photos/val``."""
    folders = sorted(folder for folder in (photos / "val").iterdir() if folder.is_dir())
    return [str(min(folder.glob("*.jpg"))) for folder in folders[:: max(1, len(folders) // 8)][:8]]


def save_kinds(folder: Path, picture: Image.Image) -> dict[str, Path]:
    """Writes `picture` as files of every kind that must be readable; returns paths by name."""
    deep = np.asarray(picture.convert("L")).astype(np.uint16) * 256 + np.arange(64, dtype=np.uint16)
    alpha = picture.copy()
    alpha.putalpha(Image.fromarray(np.tile(np.arange(0, 256, 4, dtype=np.uint8), (48, 1))))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees when shown
    kinds: dict[str, tuple[Image.Image, dict[str, object]]] = {
        "rgb.jpg": (picture, {"quality": 92}),
        "progressive.jpg": (picture, {"progressive": True}),
        "gray.jpg": (picture.convert("L"), {}),
        "cmyk.jpg": (picture.convert("CMYK"), {}),
        "rotated.jpg": (picture, {"exif": exif}),
        "one_pixel.jpg": (picture.resize((1, 1)), {}),
        "rgb.png": (picture, {}),
        "alpha.png": (alpha, {}),
        "palette.png": (picture.convert("P"), {}),
        "sixteen_bits.png": (Image.fromarray(deep), {}),
        "still.webp": (picture, {}),
        "plain.tif": (picture, {}),
        "plain.bmp": (picture, {}),
        "plain.ppm": (picture, {}),
    }
    for name, (image, options) in kinds.items():
        image.save(folder / name, **options)
    return {name: folder / name for name in kinds}


def write_corrupt(path: Path, picture: Image.Image) -> None:
    """A JPEG with wrong bytes in its data, which decoders skip."""
    picture.save(path, quality=92)
    content = bytearray(path.read_bytes())
    for i in range(len(content) // 2, len(content) // 2 + 40, 4):
        content[i] = 0x55
    path.write_bytes(content)


def write_truncated(path: Path, picture: Image.Image) -> None:
    """A JPEG with a complete header and without its second half."""
    picture.save(path, quality=92)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def write_animated(path: Path, picture: Image.Image) -> None:
    picture.save(path, save_all=True, append_images=[picture.rotate(90)])


def write_huge(path: Path, picture: Image.Image) -> None:
    """A JPEG whose header claims 65000 x 65000 pixels."""
    picture.save(path)
    content = bytearray(path.read_bytes())
    frame = content.index(b"\xff\xc0") + 5  # skips marker, length and precision; height and width follow
    content[frame : frame + 4] = (65_000).to_bytes(2, "big") * 2
    path.write_bytes(content)
