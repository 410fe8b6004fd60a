"""Shards: positions of their images, and which images of a broken shard can be used."""

import gzip
import io
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dali_pipelines.source import MAX_PIXELS, SourceError, open_source
from tests.dali_pipelines.shards import example, write_tar, write_tfrecord

CUT = "the shard is truncated"
DAMAGED = "the shard is truncated or damaged here; the rest of it cannot be read"
NO_IMAGE = "not an image, or its header is broken"


@pytest.fixture(scope="module")
def encoded(picture: Image.Image) -> list[bytes]:
    """Four JPEGs of 64 x 48 and 1 to 4 kB, the last one a PNG."""
    files = []
    for i, kind in enumerate(["JPEG", "JPEG", "JPEG", "PNG"]):
        file = io.BytesIO()
        picture.rotate(90 * i, expand=False).save(file, kind)
        files.append(file.getvalue())
    return files


Shard = Callable[[Path, list[bytes]], list[str]]


def tar(path: Path, images: list[bytes]) -> list[str]:
    """Writes images of classes 5, 4, ...; returns the names that they get."""
    members = []
    for i, image in enumerate(images):
        members += [(f"{i:06}.jpg", image), (f"{i:06}.cls", b"%d\n" % (5 - i)), (f"{i:06}.json", b"{}")]
    write_tar(path, members)
    return [f"{path}/{name}" for name, _ in members[::3]]


def tfrecord(path: Path, images: list[bytes]) -> list[str]:
    write_tfrecord(
        path,
        (
            example(image__height=48, image__encoded=image, image__class__label=5 - i, image__score=0.5)
            for i, image in enumerate(images)
        ),
    )
    return [f"{path}/{i}" for i in range(len(images))]


KINDS = pytest.mark.parametrize(
    ("kind", "write", "end"), [("webdataset", tar, "tar"), ("tfrecord", tfrecord, "tfrecord")], ids=["tar", "tfrecord"]
)


@KINDS
def test_order_labels_sizes_and_bytes(tmp_path: Path, encoded: list[bytes], kind: str, write: Shard, end: str) -> None:
    names = write(tmp_path / f"b.{end}", encoded[:1]) + write(tmp_path / f"c.{end}", encoded[1:])
    (tmp_path / "README.md").write_text("two shards")
    for root in (tmp_path, f"{tmp_path}/*.{end}", f"{tmp_path}/{{b,c}}.{end}"):
        s = open_source(str(root))
        assert s.kind == kind
        assert s.names == tuple(names)
        assert s.paths is None
        assert s.labels.tolist() == [5, 5, 4, 3]
        assert s.classes == ("0", "1", "2", "3", "4", "5")
        assert s.sizes.tolist() == [[64, 48]] * 4
        assert [s.read(i) for i in (3, 0, 2, 1)] == [encoded[i] for i in (3, 0, 2, 1)]
        assert not s.bad
    assert open_source(str(tmp_path / f"c.{end}")).names == tuple(names[1:])


