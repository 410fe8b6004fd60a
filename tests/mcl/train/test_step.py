"""A training step has the same result if it is accumulated, recomputed, captured, compiled or distributed."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from dali_pipelines.batch import MontageBatch
from mcl import distributed
from mcl.config import Config, ConfigError
from mcl.distributed import Gather
from mcl.models import backbones
from mcl.objectives import MCL, Output
from mcl.records import collapse
from mcl.train.step import TrainingStep
from tests.conftest import ThinBackbone, view
from tests.fp64 import fast_convolutions
from tests.mcl.ranks import in_ranks
from tests.step import FOUR_LEVELS, build, configure, normalize_parts, views

T = TypeVar("T")
Views = tuple[MontageBatch, MontageBatch]


def still(step: TrainingStep, batch: Views) -> tuple[Output, Tensor, dict[str, Tensor]]:
    """Results and gradients of a step that does not change weights."""
    with fast_convolutions():
        output, norm = step(*batch, lr=0, momentum=1)
    return output, norm, {n: p.grad for n, p in step.model.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------------------------------------------- accumulation


def in_evaluation(cfg: Config) -> TrainingStep:
    """Puts BatchNorms into evaluation mode, with random statistics."""
    step = build(cfg)
    for module in step.model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    step.model.eval()
    return step


@pytest.mark.usefixtures("thin_backbone")
@pytest.mark.parametrize(
    ("accumulate", "words"),
    [
        (2, FOUR_LEVELS),
        (4, FOUR_LEVELS),
        (2, (*FOUR_LEVELS, "montage.queries=[4,2,1,2]")),
        (4, (*FOUR_LEVELS, "model.compute=released")),
        (2, (*FOUR_LEVELS, "montage.queries=[2,1,2,1]", "model.compute=released")),
        (2, ("montage.images_per_canvas=[1,4]",)),
        (4, ("montage.images_per_canvas=[1,2]", "montage.queries=[2,1]")),
    ],
)
def test_accumulated_gradients_are_those_of_the_whole(accumulate: int, words: tuple[str, ...]) -> None:
    words = ("trainer.precision=fp64", "trainer.global_batch=16", *words)
    whole, parts = configure(*words), configure(*words, f"trainer.accumulate={accumulate}")
    batch = views(parts)
    output, norm, expected = still(in_evaluation(whole), batch)
    other, other_norm, gradients = still(in_evaluation(parts), batch)
    for name in ("loss", "losses", "scores", "targets"):
        torch.testing.assert_close(getattr(other, name), getattr(output, name), rtol=1e-10, atol=1e-12)
    expected_figures = collapse.figures(output)  # parts have the embeddings in another order
    assert collapse.figures(other) == {name: pytest.approx(own, rel=1e-6) for name, own in expected_figures.items()}
    torch.testing.assert_close(other_norm, norm, rtol=1e-10, atol=0)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-10 * max(gradient.norm(), 1e-3 * norm), name


@pytest.mark.usefixtures("thin_backbone")
def test_in_training_the_parts_differ_from_the_whole_by_batchnorm_alone() -> None:
    """Statistics are those of micro-batches. With these, a step of the whole batch equals the accumulated one."""
    words = ("trainer.precision=fp64", "trainer.global_batch=16")
    whole, parts = configure(*words), configure(*words, "trainer.accumulate=2")
    batch = views(parts)
    grouped = build(whole)
    normalize_parts(grouped.model, batch[0].canvas_counts, 2)
    output, norm, expected = still(grouped, batch)
    other, other_norm, gradients = still(build(parts), batch)
    torch.testing.assert_close(other.losses, output.losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(other_norm, norm, rtol=1e-12, atol=0)
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-10 * max(gradient.norm(), 1e-3 * norm), name


@pytest.mark.usefixtures("thin_backbone")
def test_all_targets_come_first_and_every_part_sees_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = configure("trainer.accumulate=2", "trainer.global_batch=8")
    step = build(cfg)
    events: list[str] = []
    banks: list[Tensor] = []
    step.model.target.register_forward_pre_hook(lambda *_: events.append("target"))
    step.model.online.register_forward_pre_hook(lambda *_: events.append("online"))
    step.model.register_forward_pre_hook(lambda *_: events.append("step"))
    wait = Gather.wait
    monkeypatch.setattr(Gather, "wait", lambda self: banks.append(wait(self)) or banks[-1])
    step(*views(cfg), lr=0.1, momentum=0.99)
    micro_batch = ["step", "online"]
    assert events == ["target"] * 2 + 2 * micro_batch
    assert [bank.shape for bank in banks] == [(8, 16)] * 4
    assert banks[0] is banks[2]
    assert banks[1] is banks[3]


# ---------------------------------------------------------------------------------------------------- recomputing


def state_after(step: TrainingStep, batches: Sequence[Views]) -> dict[str, Tensor]:
    """Losses and gradients of some steps, then all parameters and buffers."""
    seen = {}
    for i, batch in enumerate(batches):
        output, norm = step(*batch, lr=0.1, momentum=0.9)
        seen |= {f"losses {i}": output.losses.clone(), f"loss {i}": output.loss.clone(), f"norm {i}": norm.clone()}
        gradients = {f"gradient {i} of {n}": p.grad for n, p in step.model.named_parameters() if p.grad is not None}
        seen |= {name: gradient.clone() for name, gradient in gradients.items()}
    return seen | dict(step.model.state_dict())


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def shallow_resnet50(monkeypatch: pytest.MonkeyPatch) -> None:
    """resnet50 with a single block per stage."""
    monkeypatch.setitem(backbones._RESNETS, "resnet50", (backbones.Bottleneck, [1, 1, 1, 1]))


@pytest.mark.usefixtures("shallow_resnet50")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_recomputing_changes_no_bit(backbone: str, precision: str) -> None:
    recompute_and_compare(backbone, precision, steps=1)


@pytest.mark.soak
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_recomputing_changes_no_bit_of_several_steps(backbone: str, precision: str) -> None:
    recompute_and_compare(backbone, precision, steps=3)


def recompute_and_compare(backbone: str, precision: str, steps: int) -> None:
    small = ("montage.ratios=[1]", "montage.images_per_canvas=[1]", "model.loss_weights=[1]", "trainer.global_batch=2")
    words = (*small, f"model.backbone={backbone}", f"trainer.precision={precision}")
    batches = [views(configure(*words), seed) for seed in range(0, 2 * steps, 2)]
    plain = state_after(build(configure(*words)), batches)
    step = build(configure(*words, "trainer.recompute=true"))
    calls = Counter[str]()
    for name, module in step.model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    again = state_after(step, batches)
    assert calls["online.backbone.layer1.0.conv1"] == calls["online.backbone.conv1"] == 2 * steps
    assert calls["target.backbone.layer1.0.conv1"] == calls["online.fpn.laterals.0.conv"] == steps
    assert {"online.backbone.bn1.running_var", "online.backbone.layer4.0.bn2.num_batches_tracked"} <= plain.keys()
    assert same_bits(plain, again)


@pytest.mark.usefixtures("thin_backbone")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_images_of_half_precision_are_taken(precision: str) -> None:
    """``data.dtype: float16`` halves the data copied to the device, in whatever precision it is computed; bf16 uses
    it."""
    cfg = configure(f"trainer.precision={precision}")
    assert cfg.loading.dtype == ("float16" if precision == "bf16" else "float32")
    assert configure(f"trainer.precision={precision}", "data.dtype=float32").loading.dtype == "float32"
    query, key = (batch.to(torch.device("cpu"), torch.float16) for batch in views(cfg, 1))
    output, _ = build(cfg)(query, key, lr=0.1, momentum=0.9)
    assert output.loss.dtype == torch.float32
    assert output.loss.isfinite()


# ---------------------------------------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("trainer.accumulate=3",), r"trainer\.accumulate: 16 images .* divisible by 1, 2, 4, not by 3"),
        (
            ("trainer.accumulate=4", "montage.queries=[8,2]"),
            r"trainer\.accumulate: .* \[16, 4\] canvases, of which \[2, 2\] .* divisible by 1, 2, not by 4",
        ),
        (
            ("trainer.accumulate=4",),
            r"trainer\.global_batch: with 4 images .* micro-batch and 1 cell .* one value per channel",
        ),
        (("trainer.accumulate=-1",), r"trainer\.accumulate: Input should be auto or a whole number, 0 or more"),
        (("trainer.compile=true", "trainer.recompute=true"), r"trainer\.recompute: not supported by torch\.compile"),
    ],
)
def test_keys_that_cannot_be(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configure("montage.images_per_canvas=[1,4]", "trainer.global_batch=16", *words).images_per_rank(1)


@pytest.mark.usefixtures("thin_backbone")
def test_cuda_graphs_need_cuda() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.cuda_graph: needs a CUDA device; use trainer\.cuda_graph=false"):
        build(configure("trainer.cuda_graph=true"))


@pytest.mark.usefixtures("thin_backbone")
@pytest.mark.parametrize(("missing", "what"), [("which", "no gcc or clang"), ("get_path", r"no /none/Python\.h")])
def test_compiling_for_a_gpu_needs_a_compiler(missing: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda _: None if missing == "which" else "/usr/bin/gcc")
    monkeypatch.setattr("sysconfig.get_path", lambda _: "/none")
    with pytest.raises(ConfigError, match=rf"trainer\.compile: .*\({what}\); install gcc and python3-dev"):
        build(configure("trainer.compile=true"), torch.device("cuda"))


# ---------------------------------------------------------------------------------------------------- graphs


def tensors(output: Output) -> list[Tensor]:
    return [output.loss, output.losses, *output.scores.values()]


class Recorder:
    """A CPU version of a CUDA graph: it repeats the captured work in the same memory.

    Args:
        model: the model, whose gradients are part of this memory.
    """

    def __init__(self, model: MCL) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.recorded = self.replayed = 0

    def __call__(self, work: Callable[[], Output]) -> tuple[Output, Callable[[], None]]:
        def gradients() -> list[Tensor | None]:
            return [p.grad for p in self._parameters]

        def reset() -> None:
            for p in self._parameters:
                p.grad = None

        def again() -> None:
            self.replayed += 1
            assert all(p.grad is g for p, g in zip(self._parameters, memory, strict=True))
            reset()
            new = work()
            for kept, value in zip(tensors(result), tensors(new), strict=True):
                kept.copy_(value)
            for p, kept in zip(self._parameters, memory, strict=True):
                p.grad = kept if kept is None or p.grad is None else kept.copy_(p.grad)

        self.recorded += 1
        reset()
        result = work()
        memory = gradients()
        return result, again


@pytest.mark.usefixtures("thin_backbone")
@pytest.mark.parametrize(
    "words", [("optim.clip_norm=0.1",), ("trainer.accumulate=2", "model.targets=all", "model.queue=20")], ids=str
)
def test_replayed_steps_are_plain_steps(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """For two sizes of canvas, captured again at each change."""
    words = ("trainer.global_batch=8", *words)
    batches = [
        views(configure(*words, f"montage.cells={cells}"), seed)
        for seed, cells in enumerate([1, 1, 1, 2, 2, 1], start=1)
    ]
    plain = state_after(build(configure(*words)), batches)

    recorders: list[Recorder] = []
    monkeypatch.setattr(TrainingStep, "_recorder", lambda step: recorders.append(Recorder(step.model)) or recorders[-1])
    step = build(configure(*words, "trainer.cuda_graph=true"))
    assert same_bits(plain, state_after(step, batches))
    assert (recorders[0].recorded, recorders[0].replayed) == (3, 3)
    assert set(step.timer.read()) == {"graph", "optimizer"}


# ---------------------------------------------------------------------------------------------------- processes

SHARED = (*FOUR_LEVELS, "trainer.precision=fp64", "trainer.global_batch=16", "trainer.accumulate=2")


def shared_step() -> dict[str, Any]:
    """A step of one of two processes: the sequence of events, and the results."""
    events: list[str] = []
    reductions = Counter[int]()

    def noting(name: str, original: Callable[..., T]) -> Callable[..., T]:
        def call(*args: Any, **kwargs: Any) -> T:
            events.append(name)
            return original(*args, **kwargs)

        return call

    def reduce(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        reductions[bucket.index()] += 1
        events.append("reduce")
        return allreduce_hook(group, bucket)

    class Watched(DistributedDataParallel):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.register_comm_hook(None, reduce)

    cfg = configure(*SHARED)
    with (
        mock.patch("mcl.models.encoder.Backbone", ThinBackbone),
        mock.patch(f"{TrainingStep.__module__}.DistributedDataParallel", Watched),
    ):
        torch.manual_seed(0)
        model = MCL(cfg)
        step = TrainingStep(cfg, model, torch.device("cpu"))
    model.register_forward_pre_hook(lambda *_: events.append("step"))
    model.online.register_forward_hook(lambda *_: events.append("online"))
    with (
        mock.patch.object(Gather, "__init__", noting("gather", Gather.__init__)),
        mock.patch.object(Gather, "wait", noting("wait", Gather.wait)),
    ):
        output, norm, gradients = still(step, views(cfg, 1 + 2 * distributed.rank(), world=2))
    return {
        "events": events,
        "reductions": dict(reductions),
        "buckets": len(reductions),
        "losses": output.losses.numpy(),
        "norm": norm.item(),
        "tensors": {name: t.numpy() for name, t in {**gradients, **dict(model.named_buffers())}.items()},
    }


def together(batch: Sequence[MontageBatch], parts: int) -> MontageBatch:
    """The views of all processes as one, whose parts are those of all processes."""
    images = len(batch[0].index)
    pieces = [(rank, v.part(i, parts)) for i in range(parts) for rank, v in enumerate(batch)]
    levels = range(len(batch[0].ratios))
    pixels = [piece.pixels.split(piece.canvas_counts)[level] for level in levels for _, piece in pieces]
    sources = [piece.tile_images[piece.tiles(level)] + rank * images for level in levels for rank, piece in pieces]
    geometry = configure(*SHARED).montage
    return view(geometry, images * len(batch), torch.cat(pixels), torch.cat(sources))


@pytest.mark.usefixtures("thin_backbone")
def test_two_processes_gather_early_reduce_once_and_compute_what_one_does() -> None:
    first, second = in_ranks(2, shared_step)
    for rank in (first, second):
        # The exchange of both views' targets starts before the online network, and is waited for after it.
        micro_batch = ["step", "online", "wait", "wait"]
        events = [event for event in rank["events"] if event != "reduce"]
        assert events == ["gather", "gather", *micro_batch, *micro_batch]
        assert "reduce" not in rank["events"][: 2 + 2 * len(micro_batch)]
        assert set(rank["reductions"].values()) == {1}

    cfg = configure(*SHARED)
    query, key = (together(batch, 2) for batch in zip(views(cfg, 1, world=2), views(cfg, 3, world=2), strict=True))
    step = build(cfg)
    output, norm, gradients = still(step, (query, key))
    assert (first["losses"] + second["losses"]) / 2 == pytest.approx(output.losses.numpy(), rel=1e-10)
    expected = {**gradients, **dict(step.model.named_buffers())}
    for rank in (first, second):
        assert rank["norm"] == pytest.approx(norm.item(), rel=1e-10)
        assert rank["tensors"].keys() == expected.keys()
        for name, tensor in expected.items():
            # The gradient of a bias before a BatchNorm consists of rounding errors.
            bound = 1e-10 * max(tensor.abs().max().item(), 1e-3)
            assert abs(rank["tensors"][name] - tensor.numpy()).max() <= bound, name


# ---------------------------------------------------------------------------------------------------- compiling


def compiled_and_plain() -> list[tuple[float, float]]:
    """Losses of two steps of two micro-batches each, of which the second compiles nothing again; in float64, since
    updates amplify rounding errors of float32."""
    world = distributed.world_size()
    words = (f"trainer.global_batch={8 * world}", "trainer.accumulate=2", "trainer.precision=fp64")
    plain, compiled = build(configure(*words)), build(configure(*words, "trainer.compile=true"))
    losses = []
    for seed in (1, 3):
        batch = views(configure(*words), seed + 4 * distributed.rank(), world)
        with torch.compiler.set_stance("fail_on_recompile" if seed > 1 else "default"):
            found = compiled(*batch, lr=0.1, momentum=0.9)[0].loss.item()
        losses.append((found, plain(*batch, lr=0.1, momentum=0.9)[0].loss.item()))
    return losses


@pytest.mark.soak
@pytest.mark.parametrize("world", [1, 2])
def test_compiled_steps_are_plain_steps(world: int) -> None:
    for losses in in_ranks(world, compiled_and_plain) if world > 1 else [compiled_and_plain()]:
        for found, expected in losses:
            assert found == pytest.approx(expected, rel=1e-10)
