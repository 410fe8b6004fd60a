"""The loader: replacement of bad files, ownership of memory, and choice of the engine."""

import dataclasses
import gc
import importlib.util
import io
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dali_pipelines.loader
from dali_pipelines import pipelines
from dali_pipelines.geometry import Geometry
from dali_pipelines.loader import (
    READ_AHEAD,
    BadDataError,
    DaliEngine,
    LoaderMemoryError,
    MontageLoader,
    choose_engine,
    default_threads,
)
from dali_pipelines.plan import Plan
from dali_pipelines.reference import TorchvisionEngine
from dali_pipelines.source import Source, decoding, open_source
from mcl.config import AugmentConfig, ConfigError, DataConfig
from tests.conftest import ROOT
from tests.dali_pipelines.images import write_animated, write_huge, write_truncated
from tests.dali_pipelines.loading import ENGINES, GEOMETRY, Pair, all_equal, make_loader, make_source, take

IMAGES = 8
DALI = ("fused", "stock")

Write = Callable[[Path, int], list[Path]]
Found = list[tuple[int, str, str]]


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory, folder_of: Write) -> list[bytes]:
    """20 images: two steps of 8 per epoch."""
    return [path.read_bytes() for path in folder_of(tmp_path_factory.mktemp("images"), 20)]


