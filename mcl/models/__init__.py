"""Networks: backbone, FPN, region head, and their composition into MCL."""

from mcl.models.mcl import MCL, Encoder, Output

__all__ = ["MCL", "Encoder", "Output"]
