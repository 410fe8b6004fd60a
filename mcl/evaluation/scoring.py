"""Evaluations of a trained and a random network, on training images and on held-out images.

All processes must take part. Evaluations do not change training: networks are copied, and random states and PyTorch's
settings are restored.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from dali_pipelines.source import Source, open_images
from mcl import distributed
from mcl.config import Config, ConfigError
from mcl.evaluation import knn_linear, regions, svm
from mcl.evaluation.features import Features, Numbers, Pooled, Progress, extract, prepare
from mcl.evaluation.retrieval import check_gallery, retrieval
from mcl.objectives import Objective, build
from mcl.records.metrics import Record

Sources = Mapping[str, Source]
"""The images by split: ``train`` (data.root), and ``val`` if data.val_root is set."""


@torch.no_grad()
def evaluate(
    names: Sequence[str],
    model: Objective,
    config: Config,
    device: torch.device,
    sources: Sources | None = None,
    held_out: bool = False,
    progress: Progress = lambda: None,
) -> list[Record]:
    """Scores copies of a model and of the same network with initial weights; one record for each name and split.

    Args:
        names: retrieval, knn, linear, svm, regions. kNN and the linear probe use the same features.
        sources: the images; None opens them.
        held_out: do not use training images for retrieval if there are enough held-out images.
        progress: see :data:`mcl.evaluation.features.Progress`.

    Raises:
        ConfigError: an evaluation is not possible with these images.
    """
    if sources is None:
        own_images = {*names} != {"regions"}
        sources = {"train": open_images(config.data), **open_held_out(config)} if own_images else {}
    for name in names:
        check(name, config, sources)
    records: list[Record] = []
    with _undisturbed(device):
        torch.manual_seed(config.trainer.seed)
        random = build(config, model.classes)  # the same network, untrained
        if "retrieval" in names:
            found = _retrieval((model, random), config, _splits(config, sources, held_out), device, progress)
            records += [{"name": "retrieval", **record} for record in found]
        if classifiers := [name for name in names if name in ("knn", "linear")]:
            records += _classes(classifiers, model, random, config, sources, device, progress)
        if "svm" in names:
            records.append({"name": "svm", **_svm(model, random, config, sources, device, progress)})
        if "regions" in names:
            scores = regions.regions(_encoders(model, random), config, device, progress)
            records.append({"name": "regions", **scores})
    return [{"kind": "eval", **record} for record in records]


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Restores random states and cuDNN's choice of algorithms, and frees unused memory of the GPU before and after."""
    timing, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        with torch.random.fork_rng([device.index] if device.type == "cuda" else []):
            if device.type == "cuda":
                torch.cuda.empty_cache()  # DALI cannot use memory that PyTorch has cached
            yield
    finally:
        torch.backends.cudnn.benchmark = timing
        if device.type == "cuda":
            torch.cuda.empty_cache()


def describe(record: Record) -> str:
    """Formats an evaluation record."""
    if record["name"] == "regions":
        return regions.describe(record)
    if record["name"] != "retrieval":
        what, chance = ("mAP  ", "chance") if record["name"] == "svm" else ("top-1", "largest")
        return (
            f"{record['name']:<9} {record['split']:<5} {what} {record['accuracy']:6.1%}   random network "
            f"{record['random']:6.1%}   {chance} of {record['classes']} classes {record['chance']:6.1%}"
        )

    def row(values: list[float], errors: list[float]) -> str:
        return "  ".join(f"{v:6.1%} ±{e:4.1%}" for v, e in zip(values, errors, strict=True))

    return (
        f"retrieval {record['split']:<5} level 0.. {row(record['levels'], record['levels_se'])}\n"
        f"   random network    level 0.. {row(record['random'], record['random_se'])}\n"
        f"   chance {record['chance']:.1%} (1 in {record['gallery']})"
    )


def score(record: Record) -> float:
    """The number by which checkpoints are compared: accuracy or mAP; for retrieval, the mean over levels."""
    value: float = float(np.mean(record["levels"])) if record["name"] == "retrieval" else record["accuracy"]
    return value


def check_evaluations(config: Config, source: Source) -> dict[str, Source]:
    """Checks before a run that its evaluations are possible; returns its held-out images as ``val``.

    Args:
        source: the images of data.root.

    Raises:
        ConfigError, SourceError: an evaluation is not possible with these images.
    """
    names = {*config.evaluation.at_end, *(config.evaluation.during if config.evaluation.every else ())}
    held_out = open_held_out(config) if names else {}
    for name in sorted(names):
        check(name, config, {"train": source, **held_out})
    return held_out


def open_held_out(config: Config) -> dict[str, Source]:
    """The images of data.val_root as ``val``; empty if it is not set."""
    return {"val": open_images(config.data, held_out=True)} if config.data.val_root else {}


def check(name: str, config: Config, sources: Sources) -> None:
    """Checks that an evaluation is possible.

    Raises:
        ConfigError: the evaluation is not possible with these images.
    """
    if name == "svm":
        return svm.check(config)
    if name == "regions":
        regions.open_boxes(config)
        return None
    train, val = sources["train"], sources.get("val")
    if name == "retrieval":
        return check_gallery(config, train)
    if len(train.classes) < 2:
        raise ConfigError(
            f"data.root: {config.data.root} has fewer than two classes, which {name} needs; use class folders, or "
            f"remove {name} from evaluation.at_end and evaluation.during"
        )
    if val is None and name == "linear":
        raise ConfigError("data.val_root: the linear probe needs held-out images; set it to a folder of class folders")
    if val is not None and (not val.classes or not set(val.classes) <= set(train.classes)):
        strange = sorted(set(val.classes) - set(train.classes))
        what = f"has classes that data.root does not have, e.g. {strange[0]}" if strange else "has no classes"
        raise ConfigError(f"data.val_root: {config.data.val_root} {what}; both must have the same class folders")


