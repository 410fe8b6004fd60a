"""Build script: stops with the remedy where a half-working package would come out."""

import importlib
import sys

from setuptools import setup

FIRST = "pip install -r requirements/torch.txt"

missing = []
for name in ("torch", "torchvision", "nvidia.dali"):
    try:
        importlib.import_module(name)
    except (ImportError, OSError):
        missing.append(name)
if missing and not {"egg_info", "sdist"} & set(sys.argv):
    sys.exit(
        f"mcl needs {' and '.join(missing)} before it is installed, so that pip chooses no other build. Run:\n"
        f"    {FIRST}\n    pip install --no-build-isolation -e ."
    )

setup()
