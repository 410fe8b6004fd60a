"""Settings of PyTorch's GPU libraries: algorithms, precision and determinism."""

import os

import torch

from mcl import ops
from mcl.config import Config, ConfigError, TrainerConfig

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_DETERMINISTIC = (":4096:8", ":16:8")
"""Workspaces of cuBLAS with which it is deterministic."""


def choose(trainer: TrainerConfig) -> None:
    """Applies ``trainer.deterministic`` and ``trainer.tf32`` to the whole process, before CUDA starts.

    Matrix products are always in full fp32, as the loss must be, also if the environment of NVIDIA's containers enables
    TF32. With ``trainer.deterministic``, PyTorch fills uninitialised memory with NaN, which makes reads of it visible.

    Raises:
        ConfigError: the environment contradicts ``trainer.deterministic``.
    """
    exact = trainer.deterministic
    if exact:
        given = os.environ.get(_WORKSPACE) or ("" if torch.cuda.is_initialized() else _DETERMINISTIC[0])
        if not given:
            raise ConfigError(
                f"trainer.deterministic: {_WORKSPACE} is not set, and CUDA is already initialised; "
                f"set it to {_DETERMINISTIC[0]} before the process starts"
            )
        if given not in _DETERMINISTIC:
            raise ConfigError(
                f"trainer.deterministic: cuBLAS is not deterministic with {_WORKSPACE}={given}; "
                f"set it to {_DETERMINISTIC[0]}"
            )
        os.environ[_WORKSPACE] = given
    torch.use_deterministic_algorithms(exact)
    torch.backends.cudnn.deterministic = exact
    torch.backends.cudnn.benchmark = not exact  # chooses algorithms by timing, so not reproducibly
    torch.backends.cudnn.allow_tf32 = trainer.tf32
    torch.set_float32_matmul_precision("highest")


def check(config: Config, device: str, loader: str) -> None:
    """Raises if ``trainer.deterministic`` is set and a part of the run is not deterministic.

    Args:
        config: configuration of the run.
        device: cpu or cuda, the device of the networks.
        loader: cpu or gpu, the device that decodes images.

    Raises:
        ConfigError: a part is not deterministic; the message names it and the remedy.
    """
    if not (config.trainer.deterministic and device == "cuda"):
        return
    if loader == "gpu":
        raise ConfigError(
            "trainer.deterministic: decoding on a GPU is not reproducible, since the decoder of an image varies; set "
            "data.device=cpu"
        )
    pools = config.model.compute == "matched" and config.model.assembly == "montage"
    if pools and not ops.compiled("region_pool", device):
        raise ConfigError(
            "trainer.deterministic: region pooling adds gradients in a fixed order only in the compiled operators "
            f"({ops.backends(device)['region_pool'][1]}); build them, or set trainer.deterministic=false"
        )


def describe(trainer: TrainerConfig, device: str) -> str:
    """Precision and determinism in words, such as "fp32 (TF32 in convolutions), deterministic"."""
    tf32 = " (TF32 in convolutions)" if trainer.precision == "fp32" and trainer.tf32 and device == "cuda" else ""
    return f"{trainer.precision}{tf32}{', deterministic' if trainer.deterministic else ''}"
