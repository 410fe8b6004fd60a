"""Configurations, ``key=value`` words, and what is set by the machine."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet", reason="needs MMDetection: make mmdet")

from mmengine.config import Config

from mcl.config import ConfigError
from mcl.finetune import settings
from tests.mcl.finetune.conftest import CONFIGS, MINI

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU does")


def test_overrides() -> None:
    config = settings.load(
        MINI,
        [
            *("optim_wrapper.optimizer.lr=1e-3", "param_scheduler.1.gamma=1", "name=7", "output=here", "weights=a.pt"),
            "val_dataloader.dataset.pipeline.1.scale=[96,64]",
        ],
    )
    assert config.optim_wrapper.optimizer.lr == 1e-3
    assert config.val_dataloader.dataset.pipeline[1].scale == (96, 64)
    assert config.param_scheduler[1].gamma == 1.0
    assert (config.work_dir, config.weights) == ("here/7", "a.pt")
    assert config.train_dataloader.batch_size == config.global_batch == 8


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("data.rot=x", r"data\.rot: no such key; did you mean data\.root\?"),
        ("param_scheduler.7.gamma=1", r"param_scheduler\.7\.gamma: no such key"),
        ("train_cfg.max_iters=many", r"train_cfg\.max_iters: expected int, as in 1200, got 'many'"),
        ("weights", r"'weights': expected key=value"),
        ("data.classes=[a", r"data\.classes: cannot read the value '\[a'"),
        ("name=a/b", r"name: 'a/b' is not a plain folder name"),
        ("global_batch=0", r"global_batch: 0 does not divide by 1 processes"),
        ("amp=true", r"amp: needs a GPU"),
        ("timeout=0", r"timeout: 0\.0 must be above 0, in seconds"),
        ("data.max_bad_fraction=1.5", r"data\.max_bad_fraction: 1\.5 must be between 0 and 1"),
    ],
)
def test_wrong_words(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings.load(MINI, [word])


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.py: no such configuration"):
        settings.load(Path("nowhere.py"))
    (tmp_path / "foreign.py").write_text("model = dict(type='MaskRCNN')")
    with pytest.raises(ConfigError, match=r"foreign\.py: not a configuration of mcl finetune"):
        settings.load(tmp_path / "foreign.py")
    (tmp_path / "broken.py").write_text("model = dict(")
    with pytest.raises(ConfigError, match=r"broken\.py: cannot read the configuration \(SyntaxError"):
        settings.load(tmp_path / "broken.py")


def test_a_rate_that_will_not_fall_is_spoken_of(said: pytest.LogCaptureFixture) -> None:
    settings.load(MINI, ["train_cfg.max_iters=1000"])
    assert "the learning rate will not fall at [1100]: train_cfg.max_iters=1000" in said.text
    said.clear()
    settings.load(MINI, ["train_cfg.max_iters=600", "param_scheduler.1.milestones=[300,500]"])
    assert not said.text


def test_syncbn_becomes_bn_with_a_word(said: pytest.LogCaptureFixture) -> None:
    config = settings.load(CONFIGS / "mask_rcnn_r50_fpn_1x.py")
    assert config.model.neck.norm_cfg.type == config.model.roi_head.bbox_head.norm_cfg.type == "BN"
    assert "SyncBN is for GPUs; on this CPU it is BN" in said.text


@pytest.fixture
def preset() -> Config:
    return Config.fromfile(CONFIGS / "mask_rcnn_r50_fpn_1x.py")


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        ({"RANK": "1", "WORLD_SIZE": "8"}, "pytorch"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "8"}, "slurm"),
    ],
)
def test_processes(variables: dict[str, str], launcher: str, preset: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launcher, images per process and mixed precision of a machine with GPUs; an error on one without."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="8 processes, but no GPU"):
        settings.adapt(preset)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    preset.amp = True
    settings.adapt(preset)
    assert (preset.launcher, preset.train_dataloader.batch_size) == (launcher, 2)
    assert (preset.optim_wrapper.type, preset.optim_wrapper.loss_scale) == ("AmpOptimWrapper", "dynamic")
    assert preset.model.neck.norm_cfg.type == "SyncBN"
    preset.global_batch = 12
    with pytest.raises(ConfigError, match="global_batch: 12 does not divide by 8 processes"):
        settings.adapt(preset)
