"""The loop: run folder, exact resume, signals, broken checkpoints; on photographs, through DALI."""

import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dali_pipelines.source import SourceError
from mcl import commands as run
from mcl import config
from mcl.config import Config, ConfigError
from mcl.records.metrics import RecordError, read
from mcl.signals import Interrupted
from mcl.train import checkpoint
from mcl.train.checkpoint import CheckpointError
from mcl.train.trainer import Trainer
from tests.conftest import ThinBackbone
from tests.dali_pipelines.images import write_animated, write_huge, write_truncated
from tests.dali_pipelines.shards import write_tar
from tests.mcl.tiny import STEPS, TINY, equal
from tests.mcl.train.test_checkpoint import small_disk


@pytest.fixture(autouse=True)
def _thin(request: pytest.FixtureRequest) -> None:
    """Uses a cheap backbone, unless the network itself matters."""
    if not request.node.get_closest_marker("real_backbone"):
        request.getfixturevalue("thin_backbone")


def before_step(trainer: Trainer, step: int, do: Callable[[], object]) -> None:
    """Calls a function right before a step."""
    train_step = trainer.train_step

    def wrapped(*views: Any) -> Any:
        if trainer.step == step:
            do()
        return train_step(*views)

    trainer.train_step = wrapped  # type: ignore[method-assign]


def last_weights(cfg: Config) -> dict[str, Any]:
    return checkpoint.load(cfg.run_folder / "checkpoints" / "last.pt")


@pytest.mark.real_backbone
def test_run_folder(tiny: Config, photos: Path) -> None:
    cfg = config.override(tiny, ["log.tensorboard=true", "log.preview=true", "evaluation.at_end=[retrieval, knn]"])
    cfg = config.override(cfg, ["evaluation.gallery=8", "evaluation.galleries=2", "evaluation.k=3"])
    run.pretrain(cfg)
    folder = cfg.run_folder
    names = {p.name for p in folder.iterdir()}
    assert names == {
        *(
            "config.yaml",
            "train.log",
            "metrics.jsonl",
            "evaluations.jsonl",
            "tensorboard",
            "checkpoints",
            "preview",
            "report.html",
            "environment.json",
        )
    }
    assert config.from_dict(yaml.safe_load((folder / "config.yaml").read_text())) == cfg
    images = sum(path.is_file() for path in Path(cfg.data.root).rglob("*"))
    assert json.loads((folder / "environment.json").read_text())["images"] == images
    files = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert files == ["last.pt", "step_00000004.pt", "step_00000008.pt"]
    train, scores = (read(folder / f"{name}.jsonl") for name in ("metrics", "evaluations"))
    assert [r["step"] for r in train] == [2, 4, 6, 8]
    assert all(math.isfinite(r["loss"]) and r["images_per_s"] > 0 and 0 <= r["data_wait"] <= 1 for r in train)
    assert train[-1]["eta_s"] == 0
    assert all(r["peak_memory_gb"] > 0 for r in train)
    assert all(len(r["positive"]) == len(r["negative"]) == 2 for r in train)
    assert [(r["name"], r["step"]) for r in scores] == [("retrieval", 8), ("knn", 8)]
    assert {p.suffix for p in (folder / "preview").iterdir()} == {".png"}
    assert list((folder / "tensorboard").iterdir())


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.float16)])
def test_images_come_in_half_precision_where_the_network_computes_in_it(
    tiny: Config, precision: str, dtype: torch.dtype
) -> None:
    with Trainer(config.override(tiny, [f"trainer.precision={precision}"])).loader as loader:
        assert [view.pixels.dtype for view in next(loader)] == [dtype] * 2


