"""kNN and linear probe in chunks and shards give the results of the whole matrix, with bounded memory."""

import itertools
import multiprocessing
import resource
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dali_pipelines.source import open_source
from mcl import config, distributed
from mcl.config import Config
from mcl.evaluation import knn_linear
from mcl.evaluation.features import Features, Pooled, extract, prepare
from mcl.evaluation.knn_linear import knn, linear
from mcl.evaluation.scoring import labelled
from mcl.objectives import MCL
from tests.conftest import ROOT
from tests.mcl.ranks import in_ranks

CPU = torch.device("cpu")
CIFAR = ROOT / "data" / "cifar10"
CLASSES = 5


def whole(values: Tensor, labels: Tensor) -> Features:
    return Features(values, torch.arange(len(values)), labels)


def share(features: Features) -> Features:
    """The share of this process; the first of several processes has nearly all."""
    if distributed.world_size() == 1:
        return features
    bounds = [0, len(features.index) - 3, len(features.index)]
    return features.select(slice(*bounds[distributed.rank() : distributed.rank() + 2]))


def by_hand(train: Features, test: Features, k: int, same: bool) -> list[int]:
    """Computes from the whole matrix, in double precision, one photograph after another."""
    cosines = F.normalize(test.values.double(), dim=1) @ F.normalize(train.values.double(), dim=1).t()
    guesses = []
    for row, own in zip(cosines, test.index.tolist(), strict=True):
        pairs = [
            (c, y)
            for c, y, i in zip(row.tolist(), train.labels.tolist(), train.index.tolist(), strict=True)
            if not (same and i == own)
        ]
        votes = [0.0] * CLASSES
        for cosine, label in sorted(pairs, reverse=True)[:k]:
            votes[label] += torch.tensor(cosine / 0.07).exp().item()
        guesses.append(votes.index(max(votes)))
    return guesses


def in_chunks(train: Features, test: Features, k: int, same: bool) -> list[int]:
    with mock.patch.multiple(knn_linear, QUERIES=8, NEIGHBOURS=7):
        return knn(share(train), share(test), k, CLASSES, CPU, same).tolist()


@pytest.mark.parametrize("same", [False, True])
def test_knn_of_chunks_and_shards_is_that_of_the_whole_matrix(same: bool) -> None:
    torch.manual_seed(0)
    train = whole(torch.randn(61, 6), torch.randint(CLASSES, (61,)))
    test = train if same else whole(torch.randn(23, 6), torch.randint(CLASSES, (23,)))
    for k in (1, 10, 100):
        expected = by_hand(train, test, k, same)
        assert in_chunks(train, test, k, same) == expected
    first, second = in_ranks(2, in_chunks, train, test, 10, same)
    assert first + second == by_hand(train, test, 10, same)


def test_knn_by_hand() -> None:
    """Two clusters; if photographs do not vote for themselves, a single one is outvoted."""
    values = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]])
    train = whole(values, torch.tensor([0, 0, 1, 1]))
    test = whole(torch.tensor([[1.0, 0.2], [0.2, 1.0]]), torch.tensor([0, 1]))
    assert knn(train, test, 2, 2, CPU).tolist() == [0, 1]
    alone = whole(values, torch.tensor([0, 1, 1, 1]))
    assert knn(alone, alone, 1, 2, CPU, same=True).tolist()[0] == 1
    assert knn(train, train, 100, 2, CPU, same=True).tolist() == [0, 0, 1, 1]


def separable(n: int) -> Features:
    torch.manual_seed(0)
    labels = torch.arange(n) % CLASSES
    # Different scales, which standardisation removes.
    mixed = torch.randn(CLASSES, 12) @ torch.diag(torch.logspace(-2, 2, 12))
    return whole(mixed[labels] + 0.7 * mixed.std(0) * torch.randn(n, 12), labels)


def probe(features: Features, lbfgs: bool) -> list[int]:
    half = len(features.index) // 2
    train, test = features.select(slice(half)), features.select(slice(half, None))
    with mock.patch.object(knn_linear, "LBFGS_BYTES", 1 << 30 if lbfgs else 0):
        return linear(share(train), share(test), CLASSES, CPU).tolist()


