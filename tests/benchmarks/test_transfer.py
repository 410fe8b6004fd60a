"""The transfer benchmark: what is compared and run, and what is said of it; in the soak the real thing."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import transfer, transfer_probe, transfer_report
from benchmarks.common import Result
from benchmarks.transfer import STUDIES, Command
from benchmarks.transfer_protocol import METHODS, PLACES, Cell, Protocol, ProtocolError, Work
from mcl import config
from mcl.budget import count
from mcl.objectives import build
from mcl.train import checkpoint
from scripts.builders.selection import read_selection
from tests.conftest import ROOT
from tests.mcl.finetune.conftest import make_folder

QUICK = Protocol(
    images="data/photos/train",
    without=(),
    at_most=64,
    unit=1.0,
    pretraining=(*Protocol.pretraining, "model.hidden=32", "evaluation.region_cells=2"),
    finetuning=(
        "train_cfg.max_iters=2",
        "train_cfg.val_interval=2",
        "custom_hooks.2.interval=2",
        "custom_hooks.2.batches=2",
        "global_batch=2",
        "data.classes=[]",
        "train_dataloader.num_workers=0",
        "val_dataloader.num_workers=0",
        "train_dataloader.dataset.dataset.pipeline.2.scales=[[96,64]]",
        "val_dataloader.dataset.pipeline.1.scale=[96,64]",
        "model.train_cfg.rpn_proposal.max_per_img=20",
        "model.test_cfg.rpn.max_per_img=10",
        "model.test_cfg.rcnn.max_per_img=5",
        "default_hooks.logger.interval=1",
        "default_hooks.checkpoint.interval=1",
    ),
)
"""Two steps of everything, on images of a few pixels."""

RANDOM = Cell("random", 0, 0)


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path / "work", QUICK, {"cutouts": "data/cutouts"})


def result(cell: Cell, linear: float, ap50: float | None = None, protocol: Protocol = QUICK) -> Result:
    """Of a cell whose probe was run, and its fine-tuning, too, if it has an AP50; AP of boxes is half of that."""
    measures: Result = {"cutouts": {"accuracy": linear / 200, "linear_accuracy": linear / 100}}
    if ap50 is not None:
        measures["finetuning"] = {of: {"AP": ap50 / by, "AP50": ap50} for of, by in (("box", 2), ("mask", 4))}
    return {
        "method": cell.method,
        "cost": cell.cost,
        "seed": cell.seed,
        "epochs": 3,
        "supervised_epochs": 10.0 * cell.cost,
        "measures": measures,
        "hours": {stage: {"wall": 2.0, "cpu": 1.0, "starts": 1} for stage in measures},
        "protocol": protocol.deciding(cell, finetuned=ap50 is not None),
        "environment": {"cpu": "one", "date": f"2020-01-0{cell.seed + 1}", "commit": str(cell.seed)},
    }


def keep(folder: Path, *results: Result) -> Path:
    folder.mkdir(exist_ok=True)
    for each in results:
        (folder / f"{each['method']}-{each['cost']}-{each['seed']}.json").write_text(json.dumps(each))
    return folder


# ------------------------------------------------------------------------------------------------ protocol, images


def test_results_of_another_protocol_are_refused(tmp_path: Path) -> None:
    cell = Cell("mcl", 1, 0)
    other = dataclasses.replace(QUICK, pretraining=(*QUICK.pretraining, "model.temperature=0.3"))
    results = keep(tmp_path / "r", result(cell, 1.0, protocol=other))
    words = r"mcl-1-0\.json: of another protocol: model\.temperature is 0\.3 there and 0\.2 now \(1 .*move"
    with pytest.raises(ProtocolError, match=words):
        transfer.read(results, QUICK)
    with pytest.raises(SystemExit, match=r"mcl-1-0\.json: of another protocol: images is 'data/photos/train' there"):
        transfer.main(["--report", "--results", str(results)])
    assert list(transfer.read(keep(tmp_path / "own", result(cell, 1.0)), QUICK)) == [cell]


def test_keys_that_are_younger_than_a_result_had_their_defaults(tmp_path: Path) -> None:
    kept = result(Cell("mcl", 1, 0), 1.0)
    for key in ("model.queue", "model.temperature"):  # of which the default, 0, is used, and 1, which is not
        del kept["protocol"][key]
        results = keep(tmp_path / key, kept)
        if key == "model.queue":
            assert transfer.read(results, QUICK)
    with pytest.raises(ProtocolError, match=r"model\.temperature is None there and 0\.2 now"):
        transfer.read(results, QUICK)


def test_a_detector_counts_where_it_was_fine_tuned(tmp_path: Path) -> None:
    pytest.importorskip("mmengine", reason="needs MMDetection: make mmdet")
    other = dataclasses.replace(QUICK, finetuning=(*QUICK.finetuning, "model.rpn_head.feat_channels=32"))
    results = keep(tmp_path / "r", result(RANDOM, 1.0, protocol=other))
    assert transfer.read(results, QUICK)
    keep(results, result(RANDOM, 1.0, 2.0, other))
    with pytest.raises(ProtocolError, match=r"mask_rcnn_r18_fpn_mini\.py is '\w+' there and '\w+' now"):
        transfer.read(results, QUICK)


def test_cells_that_were_probed_on_other_sets_are_refused(tmp_path: Path) -> None:
    own, other = (result(Cell("mcl", 1, seed), 1.0) for seed in (0, 1))
    other["measures"]["cutouts"]["annotations"] = "7"
    with pytest.raises(ProtocolError, match=r"mcl-1-1\.json: cutouts is another set than in other cells"):
        transfer.read(keep(tmp_path / "r", own, other), QUICK)


def test_work_on_other_images_is_refused(work: Work, tmp_path: Path) -> None:
    Work(work.folder, QUICK, {})
    with pytest.raises(ProtocolError, match=r"images\.txt: of another protocol, or on other images; move .*work away"):
        Work(work.folder, dataclasses.replace(QUICK, at_most=32), {})
    with pytest.raises(ProtocolError, match=r"nowhere does not exist; make data"):
        Work(tmp_path, dataclasses.replace(QUICK, images="nowhere"), {})


def test_places_of_the_detection_set_are_left_out() -> None:
    assert set(Protocol().without) == {photo.label for photo in read_selection() if photo.background} == set(PLACES)


def test_lists_are_without_the_classes_that_are_left_out(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg", "c/1.jpg", "c/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name, "JPEG")
    protocol = dataclasses.replace(QUICK, images=str(tmp_path), without=("b",), at_most=0)
    made = Work(tmp_path / "work", protocol, {})
    assert (ROOT / made.images).read_text() == "../a/1.jpg\ta\n../a/2.jpg\ta\n../c/1.jpg\tc\n"
    two = Work(tmp_path / "two", dataclasses.replace(protocol, at_most=2), {})
    assert (ROOT / two.images).read_text() == "../a/1.jpg\ta\n../a/2.jpg\ta\n"


def test_ids_of_the_photographs_with_boxes_are_whole_and_apart() -> None:
    train, val = ((ROOT / "scripts" / f"voc15_{split}.txt").read_text().split() for split in ("train", "val"))
    assert (len(train), len(val), len({*train, *val})) == (761, 278, 761 + 278)


# ------------------------------------------------------------------------------------------------ costs


@pytest.mark.parametrize("method", ["supervised", "moco_v2", "mcl", "budget"])
def test_pretrainings_cost_the_same(method: str) -> None:
    """Within the half epoch that whole epochs allow; and more of a budget is never fewer epochs."""
    protocol = Protocol()
    before = 0
    for cost in (1, 4):
        epochs = protocol.epochs(Cell(method, cost, 0))
        own = [
            abs(protocol.spent(method, near) - cost * protocol.unit) for near in (epochs, epochs + 1, epochs - 1 or 1)
        ]
        assert own[0] == min(own) < 0.06 * cost * protocol.unit
        assert epochs > before
        before = epochs


def test_costs_are_those_of_the_budget() -> None:
    """An epoch of the supervised run shows each image twice; MoCo's keys are a third of a step."""
    protocol = Protocol()
    unit = count.supervised("resnet18", 96)
    assert protocol.spent("supervised", 3) == pytest.approx(2 * 3, rel=0.01)
    assert protocol.spent("moco_v2", 3) == pytest.approx(3 * 4 / 3, rel=0.01)
    small, full = (
        count.step(config.override(protocol.config("queries"), [f"montage.cells={cells}"]), 32, 1).flops / 32 / unit
        for cells in (2, 3)
    )
    assert protocol.spent("budget", 10) == pytest.approx(8 * small + 2 * full)
    assert protocol.epochs(RANDOM) == 0


