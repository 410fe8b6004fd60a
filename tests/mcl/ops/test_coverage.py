"""A training step on a CPU calls what a GPU runs: each of our operators has a CUDA kernel."""

import itertools
import re
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import ROOT
from tests.fp64 import fast_convolutions
from tests.mcl.train import golden


class Called(TorchDispatchMode):
    """Names of the ``mcl`` operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mcl":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


def kernels(folder: Path) -> set[str]:
    """Operators that the sources in a folder implement."""
    sources = itertools.chain(folder.glob("*.cpp"), folder.glob("*.cu"))
    return {name for file in sources for name in re.findall(r'library\.impl\("(\w+)"', file.read_text())}


def test_every_operator_of_two_steps_has_a_cuda_kernel(tmp_path: Path) -> None:
    with fast_convolutions(), Called() as called:
        for _ in itertools.islice(golden.steps(tmp_path), 2):
            pass
    cpu, cuda = (kernels(ROOT / "kernels" / "csrc" / device) for device in ("cpu", "cuda"))
    assert {"region_pool", "region_pool_backward", "batch_norm_backward_apply", "lars_", "ema_"} <= called.names <= cpu
    assert called.names <= cuda
