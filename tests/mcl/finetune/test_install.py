"""Tests with and without MMDetection, and errors of ``make mmdet``."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mcl.config import DETECTORS
from tests.conftest import ROOT

WITHOUT = """
import sys
import pytest
sys.modules |= dict.fromkeys(("mmcv", "mmdet", "mmengine", "mmpretrain"))
sys.exit(pytest.main(["--collect-only", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("folder", ["tests/mcl/finetune", pytest.param("tests", marks=pytest.mark.soak)])
def test_without_mmdetection_all_other_tests_are_collected(folder: str) -> None:
    command = [sys.executable, "-c", WITHOUT, folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "needs MMDetection: make mmdet" in done.stdout


@pytest.mark.skipif(not Path(sys.prefix, ".mmdet").exists(), reason="needs MMDetection: make mmdet")
@pytest.mark.parametrize("name", ["mmdet.apis", "mmpretrain"])
def test_what_make_mmdet_has_installed_can_be_imported(name: str) -> None:
    """Otherwise tests that need it would be skipped where they must run."""
    assert importlib.import_module(name)


def install(python: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = ["bash", str(DETECTORS.parent / "install" / "install.sh"), python]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


def test_gpus_that_are_elsewhere_must_be_named(tmp_path: Path) -> None:
    hidden = {
        "CUDA_VISIBLE_DEVICES": "",
        "FORCE_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": "",
        "XDG_CACHE_HOME": str(tmp_path),
    }
    done = install(sys.executable, **hidden)
    assert done.returncode == 1
    assert "FORCE_CUDA=1, but there is no GPU" in done.stderr
    assert "TORCH_CUDA_ARCH_LIST='8.0;9.0'" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_python_without_torch(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    done = install(str(python), PYTHONPATH="")
    assert done.returncode == 1
    assert f"{python} has no torch; install mcl first" in done.stderr


@pytest.mark.soak
@pytest.mark.skipif(not Path(sys.prefix, ".mmdet").exists(), reason="needs MMDetection: make mmdet")
def test_beside_transformers_that_mmpretrain_cannot_import(tmp_path: Path) -> None:
    (tmp_path / "transformers.py").write_text("raise TypeError('of version 5')")
    info = tmp_path / "transformers-5.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.0.0\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    check = [sys.executable, "-W", "ignore", str(DETECTORS.parent / "install" / "check.py")]
    done = subprocess.run(check, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "MMDetection works" in done.stdout
