"""The loader of ``mcl``: images to montages, with NVIDIA DALI or with torchvision, from one augmentation plan."""
