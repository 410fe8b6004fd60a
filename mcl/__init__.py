"""Multi-Level Contrastive Learning (arXiv 2304.02010): fast pre-training of detection backbones."""

__version__ = "0.1.0"
