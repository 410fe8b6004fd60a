"""``Names`` behaves like a list of texts."""

import pickle

import numpy as np
import pytest

from dali_pipelines.source.names import Names

TEXTS = ["a.jpg", "", "b/ä.jpg", "\udce9.jpg", "\ud800", "nul\0.jpg", "", "\u2028", "日本/x.jpg"]
"""Includes bytes that are not UTF-8, half a surrogate pair, and an empty text."""


@pytest.mark.parametrize("texts", [TEXTS, [], [""], ["x"] * 17_000 + TEXTS], ids=["odd", "none", "empty", "many"])
def test_names_are_a_sequence(texts: list[str]) -> None:
    names = Names.of(iter(texts))
    assert names == texts
    assert list(names) == texts
    assert [names[i] for i in range(-len(texts), len(texts))] == texts * 2
    for part in (slice(None), slice(1, -1), slice(5, 2), slice(None, None, -2), slice(7, 100)):
        assert names[part] == tuple(texts[part])
    with pytest.raises(IndexError):
        names[len(texts)]
    rows = np.random.default_rng(0).integers(0, max(1, len(texts)), 2 * len(texts))
    assert names.take(rows) == [texts[i] for i in rows]
    assert Names.concatenate([names, names.take(rows), names]) == [*texts, *(texts[i] for i in rows), *texts]
    assert names.same(Names.of(texts))
    assert not names.same(Names.of([*texts, ""]))
    assert pickle.loads(pickle.dumps(names)) == texts


def test_with_a_folder_they_are_paths() -> None:
    names = Names.of(["a.jpg", "/b.jpg", "s3://c/d.jpg"], "/data")
    assert names == ["/data/a.jpg", "/b.jpg", "s3://c/d.jpg"]
    assert names[:1] == ("/data/a.jpg",)
    assert names.same(Names.of(["a.jpg", "/b.jpg", "s3://c/d.jpg"], "/elsewhere"))
    assert Names.of(["a.jpg"], "") == ["/a.jpg"]
