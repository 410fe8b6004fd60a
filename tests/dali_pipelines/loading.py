"""Small loaders: the same images as every kind of source, and bitwise comparison of batches."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dali_pipelines.batch import MontageBatch
from dali_pipelines.geometry import Geometry
from dali_pipelines.loader import MontageLoader
from dali_pipelines.plan import Plan
from dali_pipelines.source import Source, open_source
from mcl.config import AugmentConfig, DataConfig
from tests.dali_pipelines.shards import example, write_tar, write_tfrecord

ENGINES = ("fused", "stock", "torchvision")
KINDS = ("folders", "list", "coco", "webdataset", "tfrecord", "store")
GEOMETRY = Geometry(cells=1, ratios=(1, 2), images_per_canvas=(1, 4))

Pair = tuple[MontageBatch, MontageBatch]


def make_source(kind: str, root: Path, images: Sequence[bytes]) -> Source:
    """Writes encoded images in this order as a source of the given kind, with each half as a class, and opens it."""
    root.mkdir(parents=True)
    half = (len(images) + 1) // 2
    if kind == "webdataset":
        for shard in range(2):
            members = [
                member
                for i, image in enumerate(images[shard * half : (shard + 1) * half])
                for member in [(f"{i:03}.cls", b"%d" % shard), (f"{i:03}.jpg", image)]
            ]
            write_tar(root / f"{shard}.tar", members)
        return open_source(str(root))
    if kind == "tfrecord":
        for shard in range(2):
            part = images[shard * half : (shard + 1) * half]
            records = (example(image__encoded=image, image__class__label=shard) for image in part)
            write_tfrecord(root / f"{shard}.tfrecord", records)
        return open_source(str(root))
    names = [f"{i // half}/{i:03}.jpg" for i in range(len(images))]
    for name, image in zip(names, images, strict=True):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(image)
    if kind == "list":
        (root / "list.txt").write_text("".join(f"{name} {name[0]}\n" for name in names))
        return open_source(str(root / "list.txt"))
    if kind == "coco":
        entries = [{"id": i, "file_name": name} for i, name in enumerate(names)]
        (root / "a.json").write_text(json.dumps({"images": entries}))
        return open_source(str(root), annotations=str(root / "a.json"))
    return open_source(f"file://{root}" if kind == "store" else str(root))


def make_loader(
    source: Source,
    engine: str,
    *,
    images: int = 8,
    geometry: Geometry = GEOMETRY,
    rank: int = 0,
    world_size: int = 1,
    threads: int = 1,
    on_bad: Any = None,
    **data: Any,
) -> MontageLoader:
    """A loader with `images` images per rank and step."""
    plan = Plan(
        seed=5,
        size=len(source),
        images=images,
        geometry=geometry,
        augment=AugmentConfig(),
        rank=rank,
        world_size=world_size,
    )
    loader = MontageLoader(source, plan, DataConfig(engine=engine, **data), threads=threads)  # type: ignore[arg-type]
    if on_bad is not None:
        loader.report_bad(on_bad)
    return loader


def take(loader: MontageLoader, steps: int) -> list[Pair]:
    return [next(loader) for _ in range(steps)]


def equal(a: Pair, b: Pair, but: Sequence[str] = ()) -> bool:
    """Whether all fields except those named are bit-identical."""
    names = [f.name for f in dataclasses.fields(MontageBatch) if f.name not in but]
    values = [(getattr(x, name), getattr(y, name)) for x, y in zip(a, b, strict=True) for name in names]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in values)


def all_equal(a: Sequence[Pair], b: Sequence[Pair]) -> bool:
    return all(equal(x, y) for x, y in zip(a, b, strict=True))
