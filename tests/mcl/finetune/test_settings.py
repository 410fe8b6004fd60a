"""Configurations, ``key=value`` words, and settings that depend on the machine."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmdet", reason="needs MMDetection: make mmdet")

from mmengine.config import Config

from mcl import config
from mcl.config import ConfigError
from mcl.finetune import settings
from tests.mcl.finetune.conftest import CONFIGS, MINI
from tests.mcl.test_config import WORDS


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


def places(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key without subkeys, and its value."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
            yield from places(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


WHOLE = {"007": 7, "1_000": 1000, "'1'": 1, '"1"': 1, "1.0": 1, " 1 ": 1, "-0": 0, "+1": 1}
LEGAL: dict[Any, dict[str, Any]] = {
    int: WHOLE,
    float: {**WHOLE, "1e-3": 1e-3, ".5": 0.5, "1e3": 1000.0},
    bool: dict.fromkeys(("on", "y", "true", "'1'", '"1"', " 1 "), True) | {"no": False},
    type(None): {**WHOLE, "": None, "1e-3": 1e-3, ".5": 0.5, "1e3": 1000.0, "true": True, "[x]": ["x"], "no": "no"},
}


@pytest.mark.parametrize("word", [word for word in WORDS if config.is_folder_name(word) and word not in ("~", "null")])
def test_odd_words(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every key: text keys get the text as it was typed, other keys keep their type, or the error names the key."""
    monkeypatch.setattr(settings, "adapt", lambda config: None)  # depends on the machine
    monkeypatch.setattr(settings, "_follow", lambda *_: None)  # no optimiser has such a name
    keys = dict(places(Config.fromfile(MINI).to_dict()))
    expected = {name: word for name, old in keys.items() if isinstance(old, str)}
    expected |= {name: LEGAL[type(old)][word] for name, old in keys.items() if word in LEGAL.get(type(old), ())}
    found = dict(places(settings.load(MINI, [f"{name}={word}" for name in expected]).to_dict()))
    for name, value in expected.items():
        assert found[name] == value, name
        assert type(found[name]) in (type(value), type(keys[name])), name
    preset = Config.fromfile(MINI)
    monkeypatch.setattr(Config, "fromfile", lambda path: preset)
    for name in [name for name, old in keys.items() if name not in expected and old is not None]:
        if word.startswith(("[", "- ")) and isinstance(keys[name], list | tuple):
            continue  # a list that may have one of these values
        with pytest.raises(ConfigError, match=rf"^{re.escape(name)}: expected \w+, as in .*, got "):
            settings.load(MINI, [f"{name}={word}"])


