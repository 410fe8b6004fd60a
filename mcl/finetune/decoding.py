"""Images as MMDetection decodes them, with errors that name the file."""

from typing import Any

import cv2
from mmcv.transforms import LoadImageFromFile
from mmdet.registry import TRANSFORMS


class BadImageError(RuntimeError):
    """An image cannot be decoded, or its size differs from its annotation; the message names the file."""


@TRANSFORMS.register_module()
class LoadCheckedImage(LoadImageFromFile):
    """MMCV's loader, with errors that name the file, and a check that the image still has its annotated size."""

    def transform(self, results: dict[str, Any]) -> Any:
        """Adds the pixels to an image's entry.

        Raises:
            BadImageError: the image cannot be decoded, or its size differs from the annotations.
        """
        path, annotated = results["img_path"], (results["height"], results["width"])
        try:
            loaded = super().transform(results)
        except OSError as error:
            raise BadImageError(f"{path}: cannot read it: {error.strerror or error}") from None
        except (AssertionError, cv2.error):  # AssertionError: no pixels; cv2.error: an empty file
            raise BadImageError(f"{path}: cannot be decoded") from None
        if (found := results["img_shape"]) != annotated:
            raise BadImageError(
                f"{path}: {found[1]} x {found[0]} pixels, the annotations say {annotated[1]} x {annotated[0]}"
            )
        return loaded
