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

import pytest
import torch
from PIL import Image

from benchmarks import transfer, transfer_baselines, transfer_report
from benchmarks.common import Result
from benchmarks.transfer import METHODS, Cell, Command
from benchmarks.transfer_protocol import PLACES, Protocol, ProtocolError, Work
from mcl.budget import count
from mcl.objectives import MCL
from scripts.builders.selection import read_selection
from tests.conftest import ROOT

QUICK = Protocol(
    images="data/photos/train",
    without=(),
    at_most=64,
    epochs=1,
    pretraining=(*Protocol.pretraining, "model.hidden=32"),
    moco_bank=64,
    moco_hidden=32,
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


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path / "work", QUICK)


def result(method: str, seed: int, ap50: float, protocol: Protocol = QUICK) -> Result:
    """Of a cell that was run, with half and a third of the AP50 as AP of boxes and masks."""
    pytest.importorskip("mmengine", reason="needs MMDetection: make mmdet")  # it reads the detector's configuration
    pretrained = METHODS[method].pretraining is not None
    hours = {"wall": 2.0, "cpu": 1.0, "starts": 1}
    return {
        "method": method,
        "seed": seed,
        "protocol": protocol.plain(),
        "configurations": protocol.configurations,
        "box": {"AP": ap50 / 2, "AP50": ap50, "AP75": 0.0},
        "mask": {"AP": ap50 / 3, "AP50": ap50, "AP75": 0.0},
        "hours": {"pretraining": hours if pretrained else None, "finetuning": hours},
        "supervised_epochs": 12.0 if pretrained else 0.0,
        "environment": {"cpu": "one", "date": f"2020-01-0{seed + 1}", "commit": str(seed)},
    }


def keep(folder: Path, *results: Result) -> Path:
    folder.mkdir(exist_ok=True)
    for each in results:
        (folder / f"{each['method']}-{each['seed']}.json").write_text(json.dumps(each))
    return folder


def evaluate(*results: Result) -> list[Result]:
    return transfer_report.evaluate(results, list(METHODS), transfer.PAIRS)


# ------------------------------------------------------------------------------------------------ statistics


def test_paired_differences_by_hand() -> None:
    """2, 4, 3: mean 3, standard deviation 1, so 3 ± 4.3027 / sqrt(3)."""
    difference = transfer_report.difference([12.0, 24.0, 33.0], [10.0, 20.0, 30.0])
    assert (difference["mean"], difference["exceeds_noise"]) == (3, True)
    assert (difference["low"], difference["high"]) == pytest.approx((0.51586, 5.48414), abs=1e-5)


def test_what_rounding_can_make_is_noise() -> None:
    """Differences of 0.1 each time, between values that are rounded to it."""
    ours, theirs = [5.1, 5.2, 5.3], [5.0, 5.1, 5.2]
    difference = transfer_report.difference(ours, theirs)
    assert (difference["low"], difference["high"]) == pytest.approx((0.0, 0.2))
    assert transfer_report.difference([value + 0.2 for value in ours], theirs)["exceeds_noise"] is True


def test_an_interval_with_zero_in_it_is_noise() -> None:
    """1 and 3: mean 2, standard deviation sqrt(2), so 2 ± 12.706."""
    difference = transfer_report.difference([1.0, 3.0], [0.0, 0.0])
    assert (difference["low"], difference["high"]) == pytest.approx((-10.706, 14.706), abs=1e-3)
    assert difference["exceeds_noise"] is False


def test_a_single_seed_has_no_interval_and_no_deviation() -> None:
    difference = {"mean": 3.0, "error": None, "low": None, "high": None, "exceeds_noise": None}
    assert transfer_report.difference([5.0], [2.0]) == difference
    ours, theirs, pair = evaluate(result("moco", 0, 5.0), result("moco", 1, 9.0), result("random", 0, 2.0))
    assert (ours["name"], ours["box AP50"]["sd"]) == ("random", None)
    assert theirs["box AP50"]["sd"] == pytest.approx(8**0.5)
    assert (pair["seeds"], pair["box AP50"]) == ([0], difference)


# ------------------------------------------------------------------------------------------------ protocol, images


