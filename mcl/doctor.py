"""What is installed, what is used and why: ``mcl doctor``.

Imports libraries only to examine them, and handles any that is absent or broken.
"""

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import mcl
from dali_pipelines import BUILD, DALI

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

_WIDTH = 100
_ABSENT = "not installed"
_MARKS = {"ok": "ok", "note": "-", "missing": "MISSING"}
_LEGEND = "used: with default settings. -: limited or absent, but not required. $: a command that changes it."
BUILT_FOR = Path(mcl.__file__).parent / "_C.architectures.txt"
"""Compute capabilities that setup.py compiled the extension for, such as "7.5;8.0+PTX"; empty for CPUs only."""
_PYTHON = (3, 11)
_TORCH = (2, 10)
_BUSY = 0.5
"""Load per core from which a machine is busy."""

Status = Literal["ok", "missing", "note"]


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: Status
    """ok: works. missing: required, but absent or broken. note: absent or limited, and not required."""
    detail: str
    """What was found."""
    used: bool
    """Whether a run with default settings uses it."""
    why: str
    """Why it is used or not."""
    remedy: str = ""
    """Command that changes it; empty if nothing has to be done."""


def checks() -> list[Check]:
    """Examines everything that affects how mcl runs on this machine. Never raises."""
    probes: dict[str, Callable[[], Iterator[Check]]] = {
        "Python": _python,
        "packages": _packages,
        "PyTorch": _pytorch,
        "CUDA": _cuda,
        "CPU": _cpu,
        "DALI": _dali,
        "extensions": _extensions,
        "loader": _loader,
        "apex": _apex,
        "others": _others,
    }
    found = list[Check]()
    for name, probe in probes.items():
        try:
            found += probe()
        except Exception as error:  # the other checks must still run
            found.append(Check(name, "note", f"cannot be examined: {_reason(error)}", False, "see the message"))
    return found


def ok(found: list[Check]) -> bool:
    """Whether nothing that mcl requires is absent or broken; decides the exit code."""
    return all(check.status != "missing" for check in found)


def report(found: list[Check] | None = None) -> str:
    """The checks as a table of at most 100 columns, with remedies; `found` defaults to :func:`checks`."""
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
    lines += ["", _LEGEND, f"Not ready to run: {', '.join(bad)}." if bad else "Ready to run."]
    return "\n".join(lines)


def _needed(name: str, detail: str, why: str, problem: str = "", remedy: str = "") -> Check:
    """A check of something that mcl requires; `problem` says why it does not work, or is empty."""
    if problem:
        return Check(name, "missing", detail, False, problem, remedy)
    return Check(name, "ok", detail, True, why)


def _python() -> Iterator[Check]:
    status: Status = "ok" if sys.version_info >= _PYTHON else "missing"
    yield Check("Python", status, platform.python_version(), True, f"{_dotted(_PYTHON)} or newer is needed")
    yield Check("mcl", "ok", mcl.__version__, True, f"imported from {Path(mcl.__file__).parent}")


def _packages() -> Iterator[Check]:
    modules = {"numpy": "numpy", "pillow": "PIL", "pydantic": "pydantic", "pyyaml": "yaml", "tqdm": "tqdm"}
    found = {name: _probe(module) for name, module in modules.items()}
    bad = [name for name, (module, _) in found.items() if module is None]
    detail = ", ".join(f"{name} {reason or _version(module)}" for name, (module, reason) in found.items())
    why = "mcl needs them"
    yield _needed("packages", detail, why, why if bad else "", f"pip install --force-reinstall {' '.join(bad)}")


def _pytorch() -> Iterator[Check]:
    need = _dotted(_TORCH)
    remedy = f'pip install --upgrade "torch>={need}" torchvision'
    torch, reason = _probe("torch")
    release = torch.__version__ if torch is not None else "0.0"
    major, minor = map(int, release.split(".")[:2])
    problem = "" if (major, minor) >= _TORCH else f"{need} or newer is needed" if torch else "everything needs it"
    yield _needed("torch", reason or release, "networks, losses, optimisers", problem, remedy)
    vision, reason = _probe("torchvision")
    wanted, problem = _wanted("torchvision", "torch"), ""
    if vision is None:  # as one that was made for another torch, whose import fails
        problem, remedy = "the backbones come from it", remedy.replace("--upgrade", "--force-reinstall")
    elif torch is None:
        problem = "it needs torch"
    elif not wanted.contains(release, prereleases=True):
        problem = f"it needs torch{wanted}"
    why = f"backbones; it fits torch {release}"
    yield _needed("torchvision", reason or vision.__version__, why, problem, remedy)


