"""The index of sizes: which files are read again, what a kill leaves, and damaged index files."""

import io
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tqdm.auto import tqdm

from dali_pipelines.settings import DataConfig
from dali_pipelines.source import Source, SourceError, headers, index_file, listings, open_images, open_source, source
from dali_pipelines.source.files import RangeFile
from tests.conftest import ROOT
from tests.dali_pipelines import imagenet
from tests.dali_pipelines.shards import write_tar

Write = Callable[[Path, int], list[Path]]
COUNT = 200


class Reads:
    """Opens sources and counts the headers that Pillow reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, index: Path) -> None:
        self.count = 0
        self.index = index
        self._open = Image.open
        monkeypatch.setattr(headers.Image, "open", self._counted)

    def _counted(self, file: object) -> Image.Image:
        self.count += 1
        return self._open(file)  # type: ignore[arg-type]

    def __call__(self, root: object, kind: str = "auto", **options: object) -> tuple[Source, int]:
        before = self.count
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            s = open_source(str(root), kind, index=str(self.index), **options)  # type: ignore[arg-type]
        return s, self.count - before


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Reads:
    return Reads(monkeypatch, tmp_path / "index")


def many(folder: Path, folder_of: Write, n: int = COUNT) -> Path:
    """A folder of n links to one JPEG."""
    (first,) = folder_of(folder, 1)
    for i in range(1, n):
        os.link(first, folder / f"{i:03}.jpg")
    return folder


def later(path: Path) -> None:
    """Advances the modification time by a second, since file systems may not distinguish two writes in quick
    succession."""
    moment = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(moment, moment))


def same(a: Source, b: Source) -> bool:
    return (a.names, a.bad, a.fingerprint()) == (b.names, b.bad, b.fingerprint())


def test_only_new_and_changed_files_are_read_again(
    tmp_path: Path, folder_of: Write, reads: Reads, picture: Image.Image
) -> None:
    root = tmp_path / "root"
    folder_of(root, 6)
    (root / "002.jpg").write_text("hello")
    first, n = reads(root)
    assert n == 6
    again, n = reads(root)
    assert n == 0
    assert same(first, again)
    picture.resize((40, 30)).save(root / "000.jpg")
    later(root / "000.jpg")
    picture.resize((20, 10)).save(root / "002.jpg")
    picture.save(root / "0015.jpg")
    (root / "005.jpg").unlink()
    changed, n = reads(root)
    assert n == 3
    assert changed.sizes.tolist() == [[40, 30], [64, 48], [64, 48], [20, 10], [64, 48], [64, 48]]
    assert changed.bad == {}
    assert reads(root)[1] == 0
    (root / "000.jpg").unlink()
    assert reads(root)[1] == 0
    assert np.load(next(reads.index.iterdir()))["counts"].sum() == 5


def test_missing_files_are_looked_for_again(tmp_path: Path, folder_of: Write, reads: Reads) -> None:
    (path,) = folder_of(tmp_path, 1)
    (tmp_path / "list.txt").write_text("000.jpg\n001.jpg\n000.jpg\n")
    s, n = reads(tmp_path / "list.txt")
    assert (s.bad, n) == ({1: "no such file"}, 1)
    shutil.copy(path, tmp_path / "001.jpg")
    s, n = reads(tmp_path / "list.txt")
    assert (s.bad, n) == ({}, 1)
    assert s.sizes.tolist() == [[64, 48]] * 3


def test_files_that_could_not_be_read_are_tried_again(
    tmp_path: Path, folder_of: Write, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the disk says nothing about an image, so the index does not keep it."""
    folder_of(tmp_path / "root", 2)
    (tmp_path / "root" / "list.txt").write_text("000.jpg\n.\n001.jpg")
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda file: os.open(tmp_path, os.O_WRONLY))  # raises a real OSError
        s = open_source(str(tmp_path / "root" / "list.txt"), index=str(reads.index))
    assert s.bad == dict.fromkeys([0, 1, 2], "cannot read it: Is a directory")
    s, n = reads(tmp_path / "root" / "list.txt")
    assert (s.bad, n) == ({1: "cannot read it: Is a directory"}, 2)


def test_shards_are_read_again_only_if_they_changed(tmp_path: Path, folder_of: Write, reads: Reads) -> None:
    images = [path.read_bytes() for path in folder_of(tmp_path / "in", 3)]
    root = tmp_path / "shards"
    root.mkdir()
    for shard in ("a", "b"):
        write_tar(root / f"{shard}.tar", [(f"{i}.jpg", image) for i, image in enumerate(images)])
    first, n = reads(root)
    assert n == 6
    write_tar(root / "c.tar", [("0.jpg", images[0]), ("0.cls", b"4"), ("1.jpg", b"text")])
    s, n = reads(root)
    assert n == 2
    assert s.labels.tolist() == [-1] * 6 + [4, -1]
    assert list(s.bad) == [7]
    write_tar(root / "a.tar", [("9.jpg", images[2])])
    later(root / "a.tar")
    s, n = reads(root)
    assert n == 1
    assert [Path(name).name for name in s.names[:2]] == ["9.jpg", "0.jpg"]
    assert s.bad.keys() == {5}
    assert [s.read(i) for i in range(5)] == [images[2], *images, images[0]]
    (root / "b.tar").unlink()
    s, n = reads(root)
    assert (len(s), n) == (3, 0)
    assert first.digest() != s.digest()


