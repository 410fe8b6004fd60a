"""Headers of images: sizes without pixels."""

from typing import IO

from PIL import Image, UnidentifiedImageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif")
"""File names taken for images; a file that then turns out not to be one is listed as bad."""

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM")
"""Formats that every engine decodes to the same pixels."""

MAX_PIXELS = 100_000_000
"""A larger image is taken for a broken or hostile file."""

Header = tuple[int, int] | str
"""(width, height) in pixels as stored, before any EXIF rotation; or why the image cannot be used."""


def read_header(file: IO[bytes]) -> Header:
    """Reads as little of an encoded image as tells its size.

    Raises:
        OSError: the file itself cannot be read, which says nothing about the image in it.
    """
    try:
        with Image.open(file) as image:
            if image.format not in FORMATS:
                return f"format {image.format} is not supported; convert it to JPEG or PNG"
            if getattr(image, "n_frames", 1) > 1 and image.format != "JPEG":
                return f"{image.format} with {image.n_frames} frames; keep one of them"  # type: ignore[attr-defined]
            width, height = image.size
    except UnidentifiedImageError:
        return "not an image, or its header is broken"
    except Exception as error:  # broken headers make Pillow raise nearly anything; all of it means a bad image
        if isinstance(error, OSError) and error.errno is not None:
            raise
        return f"not an image: {type(error).__name__}: {error}"
    if width * height > MAX_PIXELS:
        return f"{width} x {height} pixels; more than {MAX_PIXELS} are refused"
    return width, height
