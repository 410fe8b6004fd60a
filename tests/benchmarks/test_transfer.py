"""The transfer benchmark: what is compared and run, and what is said of it; in the soak the real thing."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import transfer
from benchmarks.common import Result
from benchmarks.transfers import cells, cost, learners, methods, report, statistics, tasks, train
from benchmarks.transfers.methods import METHODS, Cell
from benchmarks.transfers.protocol import PLACES, Protocol, ProtocolError, Work
from benchmarks.transfers.tasks import Outcome, Task
from mcl.budget import count
from mcl.models import MCL
from scripts.builders.selection import read_selection
from tests.conftest import ROOT

QUICK = Protocol.quick()
ALL = [*METHODS]


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path / "work", QUICK)


def result(method: str, seed: int, ap50: float, protocol: Protocol = QUICK) -> Result:
    """Of a cell that was run, with half and a third of the AP50 as AP of boxes and masks."""
    pretrained = METHODS[method].pretraining is not None
    hours = {"wall": 2.0, "cpu": 1.0, "starts": 1}
    return {
        "method": method,
        "seed": seed,
        "protocol": protocol.plain(),
        "configurations": protocol.configurations(),
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
    return report.evaluate({Cell(each["method"], each["seed"]): each for each in results})


# ------------------------------------------------------------------------------------------------ statistics


def test_paired_differences_by_hand() -> None:
    """2, 4, 3: mean 3, standard deviation 1, so 3 ± 4.303 / sqrt(3)."""
    difference = statistics.paired({0: 12.0, 1: 24.0, 2: 33.0, 7: 1.0}, {2: 30.0, 0: 10.0, 1: 20.0})
    assert difference is not None
    assert (difference.seeds, difference.mean) == ((0, 1, 2), 3)
    assert difference.interval == pytest.approx((0.5156, 5.4844), abs=1e-4)
    assert difference.exceeds_noise is True


def test_what_rounding_can_make_is_noise() -> None:
    """Differences of 0.1 each time, between values that are rounded to it."""
    ours, theirs = {0: 5.1, 1: 5.2, 2: 5.3}, {0: 5.0, 1: 5.1, 2: 5.2}
    difference = statistics.paired(ours, theirs)
    assert difference is not None
    assert difference.interval == pytest.approx((0.0, 0.2))
    far = statistics.paired({seed: value + 0.2 for seed, value in ours.items()}, theirs)
    assert far is not None
    assert far.exceeds_noise is True


def test_an_interval_with_zero_in_it_is_noise() -> None:
    """1 and 3: mean 2, standard deviation sqrt(2), so 2 ± 12.706."""
    difference = statistics.paired({0: 1.0, 1: 3.0}, {0: 0.0, 1: 0.0})
    assert difference is not None
    assert difference.interval == pytest.approx((-10.706, 14.706))
    assert difference.exceeds_noise is False


def test_a_single_seed_has_no_interval_and_no_deviation() -> None:
    difference = statistics.paired({0: 5.0, 1: 1.0}, {0: 2.0})
    assert difference == statistics.Difference((0,), 3.0, None)
    assert difference.exceeds_noise is None
    assert statistics.deviation([5.0]) is None
    assert statistics.deviation([1.0, 3.0]) == pytest.approx(2**0.5)
    assert statistics.paired({0: 1.0}, {1: 1.0}) is None


def test_quantiles_are_those_of_the_t_distribution() -> None:
    """By numerical integration of its density, in steps of 0.001 up to the quantile: 0.475 on one side."""
    for freedom, quantile in enumerate(statistics.T, start=1):
        x = torch.linspace(0, quantile, int(quantile * 1000) + 1, dtype=torch.float64)
        density = torch.distributions.StudentT(torch.tensor(freedom, dtype=torch.float64)).log_prob(x).exp()
        assert float(torch.trapezoid(density, x)) == pytest.approx(0.475, abs=2e-5)


# ------------------------------------------------------------------------------------------------ protocol, images


def test_results_of_another_protocol_are_refused(tmp_path: Path) -> None:
    results = keep(tmp_path / "r", result("random", 0, 1.0, dataclasses.replace(QUICK, epochs=7)))
    with pytest.raises(ProtocolError, match=r"random-0\.json: of another protocol: epochs is 7 there and 1 now .*move"):
        cells.read(results, QUICK)
    with pytest.raises(SystemExit, match=r"random-0\.json: of another protocol"):
        transfer.main(["--quick", "--report", "--results", str(results)])


def test_results_of_other_configurations_are_refused(tmp_path: Path) -> None:
    kept = result("random", 0, 1.0)
    other = {**kept["configurations"], QUICK.detector: "0123456789ab"}
    results = keep(tmp_path / "r", {**kept, "configurations": other})
    with pytest.raises(
        ProtocolError, match=r"random-0\.json: made with another configs/finetune/mask_rcnn_r18_fpn_mini"
    ):
        cells.read(results, QUICK)


def test_configurations_change_with_what_decides_a_result() -> None:
    own = QUICK.configurations()
    for changed, file in (
        ({"pretraining": (*QUICK.pretraining, "model.temperature=0.3")}, QUICK.preset),
        ({"finetuning": (*QUICK.finetuning, "model.rpn_head.feat_channels=32")}, QUICK.detector),
    ):
        other = dataclasses.replace(QUICK, **changed).configurations()  # type: ignore[arg-type]
        assert [name for name in own if own[name] != other[name]] == [file]


def test_work_of_another_protocol_or_other_images_is_refused(work: Work) -> None:
    Work(work.folder, QUICK)
    with pytest.raises(ProtocolError, match=r"protocol\.json: of another protocol: moco_momentum is 0\.99 there"):
        Work(work.folder, dataclasses.replace(QUICK, moco_momentum=0.5))
    work.images.write_text("a.jpg\tb\n")
    with pytest.raises(ProtocolError, match=r"images\.txt: not the images of .*; move .*work away"):
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
    assert (made.classes, made.count) == (["a", "c"], 3)
    assert Work.open(made.folder).protocol == protocol
    two = Work(tmp_path / "two", dataclasses.replace(protocol, at_most=2))
    assert (ROOT / two.images).read_text() == "../a/1.jpg\ta\n../a/2.jpg\ta\n"


# ------------------------------------------------------------------------------------------------ what is run


def test_cells_share_a_pretraining_and_come_seed_by_seed(work: Work, tmp_path: Path) -> None:
    planned = cells.plan(methods.cells(ALL, [4, 5]), work, tmp_path, jobs=1)
    names = [task.name for task in planned]
    assert names[:4] == ["finetune-random-4", "pretrain-mcl-4", "finetune-mcl-all-4", "finetune-mcl-backbone-4"]
    assert len(names) == len(set(names)) == 2 * (6 + 3) + 2  # mcl-released only once
    needs = {task.name: task.needs for task in planned}
    assert needs["finetune-random-4"] is None
    for method in ("mcl-all", "mcl-backbone", "mcl-fpn"):
        assert needs[f"finetune-{method}-5"] == "pretrain-mcl-5"
    assert "finetune-mcl-released-5" not in names
    assert all(need is None or names.index(need) < names.index(name) for name, need in needs.items())


def test_commands_load_the_parts_of_the_method(work: Work) -> None:
    words = {name: methods.finetune(Cell(name, 3), work) for name in METHODS}
    backbone, neck, head = r"'backbone\.'", r"'neck\.'", r"'roi_head\.bbox_head\.shared_convs\.'"
    assert not [word for word in words["random"] if word.startswith(("weights=", "pretrained."))]
    assert f"pretrained.names=[{backbone}]" in words["moco"]
    assert f"pretrained.names=[{backbone}]" in words["supervised"]
    assert f"pretrained.names=[{backbone}]" in words["mcl-backbone"]
    assert f"pretrained.names=[{backbone},{neck}]" in words["mcl-fpn"]
    assert f"pretrained.names=[{backbone},{neck},{head}]" in words["mcl-all"]
    assert f"weights={work.folder}/pretrain/moco-3/backbone.pth" in words["moco"]
    assert f"weights={work.folder}/pretrain/mcl-3/checkpoints/last.pt" in words["mcl-fpn"]
    assert "model.compute=released" in methods.pretrain(Cell("mcl-released", 0), work)
    assert "model.compute=released" not in methods.pretrain(Cell("mcl-all", 0), work)
    shell = methods.shell(words["moco"])
    assert shell.startswith("CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 python -m mcl finetune configs/")
    assert r"""'pretrained.names=['"'"'backbone\.'"'"']'""" in shell


def test_default_words_are_those_of_the_verbs() -> None:
    settings = pytest.importorskip("mcl.finetune.settings")
    protocol = Protocol()
    config = settings.load(ROOT / protocol.detector, protocol.finetuning)
    assert config.train_cfg.max_iters * config.global_batch >= 12 * 800
    assert config.to_dict() == settings.load(ROOT / protocol.detector).to_dict()
    settings.load(ROOT / protocol.detector, QUICK.finetuning)


def test_costs_are_counted(work: Work) -> None:
    pytest.importorskip("lightly")
    side = work.config(0).montage.canvas
    supervised = cost.per_image("supervised", work)
    assert supervised == pytest.approx(count.supervised("resnet18", side), rel=0.01)
    # Forward of the keys is a third of a step, in which the first convolution has no gradient towards the pixels.
    assert cost.per_image("moco", work) / supervised == pytest.approx(4 / 3, rel=0.02)
    assert cost.supervised_epochs("supervised", work) == QUICK.epochs
    assert cost.supervised_epochs(None, work) == 0


# ------------------------------------------------------------------------------------------------ runs


def test_finished_cells_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = keep(tmp_path / "r", result("random", 0, 1.0), result("moco", 0, 2.0))
    asked: list[list[str]] = []

    def run(planned: Sequence[Task], *_: object, **__: object) -> Outcome:
        asked.append([task.name for task in planned])
        return Outcome({"finetune-supervised-0": "exit code 1"}, [], 0)

    monkeypatch.setattr(tasks, "run", run)
    wanted = methods.cells(["random", "moco", "supervised"], [0])
    arguments = (QUICK, tmp_path / "work", results, 1, 1.0)
    assert transfer.run(wanted, *arguments) == 1
    assert asked == [["pretrain-supervised-0", "finetune-supervised-0"]]
    assert transfer.run(wanted[:2], *arguments) == 0
    assert len(asked) == 1


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


def test_report_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--report", "--results", str(tmp_path / "r")]
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
    monkeypatch.setattr(learners, "Backbone", Thin)
    made = Work(tmp_path / "work", dataclasses.replace(QUICK, at_most=8, moco_bank=12, epochs=3))
    optim = made.config(0).optim

    def run(folder: Path, until: int) -> tuple[list[float], torch.nn.Module]:
        torch.manual_seed(0)
        learner = learners.make(kind, made)
        photos = train.Photos(ROOT / made.images, learner.transform)
        if until < 3:  # cut while the next epoch is under way
            monkeypatch.setattr(learner, "prepare", _Cut(learner.prepare, 2 * until + 1))
        return train.train(learner, photos, optim, 4, 3, 0, folder), learner

    whole, learner = run(tmp_path / "whole", 3)
    assert len(whole) == 3
    for until in (0, 1, 2):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", until)
    again, continued = run(tmp_path / "cut", 3)
    assert again == whole == json.loads((tmp_path / "cut" / train.LOSSES).read_text())
    for name, tensor in train._tensors(learner).items():
        assert torch.equal(tensor, train._tensors(continued)[name]), name
    state = torch.load(tmp_path / "cut" / train.WEIGHTS, weights_only=True)["state_dict"]
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
    for make in (lambda: learners.make("supervised", work), lambda: learners.make("moco", work)):
        torch.manual_seed(5)
        states.append(make().backbone.state_dict())
    torch.manual_seed(5)
    config = work.config(5)
    states.append(MCL(config.model, config.montage).online.backbone.state_dict())
    assert all(torch.equal(states[0][name], other[name]) for other in states[1:] for name in states[0])


# ------------------------------------------------------------------------------------------------ the real thing


@pytest.mark.soak
def test_quick_run_from_end_to_end_is_killed_and_continues(tmp_path: Path) -> None:
    pytest.importorskip("mmdet")
    pytest.importorskip("lightly")
    from tests.mcl.finetune.conftest import make_folder

    protocol = dataclasses.replace(QUICK, detection=str(make_folder(tmp_path / "coco")))
    script = (
        "import sys; from pathlib import Path; from benchmarks import transfer; "
        "from benchmarks.transfers import methods; from benchmarks.transfers.protocol import Protocol; "
        f"protocol = {protocol!r}; results = Path({str(tmp_path / 'results')!r}); "
        "wanted = methods.cells(['random', 'mcl-all', 'mcl-backbone', 'moco'], [0]); "
        f"status = transfer.run(wanted, protocol, Path({str(tmp_path / 'work')!r}), results, 2, 1.0); "
        "transfer.publish(results, protocol); sys.exit(status)"
    )
    records = tmp_path / "work" / "tasks"
    for task in ("pretrain-mcl-0", "finetune-mcl-all-0"):
        process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, start_new_session=True)
        end = time.monotonic() + 300
        while not (records / f"{task}.json").exists() and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(5)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=900)

    there = cells.read(tmp_path / "results", protocol)
    assert {cell.name for cell in there} == {"random-0", "mcl-all-0", "mcl-backbone-0", "moco-0"}
    assert there[Cell("mcl-all", 0)]["hours"]["finetuning"]["starts"] >= 2
    assert there[Cell("moco", 0)]["losses"]["pretraining"] > 0
    assert tasks.hours(records, "pretrain-mcl-0") == there[Cell("mcl-backbone", 0)]["hours"]["pretraining"]
    sources = {
        name: torch.load(tmp_path / "work" / "pretrain" / path, weights_only=True)[entry]
        for name, path, entry in (
            ("moco", f"moco-0/{train.WEIGHTS}", "state_dict"),
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