@KINDS
def test_bad_members(tmp_path: Path, encoded: list[bytes], kind: str, write: Shard, end: str) -> None:
    """A truncated JPEG has a good header, as in a folder; text and an empty member are bad."""
    images = [encoded[0][: len(encoded[0]) // 2], b"hello", b"", encoded[0][:40], encoded[1]]
    write(tmp_path / f"a.{end}", images)
    s = open_source(str(tmp_path))
    assert {i: s.bad[i] for i in (1, 2)} == {1: NO_IMAGE, 2: "empty"}
    assert s.bad.keys() == {1, 2, 3}
    assert s.sizes.tolist() == [[64, 48], [0, 0], [0, 0], [0, 0], [64, 48]]
    assert s.read(0) == images[0]
    with pytest.raises(OSError, match=rf"a\.{end} is truncated or damaged: 0 of 0 bytes"):
        s.read(2)


@KINDS
def test_a_shard_cut_short_keeps_what_is_whole(
    tmp_path: Path, encoded: list[bytes], kind: str, write: Shard, end: str
) -> None:
    """Wherever a shard is truncated, complete images stay the same, and only the truncated one is bad, with the
    reason."""
    shard = tmp_path / f"a.{end}"
    names = write(shard, encoded)
    whole = shard.read_bytes()
    write(tmp_path / f"b.{end}", encoded)
    ends = [whole.index(image) + len(image) for image in encoded]
    for length in [*range(512, len(whole), 499), *(end - 1 for end in ends), *ends, len(whole) - 1]:
        shard.write_bytes(whole[:length])
        s = open_source(str(tmp_path))
        mine = [i for i, name in enumerate(s.names) if name.startswith(str(shard))]
        kept = [i for i in mine if i not in s.bad]
        assert [s.names[i] for i in kept] == names[: len(kept)], length
        assert [s.read(i) for i in kept] == encoded[: len(kept)], length
        # An image whose checksum or class is missing may count or not.
        assert sum(end + 4 <= length for end in ends) - 1 <= len(kept) <= sum(end <= length for end in ends), length
        assert len(mine) - len(kept) <= 1, length
        assert all(s.bad[i].startswith(CUT) for i in mine if i in s.bad), length
        assert s.names[len(mine) :] == tuple(name.replace("a.", "b.", 1) for name in names), length


def test_the_image_that_is_cut_is_the_one_named(tmp_path: Path, encoded: list[bytes]) -> None:
    tar(tmp_path / "a.tar", encoded)
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: whole.index(encoded[2]) + 100])
    s = open_source(str(tmp_path))
    assert s.names[2] == f"{tmp_path}/a.tar/000002.jpg"
    assert s.bad == {2: "the shard is truncated: it ends within this sample"}
    with pytest.raises(OSError, match=rf"a\.tar is truncated or damaged: 100 of {len(encoded[2])} bytes at "):
        s.read(2)


def test_reading_a_shard_that_has_gone_or_shrunk_says_so(tmp_path: Path, encoded: list[bytes]) -> None:
    tar(tmp_path / "a.tar", encoded)
    s = open_source(str(tmp_path))
    os.truncate(tmp_path / "a.tar", 2000)
    with pytest.raises(OSError, match=rf"a\.tar is truncated or damaged: 0 of {len(encoded[3])} bytes"):
        s.read(3)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(OSError, match=r"No such file or directory: .*a\.tar"):
        s.read(0)


@KINDS
def test_a_damaged_shard_ends_at_the_damage(
    tmp_path: Path, encoded: list[bytes], kind: str, write: Shard, end: str
) -> None:
    shard = tmp_path / f"a.{end}"
    write(shard, encoded)
    content = bytearray(shard.read_bytes())
    start = content.index(encoded[1]) - 512 if end == "tar" else int.from_bytes(content[:8], "little") + 16
    for i in range(start, start + 8):
        content[i] ^= 0x55
    shard.write_bytes(content)
    s = open_source(str(tmp_path))
    assert s.read(0) == encoded[0]
    assert set(s.bad.values()) == {DAMAGED}
    assert len(s.bad) == len(s) - 1 == 1


@pytest.mark.parametrize("name", ["a.tar", "a.tfrecord", "train-00000-of-00001"])
@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is (not a tar file|empty)"), (b"hello" * 300, "is not a (tar|TFRecord) file")],
)
def test_what_is_no_shard_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=rf"data\.root: {tmp_path}/{name} {message}"):
        open_source(str(tmp_path))


