"""Sources of images, and what reading their headers finds."""

import io
import json
import os
import pickle
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageOps

from dali_pipelines import source
from dali_pipelines.source import Source, SourceError, open_source
from tests.dali_pipelines.images import write_animated, write_truncated
from tests.dali_pipelines.loading import KINDS, make_source

Write = Callable[[Path, int], list[Path]]


def header(path: Path) -> tuple[int, int] | str:
    """The size, or why the image cannot be used."""
    with open(path, "rb") as file:
        found = source.read_header(file)
    return found if isinstance(found, str) else found.size


def bytes_are_those_of_the_files(s: Source) -> bool:
    return all(s.read(i) == Path(name).read_bytes() for i, name in enumerate(s.names))


def test_folder_of_class_folders(tmp_path: Path, folder_of: Write) -> None:
    cats, dogs = folder_of(tmp_path / "cat" / "deeper", 2), folder_of(tmp_path / "dog", 1)
    (tmp_path / "dog" / "notes.txt").write_text("not an image by its name")
    folder_of(tmp_path / ".thumbnails", 1)
    (tmp_path / "empty").mkdir()
    s = open_source(str(tmp_path))
    assert s.paths == s.names == tuple(map(str, [*cats, *dogs]))
    assert bytes_are_those_of_the_files(s)
    assert s.classes == ("cat", "dog")
    assert s.labels.tolist() == [0, 0, 1]
    assert s.sizes.tolist() == [[64, 48]] * 3
    assert s.bad == {}
    assert len(s) == 3


def test_photographs_in_formats_of_cameras_are_named_in_a_warning(tmp_path: Path, folder_of: Write) -> None:
    kept = folder_of(tmp_path / "cat", 1)
    (tmp_path / "cat" / "notes.txt").touch()
    for name in ("b.HEIC", "a.dng"):
        (tmp_path / "cat" / name).touch()
    with pytest.warns(UserWarning, match=re.escape(f"{tmp_path}: 2 files such as cat/a.dng are left out")) as warned:
        s = open_source(str(tmp_path))
    assert len(warned) == 1
    assert s.paths == tuple(map(str, kept))


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


ODD = [
    "#1.jpg",
    "a b.jpg",
    "a\tb.jpg",
    "a\x0bb.jpg",
    "a\x85b.jpg",
    "a\u2028b.jpg",
    "a\x1cb.jpg",
    "\xa0.jpg",
    "x.jpg\u3000.jpg",
]
"""Names with characters that elsewhere start a comment or separate fields or lines; the last bytes are Latin-1."""


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "byte order mark"])
@pytest.mark.parametrize("label", ["", " 3", "\t3", "  3 "])
def test_only_newlines_end_a_line_of_a_list(
    tmp_path: Path, folder_of: Write, end: str, mark: bytes, label: str
) -> None:
    (image,) = folder_of(tmp_path / "in", 1)
    names = [*ODD, os.fsdecode(b"caf\xe9.jpg")]
    for name in names:
        shutil.copy(image, tmp_path / name)
    listing = tmp_path / "list.txt"
    listing.write_bytes(mark + os.fsencode("".join(f"{name}{label}{end}" for name in names)))
    s = open_source(str(listing))
    assert s.names == tuple(f"{tmp_path}/{name}" for name in names)
    assert s.labels.tolist() == [3 if label else -1] * len(names)
    assert s.bad == {}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_lists_in_utf_16_are_refused_with_the_remedy(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "list.txt").write_bytes("000.jpg\n".encode(encoding))
    with pytest.raises(SourceError, match=r"cannot read the list .*list\.txt: .* save it as text in UTF-8"):
        open_source(str(tmp_path / "list.txt"))


def test_list_file_with_absolute_paths_and_spaces(tmp_path: Path, folder_of: Write) -> None:
    (path,) = folder_of(tmp_path / "two words", 1)
    listing = tmp_path / "list.txt"
    listing.write_text(f"{path}\n{path} 5\ntwo words/000.jpg 5\ntwo words/000.jpg\ttwo words\n")
    with pytest.raises(SourceError, match="does not exist"):
        open_source(str(tmp_path / "lists.txt"))
    with pytest.raises(SourceError, match=rf"list\.txt, line 1: .{path}. may lie outside .* data\.allow_outside=true"):
        open_source(str(listing))
    s = open_source(str(listing), allow_outside=True)
    assert s.paths == (str(path),) * 4
    assert s.classes == ("5", "two words")
    assert s.labels.tolist() == [-1, 0, 0, 1]


