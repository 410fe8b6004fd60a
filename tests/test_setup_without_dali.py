"""What setup.py builds if DALI is not installed."""

import os
import subprocess
import sys

from tests.conftest import ROOT

CODE = """
import runpy, setuptools, sys
sys.modules["nvidia.dali"] = None
setuptools.setup = lambda **arguments: print(*(extension.name for extension in arguments["ext_modules"]))
sys.argv = ["setup.py", "build_ext"]
runpy.run_path("setup.py", run_name="__main__")
"""


def test_dali_is_not_needed_without_its_plugin() -> None:
    environment = {**os.environ, "MCL_BUILD_PLUGIN": "0", "MCL_BUILD_CUDA": "0"}
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.returncode) == (["mcl._C"], 0), done.stderr
