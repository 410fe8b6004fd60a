"""Where images come from, and what their headers reveal."""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from dali_pipelines import source
from dali_pipelines.source import SourceError, open_source, read_header
from tests.dali_pipelines.images import write_animated, write_truncated

Write = Callable[[Path, int], list[Path]]


def test_folder_of_class_folders(tmp_path: Path, folder_of: Write) -> None:
    cats, dogs = folder_of(tmp_path / "cat" / "deeper", 2), folder_of(tmp_path / "dog", 1)
    (tmp_path / "dog" / "notes.txt").write_text("not an image by its name")
    folder_of(tmp_path / ".thumbnails", 1)
    (tmp_path / "empty").mkdir()
    s = open_source(str(tmp_path))
    assert s.paths == tuple(map(str, [*cats, *dogs]))
    assert s.classes == ("cat", "dog")
    assert s.labels.tolist() == [0, 0, 1]
    assert s.sizes.tolist() == [[64, 48]] * 3
    assert s.bad == {}
    assert len(s) == 3


def test_class_folders_named_by_integers_keep_their_numbers(tmp_path: Path, folder_of: Write) -> None:
    for name in ("10", "2"):
        folder_of(tmp_path / name, 1)
    s = open_source(str(tmp_path))
    assert [Path(p).parent.name for p in s.paths] == ["10", "2"]
    assert s.labels.tolist() == [10, 2]
    assert len(s.classes) == 11


def test_flat_folder_has_no_classes(tmp_path: Path, folder_of: Write) -> None:
    paths = folder_of(tmp_path, 2) + folder_of(tmp_path / "more", 1)
    s = open_source(str(tmp_path))
    assert s.paths == tuple(map(str, paths))
    assert s.labels.tolist() == [-1, -1, -1]
    assert s.classes == ()


def test_auto_and_explicit_kinds(tmp_path: Path, folder_of: Write) -> None:
    folder_of(tmp_path / "a", 1)
    assert open_source(str(tmp_path)).classes == ("a",)
    assert open_source(str(tmp_path), "flat").classes == ()


@pytest.mark.parametrize(
    ("lines", "labels", "classes"),
    [
        ("in/000.jpg 1\nin/001.jpg 0\n", [1, 0], ("0", "1")),
        ("in/000.jpg dog\n\nin/001.jpg cat\n", [1, 0], ("cat", "dog")),
        ("in/000.jpg\tgreat dane\nin/001.jpg\tcat\n", [1, 0], ("cat", "great dane")),
        ("in/000.jpg\nin/001.jpg", [-1, -1], ()),
        ("in/000.jpg 3\r\nin/001.jpg\r\n", [3, -1], ("0", "1", "2", "3")),
    ],
)
def test_list_file(tmp_path: Path, folder_of: Write, lines: str, labels: list[int], classes: tuple[str, ...]) -> None:
    paths = folder_of(tmp_path / "in", 2)
    listing = tmp_path / "list.txt"
    listing.write_text(lines)
    s = open_source(str(listing))
    assert s.paths == tuple(map(str, paths))
    assert s.labels.tolist() == labels
    assert s.classes == classes
    assert s.bad == {}


def test_list_file_with_absolute_paths_and_spaces(tmp_path: Path, folder_of: Write) -> None:
    (path,) = folder_of(tmp_path / "two words", 1)
    listing = tmp_path / "list.txt"
    listing.write_text(f"{path}\n{path} 5\ntwo words/000.jpg 5\ntwo words/000.jpg\ttwo words\n")
    with pytest.raises(SourceError, match="does not exist"):
        open_source(str(tmp_path / "lists.txt"))
    s = open_source(str(listing))
    assert s.paths == (str(path),) * 4
    assert s.classes == ("5", "two words")
    assert s.labels.tolist() == [-1, 0, 0, 1]


