"""The loader of ``mcl``: makes montages from images with NVIDIA DALI or torchvision, as an augmentation plan says."""

from pathlib import Path

BUILD = (
    "pip install --no-build-isolation -e ."
    if (Path(__file__).parents[1] / "setup.py").exists()
    else "pip install --force-reinstall --no-deps mcl_pretrain-*-manylinux_*_x86_64.whl"
)
"""Command that installs the compiled operators: in a checkout, or after the installation of a wheel."""

_BUILT_FOR = Path(__file__).with_name("libmcl_dali.txt")
DALI = _BUILT_FOR.read_text().strip() if _BUILT_FOR.exists() else "nvidia-dali-cuda130"
"""pip requirement of DALI: the exact version that mcl's plugin was built for, which setup.py records."""
