"""The peak of a fresh process."""

from collections.abc import Callable

import torch

from benchmarks.steps import memory


class Allocating:
    """Fills as many MiB as it is told, and forgets them."""

    def start(self) -> Callable[[int], object]:
        return fill


def fill(mebibytes: int) -> None:
    torch.ones(mebibytes, 2**18)


def test_peak_is_that_of_the_fresh_process_and_not_of_this_one() -> None:
    ballast = torch.ones(2**29)  # 2 GiB
    mebibytes = memory.peak(Allocating(), 256) / 2**20
    assert 256 < mebibytes < 2048
    assert ballast[0] == 1
