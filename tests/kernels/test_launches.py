"""The count of launches, compared with counts by hand, and with the figures in the documents."""

import re
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from mcl import config
from mcl.models.norm import BatchNorm
from mcl.ops.library import SCHEMAS
from tests.conftest import ROOT
from tests.kernels import launches


def test_our_operators_count_as_their_sources_launch() -> None:
    """For each function of a .cu file, including the functions that it calls."""
    for source in (ROOT / "kernels" / "csrc" / "cuda").glob("*.cu"):
        bodies = dict(re.findall(r"^\S.* (\w+)\([^;]*?\) \{\n(.*?)^\}", source.read_text(), re.MULTILINE | re.DOTALL))

        def launched(name: str, bodies: dict[str, str] = bodies) -> int:
            called = re.findall(r"(?<![:\w])(\w+)\(", bodies[name])
            return bodies[name].count("<<<") + sum(launched(other) for other in called if other in bodies)

        for name in bodies.keys() & launches.LAUNCHES.keys() & SCHEMAS.keys():
            assert launched(name) == launches.LAUNCHES[name], name
    ours = {name for name in SCHEMAS if name.startswith(("batch_norm", "region_pool"))}
    assert ours <= launches.LAUNCHES.keys()


def normalized(before: bool) -> tuple[Counter[str], float]:
    """Launches of a BatchNorm of two groups with addition and ReLU, forward and backward, and the maps that it reads
    and writes."""
    with FakeTensorMode():
        norm = BatchNorm(8)
        x, residual = (
            torch.empty(6, 8, 5, 5, dtype=torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_()
            for _ in range(2)
        )
        if before:
            norm.forward = launches.in_turn(norm)  # type: ignore[method-assign]
        with launches.Meter() as meter:
            y: Tensor = norm(x, [4, 2], residual, relu=True)
            torch.autograd.grad(y, [x, residual, norm.weight], torch.empty_like(x))
    return meter.launches, meter.moved / x.nbytes


def test_one_norm_by_hand() -> None:
    now, moved = normalized(before=False)
    assert (+now, moved) == ({"BatchNorm": 6}, 4 + 7)  # as in the other table of kernels/README.md
    before, moved = normalized(before=True)
    assert moved == 8 + 8
    # Forward: 3 per group and its number of batches, addition, ReLU. Backward: 2 per group, ReLU.
    assert before["BatchNorm"] == 2 * (3 + 1) + 2 + 2 * 2 + 1
    assert before["all others"] >= 2  # cat, and the sum of the weight's gradients


@pytest.mark.filterwarnings("ignore:`torch.distributed.all_gather_into_tensor:FutureWarning")
def test_several_processes_launch_three_more() -> None:
    """Two of them are collectives."""
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        now, _ = normalized(before=False)
    finally:
        dist.destroy_process_group()
    assert (now["BatchNorm"], now["all others"]) == (4 + 3, 2)


@pytest.mark.usefixtures("thin_backbone")
def test_forward_is_that_of_a_gpu() -> None:
    """Runs on tensors that claim to be on a GPU. Without a GPU, PyTorch does not know that cuDNN would keep
    channels_last, so our norms copy their input."""
    cfg = config.from_dict({})
    for before in (True, False):
        operators, on_gpu = (launches.step(cfg, 32, before, device)[0].operators for device in ("cpu", "cuda"))
        more, fewer = on_gpu - operators, operators - on_gpu
        assert (more.keys() - {"device"}, fewer.keys() - {"device"}) == (set() if before else {"clone"}, set())


def test_the_documented_table_is_what_is_counted() -> None:
    before, now = launches.counted()
    assert now.launches.total() <= 0.5 * before.launches.total()
    assert now.moved <= 0.68 * before.moved
    assert launches.table() in (ROOT / "kernels" / "README.md").read_text()
