"""Headers of images: what is to be known before decoding, and which images can be decoded alike by every engine."""

import contextlib
import io
import struct
from typing import IO, Any, NamedTuple

from PIL import Image, UnidentifiedImageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif")
"""File names taken for images; a file that then turns out not to be one is listed as bad."""

FORMATS = ("JPEG", "MPO", "PNG", "BMP", "WEBP", "TIFF", "PPM")
"""Formats that are read; MPO is a JPEG with other pictures behind it, of which the first counts."""

MAX_PIXELS = 100_000_000
"""A larger image is taken for a broken or hostile file."""

NO_IMAGE = "not an image, or its header is broken"
"""Why a file cannot be used of which Pillow knows nothing else."""

_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "I;16", "I;16B", "I;16L", "I;16N")
_TIFF_BY_DALI = ("raw", "tiff_lzw", "tiff_adobe_deflate")  # compressions
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"tRNS", b"acTL", b"fcTL", b"eXIf")  # transparency, whether it is animated, orientation
_ORIENTATION = 0x0112


class Header(NamedTuple):
    """What an image says about itself."""

    size: tuple[int, int]  # width, height, pixels as stored, which are those that engines decode
    orientation: int  # of EXIF, or of a TIFF: 1 to 8, 1 where it says nothing
    by_pillow: bool  # DALI does not decode it, or not rightly, so that Pillow does for all engines

    @property
    def upright(self) -> tuple[int, int]:
        """Width, height of the image turned as its orientation asks for."""
        width, height = self.size
        return (width, height) if self.orientation < 5 else (height, width)


def read_header(file: IO[bytes]) -> Header | str:
    """Reads as little of an encoded image as tells its header, or why the image cannot be used.

    Raises:
        OSError: the file itself cannot be read, which says nothing about the image in it.
    """
    try:
        with open_image(file, pixels=False) as image:
            if image.format not in FORMATS:
                return f"format {image.format} is not supported; convert it to JPEG or PNG"
            if (frames := getattr(image, "n_frames", 1)) > 1 and image.format not in ("JPEG", "MPO"):
                return f"{image.format} with {frames} frames; keep one of them"
            if image.mode not in _MODES and (image.format, image.mode) != ("PPM", "I"):
                return f"{image.format} of mode {image.mode}, whose black and white are not known; convert it to 8 bits"
            if not _tiles(image) and image.format != "WEBP":
                return "its header is all there is of it"
            orientation, stored = orientation_of(image), stored_size(image)
            header = Header(stored, orientation, not _by_dali(image, orientation))
    except UnidentifiedImageError:
        return NO_IMAGE
    except Exception as error:  # broken headers make Pillow raise nearly anything; all of it means a bad image
        if isinstance(error, OSError) and error.errno is not None:
            raise
        return f"not an image: {type(error).__name__}: {error}"
    width, height = header.size
    if width * height > MAX_PIXELS:
        return f"{width} x {height} pixels; more than {MAX_PIXELS} are refused"
    return header


def open_image(file: IO[bytes], pixels: bool = True) -> Image.Image:
    """Opens an image, a PNG without its metadata: Pillow refuses the whole file where they are large or broken.

    Args:
        pixels: whether it will be decoded, or only its header be looked at.
    """
    png = file.read(len(_PNG)) == _PNG
    if not png:
        file.seek(0)
        return Image.open(file)
    kept = [_PNG]
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IDAT" and not pixels:
            kept.append(head)
            break
        if kind[:1].isupper() or kind in _PNG_KEPT:  # upper case: what pixels cannot do without
            kept += [head, file.read(length + 4)]
        else:
            file.seek(length + 4, io.SEEK_CUR)
    return Image.open(io.BytesIO(b"".join(kept)))


def orientation_of(image: Image.Image) -> int:
    """How an opened image, not yet decoded, wants to be turned: 1 to 8 as EXIF numbers it, 1 for not at all.

    Of a TIFF that is what Pillow turns it by when it decodes, elsewhere EXIF alone, and not XMP, as in OpenCV.
    """
    with contextlib.suppress(Exception):  # broken metadata say nothing
        exif = image.getexif() if image.format == "TIFF" else Image.Exif()
        if image.format != "TIFF":
            exif.load(image.info.get("exif", b""))
        found = exif.get(_ORIENTATION, 1)
        return found if found in range(1, 9) else 1
    return 1


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Width, height of an opened image; Pillow's own size is that of a TIFF turned upright."""
    if image.format != "TIFF":
        return image.size
    tags = image.tag_v2  # type: ignore[attr-defined]
    return tags[256], tags[257]


def _tiles(image: Image.Image) -> list[Any]:
    """How Pillow decodes an image: codec, place and arguments of every piece of it."""
    return image.tile  # type: ignore[attr-defined, no-any-return]


def _by_dali(image: Image.Image, orientation: int) -> bool:
    """Whether DALI has been seen to decode such images to Pillow's pixels (the table of README.md)."""
    if image.format in ("PNG", "WEBP"):
        return True
    if image.format == "TIFF":
        planes = image.tag_v2.get(284, 1) != 1  # type: ignore[attr-defined]
        if planes or orientation != 1 or image.info.get("compression") not in _TIFF_BY_DALI:
            return False
    if image.info.get("adobe_transform") == 0 and image.mode == "RGB":  # a JPEG of RGB; decoders may take it for YCbCr
        return False
    codec, _, _, arguments = _tiles(image)[0]
    raw = arguments if isinstance(arguments, str) else arguments[0]
    if codec == "jpeg" and raw == "CMYK;I":
        return "adobe" in image.info  # or it is not known which end of the scale is white
    return codec in ("jpeg", "raw", "libtiff") and raw in ("L", "RGB", "BGR")
