"""Communication in a budget: calls and bytes equal those of a real step, and times follow from them."""

import json
import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dali_pipelines.geometry import Geometry
from mcl import cli, distributed
from mcl.budget import budget, communication, count, show
from mcl.budget.communication import LINKS, Links
from mcl.config import Config
from mcl.distributed.consensus import Consensus
from mcl.objectives import build
from mcl.train.step import TrainingStep
from tests.conftest import ROOT, ThinBackbone
from tests.mcl.ranks import in_ranks
from tests.step import FOUR_LEVELS, ONE_LEVEL, configure, views

DEMO = str(ROOT / "mcl" / "presets" / "mcl_r18_fpn_demo.yaml")
REAL = configure("trainer.global_batch=8", "trainer.recompute=true")
THIN = [
    configure("trainer.global_batch=8", "trainer.precision=fp64", *FOUR_LEVELS),
    configure(
        "trainer.global_batch=16", "trainer.accumulate=2", "montage.cells=2", *FOUR_LEVELS, "montage.queries=[2,1,1,1]"
    ),
    configure("trainer.global_batch=8", "model.compute=released", "model.width=64", "model.hidden=1024", *FOUR_LEVELS),
    configure("trainer.global_batch=8", "trainer.accumulate=2", "objective=moco_v2", "model.queue=6", *ONE_LEVEL),
    configure("trainer.global_batch=8", "objective=byol", *ONE_LEVEL),
]


def thin(cfg: Config) -> AbstractContextManager[Any]:
    return nullcontext() if cfg == REAL else mock.patch("mcl.models.encoder.Backbone", ThinBackbone)


