"""Parsing of the compiler's report."""

import shutil
from pathlib import Path

import pytest

from tests.kernels import ptxas
from tests.kernels.ptxas import Kernel

REPORT = """\
ptxas info    : 0 bytes gmem, 24 bytes cmem[4]
ptxas info    : Compiling entry function '_ZN3mcl4cuda10ema_updateIfEEvNS0_11TensorTableIT_Li2EEES3_S3_' for 'sm_80'
ptxas info    : Function properties for _ZN3mcl4cuda10ema_updateIfEEvNS0_11TensorTableIT_Li2EEES3_S3_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 380 bytes cmem[0]
ptxas info    : Compile time = 12.345 ms
ptxas info    : Compiling entry function '_ZN3mcl4cuda10ema_updateIfEEvNS0_11TensorTableIT_Li2EEES3_S3_' for 'sm_90'
ptxas info    : Function properties for _ZN3mcl4cuda10ema_updateIfEEvNS0_11TensorTableIT_Li2EEES3_S3_
    96 bytes stack frame, 40 bytes spill stores, 44 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 96 bytes cumulative stack size, 33792 bytes smem, 24 bytes cmem[4]
"""
NAME = "_ZN3mcl4cuda10ema_updateIfEEvNS0_11TensorTableIT_Li2EEES3_S3_"


def test_parse_reads_every_kernel_on_every_architecture() -> None:
    assert ptxas.parse(REPORT) == [
        Kernel(NAME, "sm_80", registers=32, stack=0, spill_stores=0, spill_loads=0, shared=0),
        Kernel(NAME, "sm_90", registers=255, stack=96, spill_stores=40, spill_loads=44, shared=33792),
    ]


@pytest.mark.parametrize(
    ("architecture", "registers", "shared", "occupancy"),
    [
        ("sm_80", 32, 0, 1.0),  # 8 blocks of 8 warps fill 64 warps and 65,536 registers
        ("sm_80", 40, 0, 0.75),  # 40 * 256 = 10,240 registers a block: 6 blocks
        ("sm_80", 255, 0, 0.125),  # rounded up to 256 per thread: one block
        ("sm_80", 32, 50 * 1024, 0.375),  # 51 of 164 KiB a block: 3 blocks
        ("sm_75", 64, 0, 1.0),  # 4 blocks of 8 warps are the maximum
        ("sm_75", 64, 20 * 1024, 0.75),  # 21 of 64 KiB a block: 3 blocks
        ("sm_120", 64, 0, 4 / 6),  # 4 blocks of 6
    ],
)
def test_occupancy_by_hand(architecture: str, registers: int, shared: int, occupancy: float) -> None:
    assert Kernel("", architecture, registers, 0, 0, 0, shared).occupancy == occupancy


def test_table_says_how_to_get_a_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ptxas, "REPORT", tmp_path / "none.txt")
    with pytest.raises(FileNotFoundError, match=r"none\.txt: not there; MCL_BUILD_CUDA=1 pip install"):
        ptxas.table()


def test_table_of_a_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report = tmp_path / "report.txt"
    report.write_text(REPORT)
    monkeypatch.setattr(ptxas, "REPORT", report)
    rows = ptxas.table().splitlines()[2:]
    name = "ema_update<float>" if shutil.which("c++filt") else NAME
    assert rows == [f"| {name} | sm_80 | 32 | 0 | 0 | 0 | 100% |", f"| {name} | sm_90 | 255 | 96 | 84 | 33792 | 12% |"]
