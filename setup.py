"""Build script: stops with the remedy where a half-working package would come out."""

import importlib.util
import sys

from setuptools import setup

FIRST = "pip install -r requirements/torch.txt"

missing = [name for name in ("torch", "torchvision") if importlib.util.find_spec(name) is None]
if missing and not {"egg_info", "sdist"} & set(sys.argv):
    sys.exit(
        f"mcl needs {' and '.join(missing)} before it is installed, so that pip does not choose another build. Run:\n"
        f"    {FIRST}\n    pip install --no-build-isolation -e ."
    )

setup()