def _splits(config: Config, sources: Sources, held_out: bool) -> dict[str, Source]:
    """The splits with enough images for a gallery; with `held_out`, only the last of these."""
    enough = {split: own for split, own in sources.items() if len(own) >= config.evaluation.gallery}
    return dict(list(enough.items())[-1:]) if held_out else enough


def _retrieval(
    networks: Sequence[Objective], config: Config, sources: Sources, device: torch.device, progress: Progress
) -> Iterator[Record]:
    for split, source in sources.items():
        (levels, errors), (random, random_errors) = retrieval(networks, config, source, device, progress)
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
    names: Sequence[str],
    model: Objective,
    random: Objective,
    config: Config,
    sources: Sources,
    device: torch.device,
    progress: Progress,
) -> Iterator[Record]:
    train, val = sources["train"], sources.get("val")
    own = config.evaluation
    classes, seed = len(train.classes), config.trainer.seed
    networks = _networks(model, random, config, train, device, progress)
    shown = labelled(train, own.labels, seed)
    learnt = extract(list(networks.values()), config, train, device, shown, progress)
    tested = learnt
    if val is not None:
        val = _renumber(val, train)
        tested = extract(list(networks.values()), config, val, device, labelled(val), progress)
    counts = sum(distributed.gather_objects(tested[0].labels.bincount(minlength=classes)))
    for name in names:
        scores = {}
        for key, of_train, of_test in zip(networks, learnt, tested, strict=True):
            if name == "knn":
                guess = knn_linear.knn(of_train, of_test, own.k, classes, device, val is None, progress)
            else:
                guess = knn_linear.linear(of_train, of_test, classes, device, seed, progress)
            scores[key] = sum(distributed.gather_objects(int((guess == of_test.labels).sum()))) / _images(of_test)
        yield {
            "name": name,
            "split": "train" if val is None else "val",
            **scores,
            "chance": (counts.max() / counts.sum()).item(),
            "classes": classes,
            "images": _images(tested[0]),
            "labels": own.labels,
            "features": own.features,
            "k": own.k,
        }


def _svm(
    model: Objective, random: Objective, config: Config, sources: Sources, device: torch.device, progress: Progress
) -> Record:
    own, train, val = config.evaluation, sources["train"], sources["val"]
    shown, labels, names = svm.annotated(own.annotations, train, "train")
    asked, truth, same = svm.annotated(own.val_annotations, val, "val")
    if names != same:
        raise ConfigError(
            f"evaluation.val_annotations: {own.val_annotations} has other classes than the training set's"
        )
    networks = _networks(model, random, config, train, device, progress)
    learnt = extract(list(networks.values()), config, train, device, shown, progress)
    tested = extract(list(networks.values()), config, val, device, asked, progress)
    record: Record = {"split": "val", "classes": len(names), "images": _images(tested[0]), "features": own.features}
    for key, of_train, of_test in zip(networks, learnt, tested, strict=True):
        record[key], record["chance"] = svm.mean_average_precision(of_train, labels, of_test, truth, progress)
    return record


def _networks(
    model: Objective, random: Objective, config: Config, train: Source, device: torch.device, progress: Progress
) -> dict[str, nn.Module]:
    """The networks that compute features, by the keys of their scores in a record."""
    encoders = _encoders(model, random)
    pooled = [Pooled(encoder, config.evaluation.features) for encoder in encoders.values()]
    return dict(zip(encoders, prepare(pooled, config, train, device, progress), strict=True))


def _encoders(model: Objective, random: Objective) -> dict[str, nn.Module]:
    """The encoders to compare, by the keys of their scores in a record."""
    encoders = {"accuracy": model.online, "target": model.target, "random": random.online}
    return {key: encoder for key, encoder in encoders.items() if encoder is not None}


def _images(features: Features) -> int:
    return sum(distributed.gather_objects(len(features.index)))


def labelled(source: Source, fraction: float = 1, seed: int = 0) -> Numbers:
    """Numbers of the images with a known class; with a `fraction`, a random subset with that fraction of every class,
    and at least one image of each."""
    known = np.flatnonzero(source.labels >= 0)
    if fraction == 1:
        return known
    shuffled = np.random.default_rng(seed).permutation(known)
    by_class = shuffled[np.argsort(source.labels[shuffled], kind="stable")]
    _, first, counts = np.unique(source.labels[by_class], return_index=True, return_counts=True)
    place = np.arange(len(by_class)) - np.repeat(first, counts)
    kept = np.repeat(np.maximum(1, np.rint(fraction * counts)), counts)
    return np.sort(by_class[place < kept])


def _renumber(val: Source, train: Source) -> Source:
    """`val` with the class numbers of `train`, since every source numbers its classes itself."""
    numbers = np.array([train.classes.index(name) for name in val.classes] + [-1])  # -1, the last, stays unknown
    return dataclasses.replace(val, labels=numbers[val.labels])
