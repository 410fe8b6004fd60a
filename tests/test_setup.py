"""The CUDA compiler that setup.py selects on different machines, without compiling; toolkits and drivers are
simulated."""

import importlib.util
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

from tests.conftest import ROOT

Setup = Callable[..., dict[str, Any]]
REMEDY = 'no compiler for CUDA 13.0; pip install "cuda-toolkit[cccl,nvcc]==13.0.*"'


def toolkit(home: Path, version: str) -> Path:
    """A toolkit with a compiler that prints its version, and a runtime."""
    nvcc = home / "bin/nvcc"
    nvcc.parent.mkdir(parents=True, exist_ok=True)
    known = "compute_75 compute_80 compute_86 compute_90"
    nvcc.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "release {version}, V{version}.88" || echo {known}')
    nvcc.chmod(0o755)
    (home / "lib").mkdir(exist_ok=True)
    for library in ("libcudart.so.13", "libcudart_static.a"):
        (home / "lib" / library).touch()
    return home


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    """Runs setup.py; `installed` is the version of the CUDA toolkit, `wheel` whether PyPI's compiler is installed."""

    def run(installed: str = "", wheel: bool = True, driver: bool = False, wish: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        monkeypatch.setattr(setuptools, "setup", lambda **given: found.update(given))
        home = toolkit(tmp_path / "cuda", installed) if installed else None
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", home and str(home))
        if wheel:
            toolkit(tmp_path / "site-packages/nvidia/cu13", "13.0")
        monkeypatch.setattr(torch, "__file__", str(tmp_path / "site-packages/torch/__init__.py"))
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(
            shutil, "which", lambda name: None if name == "nvidia-smi" and not driver else f"/bin/{name}"
        )
        exists = Path.exists
        monkeypatch.setattr(Path, "exists", lambda path: "/proc/driver" not in str(path) and exists(path))
        for name in ("TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):  # set by setup.py
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        monkeypatch.setenv("MCL_BUILD_CUDA", wish)
        monkeypatch.setattr("sys.argv", ["setup.py", "build_ext"])
        monkeypatch.chdir(ROOT)
        return found | runpy.run_path("setup.py")

    return run


@pytest.mark.parametrize(
    ("given", "compiler", "said"),
    [
        ({"installed": "13.2"}, "cuda", ""),
        ({"installed": "12.4"}, "site-packages/nvidia/cu13", "cuda is CUDA 12.4, which torch, built for CUDA 13.0, "),
        ({"installed": "12.4", "wheel": False}, None, f"built for CPUs only: {REMEDY}"),
        ({"driver": True}, "site-packages/nvidia/cu13", "compiling with "),
        ({"driver": True, "wheel": False}, None, f"built for CPUs only: {REMEDY}"),
        ({"wish": "1"}, "site-packages/nvidia/cu13", "compiling with "),
        ({}, None, "no NVIDIA driver and no CUDA toolkit; MCL_BUILD_CUDA=1 compiles for GPUs elsewhere"),
        ({"installed": "13.0", "driver": True, "wish": "0"}, None, ""),
    ],
    ids=str,
)  # fmt: skip
def test_the_compiler_that_is_taken(
    given: dict[str, Any], compiler: str | None, said: str, machine: Setup, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    extensions = {extension.name: extension for extension in machine(**given)["ext_modules"]}
    cuda = {name for name, e in extensions.items() if any(source.endswith(".cu") for source in e.sources)}
    on_gpu = {"mcl._C_cuda13", "dali_pipelines.libmcl_dali"} if compiler else set()
    assert (cuda, set(extensions)) == (on_gpu, {"mcl._C", "dali_pipelines.libmcl_dali"} | on_gpu)
    if compiler:
        assert str(tmp_path / compiler) == cpp_extension.CUDA_HOME
        assert os.environ["TORCH_CUDA_ARCH_LIST"] == "7.5;8.0;9.0+PTX"  # this compiler supports no later ones
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"), [({"wheel": False}, REMEDY), ({"wheel": False, "installed": "12.4"}, REMEDY)], ids=str
)
def test_cuda_that_is_asked_for_and_cannot_be_had(given: dict[str, Any], said: str, machine: Setup) -> None:
    with pytest.raises(SystemExit) as stopped:
        machine(**given, wish="1")
    assert stopped.value.code == f"MCL_BUILD_CUDA=1: {said}, or set CUDA_HOME to such a toolkit, or MCL_BUILD_CUDA=0"


def test_without_torch_nothing_is_compiled(machine: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in pip's isolated builds, which make the pure wheel."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else find(name, *rest))
    assert "ext_modules" not in machine()
    monkeypatch.setenv("MCL_BUILD_EXTENSION", "1")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match=r"mcl needs torch before its operators are compiled"):
        machine()


def test_one_list_of_architectures(machine: Setup) -> None:
    """The architectures of setup.py are those in the documents, and the pinned PyTorch supports them."""
    architectures = machine()["ARCHITECTURES"]
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"compute capability {architectures[0]} (Turing) or later" in readme
    assert f"`{';'.join(architectures)}`" in (ROOT / "kernels/README.md").read_text()
    pytorch = torch._C._cuda_getArchFlags()
    assert pytorch is None or {f"sm_{a.replace('.', '')}" for a in architectures} <= set(pytorch.split())