def test_results_of_another_protocol_are_refused(tmp_path: Path) -> None:
    results = keep(tmp_path / "r", result("random", 0, 1.0, dataclasses.replace(QUICK, epochs=7)))
    with pytest.raises(ProtocolError, match=r"random-0\.json: of another protocol: epochs is 7 there and 1 now .*move"):
        transfer.read(results, QUICK)
    with pytest.raises(SystemExit, match=r"random-0\.json: of another protocol: images is 'data/photos/train' there"):
        transfer.main(["--report", "--results", str(results)])


def test_results_of_other_configurations_are_refused_and_files_may_move(tmp_path: Path) -> None:
    kept = result("random", 0, 1.0)
    moved = {f"elsewhere/{Path(file).name}": digest for file, digest in kept["configurations"].items()}
    protocol = {**kept["protocol"], "preset": next(iter(moved))}
    results = keep(tmp_path / "r", {**kept, "protocol": protocol, "configurations": moved})
    assert list(transfer.read(results, QUICK)) == [Cell("random", 0)]
    keep(results, {**kept, "configurations": {**moved, QUICK.detector: "0123456789ab"}})
    with pytest.raises(
        ProtocolError, match=r"random-0\.json: .* mask_rcnn_r18_fpn_mini\.py is '0123456789ab' there and '\w+' now"
    ):
        transfer.read(results, QUICK)


def test_kept_results_are_read_and_say_the_same(tmp_path: Path) -> None:
    pytest.importorskip("mmengine", reason="needs MMDetection: make mmdet")
    shutil.copytree(transfer.RESULTS, tmp_path / "transfer")
    with pytest.raises(SystemExit, match="0"):
        transfer.main(["--results", str(tmp_path / "transfer"), "--methods", "random", "moco", "--work", "nowhere"])
    before, now = (
        json.loads(path.read_text()) for path in (transfer.RESULTS.with_suffix(".json"), tmp_path / "transfer.json")
    )
    assert transfer.table(now["results"]) == transfer.table(before["results"])
    assert {key: now[key] for key in ("environment", "config")} == {
        key: before[key] for key in ("environment", "config")
    }


def test_configurations_change_with_what_decides_a_result() -> None:
    pytest.importorskip("mmengine", reason="needs MMDetection: make mmdet")
    own = QUICK.configurations
    for changed, file in (
        ({"pretraining": (*QUICK.pretraining, "model.temperature=0.3")}, QUICK.preset),
        ({"finetuning": (*QUICK.finetuning, "model.rpn_head.feat_channels=32")}, QUICK.detector),
    ):
        other = dataclasses.replace(QUICK, **changed).configurations  # type: ignore[arg-type]
        assert [name for name in own if own[name] != other[name]] == [file]


def test_work_of_another_protocol_or_other_images_is_refused(work: Work) -> None:
    Work(work.folder, QUICK)
    with pytest.raises(
        ProtocolError, match=r"protocol\.json: of another protocol, or on other images; move .*work away"
    ):
        Work(work.folder, dataclasses.replace(QUICK, moco_momentum=0.5))
    (ROOT / work.images).write_text("a.jpg\tb\n")
    with pytest.raises(ProtocolError, match=r"images\.txt: of another protocol, or on other images; move .*work away"):
        Work(work.folder, QUICK)


def test_a_missing_folder_of_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match=r"nowhere does not exist; make data"):
        Work(tmp_path, dataclasses.replace(QUICK, images="nowhere"))


def test_places_of_the_detection_set_are_left_out() -> None:
    assert set(Protocol().without) == {photo.label for photo in read_selection() if photo.background} == set(PLACES)


def test_lists_are_without_the_classes_that_are_left_out(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg", "c/1.jpg", "c/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name, "JPEG")
    protocol = dataclasses.replace(QUICK, images=str(tmp_path), without=("b",), at_most=0)
    made = Work(tmp_path / "work", protocol)
    assert (ROOT / made.images).read_text() == "../a/1.jpg\ta\n../a/2.jpg\ta\n../c/1.jpg\tc\n"
    assert made.classes == ["a", "c"]
    assert Work.open(made.folder).protocol == protocol
    two = Work(tmp_path / "two", dataclasses.replace(protocol, at_most=2))
    assert (ROOT / two.images).read_text() == "../a/1.jpg\ta\n../a/2.jpg\ta\n"


