"""Region head, projector and predictor."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mcl.models.fpn import ConvNorm
from mcl.models.norm import BatchNorm


class RegionHead(nn.Module):
    """Convolutions with zero padding at the tile's borders, average pool, projector; shared by all levels.

    It processes all levels together, since matrix products of few rows are slow; BatchNorm normalises each level
    separately.

    Args:
        width: channels of the maps and of the embedding.
        convs: number of 3x3 convolutions.
        hidden: hidden units of the projector.
    """

    def __init__(self, width: int, convs: int, hidden: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(ConvNorm(width, width, 3) for _ in range(convs))
        self.projector = MLP(
            nn.Linear(width, hidden),
            BatchNorm(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, width),
            BatchNorm(width, affine=False),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, tiles: Tensor, counts: Sequence[int] = ()) -> Tensor:
        """Maps tiles (R, C, cells, cells) to embeddings (R, C); `counts` are tiles per level, empty for one level."""
        for conv in self.convs:
            tiles = conv(tiles, counts, relu=True)
        pooled = F.avg_pool2d(tiles, tiles.shape[2:]).flatten(1)  # unlike mean, its gradient is channels_last
        embeddings: Tensor = self.projector(pooled, counts)
        return embeddings


class GlobalHead(nn.Module):
    """Spatial mean of a map, then the projector."""

    def __init__(self, projector: "MLP") -> None:
        super().__init__()
        self.projector = projector

    def forward(self, maps: Tensor, counts: Sequence[int] = ()) -> Tensor:
        """Maps (n, C, h, w) to embeddings (n, width); `counts` as for :class:`BatchNorm`."""
        embeddings: Tensor = self.projector(F.avg_pool2d(maps, maps.shape[2:]).flatten(1), counts)
        return embeddings


class MLP(nn.Sequential):
    """Layers whose BatchNorms normalise groups of rows separately."""

    def forward(self, x: Tensor, counts: Sequence[int] = ()) -> Tensor:
        for layer in self:
            x = layer(x, counts) if isinstance(layer, BatchNorm) else layer(x)
        return x


def predictor(width: int, hidden: int) -> MLP:
    """MLP of the online network, which maps (R, width) to (R, width)."""
    mlp = MLP(nn.Linear(width, hidden), BatchNorm(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, width))
    for module in mlp:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
    return mlp