def test_kinds_and_roots_do_not_share_an_index(tmp_path: Path, folder_of: Write, reads: Reads) -> None:
    folder_of(tmp_path / "a" / "x", 2)
    assert reads(tmp_path / "a")[1] == 2
    assert reads(tmp_path / "a", "flat")[1] == 2
    assert reads(tmp_path / "a")[1] == reads(tmp_path / "a", "flat")[1] == 0


def test_path_of_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    place = index_file("", "photos", "flat", "")
    assert place.parent == Path("/caches/mcl/index")
    assert place == index_file("", str(Path.cwd() / "photos"), "flat", "")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert index_file("", "photos", "flat", "").parent == Path("/home/me/.cache/mcl/index")
    assert index_file("here", "photos", "flat", "").parent == Path("here")


def test_without_a_home_every_start_reads(
    tmp_path: Path, folder_of: Write, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of(tmp_path / "root", 2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as without HOME and passwd entry
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"cannot be kept in ~/\.cache/mcl/index \(there is no home folder\)"):
            assert len(open_source(str(tmp_path / "root"))) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


@pytest.mark.parametrize("seconds", [-1, -4_000_000_000, 9_300_000_000])
def test_files_from_before_1970_and_after_2262(tmp_path: Path, folder_of: Write, reads: Reads, seconds: int) -> None:
    root = tmp_path / "root"
    folder_of(root, 3)
    file = min(root.rglob("*.jpg"))
    os.utime(file, ns=(0, seconds * 10**9 + 1))
    assert reads(root)[1] == 3
    assert reads(root)[1] == 0
    os.utime(file, ns=(0, seconds * 10**9 + 2))
    # If the file system can store this time.
    assert reads(root)[1] == (1 if file.stat().st_mtime_ns == seconds * 10**9 + 2 else 0)


@pytest.mark.parametrize("damage", ["text", "empty", "cut", "flipped", "pickle", "foreign"])
def test_a_damaged_index_is_built_anew(tmp_path: Path, folder_of: Write, reads: Reads, damage: str) -> None:
    root = tmp_path / "root"
    folder_of(root, 3)
    first, _ = reads(root)
    (file,) = reads.index.iterdir()
    content = file.read_bytes()
    if damage == "pickle":
        np.savez(file, format=np.array([object()], dtype=object))
    elif damage == "foreign":
        folder_of(tmp_path / "other", 2)
        reads(tmp_path / "other")
        other = next(path for path in reads.index.iterdir() if path != file)
        shutil.copy(other, file)
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes(b ^ 0x55 for b in content[middle : middle + 400]) + content[middle + 400 :]
        file.write_bytes({"text": b"hello", "empty": b"", "cut": content[:-100], "flipped": flipped}[damage])
    with pytest.warns(UserWarning, match=rf"{file} cannot be used and is created again"):
        again = open_source(str(root), index=str(reads.index))
    assert same(first, again)
    assert reads(root)[1] == 0


@pytest.mark.parametrize("change", [-1, 1])
def test_an_index_of_another_version_is_built_anew(tmp_path: Path, folder_of: Write, reads: Reads, change: int) -> None:
    """Even if its columns are the same, since headers may be judged differently."""
    folder_of(tmp_path / "root", 3)
    first, _ = reads(tmp_path / "root")
    (file,) = reads.index.iterdir()
    with np.load(file) as arrays:
        columns = {**arrays, "format": arrays["format"] + change, "counts": arrays["counts"] + 7}
    np.savez(file, **columns)
    with pytest.warns(UserWarning, match=r"created again \(it was written by another version\)"):
        again = open_source(str(tmp_path / "root"), index=str(reads.index))
    assert same(first, again)
    assert reads(tmp_path / "root")[1] == 0


def test_the_index_keeps_which_decoder_is_used(tmp_path: Path, reads: Reads, picture: Image.Image) -> None:
    root = tmp_path / "root"
    root.mkdir()
    picture.save(root / "0.jpg")
    picture.save(root / "1.tif", tiffinfo={274: 6})
    picture.convert("CMYK").save(root / "2.jpg")
    for n in (3, 0):
        s, read = reads(root)
        assert read == n
        assert s.by_pillow.tolist() == [False, True, False]
        assert s.sizes.tolist() == [[64, 48]] * 3
        assert s.paths == s.names


def test_a_folder_that_cannot_be_written_only_warns(tmp_path: Path, folder_of: Write) -> None:
    folder_of(tmp_path / "root", 2)
    (tmp_path / "file").touch()
    message = r"cannot be kept in .*file/index \(Not a directory\).*set data\.index"
    with pytest.warns(UserWarning, match=message) as caught:
        s = open_source(str(tmp_path / "root"), index=str(tmp_path / "file" / "index"))
    assert len(caught) == 1
    assert s.sizes.tolist() == [[64, 48]] * 2


SLOW = """
import signal, sys, time
from dali_pipelines.source import headers, index, open_source
from PIL import Image
opened = Image.open
def slow(file):
    time.sleep(0.02)
    return opened(file)
headers.Image.open = slow
index._SAVE_SECONDS = 0.2
signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells have what they start in the background ignore
open_source(sys.argv[1], index=sys.argv[2], threads=1)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_build_goes_on_where_it_was(
    tmp_path: Path, folder_of: Write, reads: Reads, how: signal.Signals
) -> None:
    root = many(tmp_path / "root", folder_of, 600)
    command = [sys.executable, "-c", textwrap.dedent(SLOW), str(root), str(reads.index)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    file = index_file(str(reads.index), str(root), "flat", "")
    while not file.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(how)
    process.communicate(timeout=10)
    s, n = reads(root)
    assert 0 < n < 600
    assert s.sizes.tolist() == [[64, 48]] * 600
    assert reads(root)[1] == 0
    # A kill may leave a partial file, but no other.
    assert [path for path in reads.index.iterdir() if path.suffix != ".partial"] == [file]


def test_a_broken_shard_does_not_cost_the_others(tmp_path: Path, folder_of: Write, reads: Reads) -> None:
    (path,) = folder_of(tmp_path / "in", 1)
    (tmp_path / "shards").mkdir()
    for shard in ("a", "b"):
        write_tar(tmp_path / "shards" / f"{shard}.tar", [("0.jpg", path.read_bytes())])
    (tmp_path / "shards" / "c.tar").write_text("hello" * 200)
    with pytest.raises(SourceError, match=r"c\.tar is not a tar file"):
        open_source(str(tmp_path / "shards"), index=str(reads.index), threads=1)
    (tmp_path / "shards" / "c.tar").unlink()
    assert reads(tmp_path / "shards")[1] < 2


def test_an_image_takes_few_bytes(tmp_path: Path) -> None:
    """While a source is opened, afterwards, and in its pickle, which has the same arrays and little else."""
    images = imagenet.make(tmp_path / "root", tmp_path / "index", classes=40)
    tracemalloc.start()
    try:
        s = open_source(str(tmp_path / "root"), index=str(tmp_path / "index"))
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(s) == images == 40_000
    assert s.sizes[[0, -1]].tolist() == [[*imagenet.SIZE]] * 2
    assert kept / images < 60
    assert most / images < 250
    arrays: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(s, protocol=5, buffer_callback=arrays.append)
    assert len(pickled) < 10_000
    assert sum(array.raw().nbytes for array in arrays) / images < 60


def test_progress(tmp_path: Path, folder_of: Write, reads: Reads) -> None:
    root = many(tmp_path / "root", folder_of)
    said: list[tuple[int, int, int]] = []
    reads(root, progress=lambda *numbers: said.append(numbers))
    assert said == sorted(said)
    assert said[-1] == (COUNT, COUNT, COUNT)
    assert len(said) > 1
    said.clear()
    reads(root, progress=lambda *numbers: said.append(numbers))
    assert said == []


def test_bars_say_when_each_part_will_end(
    tmp_path: Path, folder_of: Write, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()

    def shown(*arguments: Any, **options: Any) -> Any:
        return tqdm(*arguments, **options | {"disable": False, "delay": 0, "mininterval": 0, "file": terminal})

    monkeypatch.setattr(listings, "tqdm", shown)
    monkeypatch.setattr(source, "tqdm", shown)
    for name in ("a", "b"):
        many(tmp_path / "root" / name, folder_of, 70)
    open_images(DataConfig(root=str(tmp_path / "root"), index=str(reads.index)))
    for part in ("listing: .*2/2 .*<.* folders/s", "checking: .*/192 .*<.* files/s", "headers: .*/140 .*<.* files/s"):
        assert re.search(part, terminal.getvalue()), part


def test_headers_are_read_a_piece_at_a_time(picture: Image.Image, tmp_path: Path) -> None:
    """The first kilobytes suffice, however large the file is; more is read only if the header is longer."""

    def fetched(name: str) -> int:
        content = (tmp_path / name).read_bytes()
        pieces: list[int] = []

        def read(start: int, end: int) -> bytes:
            pieces.append(end - start)
            return content[start:end]

        file = io.BufferedReader(RangeFile(read, len(content)), 1 << 14)
        found = headers.read_header(file)
        assert not isinstance(found, str)
        assert found.size == (2048, 1536)
        return sum(pieces)

    large = picture.resize((2048, 1536))
    large.save(tmp_path / "plain.jpg", quality=100)
    large.save(tmp_path / "profile.jpg", quality=100, icc_profile=bytes(100_000))
    assert (tmp_path / "plain.jpg").stat().st_size > 300_000
    assert fetched("plain.jpg") == 1 << 14
    assert 100_000 < fetched("profile.jpg") < 150_000
