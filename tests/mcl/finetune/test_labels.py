"""Selection of a fraction of the training images. test_loading.py and test_run.py check that only these are used."""

import hashlib
import itertools
import random

from mcl.finetune.labels import choose

IDS = range(1, 1001)


def test_rule() -> None:
    """By hand: the smallest SHA-256 of "7 1", "7 2", "7 3" and so on."""
    digests = {key: hashlib.sha256(f"7 {key}".encode()).hexdigest() for key in IDS}
    assert choose(IDS, 0.01, 7) == sorted(IDS, key=digests.__getitem__)[:10]
    assert choose(range(1, 11), 0.3, 0) == [6, 4, 10]  # computed with printf "0 $i" | sha256sum


def test_fractions_are_nested_and_of_the_size_that_was_asked_for() -> None:
    sets = [{*choose(IDS, fraction, 0)} for fraction in (1e-9, 0.01, 0.02, 0.05, 0.1, 1)]
    assert [len(chosen) for chosen in sets] == [1, 10, 20, 50, 100, 1000]
    assert all(small < large for small, large in itertools.pairwise(sets))


def test_order_of_the_file_does_not_matter_and_the_seed_does() -> None:
    shuffled = random.Random(0).sample(IDS, len(IDS))
    assert choose(shuffled, 0.1, 0) == choose(IDS, 0.1, 0)
    others = {*choose(IDS, 0.1, 1)} & {*choose(IDS, 0.1, 0)}
    assert len(others) < 30  # 10 are expected
    assert choose(["b", "a"], 0.5, 0) == choose(["a", "b"], 0.5, 0)
