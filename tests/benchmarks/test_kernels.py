"""The benchmark of operators: what is compared, and its table."""

import pytest
import torch

from benchmarks import kernels
from benchmarks.common import summary
from benchmarks.kernels import Case


def case(wrong: float = 0.0) -> Case:
    x = torch.ones(4, 5, requires_grad=True)
    return Case({"mcl": lambda: 2 * x, "PyTorch": lambda: x + x + wrong}, [x], 1e-3)


def test_ways_are_raced_forward_and_backward() -> None:
    ours, theirs = kernels.race("doubling", case(), 2)
    assert (ours["name"], theirs["name"]) == ("doubling: mcl", "doubling: PyTorch")
    assert ours["n"] == theirs["n"] == 2
    assert 0 < theirs["forward"] < theirs["seconds"]
    assert (ours["ratio"], theirs["ratio"]) == (1, theirs["seconds"] / ours["seconds"])


def test_ways_that_differ_are_not_raced() -> None:
    with pytest.raises(AssertionError, match=r"doubling: a relative error of 4\.8e-02 between ours and another"):
        kernels.race("doubling", case(wrong=0.1), 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: kernels.region_pool(32, 4, "fp32", "channels_last", random=True),
        lambda: kernels.region_pool(32, 4, "bf16", "NCHW", random=False),
        lambda: kernels.multiscale(32, 4),
        lambda: kernels.norm(2, "bf16", 8, 6, residual=True),
        lambda: kernels.norm(2, "fp32", 8, 6, residual=False),
    ],
)
def test_cases_agree(make: object) -> None:
    made = make()  # type: ignore[operator]
    assert [result["n"] for result in kernels.race("case", made, 1)] == [1, 1]


def test_the_table_has_a_row_for_each_that_ours_is_compared_with() -> None:
    """The table does not depend on whether ours is first or last."""
    seconds = {"a: mcl": 0.001, "a: PyTorch": 0.0024, "b: loop": 0.03, "b: foreach": 0.04, "b: mcl": 0.02}
    results = [summary(name, [s] * 3, ratio=s / seconds[f"{name[0]}: mcl"]) for name, s in seconds.items()]
    assert kernels.table(results).splitlines()[2:] == [
        "| a | 1 (0%) | PyTorch | 2.4 (0%) | 2.4x |",
        "| b | 20 (0%) | loop | 30 (0%) | 1.5x |",
        "| b | 20 (0%) | foreach | 40 (0%) | 2x |",
    ]
