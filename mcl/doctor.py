"""What is installed, what is used and why: ``mcl doctor``.

Imports nothing heavy itself, and survives whatever is absent or broken.
"""

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mcl

_PACKAGE = Path(__file__).parent
_WIDTH = 100
_ABSENT = "not installed"
_MARKS = {"ok": "ok", "note": "-", "missing": "MISSING"}
_DALI = "pip install nvidia-dali-cuda130"
_BUILD = "pip install --no-build-isolation -e ."
_PYTHON = (3, 11)
_TORCH = (2, 10)


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: Literal["ok", "missing", "note"]
    """ok: works. missing: needed, and absent or broken. note: absent or limited, and mcl runs without it."""
    detail: str
    """What was found."""
    used: bool
    """Whether a run with default settings uses it."""
    why: str
    """Why it is used or not."""
    remedy: str = ""
    """Command that changes it; empty where nothing has to be done."""


def checks() -> list[Check]:
    """Looks at everything that decides how mcl runs on this machine. Never raises."""
    probes: dict[str, Callable[[], list[Check]]] = {
        "Python": _python,
        "packages": _packages,
        "PyTorch": _pytorch,
        "CUDA": _cuda,
        "CPU": _cpu,
        "DALI": _dali,
        "extensions": _extensions,
        "loader": _loader,
        "apex": _apex,
        "MMDetection": _mmdetection,
        "logging": _logging,
    }
    found = []
    for name, probe in probes.items():
        try:
            found += probe()
        except Exception as error:  # a diagnosis that dies of the illness helps nobody
            found.append(Check(name, "note", f"cannot be examined: {_reason(error)}", False, "see the message"))
    return found


def ok(found: list[Check]) -> bool:
    """Whether nothing that mcl needs is absent or broken; what the exit status tells."""
    return all(check.status != "missing" for check in found)


def report(found: list[Check] | None = None) -> str:
    """The checks as a table of at most 100 columns, remedies below; `found` defaults to :func:`checks`."""
    found = checks() if found is None else found
    left = max(len(check.name) for check in found) + 2
    indent = 9 + left + 6
    lines = [f"{'status':9}{'what':{left}}{'used':6}found"]
    for check in found:
        head = f"{_MARKS[check.status]:9}{check.name:{left}}{'yes' if check.used else 'no':6}"
        text = f"{check.detail}; {check.why}"
        lines += textwrap.wrap(head + text, _WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False)
        if check.remedy:
            lines.append(" " * indent + f"$ {check.remedy}")
    bad = [check.name for check in found if check.status == "missing"]
    lines += ["", f"Not ready to run: {', '.join(bad)}." if bad else "Ready to run."]
    return "\n".join(lines)


def _python() -> list[Check]:
    right = sys.version_info >= _PYTHON
    need = ".".join(map(str, _PYTHON))
    return [
        Check("Python", "ok" if right else "missing", platform.python_version(), True, f"{need} or newer is needed"),
        Check("mcl", "ok", mcl.__version__, True, f"imported from {_PACKAGE}"),
    ]


def _packages() -> list[Check]:
    modules = {"numpy": "numpy", "pillow": "PIL", "pydantic": "pydantic", "pyyaml": "yaml", "tqdm": "tqdm"}
    states = {name: _probe(module) for name, module in modules.items()}
    bad = [name for name, (module, _) in states.items() if module is None]
    detail = ", ".join(
        f"{name} {_version(name, module) if module is not None else reason}"
        for name, (module, reason) in states.items()
    )
    remedy = f"pip install --force-reinstall {' '.join(bad)}" if bad else ""
    return [Check("packages", "missing" if bad else "ok", detail, not bad, "mcl is built on them", remedy)]


def _pytorch() -> list[Check]:
    torch, torch_reason = _probe("torch")
    vision, vision_reason = _probe("torchvision")
    need = ".".join(map(str, _TORCH))
    both = f'pip install --upgrade "torch>={need}" torchvision'
    if torch is None:
        first = Check("torch", "missing", torch_reason, False, "everything needs it", both)
    elif _release(torch) < _TORCH:
        first = Check("torch", "missing", torch.__version__, False, f"{need} or newer is needed", both)
    else:
        first = Check("torch", "ok", torch.__version__, True, "networks, losses, optimisers")
    if vision is None:
        # A torchvision made for another torch fails at its import.
        remedy = both.replace("--upgrade", "--force-reinstall")
        return [first, Check("torchvision", "missing", vision_reason, False, "the backbones come from it", remedy)]
    if torch is None:
        return [first, Check("torchvision", "missing", vision.__version__, False, "it needs torch", both)]
    pair = f"0.{_release(torch)[1] + 15}"  # torch 2.n goes with torchvision 0.(n + 15)
    if _release(torch)[0] == 2 and not vision.__version__.startswith(f"{pair}."):
        why = f"torch {torch.__version__} goes with torchvision {pair}"
        remedy = f'pip install "torchvision=={pair}.*"'
        return [first, Check("torchvision", "missing", vision.__version__, False, why, remedy)]
    return [
        first,
        Check("torchvision", "ok", vision.__version__, True, f"backbones; goes with torch {torch.__version__}"),
    ]


