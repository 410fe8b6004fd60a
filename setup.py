"""Build script: compiles kernels/ if torch is installed; stops with a remedy if a part cannot be compiled.

pip's isolated builds (``pip install .``) have no torch: they make the pure wheel.

Environment:
    MCL_BUILD_EXTENSION=0   compiles nothing; operators then run on PyTorch, slowly. 1: compiles or fails.
    MCL_BUILD_CUDA=0|1      without or with CUDA; default: with CUDA if torch has it and there is a driver or a toolkit.
    TORCH_CUDA_ARCH_LIST    default: ARCHITECTURES that the toolkit supports, and PTX for the newest.
    MAX_JOBS                parallel compilations; default: as cores and memory allow.
    MCL_BUILD_PLUGIN=0      does not compile the operator for DALI, which may then be missing.
"""

import functools
import hashlib
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

FIRST = "pip install -r requirements/torch.txt"
ARCHITECTURES = ("7.5", "8.0", "9.0", "10.0", "12.0")
"""Compute capabilities that CUDA code is compiled for; a GPU also runs code of a lower minor version."""
GIB_PER_JOB = 3
"""Memory of one compilation with torch's headers."""

SOURCES = Path("kernels/csrc")
PLUGIN = Path("kernels/dali")


def flag(name: str) -> bool | None:
    """An environment variable that is 0, 1 or not set."""
    value = os.environ.get(name)
    if value not in (None, "", "0", "1"):
        sys.exit(f"{name}={value}: must be 0 or 1")
    return None if not value else value == "1"


def with_plugin() -> bool:
    return flag("MCL_BUILD_PLUGIN") is not False


def compiles() -> bool:
    """Whether to compile: by default if torch is installed. Stops if a requirement is missing."""
    wish = flag("MCL_BUILD_EXTENSION")
    flag("MCL_BUILD_CUDA")  # reports a wrong value early
    if wish is False or (wish is None and importlib.util.find_spec("torch") is None):
        return False
    missing = []
    for name in ("torch", "torchvision", *(["nvidia.dali"] if with_plugin() else [])):
        try:
            importlib.import_module(name)
        except (ImportError, OSError):
            missing.append(name)
    if missing:
        sys.exit(
            f"mcl needs {' and '.join(missing)} before its operators are compiled. Run:\n"
            f"    {FIRST}\n    pip install --no-build-isolation -e ."
        )
    compiler = os.environ.get("CXX", "g++").split()[-1]
    if shutil.which(compiler) is None:
        sys.exit(
            f"mcl: no C++ compiler ({compiler}) to build the extension with. Install one (apt install g++), name it "
            "with CXX, or set MCL_BUILD_EXTENSION=0 to run on PyTorch alone, slowly."
        )
    return True


@functools.cache
def toolkit() -> Path | None:
    """The CUDA toolkit to compile with, of torch's major version; None: for CPUs only.

    It is the installed toolkit, or the compiler of requirements/torch.txt, so that a machine needs only a driver.
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
    """The ARCHITECTURES that the toolkit supports, with PTX for the newest."""
    listing = subprocess.run([home / "bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = {line.removeprefix("compute_") for line in listing.stdout.split()}
    chosen = [a for a in ARCHITECTURES if a.replace(".", "") in known]
    if not chosen:
        sys.exit(f"{home} compiles for none of {ARCHITECTURES}; set TORCH_CUDA_ARCH_LIST")
    return ";".join(chosen) + "+PTX"


def sources_digest() -> str:
    """Short hash of all compiled sources; :mod:`mcl.train.agreement` compares it between processes."""
    whole = hashlib.sha256(Path("setup.py").read_bytes())
    for file in sorted(path for folder in (SOURCES, PLUGIN) for path in folder.rglob("*") if path.is_file()):
        whole.update(f"{file} ".encode() + hashlib.sha256(file.read_bytes()).digest())
    return whole.hexdigest()[:12]


def jobs() -> int:
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), pages // (GIB_PER_JOB << 30)))


def runtime(home: Path, name: str) -> str:
    """The CUDA runtime to link with: torch's, or that of the toolkit."""
    import torch

    packages = Path(torch.__file__).parents[1]
    places = [*packages.glob("nvidia/*/lib"), home / "lib64", home / "lib"]
    found = [library for place in places for library in sorted(place.glob(name))]
    if not found:
        sys.exit(f"mcl: no {name} in {', '.join(map(str, places))}; install the CUDA runtime, or MCL_BUILD_CUDA=0")
    return str(found[0])