def test_a_file_that_a_list_names_in_vain_is_bad(tmp_path: Path, folder_of: Write) -> None:
    folder_of(tmp_path, 1)
    (tmp_path / "list").write_text("000.jpg\ngone.jpg\n")
    s = open_source(str(tmp_path / "list"))
    assert s.bad == {1: "no such file"}
    assert s.sizes.tolist() == [[64, 48], [0, 0]]
    with pytest.raises(OSError, match=r"No such file.*gone\.jpg"):
        s.read(1)


def test_a_list_may_not_lead_out_of_its_folder(tmp_path: Path, folder_of: Write) -> None:
    (outside,) = folder_of(tmp_path / "secret", 1)
    (inside,) = folder_of(tmp_path / "data", 1)
    listing = tmp_path / "data" / "list.txt"
    for line in ("../secret/000.jpg", "in/../../secret/000.jpg", str(outside)):
        listing.write_text(f"000.jpg\n\n{line} 3\n")
        with pytest.raises(SourceError, match=rf"data\.root: .*list\.txt, line 3: .{line}. may lie outside"):
            open_source(str(listing))
        s = open_source(str(listing), allow_outside=True)
        assert [Path(path).resolve() for path in s.paths or ()] == [inside, outside]
        assert not s.bad


def test_a_list_beside_the_working_directory(tmp_path: Path, folder_of: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = folder_of(tmp_path, 1)
    (tmp_path / "list.txt").write_text("./000.jpg")
    digest = open_source(str(tmp_path / "list.txt")).digest()
    monkeypatch.chdir(tmp_path)
    s = open_source("list.txt")
    assert s.paths == (str(path),)
    assert s.digest() == digest


def test_integers_that_are_no_class_numbers_are_names(tmp_path: Path, folder_of: Write) -> None:
    for name in ("20240101", "20231231"):
        folder_of(tmp_path / name, 1)
    s = open_source(str(tmp_path))
    assert s.classes == ("20231231", "20240101")
    assert s.labels.tolist() == [0, 1]


def test_file_names_of_any_bytes(tmp_path: Path, folder_of: Write) -> None:
    (path,) = folder_of(tmp_path, 1)
    os.rename(path, os.fsencode(tmp_path) + b"/caf\xe9.jpg")
    for _ in range(2):
        s = open_source(str(tmp_path))
        assert os.fsencode(s.names[0]).endswith(b"/caf\xe9.jpg")
        assert s.sizes.tolist() == [[64, 48]]
        assert len(s.digest()) == len(s.fingerprint()) == 64


def test_hidden_folders_are_skipped_at_any_depth(tmp_path: Path, folder_of: Write) -> None:
    folder_of(tmp_path / "cat", 1)
    folder_of(tmp_path / "cat" / ".cache", 1)
    assert len(open_source(str(tmp_path))) == 1


def test_links(tmp_path: Path, folder_of: Write) -> None:
    """Links are followed, but not in circles."""
    folder_of(tmp_path / "elsewhere", 2)
    root = tmp_path / "root"
    (root / "cat").mkdir(parents=True)
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "a.jpg").symlink_to(tmp_path / "elsewhere" / "000.jpg")
    (root / "cat" / "b.jpg").symlink_to(tmp_path / "nowhere")
    (root / "cat" / "c.jpg").symlink_to(root / "cat" / "c.jpg")
    s = open_source(str(root))
    assert [name.removeprefix(f"{root}/") for name in s.names] == [
        "cat/a.jpg",
        "cat/b.jpg",
        "cat/c.jpg",
        "dog/000.jpg",
        "dog/001.jpg",
    ]
    assert s.bad == {1: "no such file", 2: "cannot read it: Too many levels of symbolic links"}
    (root / "cat" / "again").symlink_to(root)
    with pytest.raises(SourceError, match=r"data\.root: .*cat/again is a link to a folder that it lies in"):
        open_source(str(root))


def annotate(path: Path, *images: Any, **more: Any) -> str:
    """A COCO annotation file; returns its path."""
    annotations = [{"id": 7, "image_id": 3, "bbox": [0, 0, 9, 9], "segmentation": [[0, 0, 1, 1, 2, 2]]}]
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations, **more}))
    return str(path)


