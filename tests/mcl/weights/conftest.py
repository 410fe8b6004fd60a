"""Checkpoints to read."""

from tests.mcl.exporters.conftest import model, resnet18vd, resnet50, saved  # noqa: F401
