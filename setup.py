"""Build script: compiles kernels/ into mcl/_C, and stops with the remedy where a half-working package would come out.

Environment:
    MCL_BUILD_EXTENSION=0   installs without compiling; mcl.ops then runs on PyTorch alone, slowly.
    MCL_BUILD_CUDA=0|1      without or with CUDA; default: with, if torch is and there is an NVIDIA driver or a toolkit.
    TORCH_CUDA_ARCH_LIST    default ARCHITECTURES, as far as the toolkit knows them, and PTX for the newest.
    MAX_JOBS                parallel compilations; default: as cores and memory allow.
    MCL_BUILD_PLUGIN=0      without the operator for DALI, where there is no DALI.
"""

import functools
import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup

FIRST = "pip install -r requirements/torch.txt"
ARCHITECTURES = ("7.5", "8.0", "9.0", "10.0", "12.0")
"""Compute capabilities that CUDA code is compiled for; a GPU runs the code of a lower minor version, too."""
GIB_PER_JOB = 3
"""Memory of one compilation with torch's headers."""

SOURCES = Path("kernels/csrc")
PLUGIN = Path("kernels/dali")


def with_plugin() -> bool:
    return flag("MCL_BUILD_PLUGIN") is not False


def check_packages() -> bool:
    """Whether torch and DALI are there; stops if an installation needs them."""
    missing = []
    for name in ("torch", "torchvision", *(["nvidia.dali"] if with_plugin() else [])):
        try:
            importlib.import_module(name)
        except (ImportError, OSError):
            missing.append(name)
    if missing and not {"egg_info", "sdist"} & set(sys.argv):
        sys.exit(
            f"mcl needs {' and '.join(missing)} before it is installed, so that pip chooses no other build. Run:\n"
            f"    {FIRST}\n    pip install --no-build-isolation -e ."
        )
    return not missing


def flag(name: str) -> bool | None:
    """An environment variable that is 0, 1 or not set."""
    value = os.environ.get(name)
    if value not in (None, "", "0", "1"):
        sys.exit(f"{name}={value}: must be 0 or 1")
    return None if not value else value == "1"


def check_compiler() -> None:
    flag("MCL_BUILD_CUDA")  # a wrong value is said before anything takes time
    compiler = os.environ.get("CXX", "g++").split()[-1]
    if shutil.which(compiler) is None:
        sys.exit(
            f"mcl: no C++ compiler ({compiler}) to build the extension with. Install one (apt install g++), name it "
            "with CXX, or set MCL_BUILD_EXTENSION=0 to run on PyTorch alone, slowly."
        )


@functools.cache
def toolkit() -> Path | None:
    """The CUDA toolkit to compile with, of torch's major version; None: for CPUs only.

    It is the installed one, or the compiler of requirements/torch.txt, so that a machine needs no more than a driver.
    """
    import torch
    from torch.utils import cpp_extension

    wish = flag("MCL_BUILD_CUDA")
    wanted = torch.version.cuda
    if wish is False:
        return None
    if wanted is None:
        return without_cuda(f"torch {torch.__version__} is built without CUDA; {FIRST}")
    installed = Path(cpp_extension.CUDA_HOME or "no toolkit")
    version = release(installed)
    if major(version) == major(wanted):
        return installed
    if version:
        print(f"mcl: {installed} is CUDA {version}, which torch, built for CUDA {wanted}, cannot be extended with")
    elif not (wish or has_driver()):
        return without_cuda("no NVIDIA driver and no CUDA toolkit; MCL_BUILD_CUDA=1 compiles for GPUs elsewhere")
    wheel = Path(torch.__file__).parents[1] / "nvidia" / f"cu{major(wanted)}"
    if major(release(wheel)) != major(wanted):
        return without_cuda(f'no compiler for CUDA {wanted}; pip install "cuda-toolkit[cccl,nvcc]=={wanted}.*"')
    print(f"mcl: compiling with {wheel / 'bin/nvcc'}")
    cpp_extension.CUDA_HOME = str(wheel)
    return wheel


def without_cuda(reason: str) -> None:
    if flag("MCL_BUILD_CUDA"):
        sys.exit(f"MCL_BUILD_CUDA=1: {reason}, or set CUDA_HOME to such a toolkit, or MCL_BUILD_CUDA=0")
    print(f"mcl: the extension is built for CPUs only: {reason}")


def has_driver() -> bool:
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()


def release(home: Path) -> str:
    """Version of a CUDA compiler, as "13.0"; empty if there is none."""
    try:
        said = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return "".join(re.findall(r"release (\d+\.\d+)", said)[:1])


def major(version: str) -> str:
    return version.partition(".")[0]