def test_accumulated_metrics_are_the_steps_means(tiny: Config) -> None:
    """The record of two steps has the means of the model's results."""
    trainer = Trainer(tiny)
    outputs = []
    train_step = trainer.train_step

    def spy(*views: Any) -> Any:
        outputs.append(train_step(*views))
        return outputs[-1]

    trainer.train_step = spy  # type: ignore[method-assign]
    trainer.fit()
    first = read(tiny.run_folder / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(sum(o.loss.item() for o, _ in outputs[:2]) / 2, rel=1e-6)
    assert first["grad_norm"] == pytest.approx(sum(float(g) for _, g in outputs[:2]) / 2, rel=1e-6)
    assert first["positive"] == pytest.approx(
        sum(o.scores["positive"].mean(0) for o, _ in outputs[:2]).div(2).tolist(), abs=1e-6
    )


@pytest.mark.real_backbone
def test_stopped_by_a_signal_and_resumed(tiny: Config) -> None:
    """SIGTERM in the middle of an epoch: a checkpoint is saved, and the resumed run ends bit for bit like an
    uninterrupted one."""
    tiny = config.override(tiny, ["trainer.checkpoint_epochs=2"])
    undisturbed = config.override(tiny, ["name=undisturbed"])
    Trainer(undisturbed).fit()

    trainer = Trainer(tiny)
    before_step(trainer, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted) as stop:
        trainer.fit()
    assert stop.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert last_weights(tiny)["step"] == 3

    resumed = Trainer(tiny)
    assert resumed.step == 3
    resumed.fit()
    a, b = last_weights(tiny), last_weights(undisturbed)
    assert all(equal(a[key], b[key]) for key in ("step", "model", "optimizer", "scaler", "loader", "rng"))
    # The records of both runs are the same, except for speed, time and memory.
    times = ("images_per_s", "data_wait", "saving", "forward", "backward", "optimizer", "eta_s", "peak_memory_gb")
    timeless = [
        [{k: v for k, v in r.items() if k not in times} for r in read(c.run_folder / "metrics.jsonl")]
        for c in (tiny, undisturbed)
    ]
    assert [r["step"] for r in timeless[0]] == [2, 4, 6, 8]
    assert timeless[0][2:] == timeless[1][2:]


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_stopped_next_to_a_change_of_the_canvas_and_resumed(tiny: Config, stop: int) -> None:
    """Before it, at it, and after it: the second epoch has canvases of another size."""
    tiny = config.override(tiny, ["montage.schedule=[[1, 2]]", "trainer.checkpoint_epochs=2"])
    undisturbed = Trainer(config.override(tiny, ["name=undisturbed"]))
    sides: list[int] = []
    undisturbed.model.register_forward_pre_hook(lambda _, views: sides.append(views[0].pixels.shape[-1]))
    undisturbed.fit()
    assert sides == [32] * 4 + [64] * 4

    trainer = Trainer(tiny)
    before_step(trainer, stop - 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        trainer.fit()
    resumed = Trainer(tiny)
    assert resumed.step == stop
    resumed.fit()
    a, b = last_weights(tiny), last_weights(undisturbed.config)
    assert all(equal(a[key], b[key]) for key in ("step", "model", "optimizer", "loader", "rng"))


def pretrain(words: list[str], real: bool) -> None:
    """The work of each process."""
    with nullcontext() if real else mock.patch("mcl.models.encoder.Backbone", ThinBackbone):
        Trainer(config.override(config.from_dict(TINY), words)).fit()


@pytest.mark.parametrize(
    ("kills", "epochs", "real"),
    [
        (2, 12, False),
        pytest.param(8, 9, True, marks=[pytest.mark.soak, pytest.mark.real_backbone]),
    ],
)
def test_killed_at_random_steps_and_resumed(
    tiny: Config, few_photos: Path, tmp_path: Path, kills: int, epochs: int, real: bool
) -> None:
    """SIGKILL at several random moments: the final weights are bit for bit those of an uninterrupted run."""
    words = [f"data.root={few_photos}", f"output={tmp_path}", f"trainer.epochs={epochs}"]
    words += ["trainer.checkpoint_epochs=1", "trainer.log_every=1", "trainer.threads=1"]
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["mcl.train.trainer", "dali_pipelines.pipelines"])
    chance = random.Random(0)
    log = tiny.run_folder / "metrics.jsonl"
    for kill in range(kills):
        process = processes.Process(target=pretrain, args=(words, real))
        process.start()
        goal = len(read(log)) + chance.randint(1, 4)
        while process.is_alive() and len(read(log)) < goal:
            time.sleep(0.005)
        time.sleep(chance.random() * 0.1)
        assert process.is_alive(), f"the run ended before kill {kill}"
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    process = processes.Process(target=pretrain, args=(words, real))
    process.start()
    process.join()
    assert process.exitcode == 0

    pretrain([*words, "name=undisturbed"], real)
    a, b = last_weights(tiny), last_weights(config.override(tiny, ["name=undisturbed"]))
    assert a["step"] == b["step"] == 4 * epochs
    assert all(equal(a[key], b[key]) for key in ("model", "optimizer", "loader", "rng"))


@pytest.mark.fault("half of a checkpoint, and none whole")
def test_half_a_checkpoint_is_skipped(tiny: Config) -> None:
    Trainer(tiny).fit()
    before, newest = checkpoint.steps(tiny.run_folder / "checkpoints")
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    with pytest.warns(UserWarning, match=r"step_00000008\.pt: incomplete .*trying the previous one"):
        trainer = Trainer(tiny)
    assert trainer.step == 4
    before.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="incomplete"),
        pytest.raises(CheckpointError, match="none of the 2 checkpoints"),
    ):
        Trainer(tiny)


