"""Imports MMDetection in a way that works beside transformers; configurations import this module first."""

from mcl.exporters.mmdet import import_mmdet

import_mmdet()
