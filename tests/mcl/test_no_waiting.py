"""A training step never waits for the device, and copies and allocates no more than it has to.

Every operator passes a detector: once in whole steps on the CPU, which sees what would wait were this a GPU; once on
tensors that claim to be on a GPU, which sees copies between it and the host, too.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from dali_pipelines.batch import MontageBatch
from mcl import ops
from mcl.config import Config
from mcl.models import MCL
from mcl.records.meters import Meter
from mcl.train import ema
from mcl.train.optim import build_optimizer
from mcl.train.step import TrainingStep
from mcl.train.undo import Undo
from tests.step import FOUR_LEVELS, build, configure, views

READS = {
    *("_local_scalar_dense", "equal", "allclose", "nonzero", "masked_select", "bincount", "repeat_interleave"),
    *("_unique", "_unique2", "unique_dim", "unique_dim_consecutive", "unique_consecutive"),
}
"""Operators whose result, or its shape, the host must know; item(), bool(), tolist() and where(x) are made of them."""

INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
"""Those that count the Trues of a mask."""


class Waited(AssertionError):
    """The host would have waited for the device."""


class Detector(TorchDispatchMode):
    """Raises where the host would wait for a device, and counts the operators that have passed.

    Args:
        device: whose tensors are computed with; "cpu" stands for a GPU.
        host: tensors that are on the host all the same.
        pinned: those from which a copy to the device need not wait.
    """

    def __init__(self, device: str, host: Sequence[Tensor] = (), pinned: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self._device, self._host, self._pinned = device, {id(t) for t in host}, pinned
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._opname
        if name in READS and any(map(self._on_device, args)):
            raise Waited(str(func))
        if name in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            raise Waited(f"{func} by a mask")
        if name.startswith(("index_put", "_index_put", "_unsafe_index_put")) and args[2].device != args[0].device:
            raise Waited(f"{func} of a value on the host")
        out = func(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            into = name == "copy_"  # (target, source, non_blocking)
            asynchronous = kwargs.get("non_blocking", into and args[2:] == (True,))
            self._check_copy(str(func), args[1] if into else args[0], out, asynchronous)
        self.seen[f"{func.namespace}::{name}"] += 1
        return out

    def _on_device(self, x: object) -> bool:
        return isinstance(x, Tensor) and x.device.type == self._device and id(x) not in self._host

    def _check_copy(self, name: str, source: Tensor, target: Tensor, asynchronous: bool) -> None:
        if source.device == target.device:
            return
        if target.device.type == "cpu":
            raise Waited(f"{name} to the host")
        if not (asynchronous and any(source is p for p in self._pinned)):
            raise Waited(f"{name} from pageable memory")


# ---------------------------------------------------------------------------------------------------- the detector


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0].item(),
        lambda x: bool((x > 0).any()),
        lambda x: 1.0 if x.sum() > 0 else 0.0,
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x[x > 0],
        lambda x: x[(x > 0).byte()],
        lambda x: x.clone().index_put_((x > 0,), x[:1]),
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: x[:, None].unique(dim=0),
        lambda x: x.unique_consecutive(),
        lambda x: torch.equal(x, x + 1),
        lambda x: torch.allclose(x, x + 1),
        lambda x: x.long().bincount(),
        lambda x: x.repeat_interleave(x.long()),
    ],
)
@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
def test_the_detector_knows_what_waits(wait: Callable[[Tensor], Any]) -> None:
    with pytest.raises(Waited), Detector("cpu"):
        wait(torch.arange(4.0))


@pytest.mark.parametrize(
    "copy",
    [
        lambda device, host: device.cpu(),
        lambda device, host: host.copy_(device, non_blocking=True),
        lambda device, host: host.to("cuda", non_blocking=True),
        lambda device, host: device.copy_(host, non_blocking=True),
        lambda device, host: torch.tensor([1.0, 2.0], device="cuda"),
        lambda device, host: torch.tensor(1.0, device="cuda"),
        lambda device, host: device * torch.tensor(0.5).to("cuda"),
        lambda device, host: device.index_put_((torch.zeros(2, dtype=torch.int64, device="cuda"),), host[0]),
        lambda device, host: device[0].item(),
    ],
)
def test_the_detector_knows_copies_between_host_and_device(copy: Callable[[Tensor, Tensor], Any]) -> None:
    with FakeTensorMode():
        device, host = torch.empty(4, device="cuda"), torch.empty(4)
        with pytest.raises(Waited), Detector("cuda"):
            copy(device, host)


def test_the_detector_lets_pass_what_does_not_wait() -> None:
    with FakeTensorMode():
        device, host = torch.empty(4, device="cuda"), torch.empty(4)
        with Detector("cuda", pinned=[host]) as detector:
            device.copy_(host, non_blocking=True)
            device[torch.zeros(2, dtype=torch.int64, device="cuda")] = device[:2]
            torch.where(device > 0, device * torch.tensor(2.0), 1.0)  # such a scalar goes along with the launch
    assert detector.seen["aten::index_put_"] == detector.seen["aten::where"] == 1


# ---------------------------------------------------------------------------------------------------- whole steps


def step_under_watch(step: TrainingStep, host: Sequence[Tensor] = ()) -> Detector:
    """A whole step and its metrics."""
    cfg = step._config
    meter = Meter(len(cfg.montage.ratios), torch.device("cpu"), scaled=cfg.trainer.precision == "fp16")
    query, key = views(cfg)
    with Detector("cpu", host) as detector:
        meter.add(0, *step(query, key, lr=0.1, momentum=0.99))
    assert meter.failure() is None
    return detector


def check_whole_step(words: Sequence[str]) -> None:
    cfg = configure(*words)
    step = build(cfg)
    counters: list[Tensor] = []
    if cfg.optim.name == "adamw":  # it counts its steps on the host
        step(*views(cfg), lr=0.1, momentum=0.99)
        counters = [state["step"] for state in step.optimizer.state.values()]
    seen = step_under_watch(step, counters).seen
    passes = cfg.trainer.accumulate * (1 if cfg.model.compute == "matched" else 2)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in step.model.online.backbone.modules())
    assert seen["mcl::batch_norm_backward"] >= passes * norms
    assert seen["mcl::region_pool_backward"] == passes
    assert seen["aten::_foreach_norm"] == 1  # clipping
    assert seen["mcl::lars_"] == (2 if cfg.optim.name == "lars" else 0)  # its two groups
    assert seen["mcl::ema_"] == 1


@pytest.mark.parametrize(
    "words",
    [
        ("trainer.precision=bf16", "trainer.global_batch=2", "montage.images_per_canvas=[1,1]"),
        ("model.compute=released", "trainer.recompute=true", "optim.name=sgd"),
    ],
    ids=" ".join,
)
def test_a_whole_step_reads_nothing_back(words: tuple[str, ...]) -> None:
    check_whole_step(words)


@pytest.mark.usefixtures("thin_backbone")
@pytest.mark.parametrize("optimizer", ["lars", "adamw", "sgd"])
@pytest.mark.parametrize("compute", ["matched", "released"])
def test_nor_does_it_with_any_optimiser(compute: str, optimizer: str) -> None:
    words = [f"model.compute={compute}", f"optim.name={optimizer}", "trainer.precision=bf16", "optim.clip_norm=1"]
    check_whole_step([*words, "trainer.accumulate=2", "trainer.global_batch=8"])


@pytest.mark.usefixtures("thin_backbone")
@pytest.mark.parametrize("optimizer", ["lars", "adamw", "sgd"])
def test_nor_does_one_that_is_skipped(optimizer: str) -> None:
    """Whether it is, the host never learns."""
    cfg = configure(f"optim.name={optimizer}", "trainer.on_nonfinite=skip", "optim.clip_norm=1")
    step, (query, key) = build(cfg), views(cfg)
    step(query, key, lr=0.1, momentum=0.99)
    before = {name: tensor.clone() for name, tensor in step.model.state_dict().items()}
    meter = Meter(len(cfg.montage.ratios), torch.device("cpu"), skips=True)
    query = dataclasses.replace(query, pixels=query.pixels * float("nan"))
    counters = [state["step"] for state in step.optimizer.state.values()] if optimizer == "adamw" else []
    with Detector("cpu", counters) as detector:
        meter.add(1, *step(query, key, lr=0.1, momentum=0.99))
    assert detector.seen["aten::where"] > len(before)
    assert all(torch.equal(before[name], tensor) for name, tensor in step.model.state_dict().items())
    assert (meter.failure(), meter.read()["skipped"]) == (None, 1)


@pytest.mark.usefixtures("thin_backbone")
def test_fp16_reads_one_flag_of_its_loss_scaler() -> None:
    """Whether a gradient overflowed decides on the host whether the optimiser steps: so does PyTorch's GradScaler."""
    cfg = configure("trainer.precision=fp16", "trainer.max_loss_scale=1")
    with pytest.raises(Waited, match="_local_scalar_dense"):
        step_under_watch(build(cfg))
    step, flags = build(cfg), []

    def do_not_look(optimizer: Any, state: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        flags.extend(state["found_inf_per_device"].values())
        optimizer.step()

    step.scaler._maybe_opt_step = do_not_look  # type: ignore[method-assign]
    assert step_under_watch(step).seen["mcl::lars_"] == 2
    assert [flag.numel() for flag in flags] == [1]


class Peeking(torch.autograd.Function):
    """The identity, which looks for zeros in its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad.nonzero()
        return grad


def mask_in_forward(step: TrainingStep) -> None:
    step.model.online.head.register_forward_pre_hook(lambda _, inputs: inputs[0][inputs[0] > 0].sum() and None)


def nonzero_in_backward(step: TrainingStep) -> None:
    step.model.online.head.register_forward_pre_hook(lambda _, inputs: (Peeking.apply(inputs[0]), inputs[1]))


def item_in_the_loss(step: TrainingStep) -> None:
    step.model.register_forward_hook(lambda module, inputs, output: output.loss.item() and None)


def item_in_the_optimizer(step: TrainingStep) -> None:
    weight = step.model.predictors[0][0].weight
    step.optimizer.register_step_pre_hook(lambda *_: weight.norm().item() and None)


@pytest.mark.usefixtures("thin_backbone")
@pytest.mark.parametrize(
    ("plant", "operator"),
    [
        (mask_in_forward, "aten.index.Tensor by a mask"),
        (nonzero_in_backward, "aten.nonzero"),
        (item_in_the_loss, "aten._local_scalar_dense"),
        (item_in_the_optimizer, "aten._local_scalar_dense"),
    ],
)
def test_one_planted_wait_is_found(plant: Callable[[TrainingStep], None], operator: str) -> None:
    step = build(configure())
    assert step_under_watch(step).seen["mcl::lars_"] == 2
    plant(step)
    with pytest.raises(Waited, match=operator):
        step_under_watch(step)


# ---------------------------------------------------------------------------------------------------- no real GPU


def without_memory(cfg: Config) -> MCL:
    with torch.device("meta"):
        return MCL(cfg.model, cfg.montage)


def pretend(model: nn.Module) -> None:
    """Puts tensors of the active mode, on "cuda", in place of a model's own."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            fake = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device="cuda")
            module.register_parameter(name, nn.Parameter(fake, p.requires_grad))
        for name, b in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.empty(b.shape, dtype=b.dtype, device="cuda"))