def test_shards_of_zeros_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(20_480))
    with pytest.raises(SourceError, match=r"a\.tar is an empty tar file"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.zst", "a.tar", "a.tfrecord.gz", "a.tfrecord"])
def test_compressed_shards_are_refused(tmp_path: Path, encoded: list[bytes], name: str) -> None:
    """By their names, or by their first bytes."""
    (tar if ".t" in name and "rec" not in name else tfrecord)(tmp_path / "x", encoded)
    (tmp_path / name).write_bytes(gzip.compress((tmp_path / "x").read_bytes()))
    (tmp_path / "x").unlink()
    for root in (tmp_path, tmp_path / name):
        with pytest.raises(SourceError, match=rf"{name} is compressed, .*; decompress the shards"):
            open_source(str(root))


def test_compression_is_detected_by_the_first_bytes(tmp_path: Path) -> None:
    for magic in (b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\x00", b"BZh9"):
        (tmp_path / "a.tar").write_bytes(magic + bytes(1000))
        with pytest.raises(SourceError, match=r"a\.tar is compressed"):
            open_source(str(tmp_path))


def test_names_of_braces_keep_their_order_and_zeros(tmp_path: Path, encoded: list[bytes]) -> None:
    for name in ("009", "010", "011"):
        tar(tmp_path / f"x-{name}.tar", encoded[:1])
    for braces, order in [("{009..011}", "9 10 11"), ("{011..009}", "11 10 9"), ("{010,010,009}", "10 10 9")]:
        s = open_source(f"{tmp_path}/x-{braces}.tar")
        assert [Path(name).parent.name for name in s.names] == [f"x-{int(i):03}.tar" for i in order.split()]
        assert s.read(1) == encoded[0]
    assert len(open_source(f"{tmp_path}/x-0{{0,1}}[0-9].tar")) == 3


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("x-{009..012}.tar", r"x-012\.tar does not exist \(1 of 4 shards"),
        ("x-{009}.tar", r"\{009\} is neither a range such as \{0000\.\.0146\} nor a choice"),
        ("x-{0..9999999}.tar", r"more than 1000000 shards"),
        ("x-{0..9999}{0..9999}.tar", r"more than 1000000 shards"),
        ("y-*.tar", r"no images in the 0 shards"),
        ("x-*", r"does not tell the kind of its shards; set data\.source"),
    ],
)
def test_patterns_that_cannot_be_used(tmp_path: Path, encoded: list[bytes], pattern: str, message: str) -> None:
    for name in ("009", "010", "011"):
        tar(tmp_path / f"x-{name}.tar", encoded[:1])
    with pytest.raises(SourceError, match=rf"data\.root: .*{message}"):
        open_source(f"{tmp_path}/{pattern}")


