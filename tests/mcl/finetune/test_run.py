"""``mcl finetune`` as users run it: the table of AP, continuing after SIGKILL, errors in one line."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("mmdet", reason="needs MMDetection: make mmdet")

from mmengine.config import Config
from PIL import Image
from pycocotools.mask import encode

from mcl import cli
from mcl.config import ConfigError
from mcl.finetune import annotations, console, finetune, hooks, labels, metric
from mcl.signals import Interrupted
from mcl.train.checkpoint import CheckpointError
from tests.conftest import ROOT
from tests.mcl.distributed.test_faults import children
from tests.mcl.finetune.conftest import MINI, TINY

STEPS = 6


def words(folder: Path, output: Path, name: str, *more: str) -> list[str]:
    return [*TINY, f"data.root={folder}", f"output={output}", f"name={name}", f"train_cfg.max_iters={STEPS}", *more]


def start(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    """Starts the command in a separate process."""
    command = [sys.executable, "-W", "ignore", "-m", "mcl", "finetune", str(MINI), *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)


def losses(run: Path) -> dict[int, float]:
    """Loss by step, over all starts of the run."""
    found = {}
    for path in sorted(run.glob("*/vis_data/scalars.json")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            if "loss" in record:
                found[record["step"]] = record["loss"]
    return found


def last_checkpoint(run: Path) -> str:
    path = run / "last_checkpoint"  # written after the checkpoint itself
    return path.read_text() if path.exists() else ""


@pytest.fixture(scope="module")
def whole(folder: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An uninterrupted run from a checkpoint, and its table."""
    output = tmp_path_factory.mktemp("runs")
    return output / "whole", finetune(MINI, words(folder, output, "whole", f"weights={checkpoint}"))


def test_table(whole: tuple[Path, str]) -> None:
    folder, table = whole
    assert (folder / metric.TABLE).read_text() == table
    header, _, box, mask = table.splitlines()
    assert header == "| step | of | AP | AP50 | AP75 | APs | APm | APl |"
    assert box.startswith(f"| {STEPS} | box | ")
    assert mask.startswith(f"| {STEPS} | mask | ")
    (record,) = json.loads((folder / metric.RESULTS).read_text())
    assert record["step"] == STEPS
    assert all(0 <= record[kind][name] <= 100 for kind in ("box", "mask") for name in ("AP", "AP50", "AP75"))
    # Two images of 4 x 128 pixels, each shown twice, with a line of text above.
    picture = Image.open(folder / "predictions.png")
    assert picture.size == (4 * (4 * 128 + 6), 4 * 96 + 22)