def test_checkpoint_of_another_model(tiny: Config) -> None:
    Trainer(tiny).fit()
    path = tiny.run_folder / "checkpoints" / "last.pt"
    with pytest.raises(ConfigError, match=r"model\.width: was 16 in the run in .*, is now 32 \(1 keys"):
        Trainer(config.override(tiny, ["model.width=32"]))
    with pytest.raises(ConfigError, match=r"trainer\.resume: never, but .* already has a run"):
        Trainer(config.override(tiny, ["trainer.resume=never"]))
    started = Trainer(config.override(tiny, ["name=warm", f"model.init={path}"]))
    assert started.step == 0
    assert equal(started.model.state_dict(), last_weights(tiny)["model"])


def test_a_failed_save_keeps_the_checkpoint_before(tiny: Config) -> None:
    """The disk is full when the second checkpoint is written; when it has space again, the run continues."""
    trainer = Trainer(tiny)
    with ExitStack() as disk:

        def fill() -> None:
            while not (tiny.run_folder / "checkpoints" / "last.pt").exists():
                time.sleep(0.005)
            disk.enter_context(small_disk(20_000))

        before_step(trainer, 6, fill)
        with pytest.raises(CheckpointError, match=r"step_00000008\.pt: cannot save .*too large.* unchanged"):
            trainer.fit()
    assert [p.name for p in sorted((tiny.run_folder / "checkpoints").iterdir())] == ["last.pt", "step_00000004.pt"]
    Trainer(tiny).fit()
    assert last_weights(tiny)["step"] == STEPS


def test_a_record_that_cannot_be_written_is_named(tiny: Config) -> None:
    """The error names the file and has no traceback."""
    trainer = Trainer(tiny)
    with ExitStack() as disk:
        before_step(trainer, 1, lambda: disk.enter_context(small_disk(100)))
        with pytest.raises(RecordError, match=r"metrics\.jsonl: cannot be written \(.*\); free disk space, and run"):
            trainer.fit()


@pytest.mark.fault("a disk that is still full when the run is started again")
def test_a_disk_that_is_still_full_leaves_records_as_they_were(tiny: Config) -> None:
    break_off(tiny)
    before = {name: (tiny.run_folder / name).read_bytes() for name in ("config.yaml", "metrics.jsonl")}
    assert all(before.values())
    with small_disk(100), pytest.raises(RecordError, match=r"config\.yaml: cannot be written \(.*\); free disk space"):
        Trainer(tiny)
    trainer = Trainer(tiny)
    with small_disk(100), pytest.raises(RecordError, match=r"metrics\.jsonl: cannot be written"):
        trainer.fit()
    assert before == {name: (tiny.run_folder / name).read_bytes() for name in before}


def test_the_first_lines_name_what_is_slow(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "driver").touch()
    monkeypatch.setattr("mcl.train.trainer._DRIVER", tmp_path / "driver")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("mcl.ops.steps.compiled", lambda *_: False)
    trainer = Trainer(tiny)
    trainer.fit()
    text = (trainer.folder / "train.log").read_text()
    assert "training on the CPU: PyTorch sees no GPU" in text
    assert "loader: fused on cpu (no CUDA device)" in text
    assert "steps are slower without mcl's CPU operators (region_pool: a launch per map" in text


