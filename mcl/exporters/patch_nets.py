"""ConvNeXt and Swin Transformer in other libraries: names and order of values, from those of torchvision."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor

from mcl.exporters.files import Weights

Rules = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]

_SWIN = ((r"^stages\.(\d)\.", r"stages.\1.blocks."), (r"^stem\.2", "patch_embed.norm"))
_RULES: dict[str, dict[str, Rules]] = {
    "OpenMMLab": {
        "convnext_t": (
            (r"^stem\.", "downsample_layers.0."),
            (r"^merge\.", "downsample_layers."),
            (r"block\.0", "depthwise_conv"),
            (r"block\.2", "norm"),
            (r"block\.3", "pointwise_conv1"),
            (r"block\.5", "pointwise_conv2"),
            (r"layer_scale", "gamma"),
            (r"^norms\.", "norm"),
        ),
        "swin_t": (
            *_SWIN,
            (r"^stem\.0", "patch_embed.projection"),
            (r"^merge\.(\d)", lambda m: f"stages.{int(m[1]) - 1}.downsample"),  # the end of the stage before
            (r"\.attn\.", ".attn.w_msa."),
            (r"mlp\.0", "ffn.layers.0.0"),
            (r"mlp\.3", "ffn.layers.1"),
            (r"^norms\.", "norm"),
        ),
    },
    "timm": {
        "convnext_t": (
            (r"^merge\.(\d)", r"stages.\1.downsample"),
            (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
            (r"block\.0", "conv_dw"),
            (r"block\.2", "norm"),
            (r"block\.3", "mlp.fc1"),
            (r"block\.5", "mlp.fc2"),
            (r"layer_scale", "gamma"),
            (r"^norms\..*", ""),
        ),
        "swin_t": (
            *_SWIN,
            (r"^stem\.0", "patch_embed.proj"),
            (r"^merge\.(\d)", r"layers.\1.downsample"),  # the beginning of the stage behind
            (r"^stages\.", "layers."),
            (r"mlp\.0", "mlp.fc1"),
            (r"mlp\.3", "mlp.fc2"),
            (r"^norms\.3", "norm"),
            (r"^norms\..*|.*relative_position_index", ""),
        ),
    },
}
"""What to replace in names that begin with stem, merge.<stage that follows>, stages.<stage>.<block> or norms.<stage>;
an empty name is left out."""

_MERGED = re.compile(r"stages\.\d\.downsample\.(norm|reduction)\.")  # MMDetection's, of Swin


def renames(library: str, prefix: str = "") -> Mapping[str, Callable[[str], str | None]]:
    """By backbone: our names of its tensors to the library's, whose names begin with `prefix`."""
    return {backbone: partial(_rename, rules, prefix) for backbone, rules in _RULES[library].items()}


def _rename(rules: Rules, prefix: str, name: str) -> str | None:
    name = re.sub(r"^features\.(\d)", lambda m: _place(int(m[1])), name)
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return prefix + name if name else None


def _place(index: int) -> str:
    """torchvision's sequence is a stem, and stages with what merges patches between them."""
    return "stem" if index == 0 else f"stages.{index // 2}" if index % 2 else f"merge.{index // 2}"


def adapt(weights: Weights) -> Weights:
    """Values by a library's names, shaped and ordered as it has them."""
    return {name: _adapted(name, tensor) for name, tensor in weights.items()}


def _adapted(name: str, tensor: Tensor) -> Tensor:
    if name.endswith(".gamma"):
        return tensor.flatten()
    if name.endswith(".relative_position_index"):  # of one cell of a window to another
        return tensor.view(math.isqrt(len(tensor)), -1)
    return unfolded(tensor) if _MERGED.search(name) else tensor


def restored(name: str, tensor: Tensor) -> Tensor:
    """A library's tensor in our order of values, which has our shape after a view."""
    return folded(tensor) if _MERGED.search(name) else tensor


def unfolded(tensor: Tensor) -> Tensor:
    """(..., 4 C), of the channels of four merged patches: from torchvision's order to MMDetection's.

    torchvision has one patch behind the other, its columns one by one; ``nn.Unfold`` has the four patches of a channel
    together, row by row.
    """
    patches = tensor.view(*tensor.shape[:-1], 4, -1)[..., [0, 2, 1, 3], :]
    return patches.transpose(-1, -2).flatten(-2)


def folded(tensor: Tensor) -> Tensor:
    """Undoes :func:`unfolded`."""
    patches: Tensor = tensor.unflatten(-1, (-1, 4)).transpose(-1, -2)
    return patches[..., [0, 2, 1, 3], :].flatten(-2)
