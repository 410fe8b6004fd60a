"""Region probe of a cell of :mod:`benchmarks.transfer`: kNN and linear accuracy of objects from frozen features.

All methods are probed through the same network: the preset's, new, with the initial weights of the seed, into which the
parts are loaded that a detector would get. So a method without an FPN is probed through an untrained one.
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common import PRESETS
from mcl import config
from mcl.config import Config
from mcl.evaluation.regions import regions
from mcl.finetune.data import find_splits
from mcl.objectives import Objective, build
from mcl.records.metrics import Record, rewrite
from mcl.train import checkpoint
from mcl.weights.start import start


def initial(cfg: Config) -> Objective:
    """What a pre-training of this seed starts from."""
    torch.manual_seed(cfg.trainer.seed)  # as training does before it builds its model
    return build(cfg)


@torch.no_grad()
def probe(cfg: Config, weights: Path, parts: Sequence[str]) -> Record:
    """The record of :func:`mcl.evaluation.regions.regions` of the network under ``accuracy``, and ``annotations``, a
    digest of the set's.

    Args:
        cfg: its model, and ``evaluation.regions``.
        weights: a checkpoint.
        parts: that are taken from it.

    Raises:
        CheckpointError, ConfigError, SourceError: weights or images cannot be used.
    """
    model = initial(cfg)
    print(start(model, str(weights), parts))
    record = regions({"accuracy": model.online}, cfg, torch.device("cpu"))
    return {**record, "annotations": digest(Path(cfg.evaluation.regions))}


def digest(folder: Path) -> str:
    """Of the annotation files of a COCO-format folder, which also have the sizes of its images."""
    files = [folder / split.annotations for split in find_splits(folder)]
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()[:12]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=PRESETS / "mcl_r18_fpn_demo.yaml", help="preset of the network")
    parser.add_argument("words", nargs="*", help="key=value")
    parser.add_argument("--initial", type=Path, metavar="FOLDER", help="only write a checkpoint of the initial weights")
    parser.add_argument("--weights", type=Path, help="checkpoint of the pre-training")
    parser.add_argument("--parts", nargs="*", default=[], help="that are taken from it")
    parser.add_argument("--output", type=Path, help="file to write the scores to")
    options = parser.parse_args(arguments)
    cfg = config.load(options.config, options.words)
    if options.initial:
        state = {"config": config.to_dict(cfg), "step": 0, "model": initial(cfg).state_dict()}
        print(checkpoint.save(options.initial, state, keep=1))
        return
    record = probe(cfg, options.weights, options.parts)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    rewrite(options.output, json.dumps(record, indent=1) + "\n")
    print(f"kNN {record['accuracy']:.1%}, linear {record['linear_accuracy']:.1%} of {record['boxes']} objects")


if __name__ == "__main__":
    main()
