"""ConvNeXt and Swin Transformer in other libraries: converts torchvision's names and order of values to theirs."""

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
            (r"^merge\.(\d)", lambda m: f"stages.{int(m[1]) - 1}.downsample"),  # at the end of the previous stage
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
            (r"^merge\.(\d)", r"layers.\1.downsample"),  # at the start of the next stage
            (r"^stages\.", "layers."),
            (r"mlp\.0", "mlp.fc1"),
            (r"mlp\.3", "mlp.fc2"),
            (r"^norms\.3", "norm"),
            (r"^norms\..*|.*relative_position_index", ""),
        ),
    },
}
"""Replacements in names that begin with stem, merge.<next stage>, stages.<stage>.<block> or norms.<stage>. If the
result is empty, the tensor is left out."""

_MERGED = re.compile(r"stages\.\d\.downsample\.(norm|reduction)\.")  # MMDetection's, of Swin


def renames(library: str, prefix: str = "") -> Mapping[str, Callable[[str], str | None]]:
    """By backbone, a function from mcl's names of its tensors to the library's, which begin with `prefix`."""
    return {backbone: partial(_rename, rules, prefix) for backbone, rules in _RULES[library].items()}


def _rename(rules: Rules, prefix: str, name: str) -> str | None:
    name = re.sub(r"^features\.(\d)", lambda m: _place(int(m[1])), name)
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return prefix + name if name else None


def _place(index: int) -> str:
    """torchvision's sequence is a stem, then stages, with a merging of patches between two stages."""
    return "stem" if index == 0 else f"stages.{index // 2}" if index % 2 else f"merge.{index // 2}"


def adapt(weights: Weights) -> Weights:
    """Converts tensors, given by a library's names, to the library's shapes and order of values."""
    return {name: _adapted(name, tensor) for name, tensor in weights.items()}


def _adapted(name: str, tensor: Tensor) -> Tensor:
    if name.endswith(".gamma"):
        return tensor.flatten()
    if name.endswith(".relative_position_index"):  # (cells of a window, cells of a window)
        return tensor.view(math.isqrt(len(tensor)), -1)
    return unfolded(tensor) if _MERGED.search(name) else tensor


def restored(name: str, tensor: Tensor) -> Tensor:
    """Converts a library's tensor to mcl's order of values; only a view to mcl's shape is missing."""
    return folded(tensor) if _MERGED.search(name) else tensor


def unfolded(tensor: Tensor) -> Tensor:
    """(..., 4 C), the channels of four merged patches, from torchvision's order to MMDetection's.

    torchvision stores all channels of one patch after another, patches column by column. MMDetection's ``nn.Unfold``
    stores the four patches of one channel after another, patches row by row.
    """
    patches = tensor.view(*tensor.shape[:-1], 4, -1)[..., [0, 2, 1, 3], :]
    return patches.transpose(-1, -2).flatten(-2)


def folded(tensor: Tensor) -> Tensor:
    """Undoes :func:`unfolded`."""
    patches: Tensor = tensor.unflatten(-1, (-1, 4)).transpose(-1, -2)
    return patches[..., [0, 2, 1, 3], :].flatten(-2)