# ------------------------------------------------------------------------------------------------ what is run


def test_cells_come_seed_by_seed() -> None:
    names = [cell.name for cell in transfer.cells([*METHODS], [4, 5])]
    assert names[:4] == ["random-4", "mcl-all-4", "mcl-backbone-4", "moco-4"]
    assert len(names) == len(set(names)) == 2 * 6 + 1
    assert "mcl-released-5" not in names


def test_commands_load_the_parts_of_the_method(work: Work) -> None:
    commands = {name: transfer.finetune(Cell(name, 3), work) for name in METHODS}
    words = {name: command.arguments for name, command in commands.items()}
    assert not [word for word in words["random"] if word.startswith(("weights=", "parts="))]
    assert "parts=[backbone]" in words["moco"]
    assert "parts=[backbone]" in words["supervised"]
    assert "parts=[backbone]" in words["mcl-backbone"]
    assert "parts=[backbone,fpn]" in words["mcl-fpn"]
    assert "parts=[backbone,fpn,head]" in words["mcl-all"]
    assert f"weights={work.folder}/pretrain/moco-3/backbone.pth" in words["moco"]
    assert f"weights={work.folder}/pretrain/mcl-3/checkpoints/last.pt" in words["mcl-fpn"]
    assert "model.compute=released" in transfer.pretrain(Cell("mcl-released", 0), work).arguments
    assert "model.compute=released" not in transfer.pretrain(Cell("mcl-all", 0), work).arguments
    start = "CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 python -m mcl finetune mcl/finetune/configs/"
    assert commands["moco"].shell.startswith(start)
    assert "'parts=[backbone]'" in commands["moco"].shell


def test_default_words_are_those_of_the_verbs() -> None:
    settings = pytest.importorskip("mcl.finetune.settings", reason="needs MMDetection: make mmdet")
    protocol = Protocol()
    config = settings.load(ROOT / protocol.detector, protocol.finetuning)
    assert config.train_cfg.max_iters * config.global_batch >= 12 * 800
    assert config.to_dict() == settings.load(ROOT / protocol.detector).to_dict()
    settings.load(ROOT / protocol.detector, QUICK.finetuning)


def test_costs_are_counted(work: Work) -> None:
    side = work.config(0).montage.canvas
    supervised = transfer_baselines.flops("supervised", work)
    assert supervised == pytest.approx(count.supervised("resnet18", side), rel=0.01)
    assert transfer.supervised_epochs("supervised", work) == QUICK.epochs
    assert transfer.supervised_epochs(None, work) == 0
    assert transfer.supervised_epochs("mcl-released", work) > transfer.supervised_epochs("mcl", work) > 1
    pytest.importorskip("lightly")
    # Forward of the keys is a third of a step, in which the first convolution has no gradient towards the pixels.
    assert transfer_baselines.flops("moco", work) / supervised == pytest.approx(4 / 3, rel=0.02)


# ------------------------------------------------------------------------------------------------ runs