# ------------------------------------------------------------------------------------------------ what is run


def test_cells_come_cost_by_cost_then_seed_by_seed() -> None:
    names = [cell.name for cell in transfer.cells(["random", "mcl", "budget"], [1, 4], [4, 5])]
    assert names == [
        *("random-4", "mcl-1x-4", "budget-1x-4", "random-5", "mcl-1x-5", "budget-1x-5"),
        *("mcl-4x-4", "budget-4x-4", "mcl-4x-5", "budget-4x-5"),
    ]


def test_studies_name_methods_and_pairs_that_exist() -> None:
    for study in STUDIES.values():
        assert {*study.methods, *(name for pair in study.pairs for name in pair)} <= {*METHODS}


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.trains])
def test_methods_are_legal_and_start_from_the_same_backbone(method: str) -> None:
    cfg = Protocol().config(method, 4)
    cfg.images_per_rank(1)
    assert not cfg.doubts()
    with torch.device("meta"):
        model = build(cfg, ["a", "b"])
    type(model).check(cfg)
    assert next(iter(dict(model.named_parameters()))).startswith("online.backbone.")


def test_commands_load_the_parts_of_the_method(work: Work) -> None:
    words = {name: transfer.finetune(Cell(name, 1, 3), work).arguments for name in METHODS}
    words["random"] = transfer.finetune(RANDOM, work).arguments
    assert "parts=[backbone]" in words["random"]
    for name, parts in (
        ("moco_v2", "backbone"),
        ("supervised", "backbone"),
        ("mcl-backbone", "backbone"),
        ("mcl-fpn", "backbone,fpn"),
        ("mcl", "backbone,fpn,head"),
        ("budget", "backbone,fpn,head"),
    ):
        assert f"parts=[{parts}]" in words[name]
    assert f"weights={work.folder}/pretrain/mcl-1x-3/checkpoints/last.pt" in words["mcl-fpn"]
    assert words["mcl-fpn"][-2:] == ("name=mcl-fpn-1x-3", f"output={work.folder}/finetune")
    assert transfer.probe(Cell("mcl", 1, 0), work, "cutouts").arguments[-3:] == ("--parts", "backbone", "fpn")
    initial = f"{work.folder}/pretrain/random-0/checkpoints"
    assert transfer.pretrain(RANDOM, work).arguments[-1] == f"--initial={initial}"
    assert f"weights={initial}/last.pt" in transfer.finetune(RANDOM, work).arguments
    own, whole = (transfer.pretrain(Cell(name, 1, 3), work) for name in ("mcl-backbone", "mcl"))
    assert own == whole
    start = "CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 python -m mcl pretrain mcl/presets/mcl_r18_fpn_demo.yaml "
    assert own.shell.startswith(start)


