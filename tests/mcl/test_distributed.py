"""Two processes under torchrun, over gloo."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mcl import checkpoint
from mcl.metrics import read
from tests.conftest import ROOT
from tests.mcl.test_trainer import TINY


@pytest.mark.soak
def test_two_processes_train_and_resume(photos: Path, tmp_path: Path) -> None:
    """The bank of targets holds both processes' images: the loss starts near that of a uniform guess among all 16."""
    preset = tmp_path / "tiny.yaml"
    trainer = TINY["trainer"] | {"global_batch": 16, "epochs": 1, "log_every": 1}
    preset.write_text(yaml.safe_dump(TINY | {"trainer": trainer, "evaluation": {"at_end": ["knn"]}}))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29517", "-m", "mcl"]
    command += ["pretrain", str(preset), f"data.root={photos / 'val'}", f"output={tmp_path}"]
    for _ in range(2):  # the second time it finds the run finished
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    folder = tmp_path / "tiny"
    train = [r for r in read(folder / "metrics.jsonl") if r["kind"] == "train"]
    assert [r["step"] for r in train] == [1, 2, 3, 4]
    uniform = math.log(16)
    assert all(value == pytest.approx(uniform, rel=0.2) for value in train[0]["loss_level"])
    assert checkpoint.load(folder / "checkpoints" / "last.pt")["environment"]["world_size"] == 2
    assert (folder / "report.html").exists()
