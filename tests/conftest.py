"""Fixtures and builders shared by all tests."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dali_pipelines.batch import MontageBatch, in_order
from dali_pipelines.geometry import Geometry

ROOT = Path(__file__).parent.parent
PHOTOS = ROOT / "data" / "photos"


def pytest_configure(config: pytest.Config) -> None:
    """Hides all GPUs unless tests that need one were selected: all other tests assume a machine without a GPU."""
    wanted = config.option.markexpr
    if "gpu" not in wanted or "not gpu" in wanted:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read by PyTorch and DALI on first use, not on import
    else:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for trainer.deterministic, before CUDA starts


@pytest.fixture(scope="session", autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps indices of image sizes out of the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def photos() -> Path:
    """The photographs of the repository: train/ and val/ of class folders."""
    return PHOTOS


class ThinBackbone(nn.Module):
    """A backbone that costs almost nothing: maps with the right strides, each from one pooled pixel and a 1x1
    convolution."""

    channels = (8, 7, 6, 5)

    def __init__(self, name: str, recompute: bool = False, maps: int = 4) -> None:
        super().__init__()
        convs = [nn.Conv2d(3, c, 1, bias=False) for c in self.channels]
        self.convs = nn.ModuleList(conv.requires_grad_(i < maps) for i, conv in enumerate(convs))

    def forward(self, x: Tensor, counts: Sequence[int] = ()) -> list[Tensor]:
        return [conv(F.avg_pool2d(x, 32 >> i)) for i, conv in enumerate(self.convs)]


@pytest.fixture
def thin_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the backbone of all models by :class:`ThinBackbone`."""
    monkeypatch.setattr("mcl.models.encoder.Backbone", ThinBackbone)


def view(geometry: Geometry, images: int, pixels: Tensor, tile_images: Tensor | None = None) -> MontageBatch:
    """A view with given canvases (K, 3, S, S); without `tile_images`, tile i of a level shows image i modulo N."""
    batch = in_order(geometry, images, pixels)
    tile_images = batch.tile_images if tile_images is None else tile_images
    return dataclasses.replace(batch, query_counts=batch.canvas_counts, tile_images=tile_images)


def random_view(
    geometry: Geometry, images: int, seed: int, dtype: torch.dtype = torch.float32, shuffle: bool = True
) -> MontageBatch:
    """A view of random pixels, with shuffled tiles."""
    generator = torch.Generator().manual_seed(seed)
    side = geometry.canvas
    pixels = torch.randn(sum(geometry.canvases(images)), 3, side, side, generator=generator).to(dtype)
    tiles = geometry.tiles(images)
    orders = [torch.randperm(n, generator=generator) if shuffle and i else torch.arange(n) for i, n in enumerate(tiles)]
    return view(geometry, images, pixels, torch.cat([order % images for order in orders]))


@pytest.fixture(autouse=True)
def _fault(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    """Adds the fault that a test is marked with to its report."""
    if marker := request.node.get_closest_marker("fault"):
        parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
        record_property("fault", marker.args[0].format(**parameters))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints a table of the faults that tests tried; a test may record "survived" to replace the word yes."""
    outcomes = ("passed", "failed", "error")  # error: a fixture failed, or a file could not be collected
    reports = [r for outcome in outcomes for r in terminalreporter.getreports(outcome)]
    reports = [r for r in reports if isinstance(r, pytest.TestReport) and (r.when == "call" or r.failed)]
    tried = [(dict(r.user_properties), r.passed) for r in reports if "fault" in dict(r.user_properties)]
    if tried:
        terminalreporter.section("faults tried and survived")
        for properties, passed in tried:
            survived = properties.get("survived", "yes") if passed else "NO"
            terminalreporter.line(f"{survived:>10}  {properties['fault']}")
