"""Headers of images: what can be known before decoding, and which images DALI decodes to the same pixels as Pillow."""

import contextlib
import io
import struct
from typing import IO, Any, NamedTuple

from PIL import Image, UnidentifiedImageError

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif")
"""Extensions of image files. A file with such a name that is not an image is listed as bad."""

UNREAD = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2")
"""Extensions of cameras and browsers. Files with such names are left out."""

FORMATS = ("JPEG", "MPO", "PNG", "BMP", "WEBP", "TIFF", "PPM")
"""Formats that are read. MPO is a JPEG file with several images, of which the first is read."""

MAX_PIXELS = 100_000_000
"""Larger images are refused as broken or malicious."""

NO_IMAGE = "not an image, or its header is broken"
"""Reason for files that Pillow cannot identify."""

_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "I;16", "I;16B", "I;16L", "I;16N")
_TIFF_BY_DALI = ("raw", "tiff_lzw", "tiff_adobe_deflate")  # compressions
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"tRNS", b"acTL", b"fcTL", b"eXIf")  # transparency, animation (two chunks), orientation
_ORIENTATION = 0x0112


class Header(NamedTuple):
    """Header of an image."""

    size: tuple[int, int]  # width, height, pixels; as stored, which is also how engines decode images
    orientation: int  # 1 to 8, of EXIF or TIFF; 1 if there is none
    by_pillow: bool  # whether Pillow decodes the image for all engines, since DALI cannot or decodes it wrongly

    @property
    def upright(self) -> tuple[int, int]:
        """Width, height of the image after it is rotated as its orientation says."""
        width, height = self.size
        return (width, height) if self.orientation < 5 else (height, width)


def read_header(file: IO[bytes]) -> Header | str:
    """Reads the header of an encoded image, and as little else as possible.

    Returns:
        The header, or the reason why the image cannot be used.

    Raises:
        OSError: the file cannot be read; the image may be good.
    """
    try:
        with open_image(file, pixels=False) as image:
            if image.format not in FORMATS:
                return f"format {image.format} is not supported; convert it to JPEG or PNG"
            if (frames := getattr(image, "n_frames", 1)) > 1 and image.format not in ("JPEG", "MPO"):
                return f"{image.format} with {frames} frames; keep one of them"
            if image.mode not in _MODES and (image.format, image.mode) != ("PPM", "I"):
                return f"{image.format} of mode {image.mode}, which has no fixed range of values; convert it to 8 bits"
            if not _tiles(image) and image.format != "WEBP":
                return "there is nothing after its header"
            orientation, stored = orientation_of(image), stored_size(image)
            header = Header(stored, orientation, not _by_dali(image, orientation))
    except UnidentifiedImageError:
        return NO_IMAGE
    except Exception as error:  # on broken headers Pillow raises many types of errors; all of them mean a bad image
        if isinstance(error, OSError) and error.errno is not None:
            raise
        return f"not an image: {type(error).__name__}: {error}"
    width, height = header.size
    if width * height > MAX_PIXELS:
        return f"{width} x {height} pixels, more than {MAX_PIXELS}"
    return header


def open_image(file: IO[bytes], pixels: bool = True) -> Image.Image:
    """Opens an image. Metadata of a PNG are removed, since Pillow refuses the file if they are large or broken.

    Args:
        pixels: whether the image will be decoded; if not, only its header is read.
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
        if kind[:1].isupper() or kind in _PNG_KEPT:  # upper case: needed to decode the pixels
            kept += [head, file.read(length + 4)]
        else:
            file.seek(length + 4, io.SEEK_CUR)
    return Image.open(io.BytesIO(b"".join(kept)))


def orientation_of(image: Image.Image) -> int:
    """Orientation of an image that was opened but not decoded: 1 to 8, as in EXIF; 1 for no rotation.

    For a TIFF, the orientation by which Pillow rotates it when it decodes. For other formats, that of EXIF; XMP is not
    read, as in OpenCV.
    """
    with contextlib.suppress(Exception):  # broken metadata count as none
        exif = image.getexif() if image.format == "TIFF" else Image.Exif()
        if image.format != "TIFF":
            exif.load(image.info.get("exif", b""))
        found = exif.get(_ORIENTATION, 1)
        return found if found in range(1, 9) else 1
    return 1


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Width, height of an opened image as stored; for a TIFF, Pillow's own size is that after rotation."""
    if image.format != "TIFF":
        return image.size
    tags = image.tag_v2  # type: ignore[attr-defined]
    return tags[256], tags[257]


def _tiles(image: Image.Image) -> list[Any]:
    """How Pillow decodes an image: codec, position and arguments of each of its parts."""
    return image.tile  # type: ignore[attr-defined, no-any-return]


def _by_dali(image: Image.Image, orientation: int) -> bool:
    """Whether DALI decodes such images to the same pixels as Pillow (measured: see the table in README.md)."""
    if image.format in ("PNG", "WEBP"):
        return True
    if image.format == "TIFF":
        planes = image.tag_v2.get(284, 1) != 1  # type: ignore[attr-defined]
        if planes or orientation != 1 or image.info.get("compression") not in _TIFF_BY_DALI:
            return False
    if image.info.get("adobe_transform") == 0 and image.mode == "RGB":  # an RGB JPEG, which may be read as YCbCr
        return False
    codec, _, _, arguments = _tiles(image)[0]
    raw = arguments if isinstance(arguments, str) else arguments[0]
    if codec == "jpeg" and raw == "CMYK;I":
        return "adobe" in image.info  # without it, decoders disagree whether 0 is white
    return codec in ("jpeg", "raw", "libtiff") and raw in ("L", "RGB", "BGR")
