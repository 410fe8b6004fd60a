"""Sinks of records: a missing package or login is reported before the first step."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mcl import config
from mcl.config import Config, ConfigError
from mcl.records import metrics, tensorboard
from mcl.records.metrics import Metrics

PROGRAM = """
import sys
from mcl import config
from mcl.records.metrics import Metrics
try:
    Metrics(config.load(sys.argv[1]), 0).close()
except config.ConfigError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.fixture
def cfg(tiny: Config) -> Config:
    tiny.run_folder.mkdir()
    return tiny


def test_tensorboard_that_cannot_be_imported(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        ConfigError, match=r"^log\.tensorboard: .*; pip install tensorboard, or log\.tensorboard=false$"
    ):
        Metrics(config.override(cfg, ["log.tensorboard=true"]), 0)
    Metrics(cfg, 0).close()


def test_without_tensorboard_a_run_says_so_and_goes_on(
    cfg: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(metrics, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    with caplog.at_level("INFO", "mcl"):
        Metrics(config.override(cfg, ["log.tensorboard=true"]), 0).close()
    assert "pip install tensorboard" in caplog.text
    assert not (cfg.run_folder / "tensorboard").exists()


@pytest.mark.parametrize(
    ("project", "environment", "message"),
    [
        ("x", {}, "log.wandb: No API key configured."),
        ("a/b", {"WANDB_MODE": "offline"}, "log.wandb: Invalid project name 'a/b'"),
        ("x", {"WANDB_MODE": "offline"}, ""),
        pytest.param("x", {"WANDB_API_KEY": "0" * 40}, "log.wandb: ", marks=pytest.mark.soak),  # waits for 10 s
    ],
    ids=["no key", "project", "offline", "no network"],
)
def test_wandb(cfg: Config, tmp_path: Path, project: str, environment: dict[str, str], message: str) -> None:
    """Without a terminal that could ask for a key: one line, and the run ends."""
    pytest.importorskip("wandb")
    file = tmp_path / "config.yaml"
    file.write_text(f"name: tiny\noutput: {tmp_path}\nlog: {{tensorboard: false, wandb: {project}}}")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, file],
        env={**os.environ, "HOME": str(tmp_path), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    last = done.stderr.splitlines()[-1] if message else ""
    assert last.startswith(f"ConfigError: {message}" if message else ""), done.stderr
    assert message == "" or last.endswith("; wandb login, WANDB_MODE=offline, or log.wandb=")
    assert (done.returncode == 0) == (message == "")
    assert bool(list(cfg.run_folder.iterdir())) == (message == ""), "something was written before all was accepted"


def test_tensorboard_opens_with_loss_and_scores_in_words(cfg: Config, tmp_path: Path) -> None:
    """Constants have no chart, but a note; configuration and pictures are there; NaN in the first record is no
    error."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    cfg = config.override(cfg, ["log.tensorboard=true"])
    sink = Metrics(cfg, 0)
    for step, loss, rate in ((1, 3.0, 0.1), (2, 2.0, 0.1), (3, 2.0, 0.1), (4, 1.0, 0.2)):
        train = {"loss": loss, "lr": rate, "ema": 0.99, "grad_norm": math.nan, "positive": [loss / 10, 0.5]}
        sink.write({"kind": "train", "step": step, "epoch": step / 4, "eta_s": 10.0 - step, **train})
        levels = {"levels": [0.1 * step, 0.5], "levels_se": [0.1, 0.1], "random": [0.1, 0.2], "chance": 0.1}
        sink.write({"kind": "eval", "name": "retrieval", "split": "val", "step": step, **levels})
    sink.write({"kind": "eval", "name": "knn", "split": "train", "step": 4, "accuracy": 0.5, "random": 0.25, "k": 10})
    sink.close()
    Image.new("RGB", (4, 3)).save(tmp_path / "montage_000004.png")
    tensorboard.show_picture(cfg, tmp_path / "montage_000004.png", 4)

    board = event_accumulator.EventAccumulator(str(cfg.run_folder / "tensorboard")).Reload()
    tags = board.Tags()
    charts = {tag: [(event.step, round(event.value, 4)) for event in board.Scalars(tag)] for tag in tags["scalars"]}
    assert charts.pop("update/gradient norm")
    assert charts == {
        "train/loss": [(1, 3), (2, 2), (3, 2), (4, 1)],
        "train/cosine/own/level 0": [(1, 0.3), (2, 0.2), (3, 0.2), (4, 0.1)],
        "update/learning rate": [(1, 0.1), (3, 0.1), (4, 0.2)],
        "evaluation/Retrieval, held-out images/trained/level 0": [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)],
        "evaluation/Nearest neighbours, training images/trained": [(4, 0.5)],
        "evaluation/Nearest neighbours, training images/untrained": [(4, 0.25)],
    }
    groups = sorted({tag.split("/")[0] for tag in charts})
    assert groups[:2] == ["evaluation", "train"]  # TensorBoard opens these
    texts = {tag: board.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in tags["tensors"]}
    assert "backbone: resnet18" in texts["configuration/text_summary"]
    constants = texts["numbers that never changed/text_summary"]
    assert "update/momentum of the target network: 0.99" in constants
    assert "evaluation/Retrieval, held-out images/untrained/level 1: 0.2" in constants
    assert len(constants.splitlines()) == 5
    assert [tag.split(":")[0] for tag in tags["images"]] == ["Montages"]