def test_from_scratch(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads each annotation file once, and records the labels with which it trains."""
    annotations.forget()  # those of other tests
    read: list[str] = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.append(path.name), read_bytes(path))[1])
    arguments = [word for word in words(folder, tmp_path, "scratch") if "max_iters" not in word]
    table = finetune(MINI, [*arguments, "epochs=0.8", "data.fraction=0.5"])  # 0.8 * 3 images in steps of 2: 1.2 steps
    assert sorted(name for name in read if "instances" in name) == ["instances_train.json", "instances_val.json"]
    annotations.read(folder / "instances_val.json")
    assert read.count("instances_val.json") == 2, "annotations are kept in memory while it trains"
    assert [line.split(" | ")[:2] for line in table.splitlines()[2:]] == [["| 1", "box"], ["| 1", "mask"]]
    chosen = (tmp_path / "scratch" / labels.CHOSEN).read_text().split()
    assert chosen == [str(key) for key in labels.choose(range(1, 7), 0.5, 0)]


def recorded(measured: dict[str, float], folder: Path, *kinds: str) -> dict[str, Any]:
    """The record that an evaluation after 5 steps writes into a folder."""
    config = Config({"val_evaluator": {"metric": kinds}})
    runner = SimpleNamespace(work_dir=folder, iter=5, cfg=config)
    metric.APTable().after_val_epoch(runner, measured)
    (record,) = metric.read(folder)
    return record


def measured(folder: Path, found: bool, run: Path | None = None) -> dict[str, float]:
    """Evaluation of a detector that finds the first object, or nothing; `run` gets AP by category."""
    measure = metric.FolderMetric(ann_file=str(folder / "instances_val.json"), metric=["bbox", "segm"])
    measure.dataset_meta = {"classes": ("thing", "part")}
    content = json.loads((folder / "instances_val.json").read_text())
    image, (x, y, w, h) = content["images"][0], content["annotations"][0]["bbox"]
    mask = np.zeros((image["height"], image["width"]), np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    results = []
    for number in (1, 2):
        n = int(found and number == 1)
        one = {"bboxes": np.array([[x, y, x + w, y + h]] * n).reshape(-1, 4), "masks": [encode(mask)] * n}
        scores = {"scores": np.ones(n), "mask_scores": np.ones(n), "labels": np.zeros(n, int)}
        results.append(({}, {"img_id": number, **one, **scores}))
    values = measure.compute_metrics(results)
    if run:
        loop = SimpleNamespace(evaluator=SimpleNamespace(metrics=[measure]))
        metric.APTable().after_val(SimpleNamespace(work_dir=run, val_loop=loop))
    return {f"coco/{name}": value for name, value in values.items()}


@pytest.mark.parametrize("found", [False, True])
@pytest.mark.parametrize("small", [False, True])
def test_absent_is_not_zero(found: bool, small: bool, folder: Path, tmp_path: Path) -> None:
    """AP of sizes that objects have is that of pycocotools, 0 for a detector that finds nothing; other sizes have no
    AP."""
    copy = shutil.copytree(folder, tmp_path / "coco")
    if small:
        path = copy / "instances_val.json"
        content = json.loads(path.read_text())
        for annotation in content["annotations"][1:]:
            annotation["area"] = 100
        path.write_text(json.dumps(content))
    values = measured(copy, found)
    record = recorded(values, tmp_path, "bbox", "segm")
    for kind in ("box", "mask"):
        absent = {name for name, value in record[kind].items() if value is None}
        assert absent == ({"APl"} if small else {"APs", "APl"})
        assert (record[kind]["AP"] > 0) == found
        if small:
            assert record[kind]["APs"] == 0.0
    assert all(0 <= value <= 1 for value in values.values())
    lines = (tmp_path / metric.TABLE).read_text().splitlines()[2:]
    assert [line.split(" | ")[-1] for line in lines] == ["- |"] * 2


def test_ap_by_category(folder: Path, tmp_path: Path) -> None:
    """One of two things is found: precision is 1 at recalls 0, 0.01, ..., 0.5, so AP is 51 / 101."""
    copy = shutil.copytree(folder, tmp_path / "coco")
    measured(copy, found=True, run=tmp_path)
    categories = json.loads((tmp_path / metric.CATEGORIES).read_text())
    assert categories == {kind: {"thing": 50.5, "part": 0.0} for kind in ("box", "mask")}
    path = copy / "instances_val.json"
    content = json.loads(path.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 1]
    path.write_text(json.dumps(content))
    measured(copy, found=True, run=tmp_path)
    assert metric.by_category(tmp_path).splitlines()[2:] == ["| thing | 50.5 | 50.5 |", "| part | - | - |"]


def test_a_checkpoint_is_evaluated(folder: Path, whole: tuple[Path, str], tmp_path: Path) -> None:
    """The newest checkpoint of a run, or another; the AP is that of the run, results are in a folder of the run, and
    nothing else changes."""
    run = shutil.copytree(whole[0], tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert finetune(MINI, words(folder, tmp_path, "run", "test=true")) == whole[1]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    written = {path.name for path in (run / "test").iterdir()}
    assert {metric.RESULTS, metric.TABLE, metric.CATEGORIES, "predictions.png", "train.log"} < written
    assert not list((run / "test").glob("*.pth"))
    finetune(MINI, words(folder, tmp_path, "run", "test=true", f"load_from={run / 'iter_3.pth'}"))
    assert [record["step"] for record in metric.read(run / "test")] == [3]


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("none", (), r"^test: .*none has no checkpoint; name the run by name=, or a checkpoint by load_from="),
        ("none", ("load_from=no/where.pth",), r"^load_from: no/where\.pth does not exist"),
        ("whole", ("data.classes=[part]",), r"^.*iter_6\.pth: of another detector: 6 of 208 tensors"),
    ],
)
def test_nothing_to_evaluate(
    name: str, more: tuple[str, ...], message: str, folder: Path, whole: tuple[Path, str]
) -> None:
    with pytest.raises((ConfigError, CheckpointError), match=message):
        finetune(MINI, words(folder, whole[0].parent, name, "test=true", *more))
    assert not (whole[0].parent / name / "test").exists()


def test_checkpoints_are_plain(whole: tuple[Path, str]) -> None:
    state = torch.load(whole[0] / f"iter_{STEPS}.pth", weights_only=True)
    loss = state["message_hub"]["log_scalars"]["train/loss"]
    assert len(loss["values"]) == len(loss["counts"]) == STEPS
    assert all(type(value) is float for value in loss["values"])


def cut_after_three_steps(run: Path) -> None:
    """Leaves a run folder as a killed run does; its newest checkpoint is truncated, as on a slow disk."""
    for path in (run / f"iter_{STEPS}.pth", run / metric.RESULTS, run / metric.TABLE):
        path.unlink(missing_ok=True)
    (run / "iter_5.pth").write_bytes((run / "iter_3.pth").read_bytes()[:1000])
    torch.save({"state_dict": {}}, run / "iter_7.pth")  # written by another program
    torch.save([], run / "iter_8.pth")


def check_same_weights(run: Path, other: Path) -> None:
    ours, theirs = (torch.load(folder / f"iter_{STEPS}.pth")["state_dict"] for folder in (run, other))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_cut_then_stopped_in_its_evaluation_and_resumed(
    folder: Path, checkpoint: Path, whole: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps remain, with the same losses; after the signal only the evaluation is repeated."""
    run = shutil.copytree(whole[0], tmp_path / "cut")
    for log in run.glob("*/vis_data/scalars.json"):
        log.unlink()
    cut_after_three_steps(run)
    arguments = words(folder, tmp_path, "cut", f"weights={checkpoint}")

    def signalled(self: metric.APTable, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(metric.APTable, "before_val_iter", signalled)
        with pytest.raises(Interrupted):
            finetune(MINI, arguments)
    expected = losses(whole[0])
    assert losses(run) == {step: expected[step] for step in (4, 5, 6)}
    before = (run / f"iter_{STEPS}.pth").stat().st_mtime_ns
    assert finetune(MINI, arguments) == whole[1]
    assert (run / f"iter_{STEPS}.pth").stat().st_mtime_ns == before
    check_same_weights(run, whole[0])


@pytest.mark.soak
def test_killed_and_resumed_gives_the_same_losses(
    folder: Path, checkpoint: Path, whole: tuple[Path, str], tmp_path: Path
) -> None:
    process = start(words(folder, tmp_path, "cut", f"weights={checkpoint}"))
    run = tmp_path / "cut"
    try:
        while not last_checkpoint(run).endswith("iter_3.pth"):
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    cut_after_three_steps(run)
    assert finetune(MINI, words(folder, tmp_path, "cut", f"weights={checkpoint}")) == whole[1]
    assert losses(run) == losses(whole[0])
    assert len(losses(run)) == STEPS
    check_same_weights(run, whole[0])


def test_terminated_and_resumed(folder: Path, checkpoint: Path, whole: tuple[Path, str], tmp_path: Path) -> None:
    """It saves after the step in which its processes get the signal, and leaves no processes."""
    arguments = words(folder, tmp_path, "cut", f"weights={checkpoint}", "train_dataloader.num_workers=1")
    arguments.append("default_hooks.checkpoint.interval=100")
    process = start(arguments)
    run = tmp_path / "cut"
    while not losses(run):
        assert process.poll() is None, "it ended before it was told to"
        time.sleep(0.01)
    workers = children(process.pid)
    for each in (*workers, process.pid):  # as schedulers do
        os.kill(each, signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert workers
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    trained = max(losses(run))
    assert [path.name for path in run.glob("iter_*.pth")] == [f"iter_{trained}.pth"]
    assert trained < STEPS
    assert finetune(MINI, [*arguments, "train_dataloader.num_workers=0"]) == whole[1]
    assert losses(run) == losses(whole[0])


def test_other_runs_are_not_continued(folder: Path, checkpoint: Path, whole: tuple[Path, str], tmp_path: Path) -> None:
    arguments = words(folder, whole[0].parent, "whole", f"weights={checkpoint}")
    with pytest.raises(ConfigError, match=r"whole: the run in this folder had another optim_wrapper; .*name="):
        finetune(MINI, [*arguments, "optim_wrapper.optimizer.lr=0.5"])
    with pytest.raises(ConfigError, match=r"whole: the run in this folder had another model; .*name="):
        finetune(MINI, [*arguments, "data.classes=[part]"])
    with pytest.raises(ConfigError, match=r"whole: the run in this folder had another parts; .*name="):
        finetune(MINI, [*arguments, "parts=[backbone]"])
    with pytest.raises(ConfigError, match=r"whole: the run in this folder had another data\.fraction; .*name="):
        finetune(MINI, [*arguments, "data.fraction=0.5"])
    with pytest.raises(ConfigError, match=r"resume: .*whole already has a run"):
        finetune(MINI, [*arguments, "resume=false"])
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert finetune(MINI, [*arguments, f"data.root={moved}"]) == whole[1]
    content = json.loads((moved / "instances_train.json").read_text())
    content["annotations"].pop()
    (moved / "instances_train.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"whole: the run in this folder had another data\.root; .*name="):
        finetune(MINI, [*arguments, f"data.root={moved}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.root=/no/where", r"^mcl finetune: error: data\.root: /no/where does not exist$"),
        ("weights=nowhere.pt", r"^mcl finetune: error: nowhere\.pt: cannot read \(No such file or directory\)$"),
        ("data.classes=[unicorn]", r"^mcl finetune: error: data\.classes: no category 'unicorn'"),
    ],
)
def test_errors_are_one_line(
    override: str, message: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["finetune", str(MINI), *words(folder, tmp_path, "x"), override])
    assert re.search(message, capfd.readouterr().err.strip().splitlines()[-1])
    assert not (tmp_path / "x").exists()


def test_statistics_are_means_over_the_training_data() -> None:
    """Over the next batches of the training data."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(1)

        def data_preprocessor(self, batch: Any, training: bool) -> Any:
            assert training
            return {"x": batch}

        def forward(self, x: torch.Tensor, mode: str) -> torch.Tensor:
            return self.norm(x)

    class Loader(list[torch.Tensor]):
        batch_sampler = SimpleNamespace(start=0)

    values = Loader(torch.tensor([[[1.0], [3.0]], [[10.0], [20.0]], [[9.0], [9.0]]]))
    loop = SimpleNamespace(val_interval=6)
    checked: list[int] = []
    runner = SimpleNamespace(model=Model(), train_dataloader=values, max_iters=9, train_loop=loop, seed=0)
    runner.call_hook = lambda name, step: checked.append(step)
    hook = hooks.PreciseBatchNorm(interval=4, batches=2)
    for step in range(1, 10):
        runner.model.norm.running_mean.zero_()
        runner.iter = step - 1
        hook.after_train_iter(runner, step - 1)
        if step in (4, 6, 8, 9):  # interval, evaluation, last step
            assert runner.model.norm.running_mean == (2 + 15) / 2
            assert values.batch_sampler.start == step
            assert checked[-2:] == [step, step]  # signals are checked after every batch
        else:
            assert runner.model.norm.running_mean == 0
    assert runner.model.norm.momentum == 0.1


def test_table_of_boxes_alone_and_nothing_to_find(tmp_path: Path) -> None:
    record = recorded({"coco/bbox_mAP": 0.4251, "coco/bbox_mAP_50": 0.0}, tmp_path, "bbox")
    assert record["box"] == {"AP": 42.5, "AP50": 0.0, "AP75": None, "APs": None, "APm": None, "APl": None}
    assert (tmp_path / metric.TABLE).read_text().splitlines()[-1] == "| 5 | box | 42.5 | 0.0 | - | - | - | - |"


def test_terminal(folder: Path, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One line before the first step, lines of steps, and AP once; everything else is in the log file."""
    cli.main(["finetune", str(MINI), *words(folder, tmp_path, "run", f"weights={checkpoint}")])
    out, _ = capfd.readouterr()
    before, steps, after = (
        out[: (begin := out.index("Iter(train)"))],
        out[begin : (end := out.index("evaluation at step"))],
        out[end:],
    )
    *corrected, data, model, weights, schedule = before.splitlines()
    assert all("read with corrections" in line for line in corrected)
    assert data == f"data: {folder}: 6 images to train on, 2 to evaluate on, 2 classes (thing, part)"
    assert model == "model: MaskRCNN, 12.4 million parameters, on cpu"
    assert weights.startswith(f"weights: {checkpoint}: backbone 120, fpn 48, head 12 tensors, names as in mcl")
    assert schedule == (
        f"schedule: {STEPS} steps of 2 images (2.0 epochs); learning rate 0.015 after 2 steps of warm-up, "
        "times 0.1 at 4, 5; evaluated every 400 steps"
    )
    assert [line.split(" [")[0] for line in steps.splitlines()] == ["Iter(train)"] * STEPS + ["Iter(val)"]
    evaluation, head, _, thing, part, *table = after.splitlines()
    assert re.fullmatch(rf"evaluation at step {STEPS}: box AP \d+\.\d, mask AP \d+\.\d", evaluation)
    assert head == "| category | box AP | mask AP |"
    assert re.fullmatch(r"\| thing \| \d+\.\d \| \d+\.\d \|\| part \| \d+\.\d \| \d+\.\d \|", thing + part)
    assert "\n".join(table) == (tmp_path / "run" / metric.TABLE).read_text().rstrip()
    said = (tmp_path / "run" / "train.log").read_text()
    assert all(said.count(line) == 1 for line in out.splitlines()[: -len(table)])
    (log,) = (tmp_path / "run").glob("*/*.log")
    text = log.read_text()
    assert "Iter(train)" in text
    for rest in ("System environment:", "auto_scale_lr = dict(", "after_train_iter:", "Average Precision"):
        assert rest in text
        assert rest not in said
    assert "= -1.000" not in text


def test_stopped_while_batchnorm_is_re_estimated(
    folder: Path, checkpoint: Path, whole: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped twice: it ends after the batch, and the continued run does the rest, with the same weights."""
    run = shutil.copytree(whole[0], tmp_path / "cut")
    cut_after_three_steps(run)
    arguments = words(folder, tmp_path, "cut", f"weights={checkpoint}")
    batches: list[int] = []

    def signalled(self: metric.APTable, runner: Any, step: int) -> None:
        batches.append(step)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(metric.APTable, "after_norm_iter", signalled, raising=False)
        for _ in range(2):
            with pytest.raises(Interrupted, match=str(128 + signal.SIGTERM)):
                finetune(MINI, arguments)
    assert batches == [STEPS, STEPS]
    assert (run / f"iter_{STEPS}.pth").exists()
    assert not metric.read(run)
    assert finetune(MINI, arguments) == whole[1]
    check_same_weights(run, whole[0])


def test_progress_of_batchnorm(monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture) -> None:
    """As lines, where no bar can be drawn."""
    monkeypatch.setattr(console, "PAUSE", 0.0)
    with said.at_level(logging.INFO), console.shown("re-estimating BatchNorm", "batches") as show:
        show(50, 200)
    assert "re-estimating BatchNorm: 50 of 200 batches, eta 0:00:00" in said.text
