"""Fine-tuning of detectors in MMDetection. No other part of mcl needs MMDetection."""

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mcl import distributed
from mcl.config import ConfigError
from mcl.distributed import local

if TYPE_CHECKING:
    from mcl.finetune.pictures import Detections

THRESHOLD = 0.3
"""Default of the lowest score that is drawn."""


def finetune(path: Path, overrides: Sequence[str] = (), repeats: int | None = None, compare: Path | None = None) -> str:
    """Trains and evaluates the detector of an MMDetection configuration, or continues its run.

    Args:
        path: Python file or preset, such as ``mask_rcnn_r50_fpn_1x``.
        overrides: ``key=value`` words; keys are those of the file.
        repeats: number of seeds to train with, starting at ``randomness.seed``; their runs are in ``seed-0``, ... in
            the run folder.
        compare: folder of other repeats to compare with.

    Returns:
        A table of AP in percent, with one row per evaluation, or with statistics of the repeats. Empty if this process
        started others, which have printed the table.

    Raises:
        ConfigError: wrong configuration, or MMDetection is not installed.
        SourceError: wrong data.
        CheckpointError: weights cannot be read or do not fit the detector.
    """
    _import_mmdet("mcl finetune")
    from mcl.finetune import repeats as several
    from mcl.finetune import settings, training

    if compare is not None and repeats is None:
        raise ConfigError("--compare: compares repeats; set --repeats")
    config = settings.load(path, overrides)
    gpus = distributed.gpus()
    numbers = local.devices("devices", config.devices, gpus, lambda n: config.global_batch % n == 0)
    if numbers == [0]:
        return training.finetune(config) if repeats is None else several.finetune(config, repeats, compare)
    words = ["finetune", str(path), *overrides, *(["--repeats", str(repeats)] if repeats is not None else [])]
    words += ["--compare", str(compare)] if compare is not None else []
    local.run(words, numbers, "devices", gpus, config.timeout)
    return ""


def detect(
    run: Path, images: Sequence[Path], output: Path | None = None, threshold: float = THRESHOLD
) -> Iterator["Detections"]:
    """Draws the detections of a fine-tuned detector; see :func:`mcl.detect`."""
    _import_mmdet("mcl detect")
    from mcl.finetune import detection

    return detection.detect(run, images, output, threshold)


def _import_mmdet(verb: str) -> None:
    from mcl.exporters.mmdet import import_mmdet  # avoids an import cycle through mcl.evaluation

    # MMEngine imports pkg_resources, which users cannot change.
    warnings.filterwarnings("ignore", "pkg_resources is deprecated", UserWarning)
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = "/nonexistent"  # MMEngine imports yapf, which fails without a home folder
    try:
        import_mmdet()
    except (ImportError, AssertionError) as error:  # AssertionError: MMDetection does not support this version of mmcv
        raise ConfigError(f"{verb} needs MMDetection ({error}); install it: mcl install-mmdet") from None


__all__ = ["detect", "finetune"]
