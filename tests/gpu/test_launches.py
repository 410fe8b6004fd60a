"""Kernels that are tested by emulation, launched under compute-sanitizer."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT
from tests.gpu import launches


def test_kernels_are_launched(built: None, device: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    launches.launch(device)
    assert capsys.readouterr().out == "launched\n"


@pytest.mark.gpu
@pytest.mark.soak
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(built: None, tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer, which comes with CUDA toolkits, is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "tests.gpu.launches", "cuda"]
    # Every tensor has its own allocation, so that accesses beyond it are out of bounds.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer does not support this device")
    assert (done.returncode, "launched" in done.stdout) == (0, True), done.stdout + done.stderr