@pytest.fixture(scope="module")
def good(encoded: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Source:
    return make_source("folders", tmp_path_factory.mktemp("good") / "root", encoded)


@pytest.fixture(scope="module")
def poison(tmp_path_factory: pytest.TempPathFactory, picture: Image.Image) -> dict[int, bytes]:
    """Broken images, by the number of the good image that they replace; truncated ones are found only by decoding."""
    path = tmp_path_factory.mktemp("poison") / "image"
    found = {2: b"hello", 8: b""}
    for i, write, end in [(5, write_truncated, "jpg"), (11, write_truncated, "jpg"), (14, write_huge, "jpg")]:
        write(path.with_suffix(f".{end}"), picture.rotate(i))
        found[i] = path.with_suffix(f".{end}").read_bytes()
    write_animated(path.with_suffix(".gif"), picture)
    return found | {17: path.with_suffix(".gif").read_bytes()}


@dataclass(frozen=True)
class Run:
    """Four steps, in two epochs, of images of which some are broken."""

    engine: str
    source: Source
    broken: list[int]
    batches: list[Pair]
    found: Found
    state: dict[str, Any]


@pytest.fixture(
    scope="module",
    params=[*((engine, "folders") for engine in ENGINES), ("fused", "webdataset"), ("torchvision", "tfrecord")],
    ids=" ".join,
)
def run(
    request: pytest.FixtureRequest,
    encoded: list[bytes],
    poison: dict[int, bytes],
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    """As :class:`Run`; the last shard also ends in the middle of its last image."""
    engine, kind = request.param
    root = tmp_path_factory.mktemp("poisoned") / "root"
    source = make_source(kind, root, [poison.get(i, image) for i, image in enumerate(encoded)])
    broken = sorted(poison)
    if kind != "folders":
        cut_short(sorted(root.iterdir())[-1], encoded[-1])
        source = open_source(str(root))
        broken.append(len(encoded) - 1)
    found: Found = []
    with make_loader(source, engine, on_bad=lambda *args: found.append(args), max_bad_fraction=0.4) as loader:
        return Run(engine, source, broken, take(loader, 4), found, loader.state_dict())


def cut_short(shard: Path, last: bytes) -> None:
    """Truncates a shard in the middle of its last image."""
    content = shard.read_bytes()
    shard.write_bytes(content[: content.rindex(last) + len(last) // 2])


@pytest.fixture(scope="module")
def whole(good: Source) -> Callable[[str], list[Pair]]:
    """The same steps, with only good images."""
    runs: dict[str, list[Pair]] = {}

    def load(engine: str) -> list[Pair]:
        if engine not in runs:
            with make_loader(good, engine) as loader:
                runs[engine] = take(loader, 4)
        return runs[engine]

    return load


def test_a_loader_goes_on_after_it_was_closed(good: Source, whole: Callable[[str], list[Pair]]) -> None:
    for engine in ENGINES:
        with make_loader(good, engine) as loader:
            first = take(loader, 1)
            loader.close()
            assert all_equal(first + take(loader, 1), whole(engine)[:2])


def test_iterating_yields_pairs_for_ever(good: Source) -> None:
    with make_loader(good, "fused") as loader:
        assert iter(loader) is loader
        assert [query.step for _, (query, _) in zip(range(5), loader, strict=False)] == [0, 1, 2, 3, 4]


# ------------------------------------------------------------------------------------------------------- bad files


def test_bad_files_are_each_reported_once_with_name_and_reason(run: Run) -> None:
    reasons = run.state["bad"]
    assert sorted(i for i, _, _ in run.found) == sorted(reasons) == run.broken
    assert all(name == run.source.names[i] and reasons[i] == reason for i, name, reason in run.found)
    assert reasons[2].startswith("not an image")
    assert reasons[17].startswith("format GIF is not supported")
    assert "65000 x 65000" in reasons[14] or "DecompressionBomb" in reasons[14]
    assert reasons[8]
    for i in (5, 11):
        assert "image file is truncated" in reasons[i]
    if 19 in reasons:
        assert "the shard is truncated" in reasons[19]
    assert run.state["position"] == 4


def test_bad_files_are_replaced_and_the_others_are_what_they_were(run: Run, whole: Callable[[str], list[Pair]]) -> None:
    """Compares with a run of the same plan whose files are all good."""
    replaced = 0
    pairs = zip(itertools.chain(*run.batches), itertools.chain(*whole(run.engine)), strict=True)
    for a, b in pairs:
        assert torch.equal(a.tile_images, b.tile_images)
        was_bad = torch.from_numpy(np.isin(b.index.numpy(), run.broken))
        assert torch.equal(a.index[~was_bad], b.index[~was_bad])
        assert not set(a.index.tolist()) & set(run.broken)
        for row, (k, x1, y1, x2, y2) in enumerate(a.boxes.int().tolist()):
            tiles = [batch.pixels[k, :, y1:y2, x1:x2] for batch in (a, b)]
            if was_bad[a.tile_images[row]]:
                replaced += 1
                assert not torch.equal(*tiles)
            else:
                assert torch.equal(*tiles)
                assert torch.equal(a.crops[row], b.crops[row])
    assert replaced > 0


def test_bad_files_found_before_are_part_of_the_state(run: Run) -> None:
    found: Found = []
    report: Any = lambda *args: found.append(args)  # noqa: E731
    with make_loader(run.source, run.engine, on_bad=report, max_bad_fraction=0.4, prefetch=1) as loader:
        loader.load_state_dict({"position": 2, "bad": {str(i): reason for i, reason in run.state["bad"].items()}})
        assert all_equal(take(loader, 2), run.batches[2:])
    assert sorted(i for i, _, _ in found) == run.broken


def test_too_many_bad_files_stop_the_run_and_the_first_is_named(run: Run) -> None:
    name = run.source.names[2]
    known = len(run.source.bad)
    with pytest.raises(
        BadDataError, match=rf"{known} of the 20 images .*data\.max_bad_fraction=0\.05.*{name}: not an image"
    ):
        make_loader(run.source, run.engine, max_bad_fraction=0.05)
    with (
        make_loader(run.source, run.engine, max_bad_fraction=known / 20) as loader,
        pytest.raises(BadDataError, match=rf"({known + 1}|{known + 2}) of the 20 images .*{name}"),
    ):
        take(loader, 4)


def test_every_engine_chooses_the_same_substitutes(run: Run, encoded: list[bytes]) -> None:
    """Substitutes depend only on which files are bad, not on when, or by which engine, they were found."""
    plan = Plan(seed=5, size=len(encoded), images=IMAGES, geometry=GEOMETRY, augment=AugmentConfig())
    for step, pair in enumerate(run.batches):
        for batch in pair:
            assert batch.index.tolist() == plan.samples(step, run.broken).tolist()


def test_bad_files_that_other_processes_found_count_and_are_replaced(good: Source) -> None:
    found: Found = []
    with make_loader(good, "fused", on_bad=lambda *args: found.append(args), max_bad_fraction=0.1) as loader:
        next(loader)
        loader.share({3: "cut off", 4: "cut off"})
        assert loader.state_dict() == {"position": 1, "bad": {3: "cut off", 4: "cut off"}}
        loader.share({3: "cut off"})
        with pytest.raises(BadDataError, match=r"3 of the 20 images .*003\.jpg: cut off"):
            loader.share({9: "cut off"})
    assert found == []


def test_a_folder_without_one_good_file_stops_whatever_fraction_is_allowed(tmp_path: Path) -> None:
    for i in range(IMAGES):
        (tmp_path / f"{i}.jpg").write_text("hello")
    with pytest.raises(BadDataError, match=r"8 of the 8 images .*0\.jpg"):
        make_loader(open_source(str(tmp_path)), "torchvision", max_bad_fraction=1.0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["folders", "webdataset"])
def test_files_removed_since_the_start_are_replaced(
    tmp_path: Path, encoded: list[bytes], engine: str, kind: str
) -> None:
    source = make_source(kind, tmp_path / "root", encoded[:IMAGES])
    if source.paths is None:
        cut_short(tmp_path / "root" / "1.tar", encoded[IMAGES - 1])
    else:
        Path(source.paths[-1]).unlink()
    with make_loader(source, engine, max_bad_fraction=0.2) as loader:
        (query, _) = next(loader)
    assert IMAGES - 1 not in query.index.tolist()
    ((i, reason),) = loader.bad.items()
    assert i == IMAGES - 1
    assert ("No such file" if source.paths else "1.tar is truncated or damaged") in reason


def saved(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["folders", "webdataset"])
def test_files_changed_since_the_start_are_replaced(
    tmp_path: Path, encoded: list[bytes], picture: Image.Image, engine: str, kind: str
) -> None:
    """Detected by the planned size: smaller, larger and rotated images, and files that are no longer images."""
    now = {1: picture.resize((63, 48)), 3: picture.resize((128, 96)), 6: picture.transpose(Image.Transpose.ROTATE_90)}
    # 32 images, since in smaller batches DALI survives headers that it cannot read
    images = [image.ljust(19_998, b"\0") + b"%02d" % i for i, image in enumerate((encoded * 2)[:32])]
    source = make_source(kind, tmp_path / "root", images)
    changed = {i: saved(image) for i, image in now.items()}
    changed |= {9: b"hello", 11: b"\0", 13: images[13][:200], 14: b""}
    for path in (path for path in (tmp_path / "root").rglob("*") if path.is_file()):
        content = path.read_bytes()
        for i, image in changed.items():
            content = content.replace(images[i], image if source.paths else image.ljust(20_000, b"\0"))
        path.write_bytes(content)
    with make_loader(source, engine, images=32, max_bad_fraction=0.5) as loader:
        (query, _) = next(loader)
    assert set(loader.bad) == {*now, 9, 11, 13, 14}
    assert not set(query.index.tolist()) & set(loader.bad)
    for i, image in now.items():
        size = "{} x {}".format(*image.size)
        assert loader.bad[i] == f"it has changed since its header was read: {size} pixels now, 64 x 48 then"


QUIET = """
import ctypes, sys
from dali_pipelines.source import open_source
from tests.dali_pipelines.loading import make_loader
report = lambda i, name, reason: print(f"bad: {name}: {reason}", file=sys.stderr, flush=True)
with make_loader(open_source(sys.argv[1]), sys.argv[2], on_bad=report, max_bad_fraction=0.5) as loader:
    next(loader), next(loader)
cpp = ctypes.CDLL("libstdc++.so.6")
cerr = ctypes.addressof(ctypes.c_char.in_dll(cpp, "_ZSt4cerr"))
error = b"\\33[0;31m[ERROR] "
decoder = error + b"\\33[0m[nvjpeg_cuda_decoder] "
for text in (
    *(b"one line\\n", error, b"of others\\n", b"\\n", b"[ERROR:0@0.1] global dnn.cpp:1 of others\\n"),
    *(decoder, b"Could not decode jpeg code stream - nvJPEG error #3\\n"),
    *(decoder, b"Could not create nvjpeg decoder: x\\n", decoder + b"CUDA error #2: out of memory in a stream\\n"),
    *(decoder[:15], b"\\n", b"end"),
):
    cpp._ZNSo5writeEPKcl(ctypes.c_void_p(cerr), text, ctypes.c_long(len(text)))  # std::cerr.write
"""


@pytest.mark.parametrize(("engine", "level"), [("fused", None), ("stock", None), ("fused", "1")])
def test_dali_prints_nothing_of_its_own_about_broken_images(
    tmp_path: Path, folder_of: Write, picture: Image.Image, engine: str, level: str | None
) -> None:
    """Unless DALI_NVIMGCODEC_LOG_LEVEL is set. Other output on stderr is kept, above all about memory and CUDA."""
    folder_of(tmp_path, 12)
    for i in range(3):
        write_truncated(tmp_path / f"{i}.jpg", picture.rotate(i))
    picture.save(tmp_path / "3.png")
    os.truncate(tmp_path / "3.png", 2000)
    for path in (tmp_path / "4.tif", tmp_path / "5.bmp"):
        picture.save(path)
        os.truncate(path, 2000 if path.suffix == ".bmp" else 9000)
    environment = {k: v for k, v in os.environ.items() if k != "DALI_NVIMGCODEC_LOG_LEVEL"}
    environment |= {} if level is None else {"DALI_NVIMGCODEC_LOG_LEVEL": level}
    command = [sys.executable, "-c", QUIET, str(tmp_path), engine]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=True).stderr
    # TIFF messages are from libtiff in Pillow.
    found = [line for line in lines.splitlines() if not line.startswith("TIFF")]
    ours = [line for line in found if line.startswith("bad: ")]
    assert len(ours) == 6
    error = "\33[0;31m[ERROR] "
    decoder = f"{error}\33[0m[nvjpeg_cuda_decoder] "
    others = ["one line", f"{error}of others", "", "[ERROR:0@0.1] global dnn.cpp:1 of others"]
    others += [f"{decoder}Could not create nvjpeg decoder: x", f"{decoder}CUDA error #2: out of memory in a stream"]
    if level is None:
        assert found == [*ours, *others, decoder[:15], "end"]
    else:
        assert lines.count("Premature end of JPEG data") >= 3
        assert "nvJPEG error #3" in lines


@pytest.mark.parametrize("engine", ENGINES)
def test_names_may_be_any_bytes(tmp_path: Path, encoded: list[bytes], engine: str) -> None:
    """File names that are not UTF-8, as in old ZIP archives, of good, broken and removed images."""
    names = [b"%d\xe9.jpg" % i for i in range(IMAGES)] + [
        "日本.jpg".encode(),
        b"a\nb\xff.jpg",
        b"\xc3(.jpg",
        b"\x85.jpg",
    ]
    for name, image in zip(names, encoded, strict=False):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(image)
    source = open_source(str(tmp_path))
    paths = [os.fsencode(path) for path in source.paths or ()]
    assert {path.rpartition(b"/")[2] for path in paths} == set(names)
    os.truncate(paths[2], 100)
    os.remove(paths[5])
    found: Found = []
    with make_loader(source, engine, on_bad=lambda *args: found.append(args), max_bad_fraction=0.2) as loader:
        take(loader, 2)
    assert sorted((i, os.fsencode(name)) for i, name, _ in found) == [(2, paths[2]), (5, paths[5])]
    assert "No such file" in loader.bad[5]


@pytest.mark.parametrize("engine", ENGINES)
def test_every_kind_of_readable_file_goes_through(
    tmp_path: Path, folder_of: Write, kinds: dict[str, Path], engine: str
) -> None:
    """Gray, CMYK, alpha, palette, 16 bits, a single pixel and every container are in one step."""
    for path in kinds.values():
        shutil.copy(path, tmp_path)
    folder_of(tmp_path, 16 - len(kinds))
    source = open_source(str(tmp_path))
    assert source.bad == {}
    with make_loader(source, engine, images=16) as loader:
        for batch in next(loader):
            assert sorted(batch.index.tolist()) == list(range(16))
            assert batch.pixels.isfinite().all()
    assert loader.bad == {}


# -------------------------------------------------------------------------------------------------- images by Pillow


def palette_bmp(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.convert("P", palette=Image.Palette.ADAPTIVE).save(file, "BMP")
    return file.getvalue()


def as_png(encoded: bytes) -> bytes:
    file = io.BytesIO()
    with Image.open(io.BytesIO(encoded)) as image:
        image.convert("RGB").save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def mixed(tmp_path: Path, encoded: list[bytes], picture: Image.Image) -> tuple[Source, Source, list[int]]:
    """Images of which some are decoded only by Pillow, the same pixels as PNG, and the numbers of the former."""
    ours = [3, 7]
    images = [palette_bmp(picture.rotate(i)) if i in ours else image for i, image in enumerate(encoded[:IMAGES])]
    mixed = make_source("folders", tmp_path / "mixed", images)
    assert np.flatnonzero(mixed.by_pillow).tolist() == ours
    plain = [as_png(image) if i in ours else image for i, image in enumerate(images)]
    return mixed, make_source("folders", tmp_path / "plain", plain), ours


class Counted:
    """Counts for which images a source's `read` was called."""

    def __init__(self, source: Source) -> None:
        self.read, self.asked = source.read, list[int]()
        self.source = dataclasses.replace(source, read=self)

    def __call__(self, i: int) -> bytes:
        self.asked.append(i)
        return self.read(i)


@pytest.mark.parametrize("engine", ENGINES)
def test_of_plain_files_only_those_for_pillow_are_read_by_us(
    mixed: tuple[Source, Source, list[int]], engine: str
) -> None:
    source, plain, ours = mixed
    counted = Counted(source)
    with make_loader(counted.source, engine) as loader, make_loader(plain, engine) as other:
        assert all_equal(take(loader, 3), take(other, 3))
    assert set(counted.asked) == (set(range(IMAGES)) if engine == "torchvision" else set(ours))


def test_pillow_decodes_an_image_once(mixed: tuple[Source, Source, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    open_image = decoding.open_image
    monkeypatch.setattr(decoding, "open_image", lambda file: opened.append(file) or open_image(file))
    with make_loader(mixed[0], "torchvision", prefetch=1) as loader:
        next(loader)
    assert len(opened) == IMAGES


@pytest.mark.parametrize("bound", [0, 64 * 48 * 3 * 2 - 1, 64 * 48 * 3 * 4, 1 << 30])
def test_pixels_that_wait_are_bounded_by_their_bytes(
    mixed: tuple[Source, Source, list[int]], bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow decodes two images of each step. No step is started while the pixels that wait reach the limit."""
    monkeypatch.setattr(dali_pipelines.loader, "DECODED_AHEAD", bound)
    counted = Counted(mixed[0])
    waiting = max(0, min(READ_AHEAD, math.ceil(bound / (64 * 48 * 3 * 2)) - 1))
    with make_loader(counted.source, "fused", prefetch=1) as loader:
        for steps in range(1, 4):
            next(loader)
            deadline = time.monotonic() + 20
            while len(counted.asked) < 2 * (steps + waiting) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert len(counted.asked) == 2 * (steps + waiting)


# -------------------------------------------------------------------------------------------------- other errors

DALI_ERROR = """Critical error in pipeline:
Error in GPU operator `nvidia.dali.fn.{}`,
which was used in the pipeline definition with the following traceback:

  File "pipelines.py", line 99, in pipeline

encountered:

{}
Current pipeline object is no longer valid.
"""


def fail_with(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes steps end in an error; no image may be reported as bad."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(TorchvisionEngine, "collect", fail)
    monkeypatch.setattr(TorchvisionEngine, "decodes", lambda *_: pytest.fail("decodes one image after the other"))


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (RuntimeError(DALI_ERROR.format("decoders.image", "std::bad_alloc")), r"std::bad_alloc"),
        (
            RuntimeError(
                DALI_ERROR.format("mcl.montage", "CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory")
            ),
            r"CUDA runtime API error cudaErrorMemoryAllocation \(2\):",
        ),
        (RuntimeError("CUDA allocation failed\nRequested: 7"), "CUDA allocation failed"),
        (RuntimeError("Can't allocate 123 bytes on device 0."), r"Can't allocate 123 bytes on device 0\."),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "CUDA out of memory.*"),
        (MemoryError(), "out of memory"),
        (OSError(12, "Cannot allocate memory"), r"\[Errno 12\] Cannot allocate memory"),
    ],
)
def test_too_little_memory_is_an_error_at_the_start_with_the_remedy(
    good: Source, error: Exception, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(error, monkeypatch)
    with make_loader(good, "torchvision") as loader:
        with pytest.raises(LoaderMemoryError, match=rf"on the CPU \({cause}\); lower data\.prefetch, data\.threads or"):
            next(loader)
        loader.device = "gpu"
        with pytest.raises(LoaderMemoryError, match=rf"on the GPU \({cause}\).*prefetch.*device=cpu.*accumulate"):
            next(loader)
    assert loader.bad == {}


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(DALI_ERROR.format("mcl.montage", "montage: the output is not contiguous")),
        RuntimeError("CUDA runtime API error cudaErrorIllegalAddress (700)"),
        RuntimeError("shape '[2, 3]' is invalid for input of size 5"),
    ],
)
def test_an_error_that_no_image_can_explain_is_passed_on_at_once(
    good: Source, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(error, monkeypatch)
    with make_loader(good, "torchvision") as loader, pytest.raises(RuntimeError) as raised:
        next(loader)
    assert raised.value is error
    assert loader.bad == {}


def test_images_that_only_decode_alone_are_not_bad(good: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvImageCodec reports only that it failed to DALI, even if the reason was too little memory."""
    collect = DaliEngine.collect

    def fail(engine: DaliEngine) -> None:
        collect(engine)
        raise RuntimeError(DALI_ERROR.format("decoders.image", "Failed to decode sample #3 : "))

    monkeypatch.setattr(DaliEngine, "collect", fail)
    message = r"one by one, but not together \(DALI: Failed to decode sample #3\), .* memory: lower data\.prefetch"
    with make_loader(good, "fused") as loader, pytest.raises(LoaderMemoryError, match=message):
        next(loader)
    assert loader.bad == {}


LITTLE_MEMORY = """
import pathlib, resource, sys
from dali_pipelines.loader import LoaderMemoryError
from dali_pipelines.source import open_source
from tests.dali_pipelines.loading import make_loader
with make_loader(open_source(sys.argv[1]), sys.argv[2], threads=2) as loader:
    next(loader)
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (64 << 20),) * 2)
    try:
        for _ in range(9):
            next(loader)
    except LoaderMemoryError as error:
        print(error, len(loader.bad))
"""


@pytest.mark.soak
@pytest.mark.parametrize("engine", ENGINES)
def test_memory_that_really_is_too_little_makes_no_image_bad(tmp_path: Path, engine: str) -> None:
    for i in range(16):
        side = 16 if i < IMAGES else 6000  # 108 MB each; some of them are in the second step
        Image.new("RGB", (side, side)).save(tmp_path / f"{i:02}.jpg")
    command = [sys.executable, "-c", LITTLE_MEMORY, str(tmp_path), engine]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert re.fullmatch(
        r"(not enough memory|the \d+ images .* memory is too little).*data\.prefetch.* 0\n", done.stdout
    )


# ---------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("engine", ENGINES)
def test_batches_that_are_kept_stay_what_they_were(good: Source, engine: str) -> None:
    """A batch shares memory with the engine, without a copy; later steps must not write to it."""
    with make_loader(good, engine) as loader:
        kept = take(loader, 3)
        copies = [[batch.pixels.clone() for batch in pair] for pair in kept]
        take(loader, 12)
        for pair, clones in zip(kept, copies, strict=True):
            assert all(torch.equal(batch.pixels, clone) for batch, clone in zip(pair, clones, strict=True))
    addresses = {batch.pixels.data_ptr() for pair in kept for batch in pair}
    assert len(addresses) == 6


@pytest.mark.parametrize("engine", DALI)
def test_a_batch_that_is_kept_does_not_keep_the_pipeline(good: Source, engine: str) -> None:
    """After `close` the threads are gone, and the batch can still be read."""
    loader = make_loader(good, engine, threads=4)
    kept = next(loader)
    copy = kept[0].pixels.clone()
    threads = len(os.listdir("/proc/self/task"))
    loader.close()
    gc.collect()
    assert len(os.listdir("/proc/self/task")) <= threads - 4
    assert torch.equal(kept[0].pixels, copy)


# ---------------------------------------------------------------------------------------------------------- choice


def test_fewer_images_than_a_batch(good: Source) -> None:
    plan = Plan(seed=0, size=20, images=32, geometry=Geometry(cells=1), augment=AugmentConfig())
    with pytest.raises(ConfigError, match=r"data\.root: .* has 20 images, fewer than trainer\.global_batch=32; add"):
        MontageLoader(good, plan, DataConfig())


INSTALLED = ("everything", "plugin without CUDA", "no plugin", "broken plugin", "another DALI", "no DALI")


@pytest.fixture
def installed(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """One of INSTALLED, as seen by `choose_engine`."""
    state: str = request.param
    plugin = tmp_path / "libmcl_dali.so"
    monkeypatch.setattr(pipelines, "PLUGIN", plugin)
    if state not in ("no plugin", "no DALI"):
        plugin.write_text("not a library")
    if state == "another DALI":
        monkeypatch.setattr(pipelines, "DALI", "nvidia-dali-cuda130==1.99.0")
    if state in ("broken plugin", "another DALI"):
        monkeypatch.setattr(pipelines, "load_plugin", pipelines.load_plugin.__wrapped__)
    else:
        devices = frozenset({"cpu", "gpu"} if state == "everything" else {"cpu"})
        monkeypatch.setattr(pipelines, "load_plugin", lambda: devices)
    if state == "no DALI":
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name.startswith("nvidia") else find(name, *rest)
        )
    return state


def possible(installed: str, cuda: bool, threads: int) -> list[tuple[str, str]]:
    """Available engines and devices, the best first, by the rule documented at data.device."""
    fused = {"everything": ["cpu", "gpu"] if threads >= 8 else ["gpu", "cpu"], "plugin without CUDA": ["cpu"]}
    found = [("fused", device) for device in fused.get(installed, [])]
    found += [("stock", device) for device in ("gpu", "cpu") if installed != "no DALI"]
    return [(engine, device) for engine, device in [*found, ("torchvision", "cpu")] if cuda or device == "cpu"]


@pytest.mark.parametrize("installed", INSTALLED, indirect=True)
@pytest.mark.parametrize(("cuda", "threads"), [(False, 64), (True, 7), (True, 8)])
@pytest.mark.parametrize("device", ["auto", "cpu", "gpu"])
@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_the_first_choice_that_can_be_had_is_taken(
    installed: str, cuda: bool, threads: int, engine: str, device: str
) -> None:
    asked = DataConfig(engine=engine, device=device)  # type: ignore[arg-type]
    fitting = [(e, d) for e, d in possible(installed, cuda, threads) if engine in ("auto", e) and device in ("auto", d)]
    if fitting:
        *choice, reason = choose_engine(asked, cuda, threads)
        assert tuple(choice) == fitting[0]
        assert reason
    else:
        with pytest.raises(ConfigError, match=r"^data\.(engine|device): \w+ (needs|is not available)"):
            choose_engine(asked, cuda, threads)


@pytest.mark.parametrize(
    ("installed", "asked", "cuda", "reason"),
    [
        ("everything", {}, True, "4 loader threads per GPU, fewer than 8$"),
        ("everything", {"device": "gpu"}, True, "the first choice"),
        ("everything", {}, False, "no CUDA device"),
        ("everything", {"device": "cpu"}, False, "the first choice"),
        ("everything", {"engine": "torchvision"}, True, "the torchvision engine runs on CPUs only"),
        ("plugin without CUDA", {}, True, "mcl's DALI plugin was built without CUDA; MCL_BUILD_CUDA=1 builds it with"),
        (
            "no plugin",
            {},
            False,
            "no CUDA device; mcl's DALI plugin is not installed; pip install --no-build-isolation",
        ),
        ("broken plugin", {"device": "cpu"}, True, r"mcl's DALI plugin cannot be loaded: .*too short; pip install"),
        ("no DALI", {}, False, "no CUDA device; NVIDIA DALI is not installed; pip install nvidia-dali-cuda130"),
        ("no DALI", {"device": "cpu"}, True, "NVIDIA DALI is not installed; pip install nvidia-dali-cuda130"),
    ],
    indirect=["installed"],
)
def test_the_reason_says_what_is_missing_and_how_to_get_it(
    installed: str, asked: dict[str, str], cuda: bool, reason: str
) -> None:
    _, _, said = choose_engine(DataConfig(**asked), cuda, 4)  # type: ignore[arg-type]
    assert re.match(reason, said)
    assert said.count(";") == len(set(said.split("; "))) - 1  # no reason is given twice


@pytest.mark.parametrize(
    ("installed", "asked", "cuda", "message"),
    [
        ("everything", {"device": "gpu"}, False, r"data\.device: gpu needs a CUDA device; use data\.device=cpu"),
        (
            "everything",
            {"device": "gpu", "engine": "torchvision"},
            True,
            r"data\.device: gpu is not available, cpu is: the torchvision engine runs on CPUs only",
        ),
        (
            "plugin without CUDA",
            {"device": "gpu", "engine": "fused"},
            True,
            r"data\.device: gpu is not available, cpu is: .* without CUDA; MCL_BUILD_CUDA=1 builds it with",
        ),
        (
            "no plugin",
            {"engine": "fused"},
            False,
            r"data\.engine: fused .* not installed; pip install --no-build-isolation",
        ),
        (
            "no plugin",
            {"engine": "fused", "device": "gpu"},
            True,
            r"data\.engine: fused .* not installed; pip install --no-build-isolation",
        ),
        (
            "broken plugin",
            {"engine": "fused"},
            False,
            r"data\.engine: fused .*libmcl_dali\.so.*; pip install --no-build-isolation -e \. replaces it",
        ),
        (
            "another DALI",
            {"engine": "fused"},
            False,
            r"data\.engine: fused .* built for nvidia-dali-cuda130==1\.99\.0, but nvidia-dali-cuda1\d0==[\d.]+ "
            r"is installed; pip install nvidia-dali-cuda130==1\.99\.0$",
        ),
        ("no DALI", {"engine": "fused"}, False, r"data\.engine: fused .* pip install nvidia-dali-cuda130"),
        ("no DALI", {"engine": "stock"}, True, r"data\.engine: stock .* pip install nvidia-dali-cuda130"),
        ("no DALI", {"device": "gpu"}, True, r"data\.device: gpu .* pip install nvidia-dali-cuda130"),
    ],
    indirect=["installed"],
)
def test_unavailable_engines_are_refused_with_the_remedy(
    installed: str, asked: dict[str, str], cuda: bool, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        choose_engine(DataConfig(**asked), cuda, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("installed", "engine"), [("no plugin", "stock"), ("no DALI", "torchvision")], indirect=["installed"]
)
def test_the_fallback_engine_loads(installed: str, engine: str, good: Source) -> None:
    with make_loader(good, "auto") as loader:
        assert loader.engine_name == engine
        assert loader.reason
        assert next(loader)[0].step == 0


def test_a_loader_refuses_a_gpu_that_is_not_there(good: Source) -> None:
    with pytest.raises(ConfigError, match=r"data\.device: gpu needs a CUDA device; use data\.device=cpu"):
        make_loader(good, "auto", device="gpu")


@pytest.mark.parametrize("installed", ["everything"], indirect=True)
@pytest.mark.parametrize(
    ("cores", "gpus", "chosen"),
    [(128, 8, ("fused", "cpu", "16 loader threads per GPU, at least 8")),
     (32, 8, ("fused", "gpu", "4 loader threads per GPU, fewer than 8"))],
)  # fmt: skip
@pytest.mark.usefixtures("installed")
def test_where_a_machine_loads(cores: int, gpus: int, chosen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert choose_engine(DataConfig(), True, default_threads(gpus)) == chosen


def test_threads_are_shared_among_the_processes_of_a_machine() -> None:
    assert default_threads(10_000) == 1
    assert default_threads() >= default_threads(2) >= 1
