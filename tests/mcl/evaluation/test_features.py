"""Features of every photograph that can be decoded, each computed once, by one of the processes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dali_pipelines.source import open_source
from mcl import config, distributed
from mcl.config import Config, ConfigError
from mcl.evaluation.features import Features, Pooled, extract, photos, prepare
from mcl.objectives import MCL
from tests.mcl.ranks import in_ranks
from tests.mcl.tiny import TINY

CPU = torch.device("cpu")


def colours(words: list[str], numbers: list[int] | None = None) -> tuple[Features, list[int]]:
    """Mean colours, and sizes of batches, in this process."""
    cfg = config.override(config.from_dict(TINY), words)
    source = open_source(cfg.data.root)
    index = None if numbers is None else np.array(numbers)
    (features,) = extract([_Mean()], cfg, source, CPU, index)
    return features, [len(own) for _, own in photos(cfg, source, CPU, index)]


class _Mean(nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean((2, 3))


@pytest.fixture
def folder(photos: Path, tmp_path: Path) -> Path:
    """Three classes with 65 photographs, of which number 2 is broken."""
    files = sorted((photos / "train").rglob("*.jpg"))[:65]
    for i, file in enumerate(files):
        (tmp_path / f"class{i * 3 // 65}").mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / f"class{i * 3 // 65}" / f"{i:02}.jpg")
    broken = tmp_path / "class0" / "02.jpg"
    broken.write_bytes(broken.read_bytes()[:2000])
    return tmp_path


def test_any_number_of_processes_has_each_image_once(folder: Path) -> None:
    words = [f"data.root={folder}"]
    whole, sizes = colours(words)
    assert whole.index.tolist() == [i for i in range(65) if i != 2]
    assert whole.labels.tolist() == [i * 3 // 65 for i in range(65) if i != 2]
    assert sizes == [63, 1]
    parts = in_ranks(2, colours, words)
    assert [sizes for _, sizes in parts] == [[32], [32]]
    for name in ("values", "index", "labels"):
        assert torch.equal(torch.cat([getattr(features, name) for features, _ in parts]), getattr(whole, name))
    some, sizes = colours(words, [64, 2, 7])
    assert (some.index.tolist(), sizes) == ([64, 7], [2])
    assert torch.equal(some.values, whole.values[[63, 6]])


def test_processes_step_equally_often(folder: Path) -> None:
    """There is one image for two processes."""
    words = [f"data.root={folder}"]
    assert [sizes for _, sizes in in_ranks(2, colours, words, [5])] == [[1], [0]]


def test_work_goes_on_where_it_stopped(folder: Path) -> None:
    cfg = config.override(config.from_dict(TINY), [f"data.root={folder}"])
    source = open_source(cfg.data.root)
    batches = list(photos(cfg, source, CPU))
    ((pixels, index),) = photos(cfg, source, CPU, first=1)
    assert torch.equal(pixels, batches[1][0])
    assert torch.equal(index, batches[1][1])
    assert list(photos(cfg, source, CPU, first=2)) == []


@pytest.mark.usefixtures("thin_backbone")
@pytest.mark.parametrize(("name", "width"), [("c5", 8), ("c2", 5), ("p5", 16), ("p4", 16)])
def test_stages_and_levels(tiny: Config, name: str, width: int) -> None:
    model = MCL(tiny).eval()
    pixels = torch.randn(3, 3, 32, 32)
    maps = model.online.backbone(pixels)
    expected = maps[5 - int(name[1])] if name[0] == "c" else model.online.fpn(maps, [0, 1])[5 - int(name[1])]
    pooled = Pooled(model.online, name)(pixels)
    assert pooled.shape == (3, width)
    torch.testing.assert_close(pooled, expected.mean((2, 3)))


def test_a_level_that_is_not_there(tiny: Config) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.features: the model has no p2; maps of its FPN: p5, p4"):
        Pooled(MCL(tiny).online, "p2")


def statistics(root: str) -> dict[str, torch.Tensor]:
    cfg = config.override(config.from_dict(TINY), [f"data.root={root}"])
    torch.manual_seed(0)
    backbone = MCL(cfg).online.backbone
    (prepared,) = prepare([backbone], cfg, open_source(root), CPU)
    assert backbone.bn1.num_batches_tracked == 0
    assert (prepared.bn1.momentum, prepared.training, distributed.rank() < 2) == (0.1, False, True)
    return prepared.state_dict()


def test_statistics_are_plain_means_over_photographs(few_photos: Path) -> None:
    """Networks are copies, with the same statistics in all processes."""
    alone = statistics(str(few_photos))
    cfg = config.override(config.from_dict(TINY), [f"data.root={few_photos}"])
    ((pixels, _),) = photos(cfg, open_source(str(few_photos)), CPU)
    x = torch.nn.functional.conv2d(pixels, alone["conv1.weight"], stride=2, padding=3)
    torch.testing.assert_close(alone["bn1.running_mean"], x.mean((0, 2, 3)))
    torch.testing.assert_close(alone["bn1.running_var"], x.var((0, 2, 3)))
    for ours in in_ranks(2, statistics, str(few_photos)):
        assert all(torch.equal(ours[name], alone[name]) for name in alone)
