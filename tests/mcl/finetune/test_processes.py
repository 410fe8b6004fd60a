"""Fine-tuning in two processes over gloo, which GPUs do over NCCL."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmdet", reason="needs MMDetection: make mmdet")

from mcl import distributed
from mcl.finetune import metric, settings, training
from tests.mcl.finetune.conftest import MINI, make_folder
from tests.mcl.finetune.test_images import CUT, damage
from tests.mcl.finetune.test_run import words
from tests.mcl.ranks import in_ranks

IMAGES = STEPS = 6
SEED = 1  # with which an image changes ranks
BAD = "bad file, replaced: "


def train(config: Any, output: Path) -> str:
    with open(output / f"rank {distributed.rank()}", "w") as file, contextlib.redirect_stdout(file):
        return training.finetune(config)


@pytest.mark.soak
def test_two_processes(tmp_path: Path) -> None:
    """One of them reports; an image that both find broken, in different epochs, is listed and counted once."""
    folder = make_folder(tmp_path / "coco", train=IMAGES)
    shown_by = []  # [epoch][image]: the rank, of MMEngine's DefaultSampler
    for epoch in range(2):
        order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(SEED + epoch))
        shown_by.append(order.argsort() % 2)
    broken = int((shown_by[0] != shown_by[1]).nonzero()[0])
    path = folder / "train" / f"{broken + 1}.jpg"
    damage(path, CUT)
    config = settings.load(MINI, words(folder, tmp_path, "run", f"data.max_bad_fraction={1.5 / IMAGES}"))
    config.randomness.seed = SEED
    config.launcher = "pytorch"
    config.train_dataloader.batch_size = 1
    config.model_wrapper_cfg = {"type": "MMDistributedDataParallel", "device_ids": None, "broadcast_buffers": False}

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