class Runs:
    """The benchmark with commands that only note their names, or do what a test says."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.code = folder, dict[str, str]()
        monkeypatch.setattr(transfer, "pretrain", lambda cell, _: self._command(f"pretrain-{cell.pretraining}"))
        monkeypatch.setattr(transfer, "finetune", lambda cell, _: self._command(f"finetune-{cell.name}"))
        monkeypatch.setattr(transfer, "collect", lambda cell, *_: result(cell.method, cell.seed, 1.0))

    def _command(self, name: str) -> Command:
        note = f"open({str(self.folder / 'notes')!r}, 'a').write('{name} ')"
        return Command(name, ("-c", f"{self.code.get(name, '')}\n{note}"))

    def run(self, *methods: str, jobs: int = 2) -> int:
        wanted = transfer.cells(methods, [0])
        return transfer.run(wanted, QUICK, self.folder / "work", self.folder / "results", jobs)

    def notes(self) -> list[str]:
        return (self.folder / "notes").read_text().split() if (self.folder / "notes").exists() else []

    def starts(self, name: str) -> list[dict[str, float]]:
        return transfer.starts(self._command(name), self.folder / "work" / transfer.LOGS)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(tmp_path, monkeypatch)


def test_cells_share_a_pretraining_and_are_done_once(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mmengine", reason="needs MMDetection: make mmdet")
    runs.code["pretrain-mcl-0"] = "import time; time.sleep(0.3)"
    assert runs.run("random", "mcl-all", "mcl-fpn") == 0
    notes = runs.notes()
    assert sorted(notes) == ["finetune-mcl-all-0", "finetune-mcl-fpn-0", "finetune-random-0", "pretrain-mcl-0"]
    assert max(notes.index("pretrain-mcl-0"), 0) < notes.index("finetune-mcl-all-0")
    (start,) = runs.starts("pretrain-mcl-0")
    assert start["exit"] == 0
    assert 0 < start["cpu_s"] < start["wall_s"]
    assert start["wall_s"] > 0.3
    out, err = capsys.readouterr()
    assert "mcl-fpn-0: done" in out
    assert "cells: 2 of 3 done, " in err

    assert runs.run("random", "mcl-all", "mcl-fpn", "mcl-backbone") == 0
    assert runs.notes()[4:] == ["finetune-mcl-backbone-0"]


def test_a_cell_that_fails_is_shown_and_the_others_go_on(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mmengine", reason="needs MMDetection: make mmdet")
    runs.code["pretrain-mcl-0"] = "print('the reason'); raise SystemExit(3)"
    assert runs.run("mcl-all", "mcl-fpn", "moco") == 1
    assert runs.notes() == ["pretrain-moco-0", "finetune-moco-0"]
    out = capsys.readouterr().out
    assert "mcl-all-0: failed: pretrain-mcl-0: exit code 3; the end of " in out
    assert "mcl-fpn-0: failed: pretrain-mcl-0: exit code 3; the end of " in out
    assert "    the reason" in out

    del runs.code["pretrain-mcl-0"]
    assert runs.run("mcl-all", "moco") == 0
    assert runs.notes()[2:] == ["pretrain-mcl-0", "finetune-mcl-all-0"]
    assert [start["exit"] for start in runs.starts("pretrain-mcl-0")] == [3, 0]


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_signal_stops_what_runs(runs: Runs, jobs: int, capsys: pytest.CaptureFixture[str]) -> None:
    runs.code["pretrain-mcl-0"] = f"import os, time; os.kill({os.getpid()}, {int(signal.SIGTERM)}); time.sleep(60)"
    begun = time.monotonic()
    assert runs.run("mcl-all", "mcl-fpn", "moco", jobs=jobs) == 128 + signal.SIGTERM
    assert time.monotonic() - begun < 30
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not done: ")]
    assert "mcl-all-0" in line
    assert "mcl-fpn-0" in line
    assert line.endswith("; the same command continues")
    assert [start["exit"] for start in runs.starts("pretrain-mcl-0")] == [-signal.SIGTERM]
    assert not {"finetune-mcl-all-0", "finetune-mcl-fpn-0"} & set(runs.notes())


# ------------------------------------------------------------------------------------------------ what is said


def test_report_of_what_there_is() -> None:
    results = evaluate(
        *(result("random", seed, ap50) for seed, ap50 in enumerate((10.0, 20.0, 30.0))),
        *(result("mcl-all", seed, ap50) for seed, ap50 in enumerate((12.0, 24.0, 33.0))),
        result("moco", 0, 12.0),
    )
    assert [r["name"] for r in results] == [
        *("random", "mcl-all", "moco"),
        *("mcl-all - random", "moco - random", "mcl-all - moco"),
    ]
    by_name = {r["name"]: r for r in results}
    assert by_name["random"]["box AP50"] == {"values": [10, 20, 30], "mean": 20, "sd": 10}
    assert (by_name["mcl-all"]["supervised_epochs"], by_name["random"]["pretraining_hours"]) == (12, 0)
    assert by_name["mcl-all - random"]["box AP50"]["exceeds_noise"] is True
    assert by_name["mcl-all - moco"]["seeds"] == [0]
    text = transfer.table(results)
    assert "| random | 3 | 20.0 ± 10.0 | 10.0 ± 5.0 | 6.7 ± 3.3 | 0.0 | 0.00 | 1.00 |" in text
    assert "| moco | 1 | 12.0 | 6.0 | 4.0 | 12.0 | 1.00 | 1.00 |" in text
    assert "| mcl-all - random | 3 | +3.0 (+0.5 to +5.5) | +1.5 (+0.3 to +2.7) | +1.0 (+0.2 to +1.8) |" in text
    assert "| moco - random | 1 | +2.0 | +1.0 | +0.7 |" in text
    assert "Exceed the noise (the interval excludes 0): mcl-all - random." in text
    assert "A single seed, which says nothing of noise: moco - random; mcl-all - moco." in text
    assert "Do not exceed" not in text
    assert not [name for name in ("supervised", "mcl-fpn", "mcl-backbone", "mcl-released") if f"| {name}" in text]


def test_words_name_measures_where_they_disagree() -> None:
    ours, theirs = (
        [result("moco", seed, 3.0 + seed) for seed in (0, 1, 2)],
        [result("random", s, 1.0) for s in (0, 1, 2)],
    )
    for each in ours:
        each["mask"]["AP"] = -1.0 + each["seed"]  # -1, 0, 1, less a third
    text = transfer.table(evaluate(*ours, *theirs))
    assert "Exceed the noise (the interval excludes 0): moco - random (box AP50, box AP)." in text
    assert "Do not exceed the noise: moco - random (mask AP)." in text


def test_report_writes_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(transfer, "Protocol", lambda: QUICK)
    arguments = ["--report", "--results", str(tmp_path / "r")]
    with pytest.raises(SystemExit, match="0"):
        transfer.main(arguments)
    assert "No cell has been run." in capsys.readouterr().out
    assert not (tmp_path / "r.json").exists()

    other = result("moco", 1, 2.0)
    other["environment"]["cpu"] = "two"
    keep(tmp_path / "r", result("random", 0, 1.0), other)
    with pytest.raises(SystemExit, match="0"):
        transfer.main(arguments)
    assert "| random | 1 | 1.0 |" in (said := capsys.readouterr().out)
    assert "On another machine or by other versions: random-0." in said
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["environment"]["cpu"] == "two"
    assert written["config"]["protocol"] == QUICK.plain()
    assert [r["name"] for r in written["results"]] == ["random", "moco"]  # no seed in common
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------------ training


class Thin(torch.nn.Module):
    """A backbone that costs nothing."""

    channels = (4,)

    def __init__(self, name: str) -> None:
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 4, 8, 8, bias=False), torch.nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.norm(self.conv(x))]


@pytest.mark.parametrize("kind", ["supervised", "moco"])
def test_trainings_continue_exactly_and_leave_weights(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "moco":
        pytest.importorskip("lightly")
    monkeypatch.setattr(transfer_baselines, "Backbone", Thin)
    made = Work(tmp_path / "work", dataclasses.replace(QUICK, epochs=3))

    def run(folder: Path, until: int) -> tuple[list[float], torch.nn.Module]:
        torch.manual_seed(0)
        learner = transfer_baselines.make(kind, made)
        if until < 3:  # cut while the next epoch is under way
            monkeypatch.setattr(learner, "prepare", _Cut(learner.prepare, 2 * until + 1))
        return transfer_baselines.train(learner, made, 0, folder), learner

    whole, learner = run(tmp_path / "whole", 3)
    assert len(whole) == 3
    for until in (0, 1, 2):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", until)
    again, continued = run(tmp_path / "cut", 3)
    assert again == whole
    for name, tensor in transfer_baselines.tensors(learner).items():
        assert torch.equal(tensor, transfer_baselines.tensors(continued)[name]), name
    state = torch.load(tmp_path / "cut" / transfer_baselines.WEIGHTS, weights_only=True)["state_dict"]
    assert torch.equal(state["backbone.conv.weight"], learner.backbone.conv.weight)
    assert len(state) == len(learner.backbone.state_dict())


class _Cut:
    """Interrupts at the n-th call of this process, of which those of finished epochs are none."""

    def __init__(self, prepare: object, step: int) -> None:
        self._prepare, self._step = prepare, step

    def __call__(self, step: int, steps: int) -> None:
        if step == self._step:
            raise KeyboardInterrupt
        self._prepare(step, steps)  # type: ignore[operator]


def test_all_methods_start_from_the_same_backbone(work: Work) -> None:
    pytest.importorskip("lightly")
    states = []
    for make in (lambda: transfer_baselines.make("supervised", work), lambda: transfer_baselines.make("moco", work)):
        torch.manual_seed(5)
        states.append(make().backbone.state_dict())
    torch.manual_seed(5)
    config = work.config(5)
    states.append(MCL(config).online.backbone.state_dict())
    assert all(torch.equal(states[0][name], other[name]) for other in states[1:] for name in states[0])


# ------------------------------------------------------------------------------------------------ the real thing


@pytest.mark.soak
def test_quick_run_from_end_to_end_is_killed_and_continues(tmp_path: Path) -> None:
    pytest.importorskip("mmdet", reason="needs MMDetection: make mmdet")
    pytest.importorskip("lightly")
    from tests.mcl.finetune.conftest import make_folder

    protocol = dataclasses.replace(QUICK, detection=str(make_folder(tmp_path / "coco")))
    script = (
        "import sys; from pathlib import Path; from benchmarks import transfer; "
        "from benchmarks.transfer_protocol import Protocol; "
        f"protocol = {protocol!r}; results = Path({str(tmp_path / 'results')!r}); "
        "wanted = transfer.cells(['random', 'mcl-all', 'mcl-backbone', 'moco'], [0]); "
        f"status = transfer.run(wanted, protocol, Path({str(tmp_path / 'work')!r}), results, 2); "
        "transfer.publish(results, protocol); sys.exit(status)"
    )
    logs = tmp_path / "work" / transfer.LOGS
    for command, number in (("pretrain-mcl-0", signal.SIGKILL), ("finetune-mcl-all-0", signal.SIGTERM)):
        process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, start_new_session=True)
        end = time.monotonic() + 300
        while not (logs / f"{command}.log").exists() and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(5)
        os.killpg(process.pid, number)
        process.wait()
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=900)

    there = transfer.read(tmp_path / "results", protocol)
    assert {cell.name for cell in there} == {"random-0", "mcl-all-0", "mcl-backbone-0", "moco-0"}
    hours = there[Cell("mcl-all", 0)]["hours"]
    assert hours["pretraining"] == there[Cell("mcl-backbone", 0)]["hours"]["pretraining"]
    assert hours["finetuning"]["starts"] >= 1
    sources = {
        name: torch.load(tmp_path / "work" / "pretrain" / path, weights_only=True)[entry]
        for name, path, entry in (
            ("moco", f"moco-0/{transfer_baselines.WEIGHTS}", "state_dict"),
            ("mcl", "mcl-0/checkpoints/last.pt", "model"),
        )
    }
    for method, loaded in (
        ("random", set()),
        ("moco", {"moco backbone"}),
        ("mcl-backbone", {"mcl backbone"}),
        ("mcl-all", {"mcl backbone", "mcl neck", "mcl head"}),
    ):
        path = tmp_path / "work" / "finetune" / f"{method}-0" / "iter_1.pth"
        state = torch.load(path, weights_only=True)["state_dict"]
        same = {part for part, ours, source, theirs in PARTS if close(state[ours], sources[source][theirs])}
        assert same == loaded, method


PARTS = (
    ("moco backbone", "backbone.layer4.0.conv1.weight", "moco", "backbone.layer4.0.conv1.weight"),
    ("mcl backbone", "backbone.layer4.0.conv1.weight", "mcl", "online.backbone.layer4.0.conv1.weight"),
    ("mcl neck", "neck.lateral_convs.3.conv.weight", "mcl", "online.fpn.laterals.0.conv.weight"),
    ("mcl head", "roi_head.bbox_head.shared_convs.0.conv.weight", "mcl", "online.head.convs.0.conv.weight"),
)
"""Name, weight in the detector, pre-training and weight in it."""


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """As close as a step of warm-up leaves weights; two pre-trainings of two steps are some thousandths apart."""
    return float((a - b).norm() / b.norm()) < 1e-5