def _wanted(package: str, name: str) -> "SpecifierSet":
    """Versions of package `name` that the installed `package` requires."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        requirements = map(Requirement, importlib.metadata.requires(package) or ())
    except importlib.metadata.PackageNotFoundError:
        return SpecifierSet()
    return next((r.specifier for r in requirements if r.name == name), SpecifierSet())


def _cuda() -> Iterator[Check]:
    torch, _ = _probe("torch")
    driver, on_cpu = _driver(), "the networks run on the CPU"
    if torch is None:
        yield Check("CUDA", "note", "unknown", False, "torch, which finds devices, is missing")
    elif torch.cuda.is_available():
        least = min(int("".join(filter(str.isdigit, name))) for name in torch.cuda.get_arch_list())  # 90 for sm_90a
        why, remedy = f"torch is built for CUDA {torch.version.cuda}", "use another GPU, or trainer.device=cpu"
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            own = 10 * device.major + device.minor
            detail = f"{device.name}, {device.total_memory / 2**30:.0f} GiB, driver {driver or 'unknown'}"
            problem = f"{why}, compute capability {least / 10} or later; this GPU has {own / 10}" if own < least else ""
            yield _needed(f"CUDA {index}", detail, why, problem, remedy)
    elif not driver:
        yield Check("CUDA", "note", "no device", False, on_cpu)
    elif torch.version.cuda is None:
        why, remedy = f"this torch is built for CPUs; {on_cpu}", "pip install --force-reinstall torch torchvision"
        yield Check("CUDA", "note", f"driver {driver}", False, why, remedy)
    else:
        why = f"torch, built for CUDA {torch.version.cuda}, finds no device it can use; {on_cpu}"
        yield Check("CUDA", "note", f"driver {driver}", False, why, "nvidia-smi")


def _cpu() -> Iterator[Check]:
    torch, _ = _probe("torch")
    model, flags = processor()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    capability = torch.backends.cpu.get_cpu_capability() if torch is not None else "capability unknown"
    detail = f"{model}, {cores} core{'s' if cores != 1 else ''}, {capability}"
    if _device() == "cuda":
        yield Check(
            "CPU", "ok", detail, True, "gives the GPU its work, and loads images unless the GPU does: see loader"
        )
    elif flags & {"avx512_bf16", "amx_bf16", "bf16"}:
        yield Check("CPU", "ok", detail, True, "networks and loader; it has bf16 instructions")
    else:
        why = "networks and loader; without bf16 instructions trainer.precision=bf16 is slower than fp32"
        yield Check("CPU", "note", detail, True, why, "mcl pretrain CONFIG trainer.precision=fp32 ...")


def _dali() -> Iterator[Check]:
    """DALI, and the library that decodes JPEG files."""
    dali, reason = _probe("nvidia.dali")
    loader, _ = _probe("dali_pipelines.loader")
    if dali is not None and loader is not None and _choice(loader)[1] == "gpu":
        yield Check("DALI", "ok", dali.__version__, True, "decodes and augments images on the GPU")
        why = "decodes on the GPU, and on its decoding engine if it has one"
        yield Check("JPEG decoder", "ok", "nvJPEG, in DALI", True, why)
    elif dali is not None:
        yield Check("DALI", "ok", dali.__version__, True, "decodes and augments images on the CPU: see loader")
        yield Check("JPEG decoder", "ok", "libjpeg-turbo, in DALI", True, "nvJPEG is used with data.device=gpu only")
    else:
        if reason == _ABSENT:
            why = "the torchvision engine is used, at a fraction of the speed"
            yield Check("DALI", "note", reason, False, why, f"pip install {DALI}")
        else:
            why = "installed but not usable; repair it, or remove it to use the slower torchvision engine"
            yield Check("DALI", "missing", reason, False, why, f"pip install --force-reinstall {DALI}")
        pillow, _ = _probe("PIL.features")
        if pillow is None:
            why = "neither DALI nor Pillow is installed"
            yield Check("JPEG decoder", "missing", "none", False, why, "pip install pillow")
        else:
            turbo = "-turbo" if pillow.check_feature("libjpeg_turbo") else ""
            yield Check("JPEG decoder", "ok", f"libjpeg{turbo}, in Pillow", True, "DALI is not used")


def _extensions() -> Iterator[Check]:
    """The compiled operators, and the library that runs each operator of a step."""
    ops, reason = _probe("mcl.ops")
    if ops is None:
        yield Check("C++ extension", "missing", reason, False, "the operators cannot be imported", BUILD)
        return
    if ops.missing["cpu"]:
        yield Check("C++ extension", "note", "none", False, ops.missing["cpu"])
    else:
        yield _built(ops.missing["cuda"])
    device = _device()
    tasks: dict[tuple[str, str], list[str]] = {}
    for task, backend in ops.backends(device).items():
        tasks.setdefault(backend, []).append(task)
    for (library, why), names in tasks.items():
        detail = f"{library} on {device.upper()}: {', '.join(names)}"
        yield Check("operators", "note" if library in ("PyTorch", "torchvision") else "ok", detail, True, why)


def _built(obstacle: str) -> Check:
    """Whether the extension supports the GPUs of this machine; `obstacle` says why it supports none."""
    torch, _ = _probe("torch")
    gpus = range(torch.cuda.device_count()) if _device() == "cuda" else ()
    if gpus and obstacle:
        return Check("C++ extension", "note", "for CPU", False, f"GPUs run PyTorch's operators, slower: {obstacle}")
    architectures = BUILT_FOR.read_text().strip() if not obstacle and BUILT_FOR.exists() else ""
    detail = "for CPU" if obstacle else f"for CPU and CUDA ({architectures or 'unknown GPUs'})"
    for index in gpus:
        gpu = torch.cuda.get_device_properties(index)
        if architectures and not _serves(architectures, (gpu.major, gpu.minor)):
            why = f"CUDA {index}, {gpu.name}, has compute capability {gpu.major}.{gpu.minor}"
            remedy = f"TORCH_CUDA_ARCH_LIST={gpu.major}.{gpu.minor} pip install --no-build-isolation -e ."
            return Check("C++ extension", "missing", detail, False, why, remedy)
    return Check("C++ extension", "ok", detail, True, "region pooling, BatchNorm, optimiser steps")


def _serves(architectures: str, own: tuple[int, int]) -> bool:
    """Whether the extension has machine code of the same major version or, for any later GPU, PTX."""
    built = re.findall(r"(\d+)\.(\d)[af]?(\+PTX)?", architectures)
    return any((int(a), int(b)) <= own and (int(a) == own[0] or ptx) for a, b, ptx in built)


def _choice(loader: Any) -> tuple[str, str, str]:
    """Default engine and device of a process, and why; `loader` is the module."""
    torch, _ = _probe("torch")
    cuda = _device() == "cuda"
    threads = loader.default_threads(torch.cuda.device_count() if cuda else 1)
    choice: tuple[str, str, str] = loader.choose_engine(loader.DataConfig(), cuda, threads)
    return choice


def _loader() -> Iterator[Check]:
    """Which engine loads images, and why not a faster one."""
    loader, reason = _probe("dali_pipelines.loader")
    if loader is None:
        yield Check("loader", "missing", reason, False, "the loader cannot be imported", BUILD)
        return
    engine, device, why = _choice(loader)
    detail = f"{engine} engine on {device.upper()}"
    if engine == "fused" and _device() == "cpu":
        yield Check("loader", "ok", detail, True, "the fastest engine")
    elif engine == "fused" and "loader threads" in why:
        yield Check("loader", "ok", detail, True, f"{why}; mcl doctor --measure times the others")
    else:
        yield Check("loader", "note", detail, True, why)


def _apex() -> Iterator[Check]:
    """NVIDIA apex. It is not imported: a project of the same name on PyPI fails without its own requirements."""
    spec = _find("apex")
    without = "the C++ extension or PyTorch computes its operators"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    if spec is None:
        yield Check("apex", "note", _ABSENT, False, without)
    elif not any((folder / "multi_tensor_apply").is_dir() for folder in folders):
        why = f"it has no apex.multi_tensor_apply; {without}"
        yield Check("apex", "note", "another project of this name, from PyPI", False, why, "pip uninstall apex")
    elif _find("amp_C") is None:
        yield Check("apex", "note", "NVIDIA apex without its CUDA kernels (amp_C)", False, without)
    elif _device() == "cpu":
        why = f"it serves CUDA devices only; {without}"
        yield Check("apex", "note", "NVIDIA apex with its CUDA kernels (amp_C)", False, why)
    else:
        yield Check("apex", "ok", "NVIDIA apex with its CUDA kernels (amp_C)", True, "see operators")


def _others() -> Iterator[Check]:
    """Packages for drawing, logging and fine-tuning, and their purpose."""
    for name in ("mmengine", "mmcv", "mmdet"):
        yield _package(name, "note", "only mcl finetune needs it", "mcl install-mmdet")
    yield _package("faster_coco_eval", "note", "only AP of LVIS needs it", "pip install faster-coco-eval")
    for name, why in (("matplotlib", "draws the curves of a report"), ("jinja2", "writes the report of a run")):
        yield _package(name, "missing", why, f"pip install --force-reinstall {name}")
    for name, why in (("tensorboard", "log.tensorboard"), ("wandb", "log.wandb")):
        yield _package(name, "note", f"only {why} needs it", f"pip install {name}")


def _package(name: str, absent: Status, why: str, remedy: str) -> Check:
    module, reason = _probe(name)
    if module is None:
        return Check(name, absent, reason, False, why, remedy)
    return Check(name, "ok", _version(module), absent == "missing", why)


def _device() -> str:
    torch, _ = _probe("torch")
    return "cuda" if torch is not None and torch.cuda.is_available() else "cpu"


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _probe(name: str) -> tuple[Any, str]:
    """The module; or None and the reason: ``_ABSENT``, or the error of its import."""
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


def _version(module: Any) -> str:
    return str(getattr(module, "__version__", "of unknown version"))


def processor() -> tuple[str, set[str]]:
    """Name and feature flags of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    entries = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    model = entries.get("model name") or platform.processor() or platform.machine()
    return model, set(entries.get("flags", entries.get("features", "")).split())


def busy() -> str:
    """A warning if other programs use this machine's cores; empty if not."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    text = f"the machine is busy: its load is {load:.1f} on {cores} cores, so this will be slower"
    return text if load > _BUSY * cores else ""


def _driver() -> str:
    """Version of the NVIDIA driver; empty if there is none."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):  # the tool or the driver is absent
        return ""
    return next(iter(answer.stdout.split()), "")
