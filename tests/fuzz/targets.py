"""What is fuzzed: everything that reads what others may have written."""

import contextlib
import io
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from PIL import Image

from dali_pipelines.geometry import Geometry
from dali_pipelines.source import decode, index_file, open_source, read_header
from mcl import config
from mcl.config import Config, ModelConfig
from mcl.export import export, openselfsup
from mcl.finetune.annotations import check
from mcl.models import MCL
from mcl.train import checkpoint
from tests.dali_pipelines.encodings import encodings
from tests.dali_pipelines.shards import example, write_tar, write_tfrecord
from tests.fuzz import checksums
from tests.mcl.finetune import test_annotations as annotations
from tests.mcl.tiny import TINY

Read = Callable[[bytes], object]
"""Reads an input as mcl does. Errors of our own are right; any other is a finding."""


class Target(NamedTuple):
    good: Callable[[], Iterable[bytes]]
    """Inputs that are read without an error."""
    reader: Callable[[Path], Read]
    """What reads them, from a folder that is its own."""
    mutate: checksums.Mutate = checksums.none
    words: tuple[str, ...] = ()
    """Of the format, or odd: to be put anywhere."""


# ------------------------------------------------------------------------------------------------------ images

SIZE = 64, 48  # of the encodings


def picture() -> Image.Image:
    return Image.linear_gradient("L").resize(SIZE).convert("RGB")


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
    """Opens a source of which the input says where its images lie."""

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
    """Opens a folder with this index: whatever it says, the images are found as they are."""
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

ODD = ("null", "true", "-1", "0", "0.5", "1e999", "NaN", "[]", "{}", "9" * 400, '"7"', '"\\ud800"', '"\\u0000"', "[" * 99)
FIELDS = ("images", "annotations", "categories", "id", "file_name", "bbox", "segmentation", "counts", "size", "iscrowd")


def coco() -> Iterable[bytes]:
    content = annotations.example()
    yield json.dumps(content).encode()
    yield json.dumps(content).encode("utf-16")
    content["images"][1]["file_name"] = "a.png"
    content["annotations"] = content["annotations"][:1]
    yield json.dumps(content).encode()


def checked(folder: Path) -> Read:
    def read(data: bytes) -> None:
        check(data, "x.json", masks=False)
        check(data, "x.json")

    return read


# ------------------------------------------------------------------------------------------------- checkpoints


def hollow() -> dict[str, torch.Tensor]:
    """The state of a small model, each tensor one number, repeated: so its file is small."""
    cfg = config.from_dict(TINY)
    with torch.device("meta"):
        state = MCL(cfg.model, cfg.montage).state_dict()
    return {name: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) for name, tensor in state.items()}


def saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def checkpoints() -> Iterable[bytes]:
    state = {"config": config.to_dict(config.from_dict(TINY)), "step": 3, "model": hollow()}
    yield saved({"format": checkpoint.FORMAT, **state})
    file = io.BytesIO()
    checkpoint.write({"format": checkpoint.FORMAT, **state}, file)
    yield file.getvalue()


def authors() -> list[bytes]:
    return [saved({"state_dict": {openselfsup.their_name(name): tensor for name, tensor in hollow().items()}})]


def file_reader(read: Callable[[Path, Path], object]) -> Callable[[Path], Read]:
    """What reads a file and may write one."""

    def reader(folder: Path) -> Read:
        file = folder / "file.pt"

        def write_and_read(data: bytes) -> None:
            file.write_bytes(data)
            read(file, folder / "written")

        return write_and_read

    return reader


def pretrained(folder: Path) -> Read:
    """Takes them over into a detector."""
    from mcl.finetune import settings, weights

    mini = settings.load(Path("configs/finetune/mask_rcnn_r18_fpn_mini.py"), ["width=16"])

    def read(file: Path) -> None:
        weights.load(file, mini.model, "mmdet", [], ["backbone"])

    return file_reader(lambda file, _: read(file))(folder)


# ----------------------------------------------------------------------------------------------- configurations


def use(cfg: Config) -> None:
    """What happens to every configuration that is accepted."""
    assert config.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict(cfg)))) == cfg
    cfg.images_per_rank(1)
    cfg.plan(1000, 32)


def presets() -> list[bytes]:
    return [path.read_bytes() for path in config.PRESETS.glob("*.yaml")]


def words(folder: Path) -> Read:
    return lambda data: use(config.override(Config(), data.decode(errors="surrogateescape").split("\n")))


def overrides() -> Iterable[bytes]:
    for path in config.PRESETS.glob("*.yaml"):
        content = yaml.safe_load(path.read_text())
        pairs = {key.name: config.value(config.load(path), key.name) for key in config.all_keys()}
        yield "\n".join(
            f"{name}={json.dumps(value)}" for name, value in pairs.items() if name.partition(".")[0] in content
        ).encode()


KEYS = tuple(key.name for key in config.all_keys())
YAML = ("&a ", "*a", "<<: ", "!!binary ", "!!set ", "? ", "- ", "'", "|", "2001-01-01", "0x", ".inf", "010", "1:30")

TARGETS = {
    "headers": Target(lambda: encodings(picture()).values(), header, checksums.png),
    "lists": Target(lists, source("list"), words=("..", "/", "://", "\\ufeff")),
    "tar": Target(tars, source("webdataset"), checksums.tar),
    "tfrecord": Target(tfrecords, source("tfrecord"), checksums.tfrecord),
    "index": Target(indices, index, checksums.zip),
    "coco": Target(coco, source("coco"), words=ODD + FIELDS),
    "annotations": Target(coco, checked, words=ODD + FIELDS),
    "checkpoint": Target(checkpoints, file_reader(lambda file, _: checkpoint.load_model(file)), checksums.zip),
    "export": Target(checkpoints, file_reader(lambda file, to: export(file, "timm", output=to)), checksums.zip),
    "openselfsup": Target(authors, file_reader(openselfsup.import_file), checksums.zip),
    "pretrained": Target(checkpoints, pretrained, checksums.zip),
    "yaml": Target(presets, file_reader(lambda file, _: use(config.load(file))), words=ODD + KEYS + YAML),
    "words": Target(overrides, words, words=ODD + KEYS + YAML),
}
"""By name."""