def test_nothing_is_written_before_all_is_accepted(tiny: Config, few_photos: Path, tmp_path: Path) -> None:
    """A refused start creates no folder, or does not change the log of an earlier run."""
    refused = [
        ["data.root=nowhere"],
        ["trainer.global_batch=4096"],
        ["trainer.global_batch=7"],
        ["model.init=nowhere.pt"],
        ["evaluation.at_end=[linear]", "data.val_root=nowhere"],
    ]
    for words in refused:
        with pytest.raises((ConfigError, SourceError, CheckpointError)):
            Trainer(config.override(tiny, words))
        assert not tiny.run_folder.exists()
    Trainer(tiny).fit()
    before = {path: path.read_bytes() for path in tiny.run_folder.rglob("*") if path.is_file()}
    for words in [*refused, ["trainer.epochs=3"], ["trainer.resume=never"]]:
        with pytest.raises((ConfigError, SourceError, CheckpointError)):
            run.pretrain(config.override(tiny, words))
        assert before == {path: path.read_bytes() for path in tiny.run_folder.rglob("*") if path.is_file()}


def test_a_longer_run_says_how_to_train_on(tiny: Config) -> None:
    Trainer(tiny).fit()
    with pytest.raises(ConfigError) as refused:
        Trainer(config.override(tiny, ["trainer.epochs=10"]))
    said = str(refused.value)
    assert said.startswith(f"trainer.epochs: was 2 in the run in {tiny.run_folder}, is now 10 ")
    assert said.endswith(f": name=NEW model.init={tiny.run_folder / 'checkpoints' / 'last.pt'}")
    words = ["trainer.epochs=10", "name=longer", *said.split()[-1:]]
    assert Trainer(config.override(tiny, words)).steps == 40


