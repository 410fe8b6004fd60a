"""Decoding with Pillow: the reference for DALI's decoder, and its replacement for images that DALI decodes wrongly."""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from dali_pipelines.source.headers import NO_IMAGE, open_image, orientation_of

_TURN_BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def decode(encoded: bytes) -> npt.NDArray[np.uint8]:
    """(H, W, 3) RGB of an image as stored: not rotated, without alpha, 16 bits scaled down to 8.

    Raises:
        OSError: the image cannot be decoded, or is truncated.
        MemoryError: there is too little memory; the image may be good.
    """
    try:
        with open_image(io.BytesIO(encoded)) as opened:
            image: Image.Image = opened
            if image.format == "TIFF" and (turned := orientation_of(image)) > 1:  # the only ones Pillow rotates
                image = image.transpose(_TURN_BACK[turned])
            if image.mode.startswith("I"):  # 16 bits, which Pillow would clip instead of scaling them
                gray = (np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8)
                return np.repeat(gray[..., None], 3, 2)
            image.info.pop("transparency", None)
            return np.array(image.convert("RGB"))
    except UnidentifiedImageError:
        raise OSError(NO_IMAGE) from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise many types of errors
        raise OSError(f"{type(error).__name__}: {error}") from error


def recode(encoded: bytes) -> bytes:
    """The same pixels as a PPM, which every engine decodes alike.

    Raises:
        OSError, MemoryError: see :func:`decode`.
    """
    pixels = decode(encoded)
    return b"".join((b"P6\n%d %d\n255\n" % (pixels.shape[1], pixels.shape[0]), pixels.data))
