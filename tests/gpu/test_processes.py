"""Two processes with GPUs compute the same as one on the CPU, in float64: over gloo on one GPU, over NCCL on two."""

import pytest
import torch

from tests.mcl.distributed.test_world_sizes import EXACT, check_ranks, trained
from tests.mcl.ranks import in_ranks


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("group", "devices"), [("cpu", ["cuda:0"]), ("cuda", ["cuda:0", "cuda:1"])], ids=["gloo", "NCCL"]
)
def test_two_processes_compute_what_one_does(group: str, devices: list[str]) -> None:
    if torch.cuda.device_count() < len(devices):
        pytest.skip("a single CUDA device")
    cases = [(EXACT, 5)]
    (alone,) = trained(cases)
    check_ranks([rank for (rank,) in in_ranks(2, trained, cases, devices, device=group)], alone)