def test_coco(tmp_path: Path, folder_of: Write) -> None:
    """Images are in the order of their ids. Those without annotations count; files without an entry do not."""
    paths = folder_of(tmp_path / "train2017", 4)
    images = [{"id": id, "file_name": f"{i:03}.jpg", "width": 1} for i, id in enumerate([30, 3, 20])]
    annotations = annotate(tmp_path / "instances.json", *images, {"id": 31, "file_name": "000.jpg"})
    for kind in ("auto", "coco"):
        s = open_source(str(tmp_path / "train2017"), kind, annotations=annotations)  # type: ignore[arg-type]
        assert s.paths == tuple(str(paths[i]) for i in (1, 2, 0, 0))
        assert s.kind == "coco"
    assert s.labels.tolist() == [-1] * 4
    assert s.classes == ()
    assert s.sizes.tolist() == [[64, 48]] * 4
    assert bytes_are_those_of_the_files(s)


def test_coco_images_that_are_broken_or_not_there(tmp_path: Path, folder_of: Write) -> None:
    folder_of(tmp_path / "images", 1)
    (tmp_path / "images" / "text.jpg").write_text("hello")
    names = ["000.jpg", "gone.jpg", "text.jpg"]
    annotations = annotate(tmp_path / "a.json", *({"id": i, "file_name": name} for i, name in enumerate(names)))
    s = open_source(str(tmp_path / "images"), annotations=annotations)
    assert s.bad == {1: "no such file", 2: "not an image, or its header is broken"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot read .*a\.json \(No such file"),
        ("{", r"a\.json is not a JSON file: "),
        ("[1]", r'a\.json has no list "images"'),
        ('{"annotations": []}', r'a\.json has no list "images"'),
        ('{"images": [{"id": 1}]}', r'a\.json: an image has no "id" or "file_name"'),
        ('{"images": [{"id": 1, "file_name": 2}]}', r"or one of the wrong type"),
        ('{"images": [{"id": 1, "file_name": "../x.jpg"}]}', r"a\.json, image 1: .\.\./x\.jpg. may lie outside"),
        ('{"images": [{"id": 1, "file_name": "/x.jpg"}]}', r"a\.json, image 1: ./x\.jpg. may lie outside"),
        (
            '{"images": [{"id": 1, "file_name": "a\\u0000.jpg"}]}',
            r"a\.json, image 1: 'a\\x00\.jpg' is not a legal file name",
        ),
        (
            '{"images": [{"id": 1, "file_name": "\\ud800.jpg"}]}',
            r"a\.json, image 1: '\\ud800\.jpg' is not a legal file name",
        ),
        ('{"images": [{"id": "\\n", "file_name": "\\n/.."}]}', r"a\.json, image '\\n': '\\n/\.\.' may lie outside"),
        ("[" * 100_000, r"a\.json is not a JSON file: maximum recursion"),
        ('{"images": []}', r"no images in "),
    ],
)
def test_annotations_that_cannot_be_used(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    with pytest.raises(SourceError, match=rf"data\.root: .*{message}"):
        open_source(str(tmp_path), "coco", annotations=str(tmp_path / "a.json"))


def test_annotations_and_coco_belong_together(tmp_path: Path, folder_of: Write) -> None:
    folder_of(tmp_path, 1)
    with pytest.raises(SourceError, match=r"data\.annotations is not set"):
        open_source(str(tmp_path), "coco")
    with pytest.raises(SourceError, match=r"data\.annotations is set, but data\.source is flat"):
        open_source(str(tmp_path), "flat", annotations="a.json")


def test_fingerprints_tell_what_digests_do_not(tmp_path: Path, folder_of: Write, picture: Image.Image) -> None:
    """A digest depends only on names; a fingerprint also on classes, sizes and broken files."""
    folder_of(tmp_path / "a", 2)
    before = open_source(str(tmp_path))
    flat = open_source(str(tmp_path), "flat")
    (tmp_path / "a" / "000.jpg").write_text("hello")
    broken = open_source(str(tmp_path))
    picture.resize((48, 64)).save(tmp_path / "a" / "000.jpg")
    turned = open_source(str(tmp_path))
    sources = (before, flat, broken, turned)
    assert len({s.digest() for s in sources}) == 1
    assert len({s.fingerprint() for s in sources}) == 4
    os.rename(tmp_path / "a" / "001.jpg", tmp_path / "a" / "002.jpg")
    assert open_source(str(tmp_path)).digest() != turned.digest()


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_can_be_given_to_another_process(tmp_path: Path, pictures: list[str], kind: str) -> None:
    """A source can be pickled; its pixels come from the same files."""
    images = [Path(path).read_bytes() for path in pictures]
    s = make_source(kind, tmp_path / "root", images)
    given = pickle.loads(pickle.dumps(s))
    assert (given.names, given.paths, given.fingerprint()) == (s.names, s.paths, s.fingerprint())
    assert [given.read(i) for i in range(len(given))] == images


def test_a_moved_folder_has_the_same_digest(tmp_path: Path, folder_of: Write) -> None:
    folder_of(tmp_path / "here" / "cat", 2)
    before = open_source(str(tmp_path / "here") + "/")
    os.rename(tmp_path / "here", tmp_path / "there")
    after = open_source(str(tmp_path / "there"))
    assert before.digest() == after.digest()
    assert before.fingerprint() == after.fingerprint()


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
        (lambda folder: str(folder / "file.jpg"), "coco", r"is a file, but data\.source is coco"),
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
        # Sizes are those of the stored pixels: EXIF rotation is not applied.
        assert header(path) == ((1, 1) if name == "one_pixel.jpg" else (64, 48)), name


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_headers_tell_orientation_and_upright_size(picture: Image.Image, kind: str) -> None:
    for orientation in range(9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = io.BytesIO()
        picture.save(file, kind, exif=exif)
        file.seek(0)
        found = source.read_header(file)
        assert not isinstance(found, str)
        assert found.size == (64, 48)
        assert found.orientation == max(orientation, 1)
        with Image.open(file) as image:
            assert found.upright == ImageOps.exif_transpose(image).size


def test_broken_exif_says_nothing(picture: Image.Image) -> None:
    for exif in (
        b"Exif\0\0II*\0",
        b"Exif\0\0" + b"\xff" * 40,
        b"Exif\0\0MM\0*\0\0\0\10\0\1\1\22\0\3\0\0\0\1\0\143\0\0",
    ):
        file = io.BytesIO()
        picture.save(file, "JPEG", exif=exif)
        file.seek(0)
        found = source.read_header(file)
        assert not isinstance(found, str)
        assert (found.size, found.orientation) == ((64, 48), 1)


def test_headers_of_unusable_files(tmp_path: Path, picture: Image.Image) -> None:
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.jpg").touch()
    picture.save(tmp_path / "still.gif")
    write_animated(tmp_path / "animated.gif", picture)
    write_animated(tmp_path / "animated.webp", picture)
    write_animated(tmp_path / "animated.png", picture)
    picture.save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:40])
    for name, reason in [
        ("text.jpg", "not an image, or its header is broken"),
        ("empty.jpg", "not an image, or its header is broken"),
        ("still.gif", "format GIF is not supported; convert it to JPEG or PNG"),
        ("animated.gif", "format GIF is not supported; convert it to JPEG or PNG"),
        ("animated.webp", "WEBP with 2 frames; keep one of them"),
        ("animated.png", "PNG with 2 frames; keep one of them"),
        ("cut.jpg", "not an image: "),
    ]:
        found = header(tmp_path / name)
        assert isinstance(found, str), name
        assert found.startswith(reason), name


def test_a_truncated_file_passes_its_header(tmp_path: Path, picture: Image.Image) -> None:
    write_truncated(tmp_path / "truncated.jpg", picture)
    assert header(tmp_path / "truncated.jpg") == (64, 48)


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_an_absurdly_large_image_is_refused_unread(tmp_path: Path, width: int, height: int) -> None:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    forged = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    data = b"IDAT" + zlib.compress(b"")
    forged += struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    (tmp_path / "bomb.png").write_bytes(forged)
    reason = header(tmp_path / "bomb.png")
    assert isinstance(reason, str)
    assert f"pixels, more than {source.MAX_PIXELS}" in reason or "DecompressionBombError" in reason


def test_bad_files_keep_their_place_in_the_numbering(tmp_path: Path, folder_of: Write) -> None:
    folder_of(tmp_path, 3)
    (tmp_path / "001.jpg").write_text("hello")
    s = open_source(str(tmp_path))
    assert len(s) == 3
    assert s.sizes.tolist() == [[64, 48], [0, 0], [64, 48]]
    assert list(s.bad) == [1]
