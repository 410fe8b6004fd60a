"""Networks: backbone, FPN, region head, and their composition into an encoder."""

from mcl.models.encoder import Encoder

__all__ = ["Encoder"]
