"""``mcl doctor`` on machines where packages or devices are missing or broken; these and GPUs are simulated."""

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dali_pipelines import DALI, pipelines
from mcl import doctor
from mcl.doctor import Check

Machine = Callable[..., dict[str, Check]]
REQUIRED = ["torch", "torchvision", "numpy", "PIL", "pydantic", "yaml", "tqdm", "jinja2", "matplotlib"]
OPTIONAL = ["nvidia", "nvidia.dali", "apex", "amp_C", "mmengine", "mmcv", "mmdet", "tensorboard", "wandb"]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Runs checks on a machine without some modules, with modules whose import fails, and with replacements for
    others."""

    def examine(
        absent: tuple[str, ...] = (), broken: dict[str, Exception] | None = None, stands: dict[str, Any] | None = None
    ) -> dict[str, Check]:
        broken, stands = broken or {}, stands or {}
        find, load = importlib.util.find_spec, importlib.import_module

        def find_spec(name: str) -> ModuleSpec | None:
            if name in absent:
                return None
            if name.partition(".")[0] in absent:
                raise ModuleNotFoundError(name)
            return ModuleSpec(name, None) if name in broken or name in stands else find(name)

        def import_module(name: str, package: str | None = None) -> Any:
            if name in broken:
                raise broken[name]
            return stands[name] if name in stands else load(name, package)

        with monkeypatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", find_spec)
            patch.setattr(importlib, "import_module", import_module)
            found = doctor.checks()
        lines = doctor.report(found).splitlines()
        assert max(map(len, lines)) <= 100
        assert lines[-1] == "Ready to run." or lines[-1].startswith("Not ready to run: ")
        assert doctor.ok(found) == (lines[-1] == "Ready to run.")
        for check in found:
            assert check.detail
            assert check.why
            assert check.remedy or check.status != "missing"
        return {check.name: check for check in found}

    return examine


def torch_with_gpu(**cuda: Any) -> SimpleNamespace:
    import torch

    device = SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30, major=9, minor=0)
    calls = {
        **{"is_available": lambda: True, "device_count": lambda: 2, "get_device_properties": lambda _: device},
        "get_arch_list": lambda: ["sm_75", "sm_90a", "sm_120"],
    }
    return SimpleNamespace(
        __version__=torch.__version__,
        backends=torch.backends,
        version=SimpleNamespace(cuda="13.0"),
        cuda=SimpleNamespace(**(calls | cuda)),
    )


def test_this_machine_is_ready(machine: Machine) -> None:
    found = machine()
    assert doctor.ok(list(found.values()))
    assert list(found)[:5] == ["Python", "mcl", "packages", "torch", "torchvision"]
    assert "numpy" in found["packages"].detail
    assert "core" in found["CPU"].detail
    assert doctor.report().startswith("status   what")


@pytest.mark.parametrize("name", OPTIONAL)
def test_optional_modules_may_be_absent(name: str, machine: Machine) -> None:
    assert all(check.status != "missing" for check in machine(absent=(name,)).values())


@pytest.mark.parametrize("name", REQUIRED)
def test_required_modules_may_not(name: str, machine: Machine) -> None:
    bad = [check for check in machine(absent=(name,)).values() if check.status == "missing"]
    assert bad
    assert all(check.remedy.startswith("pip install") and not check.used for check in bad)


def test_nothing_installed_at_all(machine: Machine) -> None:
    found = machine(absent=(*REQUIRED, *OPTIONAL))
    assert found["torch"].detail == "not installed"
    assert found["JPEG decoder"].status == "missing"


@pytest.mark.parametrize("error", [ImportError("no\nway"), OSError("libtorch.so"), RuntimeError(""), KeyError("x")])
def test_everything_broken_at_import(error: Exception, machine: Machine) -> None:
    found = machine(broken=dict.fromkeys(REQUIRED + OPTIONAL[1:], error))
    assert found["torch"].detail.startswith(f"broken: {type(error).__name__}: ")
    assert found["mmcv"].status == "note"


def test_a_check_that_fails_is_a_line(machine: Machine) -> None:
    def fail() -> bool:
        raise RuntimeError("driver shut down")

    found = machine(stands={"torch": torch_with_gpu(is_available=fail)})
    assert found["CUDA"].detail == "cannot be examined: RuntimeError: driver shut down"


def test_dali_absent_and_broken(machine: Machine) -> None:
    absent = machine(absent=("nvidia",))
    assert (absent["DALI"].status, absent["DALI"].used) == ("note", False)
    assert "torchvision engine" in absent["DALI"].why
    assert "Pillow" in absent["JPEG decoder"].detail
    broken = machine(broken={"nvidia.dali": OSError("libdali.so: cannot open shared object file")})
    assert (broken["DALI"].status, broken["DALI"].used) == ("missing", False)
    assert "libdali.so" in broken["DALI"].detail
    assert broken["DALI"].remedy == f"pip install --force-reinstall {DALI}"


@pytest.mark.parametrize(
    ("cores", "gpu", "loader", "decoder"),
    [
        (15, True, "fused engine on GPU; 7 loader threads per GPU, fewer than 8", "nvJPEG"),
        (16, True, "fused engine on CPU; 8 loader threads per GPU, at least 8", "libjpeg-turbo"),
        (16, False, "fused engine on CPU; the fastest engine", "libjpeg-turbo"),
    ],
)
def test_loader_and_decoder_follow_cores_and_device(
    cores: int, gpu: bool, loader: str, decoder: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(pipelines, "load_plugin", lambda: {"cpu", "gpu"})
    found = machine(stands={"torch": torch_with_gpu(is_available=lambda: gpu)})
    assert f"{found['loader'].detail}; {found['loader'].why}".startswith(loader)
    assert found["loader"].status == "ok"
    assert found["JPEG decoder"].detail == f"{decoder}, in DALI"
    assert loader.split()[3].strip(";") in found["DALI"].why


def test_cuda_devices_and_their_absence(machine: Machine, nvidia_smi: Callable[[str], None]) -> None:
    nvidia_smi("echo 580.95")
    found = machine(stands={"torch": torch_with_gpu()})
    assert found["CUDA 1"] == Check(
        "CUDA 1", "ok", "NVIDIA H100, 80 GiB, driver 580.95", True, "torch is built for CUDA 13.0"
    )
    old = SimpleNamespace(name="Tesla V100", total_memory=16 * 2**30, major=7, minor=0)
    too_old = machine(stands={"torch": torch_with_gpu(get_device_properties=lambda _: old)})["CUDA 0"]
    assert (too_old.status, too_old.used) == ("missing", False)
    assert too_old.why == "torch is built for CUDA 13.0, compute capability 7.5 or later; this GPU has 7.0"
    without = torch_with_gpu(is_available=lambda: False)
    assert machine(stands={"torch": without})["CUDA"].remedy == "nvidia-smi"
    without.version.cuda = None
    assert "built for CPUs" in machine(stands={"torch": without})["CUDA"].why
    for answer in ("exit 9", "true", ""):
        nvidia_smi(answer)
        assert machine(stands={"torch": without})["CUDA"].detail == "no device"


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Replaces nvidia-smi by a shell command; an empty one removes it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    tool = tmp_path / "nvidia-smi"

    def answer(command: str) -> None:
        tool.write_text(f"#!/bin/sh\n{command}\n")
        tool.chmod(0o755)
        if not command:
            tool.unlink()

    return answer


@pytest.mark.parametrize(
    ("torch", "wanted", "why"),
    [
        ("2.14.1+cu130", "(==2.11.0)", "it needs torch==2.11.0"),
        ("2.11.0+cu130", "(==2.11.0)", ""),
        ("2.15.0+cu132", "(>=2.14.0)", ""),  # later versions support several versions of torch
        ("2.9.0", "(==2.9.0)", ""),
    ],
)
def test_versions_that_do_not_go_together(
    torch: str, wanted: str, why: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["numpy", f"torch {wanted}"])
    found = machine(stands={"torch": fake_torch(torch)})
    assert found["torchvision"].status == ("missing" if why else "ok")
    assert not why or found["torchvision"].why == why
    assert found["torch"].status == ("missing" if torch == "2.9.0" else "ok")


def fake_torch(version: str) -> SimpleNamespace:
    fake = torch_with_gpu()
    fake.__version__ = version
    return fake


@pytest.mark.parametrize(("flags", "status"), [({"avx2"}, "note"), ({"avx2", "amx_bf16"}, "ok")])
def test_slow_bf16_is_logged(flags: set[str], status: str, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "processor", lambda: ("A CPU", flags))
    check = machine(stands={"torch": torch_with_gpu(is_available=lambda: False)})["CPU"]
    assert check.status == status
    assert ("trainer.precision=fp32" in check.remedy) == (status == "note")


def test_apex_of_pypi_is_distinguished_from_nvidias(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "apex"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('pyramid is missing')")
    assert "apex" not in sys.modules
    other = machine()["apex"]
    assert "apex.multi_tensor_apply" in other.why
    assert (other.remedy, other.used) == ("pip uninstall apex", False)
    (package / "multi_tensor_apply").mkdir()
    assert machine()["apex"].detail == "NVIDIA apex without its CUDA kernels (amp_C)"
    on_cpu = machine(stands={"amp_C": None})["apex"]
    assert "with its" in on_cpu.detail
    assert (on_cpu.used, "CUDA devices only" in on_cpu.why) == (False, True)
    on_gpu = machine(stands={"amp_C": None, "torch": torch_with_gpu()})["apex"]
    assert (on_gpu.status, on_gpu.used) == ("ok", True)


def test_the_extension_and_who_does_what(machine: Machine) -> None:
    found = machine()
    assert (found["C++ extension"].status, found["C++ extension"].used) == ("ok", True)
    assert "CPU" in found["C++ extension"].detail
    pytorch = {"region_pool": ("PyTorch", "the extension is not installed")}
    missing = dict.fromkeys(("cpu", "cuda"), "the extension is not installed; pip install ...")
    without = SimpleNamespace(missing=missing, backends=lambda device: pytorch)
    found = machine(stands={"mcl.ops": without})
    assert (found["C++ extension"].status, found["C++ extension"].used) == ("note", False)
    assert "pip install" in found["C++ extension"].why
    assert (found["operators"].detail, found["operators"].why) == (
        "PyTorch on CPU: region_pool",
        pytorch["region_pool"][1],
    )
    broken = machine(broken={"mcl.ops": ImportError("no torch")})["C++ extension"]
    assert (broken.status, broken.detail) == ("missing", "broken: ImportError: no torch")


@pytest.mark.parametrize(
    ("built_for", "capability", "status", "remedy"),
    [
        ("7.5;8.0;9.0;10.0;12.0+PTX", (7, 5), "ok", ""),
        ("7.5;8.0;9.0;10.0;12.0+PTX", (8, 9), "ok", ""),  # runs the code for 8.0
        ("7.5;8.0;9.0;10.0;12.0+PTX", (13, 0), "ok", ""),  # compiles the PTX
        ("9.0", (10, 0), "missing", "TORCH_CUDA_ARCH_LIST=10.0"),
        ("8.6 9.0+PTX", (8, 0), "missing", "TORCH_CUDA_ARCH_LIST=8.0"),
        (None, (8, 0), "note", ""),
    ],
)
def test_the_extension_is_compared_with_the_gpus(
    built_for: str | None, capability: tuple[int, int], status: str, remedy: str, machine: Machine, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(doctor, "BUILT_FOR", tmp_path / "architectures.txt")
    doctor.BUILT_FOR.write_text(f"{built_for or ''}\n")
    gpu = SimpleNamespace(name="A GPU", total_memory=1, major=capability[0], minor=capability[1])
    ops = SimpleNamespace(missing={"cpu": "", "cuda": "" if built_for else "no CUDA"}, backends=lambda _: {})
    torch = torch_with_gpu(get_device_properties=lambda _: gpu)
    check = machine(stands={"torch": torch, "mcl.ops": ops})["C++ extension"]
    assert check.status == status
    assert check.remedy == (f"{remedy} pip install --no-build-isolation -e ." if remedy else "")
    assert (built_for or "no CUDA") in check.detail + check.why


def test_the_engine_that_loads_images_and_why_not_a_faster_one(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = machine()["loader"]
    assert (fused.status, fused.detail, fused.why, fused.remedy) == (
        "ok",
        "fused engine on CPU",
        "the fastest engine",
        "",
    )
    monkeypatch.setattr(pipelines, "PLUGIN", tmp_path / "libmcl_dali.so")
    stock = machine()["loader"]
    assert (stock.status, stock.detail) == ("note", "stock engine on CPU")
    assert "plugin is not installed; pip install --no-build-isolation -e . installs it" in stock.why
    slow = machine(absent=("nvidia",))["loader"]
    assert (slow.status, slow.detail) == ("note", "torchvision engine on CPU")
    assert "DALI is not installed" in slow.why