def operators() -> list[Extension]:
    """``mcl._C`` for CPUs, and ``mcl._C_cuda13`` for GPUs, which needs a torch of that CUDA version."""
    import torch
    from torch.utils.cpp_extension import CppExtension

    os.environ.setdefault("MAX_JOBS", str(jobs()))
    # The stable libtorch symbols of 2.10, so that one build supports later versions.
    flags = ["-std=c++20", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    hidden = "-fvisibility=hidden"

    def extension(name: str, pattern: str, include: Sequence[Path] = (), link_args: Sequence[str] = ()) -> Extension:
        return CppExtension(
            name,
            sorted(map(str, [*SOURCES.glob("*.cpp"), *SOURCES.glob(pattern)])),
            include_dirs=[str(SOURCES.resolve()), *map(str, include)],
            extra_compile_args={
                "cxx": [*flags, hidden, "-g0"],
                "nvcc": [*flags, "-DUSE_CUDA", "-Xcompiler", hidden, "-Xptxas", "-v"],
            },
            extra_link_args=list(link_args),
            py_limited_api=True,
        )

    found = [extension("mcl._C", "cpu/*.cpp")]
    if cuda := toolkit():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures(cuda))
        # Headers that a minimal toolkit lacks come with torch; the toolkit's own go first.
        include = list(Path(torch.__file__).parents[1].glob("nvidia/cu*/include"))
        link_args = [runtime(cuda, "libcudart.so*"), "-ltorch_cuda"]  # both are loaded before, by torch
        found.append(extension(f"mcl._C_cuda{major(release(cuda))}", "cuda/*.cu", include, link_args))
    return found


def plugin() -> Extension:
    """The DALI operators, compiled with the headers in DALI's wheel."""
    import torch
    from nvidia.dali import sysconfig

    # DALI's headers include CUDA's, also for CPUs; torch and requirements/torch.txt install them.
    flags = ["-std=c++20", "-O3", *sysconfig.get_compile_flags()]
    for folder in Path(torch.__file__).parents[1].glob("nvidia/cu*/include"):
        flags += ["-isystem", str(folder)]
    # DALI's headers cause this warning.
    warnings = "-Wno-free-nonheap-object"
    # Without fused multiply-add, all CPUs and GPUs compute the same pixels as the emulation in the tests.
    vectorize = ["-fno-trapping-math", "-fno-math-errno", "-ffp-contract=off"]
    compile_args = {"cxx": [*flags, "-g0", *vectorize, warnings]}
    sources = [*PLUGIN.glob("cpu/*.cc")]
    link_args = sysconfig.get_link_flags()
    if cuda := toolkit():
        sources += PLUGIN.glob("cuda/*.cu")
        # DALI has a runtime of its own inside, too; so the plugin loads beside a torch for CPUs.
        link_args += [runtime(cuda, "libcudart_static.a"), "-Wl,--exclude-libs,ALL", "-lrt", "-lpthread", "-ldl"]
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


def dali() -> str:
    """The installed DALI, as a requirement of pip; the plugin supports no other version."""
    import nvidia.dali

    return f"nvidia-dali-cuda{str(nvidia.dali.__cuda_version__)[:2]}0=={nvidia.dali.__version__}"


def compile_and_setup() -> None:
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        """Also writes text files with a hash of the sources, the architectures, and ptxas' report on every kernel:
        registers, spills, shared memory."""

        def build_extension(self, extension: Extension) -> None:
            together, self.build_temp = self.build_temp, f"{self.build_temp}/{extension.name}"  # they share sources
            super().build_extension(extension)
            self.build_temp = together

        def run(self) -> None:
            for library in Path("." if self.inplace else self.build_lib, "mcl").glob("_C_cuda*.so"):
                library.unlink()  # of an earlier build; this one may be for CPUs only
            log = tempfile.TemporaryFile("w+")  # noqa: SIM115
            stdout, stderr = os.dup(1), os.dup(2)
            try:
                os.dup2(log.fileno(), 1)  # compilers write to the file descriptors, not to sys.stdout
                os.dup2(log.fileno(), 2)
                super().run()
            finally:
                os.dup2(stdout, 1)
                os.dup2(stderr, 2)
                log.seek(0)
                text = log.read()
                print(text)
            notes = {
                "mcl/_C.sources.txt": sources_digest(),
                "mcl/_C.architectures.txt": os.environ["TORCH_CUDA_ARCH_LIST"] if toolkit() else "",
                "mcl/_C.ptxas.txt": "\n".join(re.findall(r"^(?:ptxas info .*|.*bytes stack frame.*)$", text, re.M)),
                **({"dali_pipelines/libmcl_dali.txt": dali()} if with_plugin() else {}),
            }
            for file, note in notes.items():
                Path("." if self.inplace else self.build_lib, file).write_text(f"{note}\n")

    class Wheel(bdist_wheel):
        """For every Python 3: PyTorch and DALI load the libraries."""

        def get_tag(self) -> tuple[str, str, str]:
            return "py3", "none", super().get_tag()[2]

    extensions = [*operators(), *([plugin()] if with_plugin() else [])]
    build = Build.with_options(no_python_abi_suffix=True)
    setup(ext_modules=extensions, cmdclass={"build_ext": build, "bdist_wheel": Wheel})


if compiles():
    compile_and_setup()
else:
    setup()