def _capability(architecture: str) -> int:
    """75 for sm_75, 90 for sm_90a."""
    return int("".join(filter(str.isdigit, architecture)))


def _cuda() -> list[Check]:
    torch, _ = _probe("torch")
    if torch is None:
        return [Check("CUDA", "note", "unknown", False, "torch cannot tell")]
    driver = _driver()
    if torch.cuda.is_available():
        found = []
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            detail = f"{device.name}, {device.total_memory / 2**30:.0f} GiB, driver {driver or 'unknown'}"
            name, built = f"CUDA {index}", f"torch is built for CUDA {torch.version.cuda}"
            own, least = 10 * device.major + device.minor, min(map(_capability, torch.cuda.get_arch_list()))
            if own < least:
                why = f"{built}, compute capability {least / 10} or later; this GPU has {own / 10}"
                found.append(Check(name, "missing", detail, False, why, "use another GPU, or trainer.device=cpu"))
            else:
                found.append(Check(name, "ok", detail, True, built))
        return found
    if driver and torch.version.cuda is None:
        why = "this torch is built for CPUs; the networks run on the CPU"
        remedy = "pip install --force-reinstall torch torchvision"
        return [Check("CUDA", "note", f"driver {driver}", False, why, remedy)]
    if driver:
        why = f"torch, built for CUDA {torch.version.cuda}, finds no device it can use; the networks run on the CPU"
        return [Check("CUDA", "note", f"driver {driver}", False, why, "nvidia-smi")]
    return [Check("CUDA", "note", "no device", False, "the networks run on the CPU")]


def _cpu() -> list[Check]:
    torch, _ = _probe("torch")
    model, flags = _processor()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    capability = torch.backends.cpu.get_cpu_capability() if torch is not None else "capability unknown"
    detail = f"{model}, {cores} core{'s' if cores != 1 else ''}, {capability}"
    if torch is not None and torch.cuda.is_available():
        return [Check("CPU", "ok", detail, True, "prepares what the GPU does not")]
    if flags & {"avx512_bf16", "amx_bf16", "bf16"}:
        return [Check("CPU", "ok", detail, True, "networks and loader; it has bf16 instructions")]
    why = "networks and loader; without bf16 instructions trainer.precision=bf16 is slower than fp32"
    return [Check("CPU", "note", detail, True, why, "mcl pretrain CONFIG trainer.precision=fp32 ...")]


def _dali() -> list[Check]:
    """DALI, and who decodes JPEG files."""
    dali, reason = _probe("nvidia.dali")
    if dali is not None:
        torch, _ = _probe("torch")
        if torch is not None and torch.cuda.is_available():
            why = "decodes and augments on the GPU"
            jpeg = Check(
                "JPEG decoder", "ok", "nvJPEG, in DALI", True, "on the GPU, and its decoding engine if it has one"
            )
        else:
            why = "decodes and augments on the CPU, as there is no CUDA device"
            jpeg = Check("JPEG decoder", "ok", "libjpeg-turbo, in DALI", True, "nvJPEG needs a CUDA device")
        return [Check("DALI", "ok", dali.__version__, True, why), jpeg]
    pillow, _ = _probe("PIL.features")
    turbo = pillow is not None and pillow.check_feature("libjpeg_turbo")
    library = f"libjpeg{'-turbo' if turbo else ''}, in Pillow"
    jpeg = Check("JPEG decoder", "ok", library, True, "DALI is not used")
    if pillow is None:
        jpeg = Check("JPEG decoder", "missing", "none", False, "neither DALI nor Pillow is there", "pip install pillow")
    if reason == _ABSENT:
        why = "the torchvision engine is used, at a fraction of the speed"
        return [Check("DALI", "note", reason, False, why, _DALI), jpeg]
    why = "installed but unusable; mend it, or remove it and the slower torchvision engine is used"
    return [Check("DALI", "missing", reason, False, why, _DALI.replace("install", "install --force-reinstall")), jpeg]


