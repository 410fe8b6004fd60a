"""Where records go: what a sink needs and lacks is named before the first step."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mcl import config
from mcl.config import Config, ConfigError
from mcl.records import metrics
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
    """No terminal to ask for a key on: one line, and an end."""
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