class Exchanged(TorchDispatchMode):
    """Records calls and bytes of every collective of any process group, including DistributedDataParallel's."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.c10d.allreduce_.default:
            self._add("all-reduce", *args[0])
        elif func is torch.ops.c10d._allgather_base_.default:
            self._add("all-gather", args[1])
        else:
            assert func.namespace != "c10d", func
        return func(*args, **(kwargs or {}))

    def _add(self, operation: str, *tensors: torch.Tensor) -> None:
        self.sizes.setdefault(operation, []).append(sum(t.nbytes for t in tensors))


def exchanged(cases: list[Config]) -> list[dict[str, list[int]]]:
    """Sizes of the collectives in the third step of every case, since buckets get their final layout in the second
    step."""
    said = []
    for cfg in cases:
        with thin(cfg):
            step = TrainingStep(cfg, build(cfg), torch.device("cpu"))
        query, key = views(cfg, world=distributed.world_size())
        consensus = Consensus()
        for _ in range(2):
            step(query, key, 0.1, 0.9)
        with Exchanged() as calls:
            step(query, key, 0.1, 0.9)
            consensus(0)
        said.append(calls.sizes)
    return said


@pytest.mark.parametrize("cases", [THIN, pytest.param([REAL], marks=pytest.mark.soak)], ids=["thin", "resnet18"])
def test_calls_and_bytes_are_those_of_a_real_step(cases: list[Config]) -> None:
    """Compares every single collective."""
    buckets = []
    for sizes in in_ranks(2, exchanged, cases):
        for cfg, real in zip(cases, sizes, strict=True):
            accumulate = cfg.trainer.accumulate
            with thin(cfg):
                counted = count.step.__wrapped__(  # keeps counts of thin models out of the cache
                    cfg, cfg.images_per_rank(2) // accumulate, 2 * accumulate
                )
            predicted = communication.exchanges(counted, accumulate)
            for operation in ("all-reduce", "all-gather"):
                calls = [size for e in predicted if e.operation == operation for size in e.sizes]
                assert sorted(calls) == sorted(real[operation]), (cfg, operation)
            buckets += [len(e.sizes) for e in predicted if e.purpose == "gradients"]
    assert max(buckets) >= 2


def test_all_groups_of_a_norm_go_together() -> None:
    """2 C + 1 numbers in forward and 2 C in backward per group, in fp32 and fp64."""
    norms = [
        count.Normalization(3, 1, 4, True),
        count.Normalization(5, 2, 4, False),
        count.Normalization(2, 3, 8, True),
    ]
    counted = count.Count({}, {}, {}, {}, norms, [1000, 24], [64, 64], 0)
    targets, forward, backward, gradients, signals = communication.exchanges(counted, 2)
    assert (targets.operation, targets.sizes) == ("all-gather", [128, 128])
    assert (forward.operation, forward.sizes) == ("all-gather", [28, 88, 120] * 2)
    assert (backward.operation, backward.sizes) == ("all-reduce", [24, 96] * 2)
    assert (gradients.operation, gradients.sizes) == ("all-reduce", [1024])
    assert (signals.operation, signals.sizes) == ("all-reduce", [8])


def test_gradients_fill_buckets_in_their_order() -> None:
    """A first bucket of at least a MiB, then buckets of 25 MiB."""
    mib = 2**20
    assert communication.buckets([mib // 2, mib // 2, 20 * mib, 4 * mib, 2 * mib, 30 * mib, 7]) == [
        mib,
        26 * mib,
        30 * mib,
        7,
    ]


def test_seconds_of_a_collective() -> None:
    """Large messages are limited by the slowest link, small ones by the number of hops, of which a tree has fewer."""
    links = Links("H100", within_gb_per_s=400.0, between_gb_per_s=100.0, source="")

    def seconds(operation: str, size: int, world: int, nodes: int) -> float:
        return communication.collective_time(operation, size, world, nodes, links)

    giga = 10**9
    assert seconds("all-reduce", 400 * giga, 8, 1) == pytest.approx(2 * 7 / 8, rel=1e-3)
    assert seconds("all-reduce", 400 * giga, 16, 2) == pytest.approx(4 * 2 * 15 / 16, rel=1e-3)
    assert seconds("all-gather", 4 * giga, 8, 1) == pytest.approx(7 / 100, rel=1e-3)
    assert seconds("all-gather", 8, 256, 32) == pytest.approx(3.6e-6 + 224 * 0.47e-6 * 1.8 + 31 * 2.7e-6, rel=1e-3)
    assert seconds("all-reduce", 8, 256, 32) == pytest.approx(4.4e-6 + 2 * (7 * 0.52e-6 * 1.8 + 5 * 5e-6), rel=1e-3)
    assert seconds("all-reduce", 8, 2, 1) == pytest.approx(3.6e-6 + 2 * 0.47e-6, rel=1e-3)


def test_communication_that_overlaps_with_computation() -> None:
    """Gradients except the last bucket overlap with backward as far as time allows; BatchNorm's collectives never
    overlap."""
    flops = {"backbone": 3 * 10**12, "loss": 10**12, "momentum network": 2 * 10**12}
    norms = [count.Normalization(256, 1, 4, True)]

    def step(gradients: list[int], targets: int, share: float = 1.0) -> tuple[float, ...]:
        counted = count.Count(flops, {"backbone": 8 * 10**12}, {}, {}, norms, gradients, [targets], 0)
        stage = count.Stage(0, 1, Geometry(), counted, images=8, accumulate=1, views=1.0)
        return tuple(communication.step_times(stage, 1e13, share, 16, 2, LINKS[0]).values())

    gib = 2**30
    compute, gradients, targets, batchnorm, exposed = step([gib, gib], 1000)
    assert compute == pytest.approx(1.4)
    assert gradients < 0.8
    assert exposed == pytest.approx(batchnorm + gradients / 2)
    assert targets < 0.4
    _, gradients, _, batchnorm, exposed = step([gib] * 200, 1000)
    assert gradients > 0.8
    assert exposed == pytest.approx(batchnorm + gradients - 0.8)
    _, gradients, targets, batchnorm, exposed = step([gib], 20 * gib)
    assert exposed == pytest.approx(batchnorm + targets - 0.4 + gradients)
    assert step([gib], 1000, share=4.0)[0] == pytest.approx(1.4 + 0.3)


def test_a_budget_says_what_many_gpus_cost(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["budget", DEMO, "trainer.precision=bf16", "trainer.global_batch=2048"]
    cli.main([*arguments, "--gpus", "64", "--nodes", "8", "--bandwidth", "230,160", "--json"])
    result = json.loads(capsys.readouterr().out)
    said = result["communication"]
    assert said["nodes"] == 8
    assert {(k["within_gb_per_s"], k["between_gb_per_s"], k["source"]) for k in said["links"]} == {
        (230, 160, "--bandwidth")
    }
    scales = [s for s in said["scales"] if s["hardware"] == "H100"]
    assert [(s["nodes"], s["gpus"], s["global_batch"]) for s in scales] == [(n, 8 * n, 256 * n) for n in (1, 2, 4, 8)]
    efficiencies = [s["efficiency"] for s in scales]
    assert all(0 < e < 1 for e in efficiencies)
    assert efficiencies == sorted(efficiencies, reverse=True)
    for s in said["scales"]:
        assert s["efficiency"] == pytest.approx(s["compute_s"] / (s["compute_s"] + s["exposed_s"]))
        assert s["exposed_s"] >= s["batchnorm_s"]
    documented = (ROOT / "mcl" / "budget" / "cost.py").read_text()
    assert all(key in documented for key in [*said, *scales[0], *said["links"][0], *said["per_step"][0]])
    text = show.tables(result)
    assert re.search(r"gradients +all-reduce +\d+ +[\d.,]+\n", text)
    assert re.search(r"H100, estimate +8 +64 +2,048 ", text)
    assert max(map(len, text.splitlines())) < 160


def test_links_are_published_ones_unless_given() -> None:
    result = budget(configure("trainer.global_batch=8", "trainer.precision=bf16"), gpus=2)["communication"]
    assert (result["nodes"], [s["gpus"] for s in result["scales"]]) == (1, [2, 2, 2])
    links = {k["hardware"]: (k["within_gb_per_s"], k["between_gb_per_s"]) for k in result["links"]}
    assert links == {"A100": (300, 200), "H100": (450, 400), "V100": (150, 50)}
    assert all("data sheet" in k["source"] for k in result["links"])
    assert [communication.nodes_of(gpus, None) for gpus in (1, 8, 9, 12, 64)] == [1, 1, 3, 2, 8]


def test_a_single_gpu_exchanges_nothing() -> None:
    said = budget(configure("trainer.global_batch=8"), gpus=1)
    assert said["communication"]["per_step"] == []
    assert said["communication"]["scales"] == []
    assert "communication" not in show.tables(said)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "2", "--nodes", "3"], r"--nodes: 2 GPUs cannot be divided among 3 nodes"),
        (["--gpus", "2", "--nodes", "0"], r"--nodes: 2 GPUs cannot be divided among 0 nodes"),
        (["--bandwidth", "200"], r"--bandwidth: give two positive numbers"),
        (["--bandwidth", "200,0"], r"--bandwidth: give two positive numbers"),
        (["--bandwidth", "fast"], r"argument --bandwidth: invalid"),
    ],
)
def test_wrong_machines(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["budget", DEMO, "trainer.global_batch=64", *arguments])
    assert re.search(message, capsys.readouterr().err)
