"""Files of weights: formats that are read; and nothing in them is executed."""

import argparse
import io
import pickle
import tracemalloc
from collections import OrderedDict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from mcl.train.checkpoint import CheckpointError
from mcl.weights import files
from tests.mcl.test_security import Payload


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("kind", ["float32", ">f8", "bool"])
def test_pickled_arrays(kind: str, protocol: int, tmp_path: Path) -> None:
    """As pickled by NumPy: with any byte order, order of axes, and protocol."""
    array = np.arange(-3, 9).reshape(3, 4).astype(kind)
    arrays = OrderedDict(plain=array, turned=np.asfortranarray(array), number=array[0, 0], none=array[:0])
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "x"}, protocol))
    read = dict(files.flatten(files.load(tmp_path / "x.pkl")))
    assert list(read) == [f"model.{name}" for name in arrays]
    for name, expected in arrays.items():
        assert np.array_equal(read[f"model.{name}"].numpy(), expected)
        assert read[f"model.{name}"].numpy().dtype == expected.dtype.newbyteorder("=")


def test_arrays_of_python_2(tmp_path: Path) -> None:
    """Their bytes are Latin-1 text."""
    array = np.array([1.5, -2.0], np.float32)
    code = pickletools_text(array)
    (tmp_path / "x.pkl").write_bytes(code)
    assert dict(files.flatten(files.load(tmp_path / "x.pkl")))["a"].tolist() == [1.5, -2.0]


def pickletools_text(array: Any) -> bytes:
    """{"a": array} as pickled by Python 2: str is BINSTRING, which has no encoding."""
    data = array.tobytes()
    return b"".join(
        [
            b"\x80\x02}U\x01acnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R",
            b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
            b"\x89U" + bytes([len(data)]) + data + b"tbs.",
        ]
    )


def test_nested_and_other_content(tmp_path: Path) -> None:
    content = {
        "args": argparse.Namespace(arch="resnet50"),
        "epoch": 3,
        "model": OrderedDict(weight=torch.ones(2, dtype=torch.float16), step=torch.tensor(4)),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}},
        "sparse": torch.ones(2).to_sparse(),
        "meta": torch.ones(2, device="meta"),
        "a": {"b": {"c": {"d": torch.ones(1), "e": {"f": torch.ones(1)}}}},
    }
    torch.save(content, tmp_path / "x.pth")
    read = dict(files.flatten(files.load(tmp_path / "x.pth")))
    assert list(read) == ["model.weight", "model.step", "a.b.c.d", "a.b.c.e.f"]
    assert read["model.weight"].dtype == torch.float16


def test_a_folder_with_safetensors(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"a folder with 0 \*\.safetensors files; name one of them"):
        files.load(tmp_path)
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert files.load(tmp_path)["a"].tolist() == [1, 1]
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    for config in (
        "{}",
        '{"weights": "no.safetensors"}',
        '{"weights": ["model.safetensors"]}',
        "[]",
        "{",
        "[" * 100_000,
    ):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(CheckpointError, match=r"a folder with 2 \*\.safetensors files"):
            files.load(tmp_path)
    (tmp_path / "config.json").write_text('{"weights": "other.safetensors"}')
    assert files.load(tmp_path)["a"].tolist() == [0, 0]


@pytest.mark.parametrize("ending", [".pth", ".pt", ".safetensors", ".pkl"])
def test_missing_and_damaged_files(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"x{ending}"
    with pytest.raises(CheckpointError, match=r"cannot read .*No such file"):
        files.load(file)
    for content in (b"", b"<html>not found</html>\n", b"PK\x03\x04", b"\x80\x04}"):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"x\{ending}: incomplete, or not in the format"):
            files.load(file)


@pytest.mark.parametrize("ending", [".pth", ".pkl"])
@pytest.mark.parametrize("legacy", [False, True])
def test_what_executes_code_is_refused(ending: str, legacy: bool, tmp_path: Path) -> None:
    mark, file = tmp_path / "executed", tmp_path / f"x{ending}"
    content = {"model": {"a": np.ones(2) if ending == ".pkl" else torch.ones(2)}, "hook": Payload(mark)}
    if ending == ".pkl":
        file.write_bytes(pickle.dumps(content, 2 if legacy else 4))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"contains \S*mkdir besides .* could run code") as refused:
        files.load(file)
    assert ("weights_only=False" in str(refused.value)) == (ending == ".pth")
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        np.array([{}], object),
        np.array(["x"]),
        np.zeros(2, [("a", "f4")]),
        np.array(["2020-01-01"], "datetime64[D]"),
        deque([1]),
        np.str_("x"),
    ],
)
def test_arrays_of_anything_but_numbers_are_refused(content: Any, tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": content}, 4))
    with pytest.raises(CheckpointError, match=r"x\.pkl: (contains \S+ besides|incomplete, or not in the format)"):
        files.load(tmp_path / "x.pkl")


def test_memory_of_an_array_is_as_large_as_its_shape_says(tmp_path: Path) -> None:
    """NumPy would trust the file; here, a shape that does not fit the number of bytes is an error."""
    whole = pickle.dumps({"a": np.zeros(2, np.float32)}, 2)
    assert whole.count(b"K\x02\x85") == 1
    (tmp_path / "x.pkl").write_bytes(whole.replace(b"K\x02\x85", b"K\x03\x85"))
    with pytest.raises(CheckpointError, match=r"x\.pkl: incomplete, or not .*ValueError"):
        files.load(tmp_path / "x.pkl")


def test_an_unpickler_cannot_be_changed_by_what_it_reads(tmp_path: Path) -> None:
    """A pickle can set attributes only on its own objects, not on the allowed ones."""
    for named in (b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"ccollections\nOrderedDict\n"):
        code = b"\x80\x02" + named + b"N}U\x05shapeK\x07s\x86b."
        (tmp_path / "x.pkl").write_bytes(code)
        with pytest.raises(CheckpointError):
            files.load(tmp_path / "x.pkl")
    good = io.BytesIO()
    pickle.dump({"a": np.ones(2, np.float32)}, good, 2)
    (tmp_path / "x.pkl").write_bytes(good.getvalue())
    assert dict(files.flatten(files.load(tmp_path / "x.pkl")))["a"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "code", [b"r\xf0\xf0\xf0\x28", b"\x96" + (1 << 33).to_bytes(8, "little"), b"\x8e" + b"\x7f" * 8]
)
def test_a_file_does_not_say_how_much_memory_it_takes(code: bytes, tmp_path: Path) -> None:
    """Positions in the memo and lengths that are far beyond the end of the file."""
    (tmp_path / "x.pkl").write_bytes(b"\x80\x05}" + code + b"s.")
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"x\.pkl: incomplete, or not"):
        files.load(tmp_path / "x.pkl")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_dictionaries_within_each_other(tmp_path: Path) -> None:
    node: dict[str, Any] = {"a": torch.ones(1)}
    for _ in range(8):
        node = {"x": node, "y": node, "z": node}
    inside: dict[str, Any] = {"b": torch.ones(1)}
    inside["again"] = inside
    torch.save({"deep": node, "inside": inside}, tmp_path / "x.pth")
    assert [name for name, _ in files.flatten(files.load(tmp_path / "x.pth"))] == ["inside.b"]