def test_default_words_are_those_of_the_verbs() -> None:
    settings = pytest.importorskip("mcl.finetune.settings", reason="needs MMDetection: make mmdet")
    for protocol in (Protocol(), QUICK):
        settings.load(ROOT / protocol.detector, protocol.finetuning)


@pytest.mark.usefixtures("thin_backbone")
def test_the_probe_has_the_parts_that_are_named_and_the_seed_s_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config.override(QUICK.config("random"), ["trainer.seed=7", "montage.cells=2"])
    probed: list[Any] = []
    monkeypatch.setattr(transfer_probe, "regions", lambda networks, *_: probed.append(networks["accuracy"]) or {})
    monkeypatch.setattr(transfer_probe, "digest", lambda _: "")
    trained = build(cfg)
    checkpoint.save(tmp_path, {"config": config.to_dict(cfg), "step": 1, "model": trained.state_dict()}, 1)
    for parts in (["backbone"], ["backbone", "fpn"]):
        transfer_probe.probe(cfg, tmp_path / "last.pt", parts)
    torch.manual_seed(7)
    new = build(cfg).online
    for network, loaded in zip(probed, ("backbone", ("backbone", "fpn")), strict=True):
        for name, tensor in network.state_dict().items():
            source = trained.online if name.startswith(loaded) else new
            assert torch.equal(tensor, source.state_dict()[name]), name


