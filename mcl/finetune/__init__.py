"""Fine-tuning of detectors in MMDetection, which no other part of mcl needs."""

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
        repeats: number of seeds to train with, from ``randomness.seed`` on; runs are in ``seed-0``, ... of the run
            folder.
        compare: folder of other repeats to compare with.

    Returns:
        A table with the AP, in percent, of every evaluation, or with that of the repeats; empty if other processes have
        trained and printed it.

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
    from mcl.exporters.mmdet import import_mmdet  # exporters import evaluations, which read annotations

    # MMEngine imports it, which users cannot change
    warnings.filterwarnings("ignore", "pkg_resources is deprecated", UserWarning)
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = "/nonexistent"  # without any, yapf, which MMEngine imports, fails
    try:
        import_mmdet()
    except (ImportError, AssertionError) as error:  # the latter for a version of mmcv that it does not take
        raise ConfigError(f"{verb} needs MMDetection ({error}); install it: mcl install-mmdet") from None


__all__ = ["detect", "finetune"]