def test_relative_patterns(tmp_path: Path, encoded: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    names = tar(tmp_path / "x-0.tar", encoded)
    monkeypatch.chdir(tmp_path)
    for root in ("x-*.tar", "x-{0..0}.tar", "x-0.tar"):
        s = open_source(root)
        assert s.names == tuple(names)
        assert s.digest() == open_source(str(tmp_path)).digest()


def test_folders_of_shards_beside_other_folders(tmp_path: Path, encoded: list[bytes]) -> None:
    """Archives beside class folders do not make a folder one of shards."""
    tar(tmp_path / "a.tar", encoded)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.jpg").write_bytes(encoded[0])
    assert open_source(str(tmp_path)).kind == "folders"
    assert len(open_source(str(tmp_path), "webdataset")) == 4
    with pytest.raises(SourceError, match=r"no images in the 0 shards"):
        open_source(str(tmp_path), "tfrecord")
    (tmp_path / "cat" / "0.jpg").unlink()
    (tmp_path / "cat").rmdir()
    tfrecord(tmp_path / "a.tfrecord", encoded)
    with pytest.raises(SourceError, match=r"holds shards of several kinds; set data\.source to one of webdataset, tfr"):
        open_source(str(tmp_path))


def test_samples_are_identified_by_their_names(tmp_path: Path, encoded: list[bytes]) -> None:
    """A sample's name ends at the first dot after the last slash; of several fields, the image counts."""
    a, b, c, png = encoded
    members = [
        ("./x.y/1.JPG", a),
        ("x.y/2.seg.png", png),  # another field
        ("x.y/2.png", png),
        ("z/1.txt", b"no image"),
        ("z/1.jpeg", b),
        ("x.y/1.cls", b"7"),  # not the sample ./x.y/1
        ("z/2.jpg", c),
        ("z/2.png", png),  # ambiguous
        (".hidden.jpg", c),
        ("z/2.cls", b"3"),
        ("z/1.cls", b"cat"),
        ("x.y/2.cls", b"12\n"),
    ]
    write_tar(tmp_path / "a.tar", members)
    s = open_source(str(tmp_path))
    assert [name.removeprefix(f"{tmp_path}/a.tar/") for name in s.names] == [
        "./x.y/1.JPG",
        "x.y/2.png",
        "z/1.jpeg",
        "z/2.jpg",
    ]
    assert s.labels.tolist() == [-1, 12, -1, 3]
    assert s.bad == {2: "its class 'cat' is not an integer", 3: "2 images in one sample; keep one of them"}
    assert (s.read(0), s.read(1)) == (a, png)


def test_a_sample_whose_image_has_dots_in_its_name_is_one_bad_entry(tmp_path: Path, encoded: list[bytes]) -> None:
    """Such files are reported: WebDataset takes the first of them for fields of the sample "v1"."""
    members = [("v1.5_0.jpg", encoded[0]), ("v1.5_1.jpg", encoded[1]), ("a/trip 2.0.jpg", encoded[2])]
    write_tar(tmp_path / "a.tar", [*members, ("ok.jpg", encoded[3]), ("ok.seg.png", encoded[3]), ("no.seg.txt", b"")])
    s = open_source(str(tmp_path))
    assert [name.removeprefix(f"{tmp_path}/a.tar/") for name in s.names] == ["v1.5_0.jpg", "a/trip 2.0.jpg", "ok.jpg"]
    assert list(s.bad) == [0, 1]
    assert all("first dot" in reason and "rename it" in reason for reason in s.bad.values())


def test_tars_of_the_command_line(tmp_path: Path, encoded: list[bytes]) -> None:
    """Long names, folders and links, in every format of GNU tar."""
    deep = tmp_path / "in" / ("deep" * 20) / ("folder" * 20)
    deep.mkdir(parents=True)
    for i, image in enumerate(encoded[:2]):
        (deep / f"{i}.jpg").write_bytes(image)
    (deep / "link.jpg").symlink_to(deep / "0.jpg")
    for form in ("gnu", "pax"):
        archive = tmp_path / f"{form}.tar"
        command = ["tar", f"--format={form}", "--sort=name", "-cf", archive, "-C", tmp_path / "in", "."]
        subprocess.run(command, check=True)
        s = open_source(str(archive))
        assert [Path(name).name for name in s.names] == ["0.jpg", "1.jpg", "link.jpg"]
        assert [s.read(i) for i in range(2)] == encoded[:2]
        assert s.bad == {2: "a link or sparse file in the tar; store the file itself"}


@pytest.mark.parametrize("cut", [None, 1024, 512, 0], ids=["whole", "two zero blocks", "one", "none"])
def test_tars_that_were_joined(tmp_path: Path, encoded: list[bytes], cut: int | None) -> None:
    """Joined with cat, with complete or incomplete end markers. Names may repeat, unless an end marker is missing."""
    parts = []
    for i, images in enumerate([encoded[:2], encoded[2:3], encoded[3:]]):
        write_tar(tmp_path / "part", [(f"{i if cut == 0 else 0}{j}.jpg", image) for j, image in enumerate(images)])
        content = (tmp_path / "part").read_bytes()
        end = len(content.rstrip(b"\0")) + 511 & ~511
        parts.append(content if cut is None else content[:end] + bytes(cut))
    (tmp_path / "a.tar").write_bytes(b"".join(parts))
    s = open_source(str(tmp_path / "a.tar"))
    assert s.bad == {}
    assert [s.read(i) for i in range(len(s))] == encoded
    (tmp_path / "b.tar").write_bytes(b"".join(parts)[: -len(parts[-1]) + 700])  # the last one is truncated
    s = open_source(str(tmp_path / "b.tar"))
    assert [s.read(i) for i in range(3)] == encoded[:3]
    assert list(s.bad) == [3]
    assert s.bad[3].startswith(CUT)


@pytest.mark.parametrize("rest", [b"x", b"hello" * 1000, bytes(700) + b"x" * 2000, b"\x1f\x8b" + bytes(100)])
def test_data_after_a_tar_is_one_bad_entry(tmp_path: Path, encoded: list[bytes], rest: bytes) -> None:
    names = tar(tmp_path / "a.tar", encoded)
    size = (tmp_path / "a.tar").stat().st_size
    with open(tmp_path / "a.tar", "ab") as file:
        file.write(rest)
    s = open_source(str(tmp_path / "a.tar"))
    assert s.names[: len(names)] == tuple(names)
    assert [s.read(i) for i in range(len(names))] == encoded
    assert s.bad == {len(names): DAMAGED}
    assert int(s.names[-1].rpartition("byte ")[2]) == size + (512 if len(rest) == 2700 else 0)


def test_odd_members_of_tars(tmp_path: Path, encoded: list[bytes]) -> None:
    """Each member is read, ignored, or listed as one bad entry with its name."""

    def member(
        name: str, kind: bytes = tarfile.REGTYPE, image: bytes = b"", **more: Any
    ) -> tuple[tarfile.TarInfo, bytes]:
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, len(image)
        for key, value in more.items():
            setattr(info, key, value)
        return info, image

    long = "/".join(["folder" * 10] * 5) + "/" + "n" * 150 + ".jpg"
    members = [
        member("folder.jpg", tarfile.DIRTYPE),
        member("hard.jpg", tarfile.LNKTYPE, linkname="0.jpg"),
        member("soft.jpg", tarfile.SYMTYPE, linkname="0.jpg"),
        member("fifo.jpg", tarfile.FIFOTYPE),
        member("old.jpg", tarfile.AREGTYPE, encoded[0]),
        member("pax.jpg", image=encoded[1], pax_headers={"comment": "x" * 2000, "path": "named by pax.jpg"}),
        member(long, image=encoded[2]),
        member("caf\udce9.jpg", image=encoded[3]),
        member("twice.jpg", image=encoded[0]),
        member("twice.jpg", image=encoded[1]),
    ]
    link = "a link or sparse file in the tar; store the file itself"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=form) as archive:
            for info, image in members:
                archive.addfile(info, io.BytesIO(image))
        s = open_source(str(tmp_path / "a.tar"))
        pax = "named by pax.jpg" if form == tarfile.PAX_FORMAT else "pax.jpg"
        names = ["hard.jpg", "soft.jpg", "fifo.jpg", "old.jpg", pax, long, "caf\udce9.jpg", "twice.jpg"]
        assert s.names == tuple(f"{tmp_path}/a.tar/{name}" for name in names)
        assert [s.read(i) for i in range(3, 7)] == encoded
        assert s.bad == {0: link, 1: link, 2: link, 7: "2 images in one sample; keep one of them"}


