"""The evaluations as a user meets them: trained beside random, on photographs trained on and on held-out ones."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dali_pipelines.source import Source, open_source
from mcl.config import Config, ConfigError
from mcl.evaluation import classify
from mcl.evaluation.features import extract, prepare
from mcl.evaluation.retrieval import retrieval
from mcl.metrics import Record
from mcl.models import MCL


def evaluate(name: str, model: MCL, config: Config, device: torch.device) -> Iterator[Record]:
    """Scores copies of a model; yields a record for ``train`` (data.root), and for ``val`` where data.val_root is set.

    Raises:
        ConfigError: an evaluation that these images cannot serve.
    """
    torch.manual_seed(config.trainer.seed)
    random = MCL(config.model, config.montage)  # the network that training started from
    for record in EVALUATIONS[name](model, random, config, device):
        yield {"kind": "eval", "name": name, **record}


def describe(record: Record) -> str:
    """An evaluation record in a few words."""
    if record["name"] != "retrieval":
        return (
            f"{record['name']:<9} {record['split']:<5} top-1 {record['accuracy']:6.1%}   random network "
            f"{record['random']:6.1%}   chance {record['chance']:6.1%}   ({record['classes']} classes)"
        )

    def row(values: list[float], errors: list[float]) -> str:
        return "  ".join(f"{v:6.1%} ±{e:4.1%}" for v, e in zip(values, errors, strict=True))

    return (
        f"retrieval {record['split']:<5} level 0.. {row(record['levels'], record['levels_se'])}\n"
        f"   random network    level 0.. {row(record['random'], record['random_se'])}\n"
        f"   chance {record['chance']:.1%} (1 in {record['gallery']})"
    )


def _retrieval(model: MCL, random: MCL, config: Config, device: torch.device) -> Iterator[Record]:
    for split, source in _sources(config):
        if split == "val" and len(source) < config.evaluation.gallery:
            continue
        trained, untrained = retrieval((model, random), config, source, device)
        yield {
            "split": split,
            "gallery": config.evaluation.gallery,
            "chance": 1 / config.evaluation.gallery,
            "levels": trained.levels,
            "levels_se": trained.errors,
            "random": untrained.levels,
            "random_se": untrained.errors,
        }


def _classifier(
    predict: Callable[[Tensor, Tensor, Tensor, int, int, bool], Tensor],
) -> Callable[[MCL, MCL, Config, torch.device], Iterator[Record]]:
    def run(model: MCL, random: MCL, config: Config, device: torch.device) -> Iterator[Record]:
        sources = dict(_sources(config))
        classes = len(sources["train"].classes)
        if classes < 2:
            raise ConfigError(f"data.root: {config.data.root} has no classes to tell apart; use class folders")
        accuracies = []
        for network in (model, random):
            backbone = prepare(network.online.backbone, config, sources["train"], device)
            features = {split: extract(backbone, config, source, device) for split, source in sources.items()}
            train, labels = features["train"]
            test, truth = features.get("val", features["train"])
            guess = predict(train, labels, test, classes, config.evaluation.k, "val" not in features)
            accuracies.append((guess == truth).float().mean().item())
        yield {
            "split": "val" if "val" in sources else "train",
            "accuracy": accuracies[0],
            "random": accuracies[1],
            "chance": (truth.bincount().max() / len(truth)).item(),
            "classes": classes,
            "k": config.evaluation.k,
        }

    return run


def _knn(train: Tensor, labels: Tensor, test: Tensor, classes: int, k: int, same: bool) -> Tensor:
    return classify.knn(train, labels, test, k, classes, same)


def _linear(train: Tensor, labels: Tensor, test: Tensor, classes: int, k: int, same: bool) -> Tensor:
    if same:
        raise ConfigError("data.val_root: the linear probe needs held-out images; set it to a folder of class folders")
    return classify.linear(train, labels, test, classes)


def _sources(config: Config) -> Iterator[tuple[str, Source]]:
    yield "train", open_source(config.data.root, config.data.source)
    if config.data.val_root:
        yield "val", open_source(config.data.val_root, config.data.source)


EVALUATIONS = {"retrieval": _retrieval, "knn": _classifier(_knn), "linear": _classifier(_linear)}