def test_a_file_that_a_list_names_in_vain_is_bad(tmp_path: Path, folder_of: Write) -> None:
    folder_of(tmp_path, 1)
    (tmp_path / "list").write_text("000.jpg\ngone.jpg\n")
    s = open_source(str(tmp_path / "list"))
    assert s.bad == {1: "no such file"}
    assert s.sizes.tolist() == [[64, 48], [0, 0]]


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda folder: "", "auto", r"data\.root: not set"),
        (lambda folder: f"{folder}/nowhere", "auto", r"data\.root: .*nowhere does not exist"),
        (lambda folder: str(folder), "auto", r"data\.root: no images in .*\.jpg"),
        (lambda folder: str(folder / "file.jpg"), "folders", r"is a file, but data\.source is folders"),
        (lambda folder: str(folder / "file.jpg"), "flat", r"is a file, but data\.source is flat"),
        (lambda folder: str(folder), "list", r"is a folder, but data\.source is list"),
        (lambda folder: str(folder / "binary"), "auto", r"cannot read the list .*binary"),
        (lambda folder: str(folder / "blank"), "auto", r"no images in .*blank"),
    ],
)
def test_what_cannot_be_a_source_is_named(tmp_path: Path, make: Callable[[Path], str], kind: str, message: str) -> None:
    folder = tmp_path / "root"
    folder.mkdir()
    root = make(folder)
    if root not in ("", str(folder)) and "nowhere" not in root:
        content = {"file.jpg": b"", "binary": b"\xff\xd8\xff\xe0\x00", "blank": b"\n\n"}
        Path(root).write_bytes(content[Path(root).name])
    with pytest.raises(SourceError, match=message):
        open_source(root, kind)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["folders", "flat"])
@pytest.mark.parametrize("depth", ["root", "below"])
def test_a_folder_that_cannot_be_read_is_named(
    tmp_path: Path, folder_of: Write, monkeypatch: pytest.MonkeyPatch, layout: str, depth: str
) -> None:
    folder_of(tmp_path / "a" / "b", 1)
    closed = tmp_path if depth == "root" else tmp_path / "a" / "b"
    scandir = os.scandir

    def refuse(path: str) -> object:
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(SourceError, match=rf"data\.root: cannot read {closed} \(Permission denied\)"):
        open_source(str(tmp_path), layout)  # type: ignore[arg-type]


def test_headers_of_readable_files(kinds: dict[str, Path]) -> None:
    for name, path in kinds.items():
        # Sizes are those of the stored pixels: the rotation that EXIF asks for is not applied.
        assert read_header(str(path)) == ((1, 1) if name == "one_pixel.jpg" else (64, 48)), name


def test_headers_of_unusable_files(tmp_path: Path, picture: Image.Image) -> None:
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.jpg").touch()
    picture.save(tmp_path / "still.gif")
    write_animated(tmp_path / "animated.gif", picture)
    write_animated(tmp_path / "animated.webp", picture)
    write_animated(tmp_path / "animated.png", picture)
    picture.save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:40])
    (tmp_path / "folder.jpg").mkdir()
    for name, reason in [
        ("text.jpg", "not an image: UnidentifiedImageError"),
        ("empty.jpg", "not an image: UnidentifiedImageError"),
        ("still.gif", "format GIF is not supported; convert it to JPEG or PNG"),
        ("animated.gif", "format GIF is not supported; convert it to JPEG or PNG"),
        ("animated.webp", "WEBP with 2 frames; keep one of them"),
        ("animated.png", "PNG with 2 frames; keep one of them"),
        ("cut.jpg", "not an image: "),
        ("folder.jpg", "not an image: IsADirectoryError"),
        ("gone.jpg", "no such file"),
    ]:
        header = read_header(str(tmp_path / name))
        assert isinstance(header, str), name
        assert header.startswith(reason), name


def test_a_truncated_file_passes_its_header(tmp_path: Path, picture: Image.Image) -> None:
    write_truncated(tmp_path / "truncated.jpg", picture)
    assert read_header(str(tmp_path / "truncated.jpg")) == (64, 48)


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_an_absurdly_large_image_is_refused_unread(tmp_path: Path, width: int, height: int) -> None:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    forged = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    data = b"IDAT" + zlib.compress(b"")
    forged += struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    (tmp_path / "bomb.png").write_bytes(forged)
    reason = read_header(str(tmp_path / "bomb.png"))
    assert isinstance(reason, str)
    assert f"{source.MAX_PIXELS} are refused" in reason or "DecompressionBombError" in reason


def test_bad_files_keep_their_place_in_the_numbering(tmp_path: Path, folder_of: Write) -> None:
    folder_of(tmp_path, 3)
    (tmp_path / "001.jpg").write_text("hello")
    s = open_source(str(tmp_path))
    assert len(s) == 3
    assert s.sizes.tolist() == [[64, 48], [0, 0], [64, 48]]
    assert list(s.bad) == [1]