def test_lists_have_the_elements_of_those_they_replace() -> None:
    words = [
        "data.classes=[no, 007, a b]",
        "model.rpn_head.anchor_generator.scales=[4.5, 8]",
        "parts=[backbone]",
    ]
    config = settings.load(MINI, words)
    assert config.data.classes == ["no", "007", "a b"]
    assert config.model.rpn_head.anchor_generator.scales == [4.5, 8]
    assert config.parts == ["backbone"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("data.rot=x", r"data\.rot: no such key; did you mean data\.root\?"),
        ("param_scheduler.7.gamma=1", r"param_scheduler\.7\.gamma: no such key"),
        ("train_cfg.max_iters=many", r"train_cfg\.max_iters: expected int, as in 1200, got 'many'"),
        ("weights", r"'weights': expected key=value"),
        ("data.classes=[a", r"data\.classes: expected list, as in \['bird', .*, got '\[a'"),
        ("name=a/b", r"name: 'a/b' is not a plain folder name"),
        ("name=..", r"name: '\.\.' is not a plain folder name"),
        ("train_cfg.max_iters=on", r"train_cfg\.max_iters: expected int, as in 1200, got 'on'"),
        ("train_cfg.max_iters=", r"train_cfg\.max_iters: expected int, as in 1200, got ''"),
        ("train_cfg.max_iters=null", r"train_cfg\.max_iters: expected int, got None"),
        ("train_cfg={}", r"train_cfg\.max_iters: is missing; set it, or keep its section"),
        ("train_dataloader={}", r"train_dataloader\.\w+: is missing"),
        ("train_dataloader.dataset=null", r"train_dataloader\.dataset: expected dict, got None"),
        ("data={}", r"data\.\w+: is missing"),
        ("param_scheduler=null", r"param_scheduler: expected list, got None"),
        ("optim_wrapper.optimizer.lr=nan", r"optim_wrapper\.optimizer\.lr: expected float, as in 0\.06, got 'nan'"),
        ("model.backbone=vgg", r"model\.backbone: expected dict, as in {.*}, got 'vgg'"),
        ("global_batch=0", r"global_batch: 0 must be at least 1"),
        ("randomness.seed=-1", r"randomness\.seed: -1 must be at least 0"),
        ("train_cfg.val_interval=0", r"train_cfg\.val_interval: 0 must be at least 1"),
        ("val_dataloader.batch_size=0", r"val_dataloader\.batch_size: 0 must be at least 1"),
        ("amp=true", r"amp: needs a GPU"),
        ("timeout=0", r"timeout: 0\.0 must be a number above 0, of seconds"),
        ("timeout=null", r"timeout: None must be a number above 0"),
        ("data.max_bad_fraction=1.5", r"data\.max_bad_fraction: 1\.5 must be a number between 0 and 1"),
        ("data.fraction=0", r"data\.fraction: 0.* must be a number above 0, up to 1"),
        ("data.fraction=1.1", r"data\.fraction: 1\.1 must be a number above 0, up to 1"),
        ("data.fraction_seed=-1", r"data\.fraction_seed: -1 must be at least 0"),
        ("data.max_bad_fraction=null", r"data\.max_bad_fraction: None must be a number between 0 and 1"),
        ("val_dataloader.num_workers=null", r"val_dataloader\.num_workers: expected int, got None"),
        ("train_dataloader.num_workers=-1", r"train_dataloader\.num_workers: -1 must be at least 0"),
    ],
)
def test_wrong_words(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings.load(MINI, [word])


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.py: no such file"):
        settings.load(Path("nowhere.py"))
    (tmp_path / "foreign.py").write_text("model = dict(type='MaskRCNN')")
    with pytest.raises(ConfigError, match=r"foreign\.py: not a configuration of mcl finetune"):
        settings.load(tmp_path / "foreign.py")
    (tmp_path / "broken.py").write_text("model = dict(")
    with pytest.raises(ConfigError, match=r"broken\.py: cannot read the configuration \(SyntaxError"):
        settings.load(tmp_path / "broken.py")


def test_a_rate_that_will_not_decrease_is_logged(said: pytest.LogCaptureFixture) -> None:
    settings.load(MINI, ["train_cfg.max_iters=1000", "param_scheduler.1.milestones=[900,1100]"])
    assert "the learning rate will not decrease at [1100]: train_cfg.max_iters=1000" in said.text
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


def test_processes(preset: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launcher, images per process and mixed precision on a machine with GPUs; an error on a machine without."""
    variables = {"RANK": "1", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    for name, value in (variables | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="8 processes, but no GPU"):
        settings.adapt(preset)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    preset.amp = True
    settings.adapt(preset)
    assert (preset.launcher, preset.train_dataloader.batch_size) == ("pytorch", 2)
    assert (preset.optim_wrapper.type, preset.optim_wrapper.loss_scale) == ("AmpOptimWrapper", "dynamic")
    assert preset.model.neck.norm_cfg.type == "SyncBN"
    preset.global_batch = 12
    with pytest.raises(ConfigError, match="global_batch: 12 is not divisible by 8 processes"):
        settings.adapt(preset)


@pytest.mark.parametrize("word", ["param_scheduler=[null]", "param_scheduler.1.milestones=null"])
def test_schedules_are_for_mmengine_to_check(word: str) -> None:
    settings.load(MINI, [word])
