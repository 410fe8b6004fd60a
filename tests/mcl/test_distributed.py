"""Two processes under torchrun, over gloo."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mcl import checkpoint
from mcl.metrics import read
from tests.conftest import ROOT
from tests.mcl.test_trainer import TINY

OPEN = """
import json, sys, time
from dali_pipelines.source import SourceError, headers
from mcl import distributed
from mcl.config import ConfigError, DataConfig
from mcl.images import open_shared

distributed.setup("cpu")
rank = distributed.rank()
opened, reads = headers.Image.open, []

def count(file):
    reads.append(1)
    time.sleep(0.02 if rank == 0 else 0)
    return opened(file)

headers.Image.open = count
said = []
for root in json.loads(sys.argv[1])[rank]:
    try:
        said.append([len(open_shared(DataConfig(root=root, index=sys.argv[2]))), len(reads)])
    except (ConfigError, SourceError) as error:
        said.append([type(error).__name__, str(error)])
    reads.clear()
distributed.teardown()
print(json.dumps(said))
"""


def two_ranks(roots: list[list[str]], index: Path) -> list[Any]:
    """What two processes of one machine say of the sources that they open one after the other, together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN, json.dumps(roots), str(index)],
            cwd=ROOT,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


def test_ranks_open_the_same_images(photos: Path, tmp_path: Path) -> None:
    """The first reads the headers, the second the index; both refuse what differs, and what only one cannot open."""
    train, val, nowhere = str(photos / "train"), str(photos / "val"), str(tmp_path / "nowhere")
    first, second = two_ranks([[val, val, nowhere, val], [val, train, val, nowhere]], tmp_path / "index")
    assert (first[0], second[0]) == ([66, 66], [66, 0])
    for said, root in ((first, val), (second, train)):
        kind, message = said[1]
        assert kind == "ConfigError"
        assert message.startswith(f"data.root: rank 1 and rank 0 see other images in {root} (")
    missing = ["SourceError", f"data.root: {nowhere} does not exist"]
    assert first[2:] == second[2:] == [missing, missing]


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
