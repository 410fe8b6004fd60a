"""A training step never waits for the device.

A detector watches every operator: once in whole steps on the CPU, where it finds what would wait on a GPU; and once on
tensors that claim to be on a GPU, where it also finds copies to and from the host.
"""

import contextlib
import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves, tree_map_only

from dali_pipelines.batch import MontageBatch
from mcl.config import Config
from mcl.models.norm import BatchNorm
from mcl.objectives import MCL
from mcl.ops import fallback
from mcl.ops.library import SCHEMAS
from mcl.records.meters import Meter
from mcl.records.timers import HostClock, Timer
from mcl.train.optim import AUTOCAST
from mcl.train.step import TrainingStep
from tests.conftest import ThinBackbone
from tests.mcl.detector import Detector, Waited
from tests.mcl.ops.test_batch_norm import arguments
from tests.mcl.ranks import in_ranks
from tests.step import FOUR_LEVELS, ONE_LEVEL, build, configure, views

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
def test_the_detector_finds_what_waits(wait: Callable[[Tensor], Any]) -> None:
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
            torch.where(device > 0, device * torch.tensor(2.0), 1.0)  # such a scalar is passed with the launch
    assert detector.seen["aten::index_put_"] == detector.seen["aten::where"] == 1


# ---------------------------------------------------------------------------------------------------- whole steps


def step_under_watch(cfg: Config, step: TrainingStep) -> Detector:
    """A whole step and its metrics."""
    meter = Meter(len(cfg.montage.ratios), MCL.scores, torch.device("cpu"), scaled=cfg.trainer.precision == "fp16")
    query, key = views(cfg)
    with Detector("cpu") as detector:
        meter.add(0, *step(query, key, lr=0.1, momentum=0.99))
    assert meter.failure() is None
    return detector


def check_whole_step(words: Sequence[str]) -> None:
    cfg = configure(*words)
    step = build(cfg)
    seen = step_under_watch(cfg, step).seen
    passes = cfg.trainer.accumulate
    norms = sum(isinstance(m, BatchNorm) for m in step.model.online.backbone.modules())
    assert seen["mcl::batch_norm_backward_apply"] >= passes * norms
    pools = cfg.objective == "mcl" and cfg.model.compute == "matched"  # released reshapes maps into tiles
    assert seen["mcl::region_pool_backward"] == (passes if pools else 0)
    assert seen["aten::_foreach_norm"] == 1  # for clipping
    operator = {"lars": "mcl::lars_", "sgd": "aten::_fused_sgd_", "adamw": "aten::_fused_adamw_"}[cfg.optim.name]
    assert seen[operator] == 2  # one per group of parameters
    assert seen["mcl::ema_"] == 1


@pytest.mark.parametrize(
    "words",
    [
        ("trainer.precision=bf16", "trainer.global_batch=2", "montage.images_per_canvas=[1,1]"),
        ("model.compute=released", "trainer.recompute=true", "optim.name=sgd"),
        ("objective=moco_v2", *ONE_LEVEL, "model.queue=6", "optim.name=sgd"),
        ("objective=byol", *ONE_LEVEL),
    ],
    ids=" ".join,
)
def test_a_whole_step_reads_nothing_back(words: tuple[str, ...]) -> None:
    check_whole_step(words)


@pytest.mark.usefixtures("thin_backbone")
@pytest.mark.parametrize("optimizer", ["lars", "adamw", "sgd"])
@pytest.mark.parametrize(
    "words",
    [
        ("model.compute=matched", "trainer.precision=bf16"),
        ("model.compute=released", "trainer.precision=bf16"),
        ("trainer.precision=fp16", "trainer.max_loss_scale=1"),
        ("trainer.precision=fp16", "trainer.max_loss_scale=1", "trainer.on_nonfinite=skip"),
    ],
    ids=" ".join,
)
def test_no_optimiser_waits(words: tuple[str, ...], optimizer: str) -> None:
    words = (*words, f"optim.name={optimizer}", "optim.clip_norm=1", "trainer.accumulate=2", "trainer.global_batch=8")
    check_whole_step(words)


@pytest.mark.usefixtures("thin_backbone")
@pytest.mark.parametrize("optimizer", ["lars", "adamw", "sgd"])
@pytest.mark.parametrize(
    "words",
    [
        ("trainer.on_nonfinite=skip",),
        ("trainer.on_nonfinite=skip", "trainer.precision=fp16", "trainer.max_loss_scale=1"),
    ],
    ids=["fp32", "fp16"],
)
def test_a_skipped_step_does_not_wait(words: tuple[str, ...], optimizer: str) -> None:
    """The host never learns whether a step was skipped."""
    cfg = configure(*words, f"optim.name={optimizer}", "optim.clip_norm=1")
    step, (query, key) = build(cfg), views(cfg)
    step(query, key, lr=0.1, momentum=0.99)
    before = {name: tensor.clone() for name, tensor in step.model.state_dict().items()}
    meter = Meter(len(cfg.montage.ratios), MCL.scores, torch.device("cpu"), skips=True)
    query = dataclasses.replace(query, pixels=query.pixels * float("nan"))
    with Detector("cpu"):
        meter.add(1, *step(query, key, lr=0.1, momentum=0.99))
    assert all(torch.equal(before[name], tensor) for name, tensor in step.model.state_dict().items())
    assert (meter.failure(), meter.read()["skipped"]) == (None, 1)


