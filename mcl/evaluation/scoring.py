"""The evaluations as a user meets them: trained beside random, on photographs trained on and on held-out ones."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from dali_pipelines.source import Source, open_images
from mcl.config import Config, ConfigError
from mcl.evaluation import knn_linear
from mcl.evaluation.features import Pooled, extract, prepare
from mcl.evaluation.retrieval import check_gallery, retrieval
from mcl.objectives import Objective, build
from mcl.records.metrics import Record


def evaluate(name: str, model: Objective, config: Config, device: torch.device) -> Iterator[Record]:
    """Scores copies of a model; yields a record for ``train`` (data.root), and for ``val`` where data.val_root is set.

    Raises:
        ConfigError: an evaluation that these images cannot serve.
    """
    sources = _sources(config, open_images(config.data))
    torch.manual_seed(config.trainer.seed)
    networks = (model, build(config, model.classes))  # the second is the same network, untrained
    records = _retrieval if name == "retrieval" else partial(_classes, name)
    for record in records(networks, config, sources, device):
        yield {"kind": "eval", "name": name, **record}


def describe(record: Record) -> str:
    """An evaluation record in a few words."""
    if record["name"] != "retrieval":
        return (
            f"{record['name']:<9} {record['split']:<5} top-1 {record['accuracy']:6.1%}   random network "
            f"{record['random']:6.1%}   largest of {record['classes']} classes {record['chance']:6.1%}"
        )

    def row(values: list[float], errors: list[float]) -> str:
        return "  ".join(f"{v:6.1%} ±{e:4.1%}" for v, e in zip(values, errors, strict=True))

    return (
        f"retrieval {record['split']:<5} level 0.. {row(record['levels'], record['levels_se'])}\n"
        f"   random network    level 0.. {row(record['random'], record['random_se'])}\n"
        f"   chance {record['chance']:.1%} (1 in {record['gallery']})"
    )


def check_evaluations(config: Config, source: Source) -> None:
    """Refuses before a run what its ``evaluation.at_end`` would refuse behind it.

    Args:
        source: the images of data.root.

    Raises:
        ConfigError, SourceError: an evaluation that these images cannot serve.
    """
    sources = _sources(config, source) if config.evaluation.at_end else {}
    for name in config.evaluation.at_end:
        if name == "retrieval":
            check_gallery(config, source)
        else:
            _check_classes(name, config, sources)


def _sources(config: Config, train: Source) -> dict[str, Source]:
    """By split."""
    return {"train": train} | ({"val": open_images(config.data, held_out=True)} if config.data.val_root else {})


def _retrieval(
    networks: Sequence[Objective], config: Config, sources: Mapping[str, Source], device: torch.device
) -> Iterator[Record]:
    for split, source in sources.items():
        if split == "val" and len(source) < config.evaluation.gallery:
            continue
        (levels, errors), (random, random_errors) = retrieval(networks, config, source, device)
        yield {
            "split": split,
            "gallery": config.evaluation.gallery,
            "chance": 1 / config.evaluation.gallery,
            "levels": levels,
            "levels_se": errors,
            "random": random,
            "random_se": random_errors,
        }


def _classes(
    name: str, networks: Sequence[Objective], config: Config, sources: Mapping[str, Source], device: torch.device
) -> Iterator[Record]:
    _check_classes(name, config, sources)
    train_source, val_source = sources["train"], sources.get("val")
    classes, k = len(train_source.classes), config.evaluation.k
    pooled = [Pooled(network.online, "c5") for network in networks]
    backbones = prepare(pooled, config, train_source, device)
    trained_on = extract(backbones, config, train_source, device)
    held_out = trained_on
    if val_source is not None:
        held_out = extract(backbones, config, _renumber(val_source, train_source), device)
    accuracies = []
    for train, test in zip(trained_on, held_out, strict=True):
        train, test = (own.select(own.labels >= 0) for own in (train, test))
        truth = test.labels
        if name == "knn":
            guess = knn_linear.knn(train.values, train.labels, test.values, k, classes, same=val_source is None)
        else:
            guess = knn_linear.linear(train.values, train.labels, test.values, classes)
        accuracies.append((guess == truth).float().mean().item())
    yield {
        "split": "train" if val_source is None else "val",
        "accuracy": accuracies[0],
        "random": accuracies[1],
        "chance": (truth.bincount().max() / len(truth)).item(),
        "classes": classes,
        "k": k,
    }


def _check_classes(name: str, config: Config, sources: Mapping[str, Source]) -> None:
    """kNN and linear probe need classes, the same in both splits."""
    train, val = sources["train"], sources.get("val")
    if len(train.classes) < 2:
        raise ConfigError(
            f"data.root: {config.data.root} has no classes for {name} to tell apart; use class folders, or "
            f"leave {name} out of evaluation.at_end"
        )
    if val is None and name == "linear":
        raise ConfigError("data.val_root: the linear probe needs held-out images; set it to a folder of class folders")
    if val is not None and (not val.classes or not set(val.classes) <= set(train.classes)):
        strange = sorted(set(val.classes) - set(train.classes))
        what = f"has classes that data.root lacks, e.g. {strange[0]}" if strange else "has no classes"
        raise ConfigError(f"data.val_root: {config.data.val_root} {what}; lay both out as the same class folders")


def _renumber(val: Source, train: Source) -> Source:
    """`val` with the class numbers of `train`: each source numbers the classes that it has."""
    numbers = np.array([train.classes.index(name) for name in val.classes] + [-1])  # -1, the last, stays unknown
    return dataclasses.replace(val, labels=numbers[val.labels])
