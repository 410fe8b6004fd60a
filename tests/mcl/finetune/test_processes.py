"""Fine-tuning in two processes over gloo; on GPUs it uses NCCL."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmdet", reason="needs MMDetection: make mmdet")

from mcl import cli, distributed
from mcl.distributed import local
from mcl.finetune import metric, repeats, settings, training
from tests.mcl.finetune.conftest import MINI, make_folder
from tests.mcl.finetune.test_images import CUT, damage
from tests.mcl.finetune.test_run import words
from tests.mcl.ranks import in_ranks

IMAGES = STEPS = 6
SEED = 1  # with this seed, an image changes ranks
BAD = "bad file, replaced: "


def train(config: Any, output: Path) -> str:
    with open(output / f"rank {distributed.rank()}", "w") as file, contextlib.redirect_stdout(file):
        return training.finetune(config)


def repeat(config: Any, output: Path) -> str:
    with open(output / f"rank {distributed.rank()}", "w") as file, contextlib.redirect_stdout(file):
        return repeats.finetune(config, 2)


def of_two(config: Any) -> Any:
    """The configuration of one of two processes on the CPU."""
    config.launcher = "pytorch"
    config.train_dataloader.batch_size = 1
    config.model_wrapper_cfg = {"type": "MMDistributedDataParallel", "device_ids": None, "broadcast_buffers": False}
    return config


@pytest.mark.soak
def test_repeats_in_two_processes(tmp_path: Path) -> None:
    """Both train with all seeds; the first one writes the table."""
    folder = make_folder(tmp_path / "coco")
    config = of_two(settings.load(MINI, words(folder, tmp_path, "run")))
    table, nothing = in_ranks(2, repeat, config, tmp_path)
    assert ((tmp_path / "run" / repeats.TABLE).read_text(), "") == (table, nothing)
    first, second = (
        torch.load(tmp_path / "run" / f"seed-{seed}" / f"iter_{STEPS}.pth", weights_only=True)["state_dict"]
        for seed in range(2)
    )
    assert not torch.equal(first["rpn_head.rpn_conv.weight"], second["rpn_head.rpn_conv.weight"])
    said = (tmp_path / "rank 0").read_text()
    assert [f"repeat {n} of 2, with seed {n - 1}" in said for n in (1, 2)] == [True, True]
    assert "repeat" not in (tmp_path / "rank 1").read_text()


def test_processes_have_the_words_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that mcl starts do all repeats, like those of torchrun."""
    started: list[list[str]] = []
    monkeypatch.setattr(local, "devices", lambda *_: [0, 1])
    monkeypatch.setattr(local, "run", lambda words, *_: started.append(words))
    cli.main(["finetune", str(MINI), "--repeats", "3", "name=a", "--compare", "runs/b"])
    assert started == [["finetune", str(MINI), "name=a", "--repeats", "3", "--compare", "runs/b"]]


@pytest.mark.soak
def test_two_processes(tmp_path: Path) -> None:
    """One process reports; an image that both find broken, in different epochs, is listed and counted once."""
    folder = make_folder(tmp_path / "coco", train=IMAGES)
    shown_by = []  # [epoch][image]: the rank, by MMEngine's DefaultSampler
    for epoch in range(2):
        order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(SEED + epoch))
        shown_by.append(order.argsort() % 2)
    broken = int((shown_by[0] != shown_by[1]).nonzero()[0])
    path = folder / "train" / f"{broken + 1}.jpg"
    damage(path, CUT)
    config = of_two(settings.load(MINI, words(folder, tmp_path, "run", f"data.max_bad_fraction={1.5 / IMAGES}")))
    config.randomness.seed = SEED

    tables = in_ranks(2, train, config, tmp_path)
    run = tmp_path / "run"
    assert tables == [(run / metric.TABLE).read_text()] * 2
    (record,) = json.loads((run / metric.RESULTS).read_text())
    assert record["step"] == STEPS
    assert len(list(run.glob("*/*.log"))) == len(list(run.glob("train.log"))) == 1
    (bad,) = map(json.loads, (run / "bad_files.jsonl").read_text().splitlines())
    assert (bad["index"], bad["path"]) == (broken, str(path))
    said = [(tmp_path / f"rank {rank}").read_text().splitlines() for rank in range(2)]
    noted = [line.removeprefix("rank 1: ") for line in [*said[0], *said[1]] if BAD in line]
    assert noted == [f"{BAD}{path}: {bad['reason']}"]
    assert sum("read with corrections" in line for line in said[0]) == 2
    assert sum("evaluation at step" in line for line in said[0]) == 1
    assert not [line for line in said[1] if line and BAD not in line]
