"""Memory that is freed stays with the process."""

import subprocess
import sys

import pytest

ROUNDS = """
import resource, sys
import torch
if sys.argv[1] == "keep":
    from mcl.allocator import keep_freed_memory
    keep_freed_memory()
def steps(count):
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(count):
        maps = [torch.ones(10_000_000) for _ in range(8)]  # 40 MB each: 9,766 pages
        del maps
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_minflt - before.ru_minflt, after.ru_maxrss - before.ru_maxrss
steps(3)
print(*steps(5))
"""


def rounds(how: str) -> tuple[int, int]:
    """What five rounds that make 320 MB of tensors cost: pages asked for, growth of the peak in KiB."""
    run = subprocess.run([sys.executable, "-c", ROUNDS, how], capture_output=True, text=True, check=True)
    pages, growth = map(int, run.stdout.split())
    return pages, growth


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_steps_reuse_the_pages_of_the_step_before() -> None:
    pages, growth = rounds("keep")
    assert pages < 20_000 < 300_000 < rounds("free")[0]
    assert growth < 100_000
