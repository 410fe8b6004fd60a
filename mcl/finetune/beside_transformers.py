"""Imports MMDetection such that transformers may be installed, too; configurations import it before all others."""

from mcl.exporters.mmdet import import_mmdet

import_mmdet()