def test_linear_probe_by_either_means_in_one_process_or_two() -> None:
    features = separable(600)
    truth = features.labels[300:]
    guesses = probe(features, True)
    right = (torch.tensor(guesses) == truth).float().mean().item()
    assert right > 0.8
    assert [*itertools.chain(*in_ranks(2, probe, features, True))] == guesses
    for found in (probe(features, False), [*itertools.chain(*in_ranks(2, probe, features, False))]):
        assert (torch.tensor(found) == truth).float().mean().item() == pytest.approx(right, abs=0.01)


def test_linear_probe_minimises_its_loss() -> None:
    """Autograd's gradient of the regularised loss is zero at the result of L-BFGS, and small at that of
    mini-batches."""
    features = separable(300)
    x = (features.values - features.values.mean(0)) / features.values.std(0)
    for lbfgs, most in ((True, 1e-4), (False, 1e-2)):
        if lbfgs:
            weight, bias = knn_linear._by_lbfgs(x, features.labels, 300, CLASSES, lambda: None)
        else:
            zero, one = torch.zeros(12), torch.ones(12)
            weight, bias = knn_linear._by_sgd(whole(x, features.labels), zero, one, CLASSES, 0, lambda: None)
        weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        loss = F.cross_entropy(F.linear(x, weight, bias), features.labels) + 1e-3 / 2 * weight.square().sum()
        gradients = torch.autograd.grad(loss, (weight, bias))
        assert max(g.abs().max().item() for g in gradients) < most


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_a_fraction_of_every_class(few_photos: Path, fraction: float) -> None:
    source = open_source(str(few_photos))  # 4 classes with 8 images each
    numbers = labelled(source, fraction, seed=1)
    assert torch.from_numpy(source.labels[numbers]).bincount().tolist() == [max(1, round(8 * fraction))] * 4
    assert numbers.tolist() == sorted(set(numbers.tolist()))
    assert numbers.tolist() == labelled(source, fraction, seed=1).tolist()
    assert numbers.tolist() != labelled(source, fraction, seed=2).tolist()
    assert labelled(source).tolist() == list(range(32))


def grown(work: Callable[[Features, Features], object], sizes: tuple[int, int], channels: int, classes: int) -> float:
    """Peak memory that a process needs for `work`, beside the features, bytes."""

    def features(n: int) -> Features:
        values = torch.empty(n, channels)
        for part in values.split(4096):
            part.normal_()
        return Features(values, torch.arange(n), torch.arange(n) % classes)

    train, test = map(features, sizes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work(train, test)
    return 1024.0 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def _knn(train: Features, test: Features) -> None:
    knn(train, test, 20, 1000, CPU)


def _linear(train: Features, test: Features) -> None:
    with mock.patch.multiple(knn_linear, LBFGS_BYTES=0, _EPOCHS=1):
        linear(train, test, 1000, CPU)


@pytest.mark.soak
@pytest.mark.parametrize(("work", "sizes"), [(_knn, (128_117, 5_000)), (_linear, (4_096, 512))])
def test_memory_at_imagenets_size(
    work: Callable[[Features, Features], object], sizes: tuple[int, int], record_property: Callable[[str, object], None]
) -> None:
    """With a tenth of the neighbours and photographs. Except for the shares themselves, memory depends on neither."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        most = pool.apply(grown, (work, sizes, 2048, 1000))
    record_property("GB", most / 1e9)
    assert most < 4e9


@pytest.mark.soak
@pytest.mark.skipif(not CIFAR.exists(), reason="needs data/cifar10, which make data builds")
def test_mini_batches_are_within_half_a_point_of_lbfgs_on_cifar10(tiny: Config) -> None:
    """With features of the second last stage of a random ResNet-18."""
    cfg = config.override(tiny, [f"data.root={CIFAR / 'train'}", f"data.val_root={CIFAR / 'test'}"])
    torch.manual_seed(0)
    model = MCL(cfg)
    train, test = open_source(cfg.data.root), open_source(cfg.data.val_root)
    networks: list[nn.Module] = prepare([Pooled(model.online, "c4")], cfg, train, CPU)
    (of_train,), (of_test,) = extract(networks, cfg, train, CPU), extract(networks, cfg, test, CPU)
    accuracies = []
    for limit in (1 << 30, 0):
        with mock.patch.object(knn_linear, "LBFGS_BYTES", limit):
            guesses = linear(of_train, of_test, 10, CPU)
        accuracies.append((guesses == of_test.labels).float().mean().item())
    print(accuracies)
    assert accuracies[1] == pytest.approx(accuracies[0], abs=0.005)