def test_a_finished_run_is_left_alone(tiny: Config, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = config.override(tiny, ["evaluation.at_end=[retrieval]", "log.preview=true", "log.tensorboard=true"])
    run.pretrain(cfg)
    before = {path: path.read_bytes() for path in cfg.run_folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    run.pretrain(cfg)
    said = capsys.readouterr().out
    assert f"the run is finished: all {STEPS} steps are done" in said
    assert "retrieval" in said
    assert before == {path: path.read_bytes() for path in cfg.run_folder.rglob("*") if path.is_file()}


def test_other_files_are_not_resumed(tiny: Config, few_photos: Path, tmp_path: Path) -> None:
    """Removing a photograph changes the numbers of others."""
    root = tmp_path / "copy"
    shutil.copytree(few_photos, root)
    cfg = config.override(tiny, [f"data.root={root}"])
    Trainer(cfg).fit()
    next(root.rglob("*.jpg")).unlink()
    with pytest.raises(ConfigError, match=r"data\.root: the files in .* are not those that the run"):
        Trainer(cfg)


def break_off(cfg: Config) -> None:
    """Trains until an exception ends the run before its sixth step."""
    trainer = Trainer(cfg)

    def fail() -> None:
        raise RecordError

    before_step(trainer, 5, fail)
    with pytest.raises(RecordError):
        trainer.fit()


def test_remedies_for_bad_files_may_be_applied_on_resume(tiny: Config) -> None:
    break_off(tiny)
    cfg = config.override(tiny, ["data.max_bad_fraction=0.5", "trainer.log_every=1"])
    assert Trainer(cfg).step == 4
    assert yaml.safe_load((tiny.run_folder / "config.yaml").read_text())["data"]["max_bad_fraction"] == 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluation.at_end=[knn]", "data.val_root=/no/where"], r"data\.val_root: /no/where does not exist"),
        (["evaluation.at_end=[linear]"], r"data\.val_root: the linear probe needs held-out images"),
        (
            ["evaluation.at_end=[retrieval]", "evaluation.gallery=10"],
            r"evaluation\.gallery: 10 .* nearest legal: 8, 12",
        ),
        (["data.root="], r"data\.root: not set"),
        (["data.root=/no/such/folder"], r"data\.root: /no/such/folder does not exist"),
        (["trainer.global_batch=10"], r"trainer\.global_batch: 10 .* nearest legal: 8, 12"),
        (["trainer.global_batch=64"], r"has 32 images, fewer than trainer\.global_batch=64"),
        (["data.engine=stock", "data.device=gpu"], r"data\.device: gpu needs a CUDA device"),
        (["trainer.device=cuda"], r"trainer\.device: cuda is set"),
        (["output=/proc/nowhere"], r"output: cannot write to /proc/nowhere"),
        (["log.wandb=project"], r"log\.wandb: No module named 'wandb'; pip install wandb, or log\.wandb=$"),
    ],
)
def test_bad_input_is_refused_before_any_work(tiny: Config, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(config.override(tiny, words)).fit()
    assert not tiny.run_folder.exists()


def test_finished_run_is_not_trained_again(tiny: Config) -> None:
    Trainer(tiny).fit()
    before = last_weights(tiny)
    Trainer(tiny).fit()
    assert equal(before["model"], last_weights(tiny)["model"])
    assert [r["step"] for r in read(tiny.run_folder / "metrics.jsonl")] == [2, 4, 6, 8]


@pytest.mark.real_backbone
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp64"])
def test_precisions(tiny: Config, precision: str) -> None:
    """Each precision trains; the first step's loss is that of fp32, within the precision."""
    losses = {}
    for name in ("fp32", precision):
        trainer = Trainer(config.override(tiny, [f"name={name}", f"trainer.precision={name}"]))
        output, _ = trainer.train_step(*next(trainer.loader))
        trainer.loader.close()
        losses[name] = output.loss
        assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert losses[precision].dtype == (torch.float64 if precision == "fp64" else torch.float32)
    assert losses[precision].item() == pytest.approx(losses["fp32"].item(), rel={"fp64": 1e-5}.get(precision, 2e-2))


def test_bad_files_are_listed_and_replaced(tiny: Config, few_photos: Path, tmp_path: Path) -> None:
    """One in twenty files cannot be used, each for another reason; unusual files can."""
    root = tmp_path / "poisoned"
    root.mkdir()
    photos = sorted(few_photos.rglob("*.jpg"))
    for i in range(112):
        shutil.copy(photos[i % len(photos)], root / f"{i:03}.jpg")
    with Image.open(photos[0]) as photo:
        picture = photo.convert("RGB").resize((64, 48))
    write_truncated(root / "007.jpg", picture)
    (root / "020.jpg").write_bytes(b"")
    (root / "033.jpg").write_text("not an image")
    write_huge(root / "049.jpg", picture)
    write_animated(root / "050.webp", picture)
    broken = {"007.jpg", "020.jpg", "033.jpg", "049.jpg", "050.webp"}
    if os.geteuid() != 0:
        (root / "081.jpg").chmod(0)
        broken.add("081.jpg")
    picture.convert("CMYK").save(root / "090.jpg")
    Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(root / "099.png")

    cfg = config.override(tiny, [f"data.root={root}", "data.max_bad_fraction=0.06", "trainer.epochs=1"])
    Trainer(cfg).fit()
    listed = [json.loads(line) for line in (tiny.run_folder / "bad_files.jsonl").read_text().splitlines()]
    assert sorted(Path(r["path"]).name for r in listed) == sorted(broken)
    assert all(r["reason"] for r in listed)
    assert last_weights(tiny)["step"] == 14
    assert len(last_weights(tiny)["loader"]["bad"]) == len(broken)
    assert Trainer(cfg).loader.bad.keys() == last_weights(tiny)["loader"]["bad"].keys()


def test_a_shard_cut_short_trains_through(tiny: Config, few_photos: Path, tmp_path: Path) -> None:
    """The images before the truncation are used; the truncated one is listed."""
    photos = [file.read_bytes() for file in sorted(few_photos.rglob("*.jpg"))]
    shard = tmp_path / "shards" / "0.tar"
    shard.parent.mkdir()
    write_tar(shard, ((f"{i:03}.jpg", photo) for i, photo in enumerate(photos)))
    content = shard.read_bytes()
    shard.write_bytes(content[: content.index(photos[25]) + 1000])
    cfg = config.override(tiny, [f"data.root={shard.parent}", "data.max_bad_fraction=0.05", "trainer.epochs=1"])
    Trainer(cfg).fit()
    (line,) = (tiny.run_folder / "bad_files.jsonl").read_text().splitlines()
    assert json.loads(line)["path"].endswith("0.tar/025.jpg")
    assert "truncated" in json.loads(line)["reason"]
    assert last_weights(tiny)["step"] == 26 // 8