def test_sparse_members_of_tars(tmp_path: Path, encoded: list[bytes]) -> None:
    (tmp_path / "in").mkdir()
    with open(tmp_path / "in" / "0.jpg", "wb") as file:
        file.write(encoded[0])
        file.truncate(1 << 22)
    (tmp_path / "in" / "1.jpg").write_bytes(encoded[1])
    for form in ("gnu", "pax"):
        command = [
            "tar",
            f"--format={form}",
            "-S",
            "--sort=name",
            "-cf",
            tmp_path / "a.tar",
            "-C",
            tmp_path / "in",
            ".",
        ]
        subprocess.run(command, check=True)
        s = open_source(str(tmp_path / "a.tar"))
        assert s.bad == {0: "a link or sparse file in the tar; store the file itself"}
        assert s.read(1) == encoded[1]


def test_records_that_were_joined(tmp_path: Path, encoded: list[bytes]) -> None:
    """TFRecord files have neither header nor footer, so joined files are one file."""
    tfrecord(tmp_path / "part", encoded[:2])
    tfrecord(tmp_path / "other", encoded[2:])
    joined = (tmp_path / "part").read_bytes() + (tmp_path / "other").read_bytes()
    for rest, reason in [(b"", None), (bytes(3), CUT), (bytes(100), DAMAGED), (b"hello" * 20, DAMAGED)]:
        (tmp_path / "a.tfrecord").write_bytes(joined + rest)
        s = open_source(str(tmp_path / "a.tfrecord"))
        assert [s.read(i) for i in range(4)] == encoded
        assert list(s.bad) == ([4] if reason else [])
        assert reason is None or s.bad[4].startswith(reason)


