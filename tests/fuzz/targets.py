"""Targets of fuzzing: all code that reads files that others may have written."""

import contextlib
import functools
import io
import json
import pickle
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from dali_pipelines.source import decode, index_file, open_source, read_header
from mcl import config
from mcl.config import Config, ConfigError
from mcl.exporters import export, openselfsup
from mcl.finetune import voc
from mcl.finetune.annotations import check
from mcl.objectives import MCL
from mcl.train import checkpoint
from mcl.train.checkpoint import CheckpointError
from mcl.weights import files
from mcl.weights.start import start
from tests.conftest import ROOT
from tests.dali_pipelines.encodings import encodings
from tests.dali_pipelines.shards import example, write_tar, write_tfrecord
from tests.fuzz import mutations
from tests.mcl.finetune import test_annotations as annotations
from tests.mcl.tiny import TINY

Read = Callable[[bytes], object]
"""Reads an input as mcl does. Errors of mcl's own classes are expected; all others are findings."""


class Target(NamedTuple):
    good: Callable[[], Iterable[bytes]]
    """Inputs that are read without an error."""
    reader: Callable[[Path], Read]
    """Returns the function that reads inputs; the folder is its own."""
    mutate: mutations.Mutate = mutations.none
    words: tuple[str, ...] = ()
    """Words of the format, or odd words, which are inserted anywhere."""


# ------------------------------------------------------------------------------------------------------ images

SIZE = 64, 48  # of the encodings' picture


def picture() -> Image.Image:
    return Image.linear_gradient("L").resize(SIZE).convert("RGB")


def pictures() -> list[bytes]:
    return [encoded for encoded in encodings(picture()).values() if len(encoded) < 1 << 14]


def png() -> bytes:
    file = io.BytesIO()
    picture().save(file, "PNG")
    return file.getvalue()


def header(folder: Path) -> Read:
    Image.init()

    def read(data: bytes) -> None:
        found = read_header(io.BytesIO(data))
        if not isinstance(found, str) and found.size[0] * found.size[1] < 1 << 16:
            with contextlib.suppress(OSError):
                assert decode(data).shape == (*found.size[::-1], 3)

    return read


def source(kind: str) -> Callable[[Path], Read]:
    """Opens a source for which the input gives the positions of images."""

    def reader(folder: Path) -> Read:
        file, images = folder / "file", folder / "images"
        images.mkdir()
        (images / "a.png").write_bytes(png())
        root, named = (images, file) if kind == "coco" else (images / "file", "")

        def read(data: bytes) -> None:
            Path(named or root).write_bytes(data)
            found = open_source(str(root), kind, annotations=str(named), index="/dev/null", threads=1)  # type: ignore[arg-type]
            found.fingerprint()
            for i in range(min(len(found), 4)):
                with contextlib.suppress(OSError):
                    found.read(i)

        return read

    return reader


def lists() -> list[bytes]:
    lines = ["a.png 1", "b/c d.jpg\t2", "a.png", "", "b/d.jpeg\tsome class"]
    return ["\n".join(lines).encode(), ("\ufeff" + "\r\n".join(lines)).encode(), b"\xe9.png 3\n", b"x y z.tif 7\n"]


