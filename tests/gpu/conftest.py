"""Tests with `device` run twice: on the CPU with small sizes, in ``make test``, to keep them working; and on a GPU."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from mcl.ops.library import compiled
from tests.mcl.conftest import few_photos, tiny  # noqa: F401
from tests.mcl.detector import Detector


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param, *([0] if request.param == "cuda" else []))


@pytest.fixture(autouse=True)
def _there_is_one(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def built(request: pytest.FixtureRequest) -> None:
    """Skips the test unless operators are compiled for the device."""
    if request.node.get_closest_marker("gpu") and not compiled("region_pool", "cuda"):
        pytest.skip("the operators are not compiled for CUDA")


@contextlib.contextmanager
def unwaiting(device: torch.device) -> Iterator[None]:
    """Raises an error if the host waits for the device; on the CPU, if it would wait for a GPU."""
    if device.type == "cpu":
        with Detector("cpu"):
            yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def memory(device: torch.device) -> int:
    """Bytes in use on a GPU, by any process; for the CPU, see tests/dali_pipelines/test_soak.py."""
    if device.type == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free
