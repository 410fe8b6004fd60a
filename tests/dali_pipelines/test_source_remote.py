"""Object stores have the same images as a disk, through fsspec."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from dali_pipelines.source import Source, SourceError, open_source
from tests.conftest import ROOT
from tests.dali_pipelines.shards import example, write_tar, write_tfrecord

Write = Callable[[Path, int], list[Path]]


@pytest.fixture(params=["memory://store", "file://"])
def upload(request: pytest.FixtureRequest) -> Iterator[Callable[[Path], str]]:
    """Copies a folder to a place that fsspec reads; returns its URL."""
    memory = fsspec.filesystem("memory")

    def put(folder: Path) -> str:
        if request.param == "file://":
            return f"file://{folder}"
        for path in folder.rglob("*"):
            if path.is_file():
                memory.pipe(f"/store/{path.relative_to(folder.parent)}", path.read_bytes())
        return f"memory://store/{folder.name}"

    yield put
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


def below(s: Source, root: str) -> list[str]:
    assert all(name.startswith(f"{root}/") for name in s.names)
    return [name.removeprefix(f"{root}/") for name in s.names]


def check_equal(plain: Source, remote: Source, folder: Path, url: str) -> None:
    assert below(remote, url) == below(plain, str(folder))
    assert remote.kind == plain.kind
    assert remote.digest() == plain.digest()
    assert remote.fingerprint() == plain.fingerprint()
    assert remote.classes == plain.classes
    assert remote.bad == plain.bad
    assert remote.paths is None
    assert all(remote.read(i) == plain.read(i) for i in range(len(plain)) if i not in plain.bad)


def test_folders_lists_and_annotations(tmp_path: Path, folder_of: Write, upload: Callable[[Path], str]) -> None:
    root = tmp_path / "root"
    folder_of(root / "dog", 3)
    folder_of(root / "cat" / "deeper", 2)
    folder_of(root / ".hidden", 1)
    (root / "cat" / "text.jpg").write_text("hello")
    (root / "cat" / "empty.jpg").touch()
    (root / "list.txt").write_text("dog/001.jpg 3\ncat/gone.jpg\n./cat/deeper/000.jpg 1\n")
    (root / "a.json").write_text('{"images": [{"id": 2, "file_name": "000.jpg"}, {"id": 1, "file_name": "002.jpg"}]}')
    url = upload(root)
    for _ in range(2):  # the second time from the index
        check_equal(open_source(str(root)), open_source(url), root, url)
    check_equal(open_source(str(root / "dog")), open_source(f"{url}/dog/"), root / "dog", f"{url}/dog")
    check_equal(open_source(str(root / "list.txt")), open_source(f"{url}/list.txt"), root, url)
    plain = open_source(str(root / "dog"), annotations=str(root / "a.json"))
    check_equal(plain, open_source(f"{url}/dog", annotations=f"{url}/a.json"), root / "dog", f"{url}/dog")
    assert [Path(name).name for name in plain.names] == ["002.jpg", "000.jpg"]


def test_shards(tmp_path: Path, folder_of: Write, upload: Callable[[Path], str]) -> None:
    images = [path.read_bytes() for path in folder_of(tmp_path / "in", 3)]
    root = tmp_path / "root"
    (root / "t").mkdir(parents=True)
    (root / "r").mkdir()
    members = [member for i, image in enumerate(images) for member in [(f"{i}.jpg", image), (f"{i}.cls", b"2")]]
    for name in ("0", "1"):
        write_tar(root / "t" / f"{name}.tar", members)
        write_tfrecord(root / "r" / f"{name}.tfrecord", (example(image__encoded=image) for image in images))
    content = (root / "t" / "1.tar").read_bytes()
    (root / "t" / "1.tar").write_bytes(content[: content.index(images[2]) + 9])
    url = upload(root)
    for kind in ("t", "r"):
        check_equal(open_source(str(root / kind)), open_source(f"{url}/{kind}"), root / kind, f"{url}/{kind}")
    for pattern in ("t/*.tar", "t/{0..1}.tar", "t/1.tar"):
        check_equal(open_source(f"{root}/{pattern}"), open_source(f"{url}/{pattern}"), root / "t", f"{url}/t")


def test_changed_files_are_read_again(tmp_path: Path, folder_of: Write, upload: Callable[[Path], str]) -> None:
    paths = folder_of(tmp_path / "root", 2)
    url = upload(tmp_path / "root")
    assert open_source(url).bad == {}
    paths[1].write_bytes(paths[0].read_bytes()[:30])
    shutil.copy(paths[0], tmp_path / "root" / "002.jpg")
    upload(tmp_path / "root")
    s = open_source(url)
    assert len(s) == 3
    assert list(s.bad) == [1]


def test_a_list_may_name_other_buckets_if_it_is_trusted(tmp_path: Path, folder_of: Write) -> None:
    (path,) = folder_of(tmp_path, 1)
    memory = fsspec.filesystem("memory")
    memory.pipe("/other/000.jpg", path.read_bytes())
    memory.pipe("/lists/list.txt", b"memory://other/000.jpg 1\n")
    with pytest.raises(SourceError, match=r"line 1: .memory://other/000\.jpg. may lie outside"):
        open_source("memory://lists/list.txt")
    s = open_source("memory://lists/list.txt", allow_outside=True)
    assert s.sizes.tolist() == [[64, 48]]
    assert s.read(0) == path.read_bytes()
    memory.rm("/other", recursive=True)
    with pytest.raises(OSError, match=r"no such file: 'memory://other/000\.jpg'"):
        s.read(0)


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("memory://nowhere", r"memory://nowhere does not exist"),
        ("memory://nowhere/{0..3}.tar", r"memory://nowhere/0\.tar does not exist \(4 of 4 shards"),
        ("nonsense://bucket/x", r"nonsense://bucket/x: Protocol not known: nonsense"),
    ],
)
def test_what_cannot_be_reached_is_named(root: str, message: str) -> None:
    with pytest.raises(SourceError, match=rf"data\.root: {message}"):
        open_source(root)


def test_a_missing_package_is_named() -> None:
    """Runs in a process where s3fs cannot be imported, whether it is installed or not."""
    code = (
        "import sys; sys.modules['s3fs'] = None\nfrom dali_pipelines.source import open_source\nopen_source('s3://b/x')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert "SourceError: data.root: s3://b/x cannot be read without another package: " in last
    assert last.endswith("; pip install s3fs")
