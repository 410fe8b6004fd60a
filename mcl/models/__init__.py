"""Networks: backbone, FPN, region head, and their composition into encoders."""

from mcl.models.encoder import Encoder, GlobalEncoder

__all__ = ["Encoder", "GlobalEncoder"]
