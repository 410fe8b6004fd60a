"""Region probe of a cell of :mod:`benchmarks.transfer`: kNN and linear accuracy of objects from frozen features.

All methods are probed through the same network: the preset's, new, with the initial weights of the seed, into which the
parts are loaded that a detector would get. So a method without an FPN is probed through an untrained one.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common import PRESETS
from mcl import config
from mcl.config import Config
from mcl.evaluation.regions import regions
from mcl.objectives import build
from mcl.records.metrics import Record, rewrite
from mcl.weights.start import start


@torch.no_grad()
def probe(cfg: Config, weights: str, parts: Sequence[str]) -> Record:
    """The record of :func:`mcl.evaluation.regions.regions` of the network under ``accuracy``.

    Args:
        cfg: its model, and ``evaluation.regions``.
        weights: a checkpoint; empty: initial weights.
        parts: that are taken from it.

    Raises:
        CheckpointError, ConfigError, SourceError: weights or images cannot be used.
    """
    torch.manual_seed(cfg.trainer.seed)  # as training does before it builds its model
    model = build(cfg)
    if weights:
        print(start(model, weights, parts))
    return regions({"accuracy": model.online}, cfg, torch.device("cpu"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=PRESETS / "mcl_r18_fpn_demo.yaml", help="preset of the network")
    parser.add_argument("words", nargs="*", help="key=value")
    parser.add_argument("--weights", default="", help="checkpoint of the pre-training; default: initial weights")
    parser.add_argument("--parts", nargs="*", default=[], help="that are taken from it")
    parser.add_argument("--output", type=Path, required=True, help="file to write the scores to")
    options = parser.parse_args(arguments)
    record = probe(config.load(options.config, options.words), options.weights, options.parts)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    rewrite(options.output, json.dumps(record, indent=1) + "\n")
    print(f"kNN {record['accuracy']:.1%}, linear {record['linear_accuracy']:.1%} of {record['boxes']} objects")


if __name__ == "__main__":
    main()
