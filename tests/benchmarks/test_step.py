"""The benchmark of training steps: contenders, results computed from given times, and a short real run."""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import step
from benchmarks.step import CONTENDERS, Pretraining, Setting, Stage
from mcl import config
from mcl.budget import count
from mcl.config import Config, ConfigError, TrainerConfig
from mcl.train import arithmetic
from tests.conftest import ROOT

SETTING = Setting("resnet18", cells=2, images=32, precision="fp32", device="cpu")


def stage(epochs: int, side: int, gflop_per_image: float, saved_bytes: int | None = None) -> Stage:
    counted = {"epochs": epochs, "side": side, "gflop_per_image": gflop_per_image}
    return counted if saved_bytes is None else {**counted, "saved_bytes": saved_bytes}


@pytest.fixture
def counted_anew(thin_backbone: None) -> Iterator[None]:
    """Clears the cache of counts before and after, since other backbones are counted here."""
    count.step.cache_clear()
    yield
    count.step.cache_clear()


def preset(name: str) -> Config:
    contender = CONTENDERS[name][1](SETTING)
    assert isinstance(contender, Pretraining)
    return contender.config


def test_contenders_are_the_presets_in_the_common_setting() -> None:
    presets = {name: preset(name) for name in CONTENDERS if not name.startswith("supervised")}
    for name, cfg in presets.items():
        assert (cfg.model.backbone, cfg.trainer.global_batch) == ("resnet18", 32)
        assert cfg.trainer.precision == ("bf16" if name == "bf16" else "fp32")
        assert cfg.trainer.recompute == (name == "recompute")
        assert cfg.model.compute == ("released" if name in ("authors", "released") else "matched")
        assert (cfg.model.width, cfg.model.head_convs, cfg.model.hidden) == (256, 4, 2048)
        assert cfg.optim.name == "lars"
    assert {name for name, cfg in presets.items() if cfg.montage.cells != 2} == {"budget", "budget_2x"}
    assert presets["budget"].montage.schedule == ((30, 4), (60, 5), (82, 7))


@pytest.mark.usefixtures("counted_anew")
def test_stages_of_a_schedule_have_its_epochs_and_what_was_counted() -> None:
    one_level = ["montage.ratios=[1]", "montage.images_per_canvas=[1]", "montage.queries=[4]", "model.loss_weights=[1]"]
    cfg = config.override(preset("budget_2x"), one_level)
    stages = Pretraining(cfg).stages()
    assert [(stage["epochs"], stage["side"]) for stage in stages] == [(21, 160), (79, 224)]
    counted = count.step(dataclasses.replace(cfg, montage=cfg.montage.at(50)), 32, 1)
    assert stages[1]["gflop_per_image"] == pytest.approx(counted.flops / 32 / 1e9)
    assert stages[1]["saved_bytes"] == sum(counted.saved.values())


def test_recomputation_is_done_and_counted() -> None:
    contender = CONTENDERS["recompute"][1](SETTING)
    step = contender.start()
    with FlopCounterMode(display=False) as counter:
        step(64)
    (stage,) = contender.stages()
    assert counter.get_total_flops() / 32 / 1e9 == pytest.approx(stage["gflop_per_image"])


def test_supervised_is_counted_at_its_own_size() -> None:
    (whole,), (small,) = (CONTENDERS[name][1](SETTING).stages() for name in ("supervised", "supervised_canvas"))
    assert (whole["side"], small["side"]) == (224, 64)
    assert whole["gflop_per_image"] == pytest.approx(
        3 * 3.628 - 0.236, rel=0.01
    )  # ResNet-18: 1.814 GMAC; the pixels have no gradient
    assert small["gflop_per_image"] == pytest.approx(whole["gflop_per_image"] * (64 / 224) ** 2, rel=0.01)


@pytest.mark.usefixtures("thin_backbone")
@pytest.mark.parametrize("name", ["supervised", "matched"])
def test_the_process_of_a_contender_computes_as_a_run_does(name: str) -> None:
    """The process of a contender sets PyTorch's switches."""
    try:
        CONTENDERS[name][1](dataclasses.replace(SETTING, tf32=False)).start()
        assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32) == (True, False)
    finally:
        arithmetic.choose(TrainerConfig())


@dataclass(frozen=True)
class Noting:
    """Allocates as many MiB as the size of each step; records sizes and process."""

    file: Path

    def start(self) -> Callable[[int], object]:
        return self._step

    def _step(self, side: int) -> None:
        torch.ones(side, 2**18)
        with self.file.open("a") as file:
            file.write(f"{side} {os.getpid()}\n")


