"""Steps in processes of their own."""

import os
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


def resident() -> int:
    """MiB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


@dataclass(frozen=True)
class Noting:
    """Fills 256 MiB; writes its process, and what that had in memory before and has after."""

    path: Path
    plain: bool

    def start(self) -> Callable[[int], object]:
        return self._note

    def _note(self, side: int) -> None:
        before = resident()
        fill(256)
        with self.path.open("a") as file:
            file.write(f"{side} {os.getpid()} {before} {resident()}\n")


def test_apart_is_one_other_process_that_gives_memory_back_if_it_is_plain_or_not_awake(tmp_path: Path) -> None:
    held = {}
    for plain in (False, True):
        apart = processes.Apart(Noting(tmp_path / str(plain), plain))
        apart.step(1)
        apart.step(2)
        with apart.awake(3):
            apart.step(4)
        apart.step(5)
        notes = [[int(word) for word in line.split()] for line in (tmp_path / str(plain)).read_text().splitlines()]
        assert [side for side, *_ in notes] == [1, 2, 3, 4, 5]
        assert len({pid for _, pid, *_ in notes} - {os.getpid()}) == 1
        held[plain] = [before for *_, before, _ in notes]
    kept, given = held[False], held[True]
    assert min(kept[1:4]) > max(*given[1:], kept[0], kept[4]) + 200  # awake, a step finds what the one before has left
