"""Registers, spills and shared memory of the CUDA kernels, as the compiler reports them, and the resulting occupancy.

``python -m tests.kernels.ptxas`` prints the report of the library that was built.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import mcl
from benchmarks.common import markdown

REPORT = Path(mcl.__file__).parent / "_C.ptxas.txt"
THREADS = 256
"""Threads per block; make_tiles has 384, with the same occupancy."""

_LIMITS = {"sm_75": (64, 32, 16), "sm_80": (164, 64, 32), "sm_120": (100, 48, 24)}
"""KiB of shared memory, warps and blocks per multiprocessor; others use the default. All have 65,536 registers."""


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture."""

    name: str
    architecture: str
    registers: int
    stack: int  # bytes
    spill_stores: int  # bytes
    spill_loads: int  # bytes
    shared: int  # bytes

    @property
    def occupancy(self) -> float:
        """Share of the multiprocessor's warps that run, for blocks of 256 threads; computed from registers and shared
        memory."""
        warps = THREADS // 32
        memory, most_warps, most_blocks = _LIMITS.get(self.architecture, (228, 64, 32))
        registers = -(-self.registers * 32 // 256) * 256  # allocated to warps in units of 256
        shared = memory * 1024 // (self.shared + 1024)  # 1 KiB of each block is reserved
        return min(65536 // (registers * warps), shared, most_warps // warps, most_blocks) * warps / most_warps


def parse(text: str) -> list[Kernel]:
    """Kernels in the output of ``nvcc -Xptxas -v``."""
    kernels = []
    for part in text.split("Compiling entry function ")[1:]:
        name, architecture = re.findall(r"'([^']+)' for '(\w+)'", part)[0]
        stack, stores, loads = map(int, re.findall(r"(\d+) bytes (?:stack frame|spill \w+)", part)[:3])
        registers = int(re.findall(r"Used (\d+) registers", part)[0])
        shared = sum(map(int, re.findall(r"(\d+) bytes smem", part)))
        kernels.append(Kernel(name, architecture, registers, stack, stores, loads, shared))
    return kernels


def table() -> str:
    """The report of the library that was built, as Markdown.

    Raises:
        FileNotFoundError: the library was built without CUDA.
    """
    if not REPORT.exists():
        raise FileNotFoundError(f"{REPORT}: not there; MCL_BUILD_CUDA=1 pip install --no-build-isolation -e . makes it")
    kernels = sorted(parse(REPORT.read_text()), key=lambda k: (k.name, len(k.architecture), k.architecture))
    names = _demangle([k.name for k in kernels])
    rows = [
        (name, k.architecture, k.registers, k.stack, k.spill_stores + k.spill_loads, k.shared, f"{k.occupancy:.0%}")
        for name, k in zip(names, kernels, strict=True)
    ]
    return markdown(
        ["kernel", "for", "registers", "stack", "spilled bytes", "shared bytes", "occupancy (computed)"], rows
    )


def _demangle(names: list[str]) -> list[str]:
    """C++ names without arguments; unchanged if c++filt is missing."""
    try:
        done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return names
    return [re.sub(r"^(?:void )?(?:mcl::(?:\w+::)*)?(.*?)\(.*$", r"\1", line) for line in done.stdout.splitlines()]


if __name__ == "__main__":
    print(table())