def test_every_stage_has_its_turn_in_every_round_and_every_contender_a_process(tmp_path: Path) -> None:
    ballast = torch.ones(2**29)  # 2 GiB, which must not count as a contender's memory
    stages = {"a": [stage(1, 1, 1.0), stage(2, 2, 1.0)], "b": [stage(1, 256, 1.0)]}
    contenders = {name: Noting(tmp_path / name) for name in stages}
    seconds, peaks = step.measure(contenders, stages, repeat=2)  # type: ignore[arg-type]
    assert [[len(rounds) for rounds in each] for each in seconds.values()] == [[2, 2], [2]]
    notes = {
        name: [tuple(map(int, line.split())) for line in (tmp_path / name).read_text().splitlines()] for name in "ab"
    }
    assert len({pid for each in notes.values() for _, pid in each} | {os.getpid()}) == 3
    sides = {name: [side for side, _ in each] for name, each in notes.items()}
    assert all(each[::2] == each[1::2] for each in sides.values())  # an untimed step before each timed one
    assert {name: sorted(each[::2]) for name, each in sides.items()} == {"a": [1] * 3 + [2] * 3, "b": [256] * 3}
    assert peaks["a"] + 200 * 2**20 < peaks["b"] < 2048 * 2**20 <= 4 * ballast.numel()


def test_results_by_hand() -> None:
    stages = {
        "supervised": [stage(1, 224, 10.0)],
        "released": [stage(100, 224, 160.0, 4000)],
        "matched": [stage(100, 224, 40.0, 2000)],
        "budget": [stage(75, 96, 4.0, 500), stage(25, 224, 20.0, 900)],
    }
    measured = {
        "supervised": [[2.0, 1.0, 3.0]],
        "released": [[30.0, 32.0, 40.0]],
        "matched": [[8.0, 8.0, 9.0]],
        "budget": [[1.0, 2.0, 1.0], [5.0, 6.0, 5.0]],
    }
    results = {r["contender"]: r for r in step.evaluate(stages, measured, dict.fromkeys(stages, 7), images=32)}
    matched, budget = results["matched"], results["budget"]
    assert (matched["seconds"], matched["images_per_s"], matched["gflop_per_s"]) == (8, 4, 160)
    assert (matched["ratio_to_supervised"], matched["counted_ratio"]) == (4, 4)
    assert (matched["faster_than_released"], matched["saved_of_released"]) == (4, 0.5)
    assert (matched["saved_bytes"], matched["peak_bytes"]) == (2000, 7)
    assert "stages" not in matched
    assert "saved_bytes" not in results["supervised"]

    # Rounds: (75 * 1 + 25 * 5) / 100 = 2, (150 + 150) / 100 = 3, 2.
    assert (budget["seconds"], budget["ratio_to_supervised"], budget["n"]) == (2, 1, 3)
    assert (budget["gflop_per_image"], budget["counted_ratio"], budget["saved_bytes"]) == (8, 0.8, 900)
    assert [(s["side"], s["seconds"], s["ratio_to_supervised"]) for s in budget["stages"]] == [
        (96, 1, 0.5),
        (224, 5, 2.5),
    ]
    assert [s["counted_ratio"] for s in budget["stages"]] == [0.4, 2]
    table = step.table(list(results.values()))
    assert "| matched | 4 | 12% | 160 | 4.00x | 4.00x | 4.00x | 0.00 | 0.50x | 0.00 |" in table
    assert "| budget, 96 px | 75 | 1 | 0.50x | 0.40x |" in table

    # There is nothing to compare with.
    alone = step.evaluate({"matched": stages["matched"]}, measured, {"matched": 7}, 32)
    assert not {"ratio_to_supervised", "counted_ratio", "faster_than_released"} & alone[0].keys()


def test_an_illegal_batch_is_named_before_anything_is_measured() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.global_batch: 48 .*; nearest legal: 32, 64"):
        step.main(["--images", "48", "--contenders", "matched"])


def test_the_makefile_names_contenders_that_there_are() -> None:
    lists = re.findall(r"\.step .*?--contenders ((?:\w+ )+)", (ROOT / "Makefile").read_text())
    assert lists
    assert {name for names in lists for name in names.split()} <= CONTENDERS.keys()


@pytest.mark.usefixtures("counted_anew")
def test_a_run_reports_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, plot = tmp_path / "step.json", tmp_path / "step.png"
    arguments = ["--backbone", "resnet18", "--cells", "2", "--repeat", "1", "--device", "cpu"]
    contenders = ["supervised_canvas", "matched"]
    step.main([*arguments, "--contenders", *contenders, "--json", str(file), "--plot", str(plot)])
    results = {r["contender"]: r for r in json.loads(file.read_text())["results"]}
    assert list(results) == contenders
    for r in results.values():
        assert r["images_per_s"] == pytest.approx(32 / r["seconds"])
        assert r["gflop_per_s"] == pytest.approx(r["images_per_s"] * r["gflop_per_image"])
    printed = capsys.readouterr()
    assert "| supervised, canvas size |" in printed.out
    expected = ["counting FLOPs, supervised_canvas", "counting FLOPs, matched"]
    expected += ["warm-up, supervised_canvas, 64 px", "round 1 of 1, matched, 64 px"]
    said = [line.split(":")[0] for line in printed.err.splitlines()]
    assert [line for line in said if line in expected] == expected  # others are said after slow items
    assert plot.read_bytes().startswith(b"\x89PNG")