@pytest.mark.usefixtures("thin_backbone")
def test_random_weights_are_those_that_a_pretraining_starts_from(tmp_path: Path) -> None:
    words = [str(ROOT / QUICK.preset), *QUICK.words("random"), "trainer.seed=7"]
    transfer_probe.main([*words, f"--initial={tmp_path}"])
    written = torch.load(tmp_path / checkpoint.LAST, weights_only=True)["model"]
    torch.manual_seed(7)
    for name, tensor in build(config.load(words[0], words[1:])).state_dict().items():
        assert torch.equal(written[name], tensor)


# ------------------------------------------------------------------------------------------------ runs


class Runs:
    """The benchmark with commands that only note their names, or do what a test says."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.code = folder, dict[str, str]()
        self.work = Work(folder / "work", QUICK, {})
        monkeypatch.setattr(transfer, "pretrain", lambda cell, _: self.command(f"pretrain-{cell.pretraining}"))
        monkeypatch.setattr(
            transfer,
            "measured",
            lambda cell, _, stage: (self.command(f"{stage}-{cell.name}"), lambda: {"accuracy": 0.5}),
        )

    def command(self, name: str) -> Command:
        note = f"open({str(self.folder / 'notes')!r}, 'a').write('{name} ')"
        return Command(name, ("-c", f"{self.code.get(name, '')}\n{note}"))

    def run(self, *methods: str, jobs: int = 2, stages: tuple[str, ...] = ("cutouts",)) -> int:
        return transfer.run(transfer.cells(methods, [1], [0]), stages, self.work, self.folder / "results", jobs)

    def notes(self) -> list[str]:
        return (self.folder / "notes").read_text().split() if (self.folder / "notes").exists() else []

    def starts(self, name: str) -> list[dict[str, Any]]:
        return transfer.starts(self.command(name), self.work.folder / transfer.LOGS)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(tmp_path, monkeypatch)


def test_cells_share_a_pretraining_and_stages_are_done_once(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.code["pretrain-mcl-1x-0"] = "import time; time.sleep(0.3)"
    assert runs.run("random", "mcl", "mcl-fpn") == 0
    notes = runs.notes()
    assert sorted(notes) == [
        *("cutouts-mcl-1x-0", "cutouts-mcl-fpn-1x-0", "cutouts-random-0", "pretrain-mcl-1x-0", "pretrain-random-0")
    ]
    assert notes.index("pretrain-mcl-1x-0") < notes.index("cutouts-mcl-1x-0")
    (start,) = runs.starts("pretrain-mcl-1x-0")
    assert start["exit"] == 0
    assert 0 < start["cpu_s"] < start["wall_s"]
    assert start["wall_s"] > 0.3
    out, err = capsys.readouterr()
    assert "mcl-fpn-1x-0: done" in out
    assert "cells: 2 of 3 done, " in err

    assert runs.run("random", "mcl", "mcl-backbone", stages=("cutouts", "voc15")) == 0
    assert sorted(runs.notes()[5:]) == [
        *("cutouts-mcl-backbone-1x-0", "voc15-mcl-1x-0", "voc15-mcl-backbone-1x-0", "voc15-random-0"),
    ]
    kept = json.loads((runs.folder / "results" / "mcl-1x-0.json").read_text())
    assert {*kept["measures"]} == {"cutouts", "voc15"}
    assert {*kept["hours"]} == {*kept["commands"]} == {"pretraining", "cutouts", "voc15"}
    assert kept["epochs"] == 1
    assert kept["supervised_epochs"] == pytest.approx(3.4, abs=0.1)


def test_another_command_of_the_same_name_is_refused(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.run("mcl") == 0
    runs.code["pretrain-mcl-1x-0"] = "pass"
    assert runs.run("mcl-fpn") == 1
    assert "mcl-fpn-1x-0: failed: " in (out := capsys.readouterr().out)
    assert "of another protocol: pretrain-mcl-1x-0 was CUDA" in out


def test_a_cell_that_fails_is_shown_and_the_others_go_on(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    ready = runs.folder / "ready"
    runs.code["pretrain-mcl-1x-0"] = f"import os\nif not os.path.exists({str(ready)!r}): print('the reason'); exit(3)"
    assert runs.run("mcl", "mcl-fpn", "moco_v2") == 1
    assert runs.notes() == ["pretrain-moco_v2-1x-0", "cutouts-moco_v2-1x-0"]
    out = capsys.readouterr().out
    assert "mcl-1x-0: failed: pretrain-mcl-1x-0: exit code 3; the end of " in out
    assert "mcl-fpn-1x-0: failed: pretrain-mcl-1x-0: exit code 3; the end of " in out
    assert "    the reason" in out

    ready.touch()
    assert runs.run("mcl", "moco_v2") == 0
    assert runs.notes()[2:] == ["pretrain-mcl-1x-0", "cutouts-mcl-1x-0"]
    assert [start["exit"] for start in runs.starts("pretrain-mcl-1x-0")] == [3, 3, 0]


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_signal_stops_what_runs(runs: Runs, jobs: int, capsys: pytest.CaptureFixture[str]) -> None:
    runs.code["pretrain-mcl-1x-0"] = f"import os, time; os.kill({os.getpid()}, {int(signal.SIGTERM)}); time.sleep(60)"
    begun = time.monotonic()
    assert runs.run("mcl", "mcl-fpn", "moco_v2", jobs=jobs) == 128 + signal.SIGTERM
    assert time.monotonic() - begun < 30
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not done: ")]
    assert "mcl-1x-0" in line
    assert "mcl-fpn-1x-0" in line
    assert line.endswith("; the same command continues")
    assert [start["exit"] for start in runs.starts("pretrain-mcl-1x-0")] == [-signal.SIGTERM]
    assert not {"cutouts-mcl-1x-0", "cutouts-mcl-fpn-1x-0"} & set(runs.notes())


# ------------------------------------------------------------------------------------------------ what is said


def test_report_of_what_there_is() -> None:
    results = transfer_report.evaluate(
        [
            *(result(Cell("random", 0, seed), linear) for seed, linear in enumerate((10.0, 20.0, 30.0))),
            *(result(Cell("mcl", 1, seed), linear, linear) for seed, linear in enumerate((12.0, 24.0, 33.0))),
            *(result(Cell("mcl", 4, seed), linear) for seed, linear in enumerate((15.0, 27.0, 36.0))),
            result(Cell("moco_v2", 1, 0), 12.0),
            result(Cell("mcl", 2, 0), 12.0),
        ],
        STUDIES["transfer"],
        ["moco_v2"],
    )
    assert "mcl, 2x" not in [r["name"] for r in results]  # it is there for another study
    by_name = {r["name"]: r for r in results if r["kind"] != "rank correlation"}
    assert by_name["random"]["cutouts linear"] == {"values": [10, 20, 30], "mean": 20, "sd": 10}
    assert by_name["mcl, 1x - random"]["cutouts linear"]["exceeds_noise"] is True
    assert by_name["mcl, 1x - moco_v2, 1x"]["cutouts linear"]["low"] is None
    assert by_name["mcl, 4x - mcl, 1x"]["cutouts linear"]["mean"] == 3
    assert by_name["mcl, 1x - moco_v2, 1x"]["seeds"] == [0]
    assert by_name["budget, 4x"]["seeds"] == []
    text = transfer_report.table(results)
    runs = "not run | not run | not run"
    assert f"| random | 3 | 10.0 ± 5.0 | 20.0 ± 10.0 | not run | not run | {runs} |" in text
    assert "| random | 3 | 0.0 | - | 1.000 | - | - |" in text
    assert "| 23.0 ± 10.5 | not run | not run | 23.0 ± 10.5 | 11.5 ± 5.3 | 5.8 ± 2.6 |" in text
    assert f"| budget, 4x | 0 | not run | not run | not run | not run | {runs} |" in text
    # Left over: 2, -2, 0 and twice -1, 1, 0 thirds, 4/3 in squares on 4 degrees of freedom; the error of a difference
    # is sqrt(2 / 3 / 3). Three differences have several seeds: Student's t for 0.05 / 2 / 3 is 3.961.
    kNN, linear = "**+1.5 (+0.6 to +2.4)**", "**+3.0 (+1.1 to +4.9)**"
    assert f"| mcl, 1x - random | 3 | {kNN} | {linear} | not run | not run | {runs} |" in text
    assert "| mcl, 1x - moco_v2, 1x | 1 | +0.0 | +0.0 |" in text
    assert "| cutouts linear | 3 | 1.00 | 3 | 1.00 |" in text
    gains = transfer_report.gains(results)
    assert [(cost, gain["mean"]) for cost, gain in gains["cutouts linear"]["mcl"]] == [(10, 3), (40, 6)]


def test_rank_correlation_by_hand() -> None:
    """Ranks 1 2 3 4 and 2 1 3 4: 1 - 6 * 2 / (4 * 15)."""
    values = zip((10.0, 20.0, 30.0, 40.0), (5.0, 4.0, 8.0, 9.0), strict=True)
    cells = [result(Cell("mcl", 1, seed), linear, ap50) for seed, (linear, ap50) in enumerate(values)]
    found = {r["name"]: r for r in transfer_report.evaluate(cells, STUDIES["transfer"], []) if "rho" in r}
    assert found["cutouts linear"]["rho"] == pytest.approx(0.8)
    assert found["cutouts linear"]["cells"] == 4
    assert "voc15 kNN" not in found


def test_report_writes_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(transfer, "Protocol", lambda: QUICK)
    arguments = ["--report", "--results", str(tmp_path / "r")]
    with pytest.raises(SystemExit, match="0"):
        transfer.main(arguments)
    assert not (tmp_path / "transfer.json").exists()

    keep(tmp_path / "r", result(RANDOM, 1.0), result(Cell("mcl", 1, 0), 1.0))
    with pytest.raises(SystemExit, match="0"):
        transfer.main(arguments)
    assert not (tmp_path / "transfer.json").exists()  # these may be of any study

    other = result(Cell("moco_v2", 1, 1), 2.0)
    other["environment"]["cpu"] = "two"
    keep(tmp_path / "r", result(RANDOM, 1.0), result(Cell("random", 0, 1), 1.0), other)
    with pytest.raises(SystemExit, match="0"):
        transfer.main(arguments)
    assert "On another machine or by other versions: mcl-1x-0, random-0, random-1." in capsys.readouterr().out
    written = json.loads((tmp_path / "transfer.json").read_text())
    assert written["environment"]["cpu"] == "two"
    assert written["config"]["cells"] == ["mcl-1x-0", "moco_v2-1x-1", "random-0", "random-1"]
    assert "moco_v2, 1x - random" in [r["name"] for r in written["results"]]
    assert (tmp_path / "transfer.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "ablation.json").exists()


def test_kept_results_are_of_this_protocol_and_say_what_is_kept(tmp_path: Path) -> None:
    pytest.importorskip("mmengine", reason="needs MMDetection: make mmdet")  # which the detector's digest needs
    shutil.copytree(transfer.RESULTS, tmp_path / "transfer")
    with pytest.raises(SystemExit, match="0"):
        transfer.main(["--report", "--results", str(tmp_path / "transfer")])
    for name in STUDIES:
        before, now = (folder / f"{name}.json" for folder in (transfer.RESULTS.parent, tmp_path))
        assert before.exists() == now.exists()
        if now.exists():
            assert json.loads(now.read_text()) == json.loads(before.read_text())


# ------------------------------------------------------------------------------------------------ the real thing


@pytest.mark.soak
def test_quick_run_from_end_to_end_is_killed_and_continues(tmp_path: Path) -> None:
    pytest.importorskip("mmdet", reason="needs MMDetection: make mmdet")
    folder = str(make_folder(tmp_path / "coco"))
    protocol = dataclasses.replace(QUICK, detection=folder)
    script = (
        "import sys; from pathlib import Path; from benchmarks import transfer; "
        "from benchmarks.transfer_protocol import Protocol, Work; "
        f"protocol = {protocol!r}; results = Path({str(tmp_path / 'results')!r}); "
        f"work = Work(Path({str(tmp_path / 'work')!r}), protocol, {{'cutouts': {folder!r}}}); "
        "wanted = transfer.cells(['random', 'supervised', 'moco_v2', 'mcl', 'mcl-backbone'], [1], [0]); "
        "status = transfer.run(wanted, ['cutouts', 'finetuning'], work, results, 2); "
        "transfer.publish('transfer', results, protocol); sys.exit(status)"
    )
    logs = tmp_path / "work" / transfer.LOGS
    for command, number in (("pretrain-mcl-1x-0", signal.SIGKILL), ("finetune-mcl-1x-0", signal.SIGTERM)):
        process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, start_new_session=True)
        end = time.monotonic() + 300
        while not (logs / f"{command}.log").exists() and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(5)
        os.killpg(process.pid, number)
        process.wait()
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=900)

    there = transfer.read(tmp_path / "results", protocol)
    assert {cell.name for cell in there} == {
        *("random-0", "supervised-1x-0", "moco_v2-1x-0", "mcl-1x-0", "mcl-backbone-1x-0"),
    }
    assert all({*r["measures"]} == {"cutouts", "finetuning"} for r in there.values())
    hours = there[Cell("mcl", 1, 0)]["hours"]
    assert hours["pretraining"] == there[Cell("mcl-backbone", 1, 0)]["hours"]["pretraining"]
    assert hours["finetuning"]["starts"] >= 1
    sources = {
        name: torch.load(tmp_path / "work" / "pretrain" / f"{name}-0" / "checkpoints" / "last.pt")["model"]
        for name in ("random", "supervised-1x", "moco_v2-1x", "mcl-1x")
    }
    for cell, loaded in (
        ("random-0", {"random backbone"}),
        ("supervised-1x-0", {"supervised-1x backbone"}),
        ("moco_v2-1x-0", {"moco_v2-1x backbone"}),
        ("mcl-backbone-1x-0", {"mcl-1x backbone"}),
        ("mcl-1x-0", {"mcl-1x backbone", "mcl-1x neck", "mcl-1x head"}),
    ):
        state = torch.load(tmp_path / "work" / "finetune" / cell / "iter_1.pth", weights_only=True)["state_dict"]
        same = {
            f"{name} {part}"
            for name, source in sources.items()
            for part, ours, theirs in PARTS
            if theirs in source and state[ours].shape == source[theirs].shape and close(state[ours], source[theirs])
        }
        assert same == loaded, cell


PARTS = (
    ("backbone", "backbone.layer4.0.conv1.weight", "online.backbone.layer4.0.conv1.weight"),
    ("neck", "neck.lateral_convs.3.conv.weight", "online.fpn.laterals.0.conv.weight"),
    ("head", "roi_head.bbox_head.shared_convs.0.conv.weight", "online.head.convs.0.conv.weight"),
)
"""Name, weight in the detector and in the pre-training."""


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """As close as a step of warm-up leaves weights; two pre-trainings of two steps are some thousandths apart."""
    return float((a - b).norm() / b.norm()) < 1e-5
