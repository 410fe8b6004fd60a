"""Fine-tuning of detectors in MMDetection, which need not be installed for anything else."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from mcl import distributed
from mcl.config import ConfigError
from mcl.distributed import local


def finetune(path: Path, overrides: Sequence[str] = ()) -> str:
    """Trains and evaluates the detector of an MMDetection configuration, or continues its run.

    Args:
        path: Python file, or the name of one of mcl's, such as ``mask_rcnn_r50_fpn_1x``.
        overrides: ``key=value`` words; keys are those of the file.

    Returns:
        The table of AP, in percent, of every evaluation; empty if other processes have trained and printed it.

    Raises:
        ConfigError: wrong configuration, or MMDetection is not installed.
        SourceError: wrong data.
        CheckpointError: weights that do not fit, or cannot be read.
    """
    # MMEngine imports it, and nobody who fine-tunes can change that.
    warnings.filterwarnings("ignore", "pkg_resources is deprecated", UserWarning)
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = "/nonexistent"  # without any, yapf, which MMEngine imports, fails
    try:
        import mmdet.apis  # noqa: F401  # whatever of mmcv and mmengine it needs, too
    except (ImportError, AssertionError) as error:  # the latter for a version of mmcv that it does not take
        raise ConfigError(f"mcl finetune needs MMDetection ({error}); install it: mcl install-mmdet") from None
    from mcl.finetune import settings, training

    config = settings.load(path, overrides)
    gpus = distributed.gpus()
    numbers = local.devices("devices", config.devices, gpus, lambda n: config.global_batch % n == 0)
    if numbers == [0]:
        return training.finetune(config)
    local.run(["finetune", str(path), *overrides], numbers, "devices", gpus, config.timeout)
    return ""


__all__ = ["finetune"]