@pytest.mark.usefixtures("thin_backbone")
@pytest.mark.parametrize("optimizer", ["lars", "adamw", "sgd"])
def test_a_step_that_may_be_skipped_copies_buffers_alone(optimizer: str) -> None:
    """A step that cannot be skipped copies nothing; otherwise both call the same operators."""
    seen = {}
    for choice in ("stop", "skip"):
        cfg = configure(f"optim.name={optimizer}", f"trainer.on_nonfinite={choice}")
        seen[choice] = step_under_watch(cfg, build(cfg)).seen
    dtypes = 2  # fp32 and int64
    more = seen["skip"] - seen["stop"]
    assert not seen["stop"] - seen["skip"]
    assert more["aten::cat"] == 2 * dtypes  # before and after
    assert more["aten::where"] == more["aten::_foreach_copy_"] == dtypes
    assert not {"aten::clone", "aten::copy_", "aten::_foreach_clone"} & more.keys()


def wrapped_steps() -> list[Counter[str]]:
    """Operators of this rank's steps in DistributedDataParallel, in every precision, with on_nonfinite=stop and
    skip."""
    seen = []
    for precision, choice in itertools.product(("fp32", "bf16", "fp16"), ("stop", "skip")):
        words = f"trainer.precision={precision}", f"trainer.on_nonfinite={choice}", "trainer.accumulate=2"
        cfg = configure(*FOUR_LEVELS, *words, "trainer.global_batch=16", "optim.clip_norm=1")
        with mock.patch("mcl.models.encoder.Backbone", ThinBackbone):
            step, (query, key) = build(cfg), views(cfg, world=2)
        meter = Meter(4, MCL.scores, torch.device("cpu"), precision == "fp16", choice == "skip")
        with Detector("cpu") as detector:
            for number in range(2):  # buckets are rebuilt after the first step
                meter.add(number, *step(query, key, lr=0.1, momentum=0.99))
        seen.append(detector.seen)
    return seen


def test_a_step_of_several_processes_does_not_wait() -> None:
    for seen in itertools.chain(*in_ranks(2, wrapped_steps)):
        assert seen["c10d::allreduce_"] > seen["mcl::batch_norm_backward_reduce"] > 0  # of gradients, and of each norm
        assert seen["mcl::lars_"] == 4


class Peeking(torch.autograd.Function):
    """The identity; it searches its gradient for zeros."""

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
    cfg = configure()
    step = build(cfg)
    assert step_under_watch(cfg, step).seen["mcl::lars_"] == 2
    plant(step)
    with pytest.raises(Waited, match=operator):
        step_under_watch(cfg, step)


# ---------------------------------------------------------------------------------------------------- no real GPU


def without_memory(cfg: Config) -> MCL:
    with torch.device("meta"):
        return MCL(cfg)


def pretend(model: nn.Module) -> None:
    """Replaces a model's tensors by those of the active mode, on "cuda"."""
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


@contextlib.contextmanager
def autocast(step: TrainingStep) -> Iterator[None]:
    """Sets the switches that torch.autocast sets on a GPU."""
    dtype = AUTOCAST.get(step._config.trainer.precision)
    torch.set_autocast_enabled("cuda", dtype is not None)
    torch.set_autocast_dtype("cuda", dtype or torch.float16)
    yield
    torch.set_autocast_enabled("cuda", False)
    torch.clear_autocast_cache()


