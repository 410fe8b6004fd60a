"""Weights of other libraries, downloaded and cached by the libraries' own loaders."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from mcl.config import ConfigError
from mcl.train.checkpoint import CheckpointError, reason


def torchvision(name: str, key: str) -> Mapping[str, Tensor]:
    """Downloads weights of torchvision.

    Args:
        name: name of a model, for its default weights, or of weights, such as ResNet50_Weights.IMAGENET1K_V1.
        key: key of the configuration, for errors.

    Raises:
        ConfigError: there are no such weights.
        CheckpointError: the download failed.
    """
    from torchvision.models import get_model_weights, get_weight

    try:
        weights: Any = get_weight(name) if "." in name else get_model_weights(name).DEFAULT
    except (ValueError, AttributeError, KeyError):
        raise ConfigError(
            f"{key}: torchvision has no weights called {name!r}; name a model, such as torchvision:resnet50, or "
            "weights, such as torchvision:ResNet50_Weights.IMAGENET1K_V1"
        ) from None
    return _download(
        f"torchvision:{name}",
        key,
        weights.url,
        lambda: weights.get_state_dict(progress=False, check_hash=True, weights_only=True),
    )


def timm(name: str, key: str) -> Mapping[str, Tensor]:
    """Downloads weights of timm.

    Args:
        name: name of a model of timm that has weights on the Hugging Face Hub.
        key: key of the configuration, for errors.

    Raises:
        ConfigError: timm is not installed, or there are no such weights.
        CheckpointError: the download failed.
    """
    try:
        from timm.models import get_pretrained_cfg, load_state_dict_from_hf
    except ImportError as error:
        raise ConfigError(f"{key}: timm:{name} needs timm ({error}); install it: pip install timm") from None
    try:
        identity = get_pretrained_cfg(name, allow_unregistered=False).hf_hub_id
    except RuntimeError:
        identity = None
    if not identity:
        raise ConfigError(f"{key}: timm has no weights called {name!r}; timm.list_pretrained() has their names")
    url = f"https://huggingface.co/{identity}/resolve/main/model.safetensors"
    return _download(f"timm:{name}", key, url, lambda: load_state_dict_from_hf(identity, weights_only=True))


def _download(source: str, key: str, url: str, load: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    try:
        return load()
    except Exception as error:  # from sockets, from the libraries, or from a damaged cache
        raise CheckpointError(
            f"{source}: cannot download {url} ({reason(error)}); fetch it where there is a network, and set {key}=FILE"
        ) from None


LIBRARIES: dict[str, Callable[[str, str], Mapping[str, Tensor]]] = {"torchvision": torchvision, "timm": timm}