def pretended(view: MontageBatch, device: str) -> MontageBatch:
    tensors = {f.name: getattr(view, f.name) for f in dataclasses.fields(view)}
    fakes: dict[str, Any] = {
        name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
        for name, t in tensors.items()
        if isinstance(t, Tensor)
    }
    return dataclasses.replace(view, **fakes)


@pytest.mark.parametrize("compute", ["matched", "released"])
def test_forward_and_metrics_stay_on_the_device(compute: str) -> None:
    """Without autocast, which needs a GPU; as backward does, which whole steps above have shown."""
    cfg = configure(f"model.compute={compute}")
    model = without_memory(cfg)
    query, key = views(cfg)
    with FakeTensorMode():
        pretend(model)
        query, key = pretended(query, "cuda"), pretended(key, "cuda")
        meter = Meter(2, torch.device("cuda"))
        with Detector("cuda") as detector:
            output = model(query, key)
            meter.add(0, output, output.loss.detach())
    assert output.loss.device.type == "cuda"
    assert detector.seen["mcl::region_pool"] == 4


@pytest.mark.usefixtures("thin_backbone")
@pytest.mark.parametrize("optimizer", ["lars", "adamw", "sgd"])
def test_clipping_optimiser_and_momentum_network_stay_on_the_device(optimizer: str) -> None:
    """With gradients set by hand. PyTorch takes lists of fake tensors one by one; above they passed as lists."""
    cfg = configure(f"optim.name={optimizer}")
    model = without_memory(cfg)
    with FakeTensorMode():
        pretend(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        update = build_optimizer(cfg.optim, model)
        with Detector("cuda") as detector:
            for _ in range(2):  # its state comes to be in the first
                for p in trained:
                    p.grad = torch.empty_like(p)
                norm = ops.clip_grad_norm_(trained, 1.0)
                update.step()
                ema.update(model.target.parameters(), model.online.parameters(), 0.99)
    assert norm.device.type == "cuda"
    assert {tensor.device.type for state in update.state.values() for tensor in state.values()} >= {"cuda"}
    assert detector.seen["mcl::ema_"] == 2


@pytest.mark.usefixtures("thin_backbone")
@pytest.mark.parametrize("optimizer", ["lars", "adamw", "sgd"])
def test_undoing_a_step_stays_on_the_device(optimizer: str) -> None:
    """So does, then, AdamW's count of steps."""
    cfg = configure(f"optim.name={optimizer}")
    model = without_memory(cfg)
    with FakeTensorMode():
        pretend(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        update = build_optimizer(cfg.optim, model, on_device=True)
        with Detector("cuda") as detector:
            for _ in range(2):
                undo = Undo(model.buffers())
                for p in trained:
                    p.grad = torch.empty_like(p)
                undo.keep(model.parameters(), update)
                update.step()
                undo.unless(ops.clip_grad_norm_(trained, 1.0).isfinite())
    assert {tensor.device.type for state in update.state.values() for tensor in state.values()} == {"cuda"}
    assert detector.seen["aten::where"] > 2 * len(trained)


@pytest.mark.usefixtures("thin_backbone")
def test_a_copy_planted_in_forward_is_found() -> None:
    cfg = configure()
    model = without_memory(cfg)
    query, key = views(cfg)
    with FakeTensorMode():
        pretend(model)
        query, key = pretended(query, "cuda"), pretended(key, "cuda")
        for plant in (lambda x: x.mean().cpu(), lambda x: torch.arange(2.0).to(x.device)):
            hook = model.online.head.register_forward_hook(lambda module, inputs, out, plant=plant: plant(out) and None)
            with pytest.raises(Waited, match="_to_copy"), Detector("cuda"):
                model(query, key)
            hook.remove()


def test_views_go_to_the_device_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Tensor] = []

    def pin(x: Tensor) -> Tensor:  # there is nothing to pin on a machine without a GPU
        pinned.append(torch.empty_like(x))
        return pinned[-1]

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    cfg = configure()
    query, _ = views(cfg)
    with FakeTensorMode():
        query = pretended(query, "cpu")
        with Detector("cuda", pinned=pinned) as detector:
            moved = query.to(torch.device("cuda"))
            again = moved.to(torch.device("cuda"))
    assert moved.pixels.device.type == "cuda"
    assert moved.pixels.is_contiguous(memory_format=torch.channels_last)
    assert again.pixels is moved.pixels
    assert len(pinned) == detector.seen["aten::_to_copy"] == 6


# ---------------------------------------------------------------------------------------------------- copies, memory


class Watched:
    """What the profiler saw of a step."""

    def __init__(self, work: Callable[[], None]) -> None:
        with profile(profile_memory=True, record_shapes=True) as self._profiler:
            work()
        assert self._profiler.profiler is not None
        events = self._profiler.profiler.kineto_results.events()
        self.calls = Counter(e.name() for e in events)
        self.kept = sum(e.nbytes() for e in events if e.name() == "[memory]")  # bytes allocated less bytes freed

    def copies(self) -> Counter[str]:
        """How many of more than a scalar, by the operator or the node of the backward graph that called for them."""
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
    Watched(work)  # it frees what was allocated unseen
    first, second = Watched(work), Watched(work)
    assert first.kept == second.kept == 0
    assert first.calls == second.calls  # of operators, allocations among them

    copies = second.copies()
    # The product that is a weight's gradient turns its first factor round.
    assert copies.pop("_LinearBackward") == 2 * (2 * 2) + 2  # per view the predictors of both levels; the projector
    # The library's layout of a weight's gradient becomes ours, or our layout of a weight the library's.
    assert 0 < copies.pop("ConvolutionBackward0") <= second.calls["ConvolutionBackward0"]
    assert copies.pop("AvgPool2DBackward0") == 2  # one value per tile and channel
    assert not copies


def out_of_order(cfg: Config) -> set[str]:
    """What convolutions and norms read and write in a step, and its gradients, where it is not channels_last; and
    parameters whose gradient lies otherwise in memory than they do."""
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
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_hook(functools.partial(watch, name))
    step(*views(cfg), lr=0.1, momentum=0.99)
    assert min(watched.values()) > 100
    parameters = step.model.named_parameters()
    return found | {name for name, p in parameters if p.grad is not None and p.grad.stride() != p.stride()}


@pytest.mark.parametrize(
    "words",
    [("model.compute=released",), ("trainer.accumulate=2", "trainer.global_batch=4")],
    ids=["released", "matched and accumulated"],
)
def test_everything_is_channels_last(words: tuple[str, ...]) -> None:
    assert not out_of_order(configure("montage.cells=2", "trainer.global_batch=2", *FOUR_LEVELS, *words))
