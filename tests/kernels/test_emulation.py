"""The emulation of CUDA behaves like CUDA, and sanitizers find errors in emulated kernels."""

from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.kernels import programs
from tests.kernels.programs import EMULATION, SANITIZERS

SELFTEST = EMULATION / "selftest.cpp"


def selftest(out: Path, sanitizer: str, *flags: str) -> CompletedProcess[str]:
    # Compiling takes longer than running, hence -O0.
    return programs.run(programs.build(SELFTEST, out, "-O0", *SANITIZERS[sanitizer], *flags))


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_kernels_agree_with_plain_loops(sanitizer: str, tmp_path: Path) -> None:
    result = selftest(tmp_path / "right", sanitizer)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("fault", "sanitizer", "report", "kernel"),
    [
        ("FAULT_MISSING_BARRIER", "thread", "data race", "sum_shared"),
        ("FAULT_SHUFFLE_AS_BARRIER", "thread", "data race", "swap_neighbours"),
        ("FAULT_OUT_OF_BOUNDS", "address", "heap-buffer-overflow", "sum_shared"),
    ],
)
def test_planted_faults_are_found(fault: str, sanitizer: str, report: str, kernel: str, tmp_path: Path) -> None:
    result = selftest(tmp_path / "faulty", sanitizer, f"-D{fault}")
    assert result.returncode != 0
    (summary,) = (line for line in result.stderr.splitlines() if line.startswith("SUMMARY:"))
    assert report in summary
    assert kernel in summary


def test_uncovered_lines_are_named(tmp_path: Path) -> None:
    (tmp_path / "kernel.cuh").write_text("""\
template <typename T>
__global__ void kernel(T* x, bool other) {
  if (sizeof(T) == 4) {
    x[threadIdx.x] += 1;
  } else {
    x[threadIdx.x] += 2;
  }
  if (other)
    x[threadIdx.x] += 3;
}
""")
    source = tmp_path / "program.cpp"
    source.write_text("""\
#include "cuda_emulation.h"
#include "kernel.cuh"
int main() {
  float x[3] = {};
  double y[3] = {};
  emulation::launch(1, 3, kernel<float>, x, false);
  emulation::launch(1, 3, kernel<double>, y, false);
  return x[2] != 1 || y[2] != 2;
}
""")
    missed = ["kernel.cuh:9: x[threadIdx.x] += 3;"]
    assert programs.uncovered_lines(source, tmp_path / "kernel.cuh", tmp_path / "work") == missed