def architectures(home: Path) -> str:
    """Those of ARCHITECTURES that the toolkit can compile for, PTX for the newest."""
    listing = subprocess.run([home / "bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = {line.removeprefix("compute_") for line in listing.stdout.split()}
    chosen = [a for a in ARCHITECTURES if a.replace(".", "") in known]
    if not chosen:
        sys.exit(f"{home} compiles for none of {ARCHITECTURES}; set TORCH_CUDA_ARCH_LIST")
    return ";".join(chosen) + "+PTX"


def sources_digest() -> str:
    """Short hash of all that is compiled; :mod:`mcl.distributed.agreement` compares it between processes."""
    whole = hashlib.sha256(Path("setup.py").read_bytes())
    for file in sorted(path for folder in (SOURCES, PLUGIN) for path in folder.rglob("*") if path.is_file()):
        whole.update(f"{file} ".encode() + hashlib.sha256(file.read_bytes()).digest())
    return whole.hexdigest()[:12]


def jobs() -> int:
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), pages // (GIB_PER_JOB << 30)))


def runtime(home: Path) -> str:
    """The CUDA runtime to link with: the one that torch brings and loads, or the toolkit's."""
    import torch

    packages = Path(torch.__file__).parents[1]
    places = [*packages.glob("nvidia/*/lib"), home / "lib64", home / "lib"]
    found = [library for place in places for library in sorted(place.glob("libcudart.so*"))]
    if not found:
        sys.exit(
            f"mcl: no libcudart.so in {', '.join(map(str, places))}; install the CUDA runtime, or MCL_BUILD_CUDA=0"
        )
    return str(found[0])


def extension() -> Extension:
    import torch
    from torch.utils.cpp_extension import CppExtension

    cuda = toolkit()
    os.environ.setdefault("MAX_JOBS", str(jobs()))
    sources = [*SOURCES.glob("*.cpp"), *SOURCES.glob("cpu/*.cpp")]
    include = [str(SOURCES.resolve())]
    # The libtorch symbols that 2.10 promises to keep; so one build serves later versions, too.
    flags = ["-std=c++20", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    compile_args: dict[str, list[str]] = {"cxx": [*flags, "-fvisibility=hidden", "-g0"]}
    link_args = []
    if cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures(cuda))
        sources += SOURCES.glob("cuda/*.cu")
        # Headers that a minimal toolkit lacks come with torch; the toolkit's own go first.
        include += [str(p) for p in Path(torch.__file__).parents[1].glob("nvidia/cu*/include")]
        link_args += [runtime(cuda), "-ltorch_cuda"]
        compile_args["nvcc"] = [*flags, "-DUSE_CUDA", "-Xcompiler", "-fvisibility=hidden", "-Xptxas", "-v"]
    return CppExtension(
        "mcl._C",
        sorted(map(str, sources)),
        include_dirs=include,
        extra_compile_args=compile_args,
        extra_link_args=link_args,
        py_limited_api=True,
    )


wanted = flag("MCL_BUILD_EXTENSION") is not False
if wanted:
    check_compiler()


def plugin() -> Extension:
    """The DALI operators, against the headers in DALI's wheel."""
    import torch
    from nvidia.dali import sysconfig

    # DALI's headers name CUDA's, whatever is compiled; they come with torch and requirements/torch.txt.
    flags = ["-std=c++20", "-O3", *sysconfig.get_compile_flags()]
    for folder in Path(torch.__file__).parents[1].glob("nvidia/cu*/include"):
        flags += ["-isystem", str(folder)]
    # What is switched off complains of DALI's headers.
    warnings = "-Wno-free-nonheap-object"
    # No fused multiply-add anywhere: so all processors and GPUs make the same pixels, those that the emulation proves.
    vectorize = ["-fno-trapping-math", "-fno-math-errno", "-ffp-contract=off"]
    compile_args = {"cxx": [*flags, "-g0", *vectorize, warnings]}
    sources = [*PLUGIN.glob("cpu/*.cc")]
    link_args = sysconfig.get_link_flags()
    if cuda := toolkit():
        sources += PLUGIN.glob("cuda/*.cu")
        link_args += [runtime(cuda)]
        # DALI's headers need the conversions that torch switches off.
        half = [f"-U__CUDA_NO_HALF_{what}__" for what in ("OPERATORS", "CONVERSIONS")]
        compile_args["nvcc"] = [*flags, *half, "-fmad=false", "-Xcompiler", warnings, "-Xptxas", "-v"]
    return Extension(
        "dali_pipelines.libmcl_dali",
        sorted(map(str, sources)),
        include_dirs=[str(PLUGIN.parent.resolve()), str(SOURCES.resolve())],
        extra_compile_args=compile_args,
        extra_link_args=link_args,
        language="c++",
    )


if check_packages() and wanted:
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        """Keeps beside the libraries the hash of their sources, and what ptxas says of every kernel: registers, spills,
        shared memory."""

        def build_extensions(self) -> None:
            log = tempfile.TemporaryFile("w+")  # noqa: SIM115
            stdout, stderr = os.dup(1), os.dup(2)
            try:
                os.dup2(log.fileno(), 1)  # compilers write to the file descriptors, not to sys.stdout
                os.dup2(log.fileno(), 2)
                super().build_extensions()
            finally:
                os.dup2(stdout, 1)
                os.dup2(stderr, 2)
                log.seek(0)
                text = log.read()
                print(text)
            Path("mcl/_C.sources.txt").write_text(f"{sources_digest()}\n")
            built_for = os.environ["TORCH_CUDA_ARCH_LIST"] if toolkit() else ""
            Path("mcl/_C.architectures.txt").write_text(f"{built_for}\n")  # mcl doctor compares it with the GPUs
            report = re.findall(r"^(?:ptxas info .*|.*bytes stack frame.*)$", text, re.MULTILINE)
            if report:
                Path("mcl/_C.ptxas.txt").write_text("\n".join(report) + "\n")

    extensions = [extension(), *([plugin()] if with_plugin() else [])]
    setup(ext_modules=extensions, cmdclass={"build_ext": Build.with_options(no_python_abi_suffix=True)})
else:
    setup()
