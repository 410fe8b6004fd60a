"""Multi-Level Contrastive Learning (arXiv 2304.02010): pre-training of detection backbones at the speed of the hardware."""

__version__ = "0.1.0"