def test_forged_sizes_do_not_lead_in_circles(tmp_path: Path, encoded: list[bytes]) -> None:
    """A member of negative size would make a reader go back to what it has read."""
    tar(tmp_path / "a.tar", encoded[:1])
    content = bytearray((tmp_path / "a.tar").read_bytes())
    content[124:136] = (-2048).to_bytes(12, "big", signed=True)
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(SourceError, match=r"a\.tar is (not a|an empty) tar file"):
        open_source(str(tmp_path))


def test_a_tar_may_claim_to_be_a_huge_image(tmp_path: Path, picture: Image.Image) -> None:
    bomb = b"P6 30000 30000 255\n" + bytes(100)
    write_tar(tmp_path / "a.tar", [("0.ppm", bomb)])
    (reason,) = open_source(str(tmp_path)).bad.values()
    assert str(MAX_PIXELS) in reason or "DecompressionBomb" in reason


def test_records_without_what_is_needed(tmp_path: Path, encoded: list[bytes]) -> None:
    records = [
        example(image__encoded=encoded[0]),
        example(image__format=b"jpeg"),
        b"\xff" * 50,
        b"",
        example(image__encoded=[encoded[0], encoded[1]], image__class__label=1),
        example(image__encoded=encoded[1], image__class__label=[2, 3]),
        example(image__encoded=encoded[1], image__class__label=-5),
        example(image__encoded=encoded[1], image__class__label=-1),
    ]
    write_tfrecord(tmp_path / "a.tfrecord", records)
    s = open_source(str(tmp_path))
    none, two = (f"{n} values of image/encoded in the record, instead of 1" for n in (0, 2))
    assert s.bad == {1: none, 2: "not a tf.train.Example", 3: none, 4: two, 6: "its class -5 is negative"}
    assert s.labels.tolist() == [-1, -1, -1, -1, 1, 2, -1, -1]
    assert s.read(5) == encoded[1]


def test_class_numbers_too_large_to_count_to(tmp_path: Path, encoded: list[bytes]) -> None:
    records = [example(image__encoded=encoded[0], image__class__label=label) for label in (2**62, 7)]
    write_tfrecord(tmp_path / "a.tfrecord", records)
    s = open_source(str(tmp_path))
    assert s.classes == ("7", str(2**62))
    assert s.labels.tolist() == [1, 0]


def test_a_shard_that_cannot_be_read_is_named(tmp_path: Path, encoded: list[bytes]) -> None:
    (tmp_path / "a.tar").mkdir()
    with pytest.raises(SourceError, match=rf"data\.root: cannot read {tmp_path}/a\.tar \(Is a directory\)"):
        open_source(f"{tmp_path}/{{a,a}}.tar")


@KINDS
def test_an_index_is_made_without_reading_the_images(tmp_path: Path, kind: str, write: Shard, end: str) -> None:
    """For shards as large as ImageNet's this is the difference between minutes and hours."""
    large = io.BytesIO()
    Image.effect_noise((1500, 1500), 100).save(large, "PNG")
    write(tmp_path / f"a.{end}", [large.getvalue()] * 4)

    def read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])  # rchar: bytes read

    before = read()
    assert len(open_source(str(tmp_path), kind, index=str(tmp_path / "index"))) == 4
    assert read() - before < (tmp_path / f"a.{end}").stat().st_size / 4
