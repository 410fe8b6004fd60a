"""Checkpoints to read."""

from tests.mcl.exporters.conftest import model, resnet50, saved  # noqa: F401
