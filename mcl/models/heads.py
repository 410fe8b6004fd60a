"""Region head, projector and predictor."""

from torch import Tensor, nn

from mcl.models.fpn import ConvNorm


class RegionHead(nn.Module):
    """Convolutions with zero padding at the tile's borders, average pool, projector; shared by all levels.

    Args:
        width: channels of the maps and of the embedding.
        convs: number of 3x3 convolutions.
        hidden: hidden units of the projector.
    """

    def __init__(self, width: int, convs: int, hidden: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(ConvNorm(width, width, 3) for _ in range(convs))
        self.projector = nn.Sequential(
            nn.Linear(width, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, width),
            nn.BatchNorm1d(width, affine=False),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, tiles: Tensor) -> Tensor:
        """(R, C, cells, cells) to embeddings (R, C)."""
        for conv in self.convs:
            tiles = conv(tiles).relu()
        embeddings: Tensor = self.projector(tiles.mean((2, 3)))
        return embeddings


def predictor(width: int, hidden: int) -> nn.Sequential:
    """MLP of the online side, (R, width) to (R, width)."""
    mlp = nn.Sequential(
        nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, width)
    )
    for module in mlp:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
    return mlp
