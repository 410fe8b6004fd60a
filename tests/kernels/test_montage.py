"""The fused operator's CUDA kernel, emulated on the CPU, makes the CPU's tiles, passes sanitizers, and executes every
line."""

import shutil
from pathlib import Path

import pytest

from mcl.ops.library import compiled
from tests.conftest import ROOT
from tests.kernels import programs, ptxas
from tests.kernels.programs import EMULATION, KERNELS

PROGRAM = EMULATION / "montage.cpp"
KERNEL = Path("dali", "cuda", "montage.cuh")


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_tiles_equal_the_cpus_and_sanitizers_find_nothing(sanitizer: str, tmp_path: Path) -> None:
    """Includes recipes that no plan contains (NaN, infinite, negative, huge): kernels must not access memory out of
    bounds."""
    # The level that compiles faster.
    flags = [*programs.SANITIZERS[sanitizer], "-O0" if sanitizer == "address" else "-O1"]
    result = programs.run(programs.build(PROGRAM, tmp_path / "montage", *flags))
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "ok", "")


@pytest.mark.soak
def test_every_line_of_the_kernel_is_executed(tmp_path: Path) -> None:
    assert programs.uncovered_lines(PROGRAM, KERNELS / KERNEL, tmp_path) == []


@pytest.mark.soak
@pytest.mark.parametrize(
    ("right", "wrong", "sanitizer", "report"),
    [
        ("    __syncthreads();\n    for_each_pixel(rows, side", "    for_each_pixel(rows, side", "thread", "data race"),
        ("job.copy.at(rows.base() + y,", "job.copy.at(rows.base() + y + 1,", "address", "heap-buffer-overflow"),
        ("total += sums[w]", "total = sums[w]", None, "operations 7: element"),
    ],
    ids=["missing barrier", "out of bounds", "wrong sum"],
)
def test_faults_planted_in_the_kernel_are_found(
    right: str, wrong: str, sanitizer: str | None, report: str, tmp_path: Path
) -> None:
    """Runs the same program with one line of the kernel changed."""
    sources = shutil.copytree(KERNELS, tmp_path / "kernels")
    text = (sources / KERNEL).read_text()
    assert text.count(right) == 1
    (sources / KERNEL).write_text(text.replace(right, wrong))
    flags = programs.SANITIZERS[sanitizer] if sanitizer else ()
    result = programs.run(programs.build(PROGRAM, tmp_path / "faulty", f"-iquote{sources}", "-O0", *flags))
    assert result.returncode != 0
    assert report in result.stdout + result.stderr


def test_the_kernel_is_in_the_plugin_and_spills_no_registers() -> None:
    if not compiled("region_pool", "cuda"):
        pytest.skip("built without CUDA")
    kernels = [k for k in ptxas.parse(ptxas.REPORT.read_text()) if "make_tiles" in k.name]
    assert {"sm_80", "sm_90"} <= {k.architecture for k in kernels}
    assert [k for k in kernels if k.spill_stores or k.spill_loads or k.stack] == []
    names = (ROOT / "dali_pipelines" / "libmcl_dali.so").read_bytes()
    assert all(k.name.encode() in names for k in kernels)
