"""The Python interface: names, examples, and exceptions."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torchvision.models.feature_extraction import create_feature_extractor

import mcl
from mcl.config import ConfigError, value
from tests.conftest import ROOT


def test_public_names() -> None:
    names = [
        "MontageLoader",
        "Run",
        "detect",
        "embed",
        "evaluate",
        "export",
        "load_backbone",
        "load_config",
        "ops",
        "pretrain",
    ]
    assert mcl.__all__ == names
    assert all(getattr(mcl, name) is not None for name in names)
    with pytest.raises(AttributeError, match="no attribute 'train_'"):
        mcl.train_  # noqa: B018


def test_import_is_light() -> None:
    code = "import sys, mcl; sys.exit(bool({'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_examples(few_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the examples of docs/python.md, one after another."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "photos").mkdir()
    for split in ("train", "val"):
        (tmp_path / "photos" / split).symlink_to(few_photos)
    found: dict[str, Any] = {}
    for example in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL):
        exec(example, found)

    assert found["run"].checkpoint.exists()
    assert found["run"].report.exists()
    assert found["losses"] == [pytest.approx(3, abs=1)]
    assert found["scores"]["split"] == "val"
    assert found["report"].verified.difference < 1e-4
    assert found["query"].pixels.shape[1:] == (3, 64, 64)
    assert found["pooled"].shape == (2, 8, 4, 4)
    assert found["y"].min() == 0

    resnet = torchvision.models.resnet18()
    resnet.load_state_dict(found["backbone"].backbone.state_dict(), strict=False)
    layers = {f"layer{i}": str(2 ** (i + 1)) for i in range(1, 5)}
    expected = create_feature_extractor(resnet.eval(), layers)(found["images"])
    maps = found["maps_by_stride"]
    assert list(maps) == [4, 8, 16, 32]
    assert all(torch.allclose(maps[s], expected[str(s)], atol=1e-5) for s in maps)
    assert {s: m.shape[1] for s, m in maps.items()} == found["backbone"].channels


def test_keys() -> None:
    config = mcl.load_config("mcl_r18_fpn_demo", data={"root": Path("x")}, **{"trainer.epochs": 3, "montage.cells": 1})
    assert [value(config, key) for key in ("data.root", "data.val_root", "trainer.epochs")] == ["x", "", 3]
    assert mcl.load_config(config, name="other").name == "other"
    with pytest.raises(ConfigError, match=r"did you mean trainer.epochs\?"):
        mcl.load_config(config, trainer={"epoch": 3})
    with pytest.raises(ConfigError, match="'keras' is not a target"):
        mcl.export("x.pt", "keras")
