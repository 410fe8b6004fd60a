"""Photographs and the configuration of the smallest run."""

from pathlib import Path

import pytest

from mcl import config
from mcl.config import Config
from tests.mcl.tiny import TINY


@pytest.fixture(scope="module")
def few_photos(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 photographs in 4 classes."""
    root = tmp_path_factory.mktemp("photos")
    folders = sorted(p for p in (photos / "train").iterdir() if len(list(p.iterdir())) >= 8)[:4]
    for folder in folders:
        (root / folder.name).mkdir()
        for file in sorted(folder.iterdir())[:8]:
            (root / folder.name / file.name).symlink_to(file)
    return root


@pytest.fixture
def tiny(few_photos: Path, tmp_path: Path) -> Config:
    return config.override(config.from_dict(TINY), [f"data.root={few_photos}", f"output={tmp_path}"])
