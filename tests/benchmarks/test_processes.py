"""Steps in processes of their own."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.steps import processes


class Allocating:
    """Fills as many MiB as it is told, and forgets them."""

    plain = False

    def start(self) -> Callable[[int], object]:
        return fill


def fill(mebibytes: int) -> None:
    torch.ones(mebibytes, 2**18)


def test_peak_is_that_of_the_fresh_process_and_not_of_this_one() -> None:
    ballast = torch.ones(2**29)  # 2 GiB
    mebibytes = processes.peak(Allocating(), 256) / 2**20
    assert 256 < mebibytes < 2048
    assert ballast[0] == 1


def test_room_is_there_meanwhile_and_then_kept_again() -> None:
    """In a process that keeps what it frees."""
    script = """
from pathlib import Path
import torch
from benchmarks.steps import processes
from mcl.allocator import keep_freed_memory
keep_freed_memory()
def held(): return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20
torch.ones(512, 2**18)
before = held()
with processes.room():
    meanwhile = held()
print(before, meanwhile, held())
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, meanwhile, after = map(int, run.stdout.split())
    assert meanwhile < before - 500
    assert abs(after - before) < 50


@dataclass(frozen=True)
class Noting:
    """Fills 256 MiB; then writes its process and what that has in memory."""

    path: Path
    plain: bool

    def start(self) -> Callable[[int], object]:
        return self._note

    def _note(self, side: int) -> None:
        fill(256)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        with self.path.open("a") as file:
            file.write(f"{side} {os.getpid()} {pages * os.sysconf('SC_PAGE_SIZE') >> 20}\n")


def test_apart_is_one_other_process_that_gives_memory_back_if_it_is_plain(tmp_path: Path) -> None:
    held = {}
    for plain in (False, True):
        step = processes.apart(Noting(tmp_path / str(plain), plain))
        step(1)
        step(2)
        notes = [[int(word) for word in line.split()] for line in (tmp_path / str(plain)).read_text().splitlines()]
        assert [side for side, _, _ in notes] == [1, 2]
        assert len({pid for _, pid, _ in notes} - {os.getpid()}) == 1
        held[plain] = notes[-1][2]
    assert held[False] > held[True] + 200