def _extensions() -> list[Check]:
    """The compiled operators, and who does what in a step."""
    ops, reason = _probe("mcl.ops")
    if ops is None:
        return [Check("C++ extension", "missing", reason, False, "the operators cannot be imported", _BUILD)]
    device = _device()
    if ops.missing:
        found = [Check("C++ extension", "note", "not built", False, ops.missing, _BUILD)]
    else:
        built = " and ".join(d.upper() for d in ("cpu", "cuda") if ops.compiled("region_pool", d))
        found = [
            Check("C++ extension", "ok", f"built for {built}", True, "region pooling, layers on CPUs, optimiser steps")
        ]
    tasks: dict[tuple[str, str], list[str]] = {}
    for task, backend in ops.backends(device).items():
        tasks.setdefault(backend, []).append(task)
    for (library, why), names in tasks.items():
        detail = f"{library} on {device.upper()}: {', '.join(names)}"
        found.append(Check("operators", "note" if library == "PyTorch" else "ok", detail, True, why))
    return found


def _loader() -> list[Check]:
    """Which engine loads images, and why not a faster one."""
    loader, reason = _probe("dali_pipelines.loader")
    if loader is None:
        return [Check("loader", "missing", reason, False, "the loader cannot be imported", _BUILD)]
    engine, device, why = loader.choose_engine(loader.DataConfig(), _device() == "cuda")
    fastest = engine == "fused" and device == _device().replace("cuda", "gpu")
    why = "the fastest there is" if fastest else why
    status: Literal["ok", "note"] = "ok" if fastest else "note"
    return [Check("loader", status, f"{engine} engine on {device.upper()}", True, why, "" if fastest else _BUILD)]


def _device() -> str:
    torch, _ = _probe("torch")
    return "cuda" if torch is not None and torch.cuda.is_available() else "cpu"


def _apex() -> list[Check]:
    """Not imported by its bare name: PyPI's project of the name has requirements of its own and fails without them."""
    spec = _find("apex")
    without = "the extension or PyTorch does its work"
    if spec is None:
        return [Check("apex", "note", _ABSENT, False, without)]
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "multi_tensor_apply").is_dir() for folder in folders):
        why = f"it has no apex.multi_tensor_apply; {without}"
        return [Check("apex", "note", "another project of this name, from PyPI", False, why, "pip uninstall apex")]
    if _find("amp_C") is None:
        return [Check("apex", "note", "NVIDIA apex without its CUDA kernels (amp_C)", False, without)]
    detail = "NVIDIA apex with its CUDA kernels (amp_C)"
    if _device() == "cpu":
        return [Check("apex", "note", detail, False, f"it serves CUDA devices only; {without}")]
    return [Check("apex", "ok", detail, True, "see operators")]


def _mmdetection() -> list[Check]:
    found = []
    for name in ("mmengine", "mmcv", "mmdet"):
        module, reason = _probe(name)
        detail = _version(name, module) if module is not None else reason
        remedy = "" if module is not None else "make mmdet"
        found.append(Check(name, "note", detail, False, "only mcl finetune needs it", remedy))
    return found


def _logging() -> list[Check]:
    found = []
    for name, why in (
        ("tensorboard", "log.tensorboard is on by default"),
        ("matplotlib", "draws previews and reports"),
    ):
        module, reason = _probe(name)
        if module is not None:
            found.append(Check(name, "ok", _version(name, module), True, why))
        else:
            found.append(Check(name, "missing", reason, False, why, f"pip install --force-reinstall {name}"))
    module, reason = _probe("wandb")
    if module is not None:
        found.append(Check("wandb", "ok", _version("wandb", module), False, "used once log.wandb names a project"))
    else:
        found.append(Check("wandb", "note", reason, False, "only log.wandb needs it", "pip install wandb"))
    return found


def _probe(name: str) -> tuple[Any, str]:
    """The module; or None and the reason, which is ``_ABSENT`` or what its import raised."""
    if _find(name) is None:
        return None, _ABSENT
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name), ""
    except Exception as error:  # a broken installation raises ImportError, OSError, RuntimeError, ...
        return None, f"broken: {_reason(error)}"


def _find(name: str) -> importlib.machinery.ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):  # no parent package, or a module without a spec
        return None


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return textwrap.shorten(f"{type(error).__name__}: {lines[0] if lines else 'no message'}", 200)


def _version(distribution: str, module: Any) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(module, "__version__", "of unknown version"))


def _release(torch: Any) -> tuple[int, int]:
    """(major, minor)."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def _processor() -> tuple[str, set[str]]:
    """Name and feature flags of the CPU."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), set()
    entries = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {key.strip().lower(): value.strip() for key, value in entries.items()}
    model = fields.get("model name") or platform.processor() or platform.machine()
    return model, set(fields.get("flags", fields.get("features", "")).split())


def _driver() -> str:
    """Version of the NVIDIA driver; empty if there is none."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return next(iter(answer.stdout.split()), "")
