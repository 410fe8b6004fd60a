"""A training step makes no unnecessary copies, keeps no unnecessary memory, and uses channels_last throughout."""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile

from mcl.config import Config
from mcl.models.norm import BatchNorm
from tests.step import FOUR_LEVELS, build, configure, views


class Watched:
    """What the profiler recorded of a step."""

    def __init__(self, work: Callable[[], None]) -> None:
        with profile(profile_memory=True, record_shapes=True) as self._profiler:
            work()
        assert self._profiler.profiler is not None
        events = self._profiler.profiler.kineto_results.events()
        self.calls = Counter(e.name() for e in events)
        self.kept = sum(e.nbytes() for e in events if e.name() == "[memory]")  # bytes allocated minus bytes freed

    def copies(self) -> Counter[str]:
        """Number of copies of more than a scalar, by the operator or backward node that made them."""
        return Counter(
            self._origin(e) for e in self._profiler.events() or [] if e.name == "aten::copy_" and e.input_shapes[0]
        )

    @staticmethod
    def _origin(event: Any) -> str:
        while event.cpu_parent is not None and not event.cpu_parent.name.startswith("autograd::engine"):
            event = event.cpu_parent
        return str(event.name)


def test_steady_steps_copy_what_is_known_and_keep_nothing() -> None:
    cfg = configure("montage.cells=2", "trainer.global_batch=2")
    step = build(cfg)
    query, key = views(cfg)

    def work() -> None:
        step(query, key, lr=0.1, momentum=0.99)
        step.timer.read()

    work()
    Watched(work)  # frees memory that was allocated before the profiler started
    first, second = Watched(work), Watched(work)
    assert first.kept == second.kept == 0
    assert first.calls == second.calls  # calls of operators, including allocations

    copies = second.copies()
    # On a CPU a linear layer copies its bias to the output: two in each predictor and in both projectors.
    assert copies.pop("aten::linear") == 2 * 2 + 2 * 2
    # A weight's gradient is converted from the library's layout to ours, or a weight from ours to the library's.
    assert 0 < copies.pop("ConvolutionBackward0") <= second.calls["ConvolutionBackward0"]
    assert copies.pop("AvgPool2DBackward0") == 2  # one value per tile and channel
    assert not copies


def out_of_order(cfg: Config) -> set[str]:
    """Inputs and outputs of convolutions and norms in a step, and its gradients, that are not channels_last; and
    parameters whose gradient has another layout than they have."""
    step = build(cfg)
    found: set[str] = set()
    watched: Counter[str] = Counter()

    def note(what: str, name: str, x: Tensor) -> None:
        watched[what] += 1
        if x.shape[2:].numel() > 1 and not x.is_contiguous(memory_format=torch.channels_last):
            found.add(f"{what} of {name}")

    def watch(name: str, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        for what, x in (("input", inputs[0]), ("output", output)):
            note(what, name, x)
            if x.requires_grad:
                x.register_hook(functools.partial(note, f"{what}'s gradient", name))

    for name, module in step.model.named_modules():
        if isinstance(module, nn.Conv2d | BatchNorm):
            module.register_forward_hook(functools.partial(watch, name))
    step(*views(cfg), lr=0.1, momentum=0.99)
    assert min(watched.values()) > 50
    parameters = step.model.named_parameters()
    return found | {name for name, p in parameters if p.grad is not None and p.grad.stride() != p.stride()}


@pytest.mark.parametrize(
    "words",
    [("model.compute=released",), ("trainer.accumulate=2", "trainer.global_batch=4")],
    ids=["released", "matched and accumulated"],
)
def test_everything_is_channels_last(words: tuple[str, ...]) -> None:
    assert not out_of_order(configure("montage.cells=2", "trainer.global_batch=2", *FOUR_LEVELS, *words))
