"""How PyTorch's libraries compute on a GPU: which algorithms, in which precision, and whether twice the same."""

import os

import torch

from mcl import ops
from mcl.config import Config, ConfigError, TrainerConfig

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_DETERMINISTIC = (":4096:8", ":16:8")
"""Workspaces of cuBLAS with which it is deterministic."""


def choose(trainer: TrainerConfig) -> None:
    """Sets PyTorch's switches as the configuration says, for the whole process; before CUDA starts.

    Matrix products are always in full fp32, as the loss must be, whatever NVIDIA's containers have in their
    environment. Memory that an operator leaves uninitialised is filled with NaN under ``trainer.deterministic``, as is
    PyTorch's default there, so that reading it shows.

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
    torch.backends.cudnn.benchmark = not exact  # by timing, which is not twice the same
    torch.backends.cudnn.allow_tf32 = trainer.tf32
    torch.set_float32_matmul_precision("highest")


def check(config: Config, device: str, loader: str) -> None:
    """Refuses what is not covered by PyTorch's deterministic algorithms.

    Args:
        device: cpu or cuda, where the networks live.
        loader: cpu or gpu, where images are decoded.

    Raises:
        ConfigError: ``trainer.deterministic`` cannot be had; the message names the obstacle and the remedy.
    """
    if not (config.trainer.deterministic and device == "cuda"):
        return
    if loader == "gpu":
        raise ConfigError(
            "trainer.deterministic: decoding on a GPU is not reproducible, since the decoder that takes an image "
            "varies; set data.device=cpu"
        )
    pools = config.model.compute == "matched" and config.model.assembly == "montage"
    if pools and not ops.compiled("region_pool", device):
        raise ConfigError(
            "trainer.deterministic: region pooling adds gradients in a fixed order only in the compiled operators "
            f"({ops.backends(device)['region_pool'][1]}); build them, or set trainer.deterministic=false"
        )


def describe(trainer: TrainerConfig, device: str) -> str:
    """The arithmetic of the networks in words, as in "fp32 (TF32 in convolutions), deterministic"."""
    tf32 = " (TF32 in convolutions)" if trainer.precision == "fp32" and trainer.tf32 and device == "cuda" else ""
    return f"{trainer.precision}{tf32}{', deterministic' if trainer.deterministic else ''}"