@pytest.fixture
def pretending(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a step run on tensors that claim to be on a GPU, without backward, whose engine needs a driver."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(Timer, "on", lambda device: Timer(HostClock()))
    monkeypatch.setattr(MCL, "to", lambda model, *_, **__: pretend(model))
    monkeypatch.setattr(TrainingStep, "autocast", autocast)
    monkeypatch.setattr(TrainingStep, "_parallel", lambda step: step.model)
    monkeypatch.setattr(Tensor, "backward", lambda loss: None)


@pytest.fixture
def eight_processes() -> Iterator[None]:
    """A process group that does not communicate."""
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:`torch.distributed.all_gather_into_tensor:FutureWarning")
@pytest.mark.usefixtures("pretending", "eight_processes")
@pytest.mark.parametrize("choice", ["stop", "skip"])
@pytest.mark.parametrize(
    ("precision", "optimizer", "compute", "variant"),
    [
        ("fp32", "lars", "released", ()),
        ("bf16", "sgd", "matched", ("model.targets=all", "model.queue=40")),
        ("fp16", "adamw", "matched", ("model.assembly=stack",)),
    ],
)
def test_a_step_stays_on_the_device(
    precision: str, optimizer: str, compute: str, variant: Sequence[str], choice: str
) -> None:
    """All of the step except backward, which whole steps above have covered, and its metrics."""
    words = f"trainer.precision={precision}", f"optim.name={optimizer}", f"model.compute={compute}"
    cfg = configure(*words, *variant, f"trainer.on_nonfinite={choice}", "optim.clip_norm=1")
    model = without_memory(cfg)
    query, key = views(cfg)
    convolved = set()

    def give_gradients(*_: Any) -> None:
        for p in model.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None

    with FakeTensorMode():
        query, key = pretended(query, "cuda"), pretended(key, "cuda")
        step = TrainingStep(cfg, model, torch.device("cuda"))
        meter = Meter(2, MCL.scores, torch.device("cuda"), precision == "fp16", choice == "skip")
        model.register_forward_hook(give_gradients)
        model.online.backbone.conv1.register_forward_hook(lambda module, inputs, out: convolved.add(out.dtype))
        with Detector("cuda") as detector:
            for number in range(2):  # the first step creates the optimiser's state
                output, norm = step(query, key, lr=0.1, momentum=0.99)
                meter.add(number, output, norm)
    assert convolved == {AUTOCAST.get(precision, torch.float32)}
    assert {output.loss.device.type, norm.device.type} == {"cuda"}
    assert {tensor.device.type for state in step.optimizer.state.values() for tensor in state.values()} == {"cuda"}
    seen = detector.seen
    pools = compute == "matched" and cfg.model.assembly == "montage"
    assert seen["mcl::region_pool"] == (4 if pools else 0)  # of both networks, in both steps
    assert seen["c10d::_allgather_base_"] == 4 + seen["mcl::batch_norm_apply"]  # of targets, and for each norm
    assert seen["aten::_amp_update_scale_"] == (2 if precision == "fp16" else 0)
    assert seen["mcl::ema_"] == 2


def test_the_backward_of_regions_stays_on_the_device() -> None:
    """Only the operator, since the autograd engine needs a driver."""
    with FakeTensorMode(), Detector("cuda") as detector:
        f = torch.empty(2, 8, 4, 4, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        boxes, index = torch.empty(3, 5, device="cuda"), torch.empty(3, device="cuda", dtype=torch.int64)
        grad = torch.empty(3, 8, 2, 2, device="cuda", dtype=torch.bfloat16)
        (found,) = torch.ops.mcl.region_pool_backward(grad, list(f.shape), [8.0], boxes, index, 0, True)
    assert (found.device.type, found.dtype, found.shape, found.stride()) == ("cuda", f.dtype, f.shape, f.stride())
    assert detector.seen["mcl::region_pool_backward"] == 1


def arguments_of_all(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Arguments of every operator."""
    maps = [torch.empty(2, 8, 4, 4, dtype=dtype), torch.empty(1, 8, 8, 8, dtype=dtype)]
    boxes, index = torch.empty(3, 5), torch.zeros(3, dtype=torch.int64)
    sizes = [side for f in maps for side in f.shape]
    params, found_inf = [torch.empty(3, 4), torch.empty(5)], torch.zeros(1)
    return {
        **arguments(dtype),
        "region_pool": (maps, [8.0, 4.0], boxes, index, 2, 0),
        "region_pool_backward": (torch.empty(3, 8, 2, 2, dtype=dtype), sizes, [8.0, 4.0], boxes, index, 2, True),
        "norms": (params,),
        "lars_": (params, params, params, None, 0.1, 0.9, 1e-4, 1e-3, True, found_inf),
        "ema_": (params, params, 0.9, found_inf),
    }


@pytest.mark.parametrize("name", SCHEMAS)
def test_operators_without_the_extension_stay_on_the_device(name: str) -> None:
    """Each operator in PyTorch or torchvision; results have the properties that the fake kernels say."""
    given = arguments_of_all(torch.bfloat16)[name]
    with FakeTensorMode(), Detector("cuda"):
        fakes = tree_map_only(
            Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda"), given
        )
        results = [getattr(fallback, name)(*fakes), getattr(torch.ops.mcl, name)(*fakes)]
    tensors = ([t for t in tree_leaves(result) if t is not None] for result in results)
    found, expected = ([(t.shape, t.dtype, t.device, t.stride()) for t in leaves] for leaves in tensors)
    assert found == expected
    assert {t[2].type for t in found} <= {"cuda"}


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

    def pin(x: Tensor) -> Tensor:  # a machine without a GPU cannot pin memory
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