def tars() -> Iterable[bytes]:
    members = [("a.png", png()), ("a.cls", b"3"), ("b/c.jpg", b""), ("b/c.cls", b"-1"), ("long" * 20 + ".png", b"x")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        for format in range(3):  # ustar, GNU, pax
            write_tar(path, members, format=format)
            yield path.read_bytes()
        write_tar(path, members[:1], pax_headers={"comment": "x", "GNU.sparse.map": "0,9"})
        yield path.read_bytes() * 2


def tfrecords() -> Iterable[bytes]:
    records = [
        example(image__encoded=png(), image__class__label=3),
        example(image__encoded=[b"a", b"b"], image__class__label=[-1, 2], image__height=1.0),
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tfrecord"
        for count in (1, 2):
            write_tfrecord(path, records[:count])
            yield path.read_bytes()


def index(folder: Path) -> Read:
    """Opens a folder with the input as its index. The images must be found correctly, whatever the index says."""
    images = folder / "images"
    images.mkdir()
    for name in ("a", "b"):
        (images / f"{name}.png").write_bytes(png())
    file = index_file(str(folder), str(images), "flat", "")

    def read(data: bytes) -> None:
        file.write_bytes(data)
        assert open_source(str(images), "flat", index=str(folder), threads=1).sizes.tolist() == [[*SIZE]] * 2

    return read


def indices() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        index(Path(folder))(b"")
        return [path.read_bytes() for path in Path(folder).glob("*.npz")]


# ------------------------------------------------------------------------------------------------- annotations

ODD = (
    "null",
    "true",
    "-1",
    "0",
    "0.5",
    "1e999",
    "NaN",
    "[]",
    "{}",
    "9" * 400,
    '"7"',
    '"\\ud800"',
    '"\\u0000"',
    "[" * 99,
)
FIELDS = (
    *("images", "annotations", "categories", "id", "file_name", "bbox", "segmentation", "counts", "size", "iscrowd"),
    *("difficult", "frequency", "neg_category_ids"),
)


def coco() -> Iterable[bytes]:
    content = annotations.example()
    yield json.dumps(content).encode()
    yield json.dumps(content).encode("utf-16")
    content["images"][0].update(neg_category_ids=[content["categories"][0]["id"]], not_exhaustive_category_ids=[])
    content["categories"][0]["frequency"] = "r"
    content["images"][1]["file_name"] = "a.png"
    content["annotations"] = content["annotations"][:1]
    yield json.dumps(content).encode()


def checked(folder: Path) -> Read:
    def read(data: bytes) -> None:
        check(data, "x.json", masks=False)
        check(data, "x.json")

    return read


def xml() -> list[bytes]:
    sides = "<size><width>9</width><height>8</height></size>"
    box = "<bndbox><xmin>1</xmin><ymin>2.5</ymin><xmax>9</xmax><ymax>8</ymax></bndbox>"
    objects = f"<object><name>cat</name><difficult>1</difficult>{box}</object><object><name>7</name>{box}</object>"
    return [f"<annotation>{sides}{objects}</annotation>".encode(encoding) for encoding in ("utf-8", "utf-16")]


def converted(folder: Path) -> Read:
    kit = folder / "VOC2007"
    for part in ("Annotations", "JPEGImages"):
        (kit / part).mkdir(parents=True)
    (kit / "JPEGImages" / "a.jpg").touch()

    def read(data: bytes) -> None:
        (kit / "Annotations" / "a.xml").write_bytes(data)
        voc.convert([kit], folder / "voc.json")

    return read


# ------------------------------------------------------------------------------------------------- checkpoints


@functools.cache
def hollow() -> dict[str, Tensor]:
    """The state of a small model. All elements of a tensor are the same number, stored once, so that its file is
    small."""
    cfg = config.from_dict(TINY)
    with torch.device("meta"):
        state = MCL(cfg).state_dict()
    numbers = {dtype: torch.zeros((), dtype=dtype) for dtype in {tensor.dtype for tensor in state.values()}}
    return {name: numbers[tensor.dtype].expand(tensor.shape) for name, tensor in state.items()}


def fields() -> dict[str, Any]:
    """The fields of a checkpoint other than tensors, in words."""
    return {
        "format": checkpoint.FORMAT,
        "config": config.to_dict(config.from_dict(TINY)),
        "step": 3,
        "model": "OURS",
        "state_dict": "THEIRS",
    }


def save(content: Any, file: BinaryIO) -> None:
    """Writes a checkpoint with these fields."""

    def filled(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: filled(value) for key, value in node.items()}
        if isinstance(node, list):
            return [*map(filled, node)]
        words = {"OURS": hollow, "THEIRS": lambda: {openselfsup.their_name(n): t for n, t in hollow().items()}}
        return words[node]() if node in words else torch.zeros(3) if node == "TENSOR" else node

    torch.save(filled(content), file)


def checkpoints() -> Iterable[bytes]:
    for left_out in ("state_dict", "model"):
        file = io.BytesIO()
        save({key: value for key, value in fields().items() if key != left_out}, file)
        yield file.getvalue()


def use_checkpoint(file: Path) -> None:
    """Does everything that can be done with a checkpoint."""
    uses = (
        checkpoint.load_model,
        lambda file: export(file, "timm", output=file.with_suffix(".pth")),
        lambda file: openselfsup.import_file(file, file.with_suffix(".mcl.pt")),
    )
    for use in uses:
        with contextlib.suppress(CheckpointError, ConfigError):
            use(file)


def from_file(use: Callable[[Path], object], ending: str = ".pt") -> Callable[[Path], Read]:
    """Reads a file whose content is the input."""

    def reader(folder: Path) -> Read:
        file = folder / f"file{ending}"

        def read(data: bytes) -> None:
            file.write_bytes(data)
            use(file)

        return read

    return reader


def from_fields(use: Callable[[Path], object]) -> Callable[[Path], Read]:
    """Reads a checkpoint whose fields are the input, as JSON."""

    def reader(folder: Path) -> Read:
        file = folder / "file.pt"
        for name in ("normal_", "uniform_", "constant_", "kaiming_normal_", "kaiming_uniform_"):
            # Models are built for every input; this takes a third of the time off.
            setattr(nn.init, name, lambda tensor, *_, **__: tensor)

        def read(data: bytes) -> None:
            with contextlib.suppress(ValueError, RecursionError), open(file, "wb") as opened:
                save(json.loads(data), opened)
            use(file)

        return read

    return reader


@functools.cache
def detector() -> Any:
    """The configuration of a detector with this backbone."""
    from mcl.finetune import settings

    return settings.load(ROOT / "mcl" / "finetune" / "configs" / "mask_rcnn_r18_fpn_mini.py").model


def pretrained(file: Path) -> None:
    """Loads weights into a detector and into a new run."""
    from mcl.finetune import weights

    with contextlib.suppress(CheckpointError, ConfigError):
        start(model(), str(file))
    weights.load(str(file), detector(), ["backbone"])


@functools.cache
def model() -> MCL:
    return MCL(config.from_dict(TINY))


def pickles() -> Iterable[bytes]:
    """Arrays pickled by NumPy."""
    arrays = {"a": np.ones((2, 3), np.float32), "b": np.asfortranarray(np.ones((2, 3), ">f2")), "c": np.int64(3)}
    yield from (pickle.dumps({"model": arrays, "__author__": "x"}, protocol) for protocol in (2, 4, 5))


def use_arrays(file: Path) -> None:
    """Checks that the elements of all arrays can be added."""
    for tensor in dict(files.flatten(files.load(file))).values():
        tensor.sum()


# ----------------------------------------------------------------------------------------------- configurations


def use(cfg: Config) -> None:
    """Does what happens to every accepted configuration."""
    assert config.from_dict(config.to_dict(cfg)) == cfg
    cfg.doubts()
    cfg.images_per_rank(1)


def use_file(file: Path) -> None:
    """As :func:`use`; also writes the configuration into the run folder and reads it from there."""
    cfg = config.load(file)
    use(cfg)
    file.write_text(yaml.safe_dump(config.to_dict(cfg)))
    assert config.load(file) == cfg


def presets() -> list[bytes]:
    return [path.read_bytes() for path in config.PRESETS.glob("*.yaml")]


def words(folder: Path) -> Read:
    return lambda data: use(config.override(Config(), data.decode(errors="surrogateescape").split("\n")))


def overrides() -> Iterable[bytes]:
    """Five overrides per key; more would take longer."""
    for path in config.PRESETS.glob("*.yaml"):
        cfg = config.load(path)
        values = {key.name: config.value(cfg, key.name) for key in config.all_keys()}
        lines = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]
        yield from ("\n".join(lines[i : i + 5]).encode() for i in range(0, len(lines), 5))


TENSORS = ('"OURS"', '"THEIRS"', '"TENSOR"', '"model"', '"state_dict"', '"format"', '"config"')
KEYS = tuple(key.name for key in config.all_keys())
YAML = ("&a ", "*a", "<<: ", "!!binary ", "!!set ", "? ", "- ", "'", "|", "2001-01-01", "0x", ".inf", "010", "1:30")

TARGETS = {
    "headers": Target(pictures, header, mutations.png),
    "lists": Target(lists, source("list"), words=("..", "/", "://", "\ufeff")),
    "tar": Target(tars, source("webdataset"), mutations.tar),
    "tfrecord": Target(tfrecords, source("tfrecord"), mutations.tfrecord),
    "index": Target(indices, index, mutations.zip),
    "coco": Target(coco, source("coco"), mutations.json, ODD + FIELDS),
    "annotations": Target(coco, checked, mutations.json, ODD + FIELDS),
    "voc": Target(xml, converted, words=(*ODD, "<?xml ", "encoding=", "<!ENTITY a 'b'>", "&a;", "<![CDATA[", "xmlns:")),
    "checkpoint": Target(checkpoints, from_file(use_checkpoint), mutations.zip),
    "fields": Target(
        lambda: [json.dumps(fields()).encode()], from_fields(use_checkpoint), mutations.json, ODD + TENSORS + KEYS
    ),
    "pretrained": Target(
        lambda: [json.dumps(fields()).encode()], from_fields(pretrained), mutations.json, ODD + TENSORS
    ),
    "arrays": Target(pickles, from_file(use_arrays, ".pkl")),
    "yaml": Target(presets, from_file(use_file), words=ODD + KEYS + YAML),
    "words": Target(overrides, words, words=ODD + KEYS + YAML),
}
"""Targets by name."""
