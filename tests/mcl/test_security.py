"""No file that a run reads can execute code, and a run connects only to hosts that the user named.

Tests in ``tests/dali_pipelines/test_source.py`` check that list and annotation files cannot name files outside
``data.root``.
"""

import ast
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mcl import commands as run
from mcl import config
from mcl.config import ConfigError
from mcl.exporters import TARGETS, export, openselfsup
from mcl.objectives import MCL
from mcl.train import checkpoint
from mcl.train.checkpoint import CheckpointError
from mcl.weights import files
from tests.conftest import ROOT
from tests.mcl.tiny import TINY


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize(
    "read", [checkpoint.load, files.load, lambda path: openselfsup.import_file(path, path.with_suffix(".out"))]
)
def test_checkpoints_execute_nothing(tmp_path: Path, read: Any) -> None:
    mark, file = tmp_path / "executed", tmp_path / "checkpoint.pt"
    torch.save({"format": checkpoint.FORMAT, "model": {}, "state_dict": {}, "step": Payload(mark)}, file)
    with pytest.raises(CheckpointError):
        read(file)
    assert not mark.exists()
    torch.load(file, weights_only=False)  # shows that the payload works
    assert mark.exists()


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_no_code_reads_formats_that_can_execute_code() -> None:
    """torch.load uses weights_only, YAML uses safe_load, and there is no unpickling, eval, exec or shell."""
    files = [file for package in ("mcl", "dali_pipelines") for file in (ROOT / package).rglob("*.py")]
    assert len(files) > 50
    loads = 0
    for file in files:
        for name, call in calls(ast.parse(file.read_text())):
            keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
            forbidden = ("eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load", "yaml.full_load")
            if (
                file != ROOT / "mcl/distributed/memory.py"
            ):  # objects of another process of the run, sent by torch.distributed
                assert name not in ("pickle.load", "pickle.loads"), f"{file}: {name}"
            assert name not in (*forbidden, "torch.hub.load"), f"{file}: {name}"
            assert keywords.get("shell") != "True", f"{file}: {name}"
            if name == "torch.load":
                loads += 1
                assert keywords["weights_only"] == "True", file
    assert loads >= 3


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of an untrained model."""
    cfg = config.from_dict({"model": {"backbone": "resnet18", "width": 16, "hidden": 32}})
    state = {"config": config.to_dict(cfg), "step": 1, "model": MCL(cfg).state_dict()}
    file = tmp_path_factory.mktemp("run") / "step.pt"
    torch.save({"format": checkpoint.FORMAT, **state}, file)
    return file


@pytest.mark.parametrize(
    ("name", "ending"),
    [("torchvision", ".safetensors"), ("timm", ".safetensors"), ("torchvision", ".pth"), ("mmpretrain", ".pth")],
)
def test_exports_carry_no_pickle_where_their_reader_needs_none(untrained: Path, name: str, ending: str) -> None:
    """safetensors files contain a header and numbers; torch.load reads the others with weights_only. (detectron2's own
    format is a pickle of arrays.)"""
    file = untrained.with_name(name + ending)
    export(untrained, name, output=file)
    if ending == ".safetensors":
        content = file.read_bytes()
        header = int.from_bytes(content[:8], "little")
        tensors = json.loads(content[8 : 8 + header])
        ends = [entry["data_offsets"][1] for key, entry in tensors.items() if key != "__metadata__"]
        assert 8 + header + max(ends) == len(content)
    else:
        assert torch.load(file, weights_only=True)


def test_targets_that_can_have_safetensors() -> None:
    assert {name for name, t in TARGETS.items() if ".safetensors" in t.saves} >= {"torchvision", "timm"}


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir", "!!python/name:os.mkdir"]
)
def test_configurations_execute_nothing(tmp_path: Path, tag: str) -> None:
    """Neither in a file nor on the command line."""
    mark, file = tmp_path / "executed", tmp_path / "preset.yaml"
    value = f"{tag} ['{mark}']" if ":os.mkdir" in tag and "name" not in tag else f"{tag} ''"
    file.write_text(f"name: {value}\n")
    with pytest.raises(ConfigError, match=r"preset\.yaml: not a YAML file: .*python"):
        config.load(file)
    file.write_text("name: mine\n")
    with pytest.raises(ConfigError, match=r"trainer\.epochs: cannot read the value"):
        config.load(file, [f"trainer.epochs={value}"])
    assert config.load(file, [f"output={value}"]).output == value
    assert not mark.exists()


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Hosts that Python tries to reach beyond this machine; all connections fail."""
    called: list[Any] = []

    def guard(name: str, address_of: Callable[..., Any]) -> None:
        real = getattr(socket.socket, name)

        def guarded(self: socket.socket, *arguments: Any) -> Any:
            address = address_of(*arguments)
            if self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost"):
                return real(self, *arguments)
            called.append(address)
            raise OSError(f"no way to {address}")

        monkeypatch.setattr(socket.socket, name, guarded)

    guard("connect", lambda address: address)
    guard("connect_ex", lambda address: address)
    guard("sendto", lambda data, *rest: rest[-1])

    def resolve(host: Any, *arguments: Any, **options: Any) -> Any:
        if host not in (None, "127.0.0.1", "::1", "localhost"):
            called.append(host)
            raise socket.gaierror(f"no name {host}")
        return looked_up(host, *arguments, **options)

    looked_up = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return called


def test_a_run_connects_to_no_host(
    tmp_path: Path, photos: Path, called: list[Any], monkeypatch: pytest.MonkeyPatch, thin_backbone: None
) -> None:
    """From its start to its report, with pictures, TensorBoard and scores."""
    for address in (("192.0.2.1", 80), ("example.com", 443)):
        with pytest.raises(OSError, match="no "):
            socket.create_connection(address, timeout=1)
    assert called == ["192.0.2.1", "example.com"]
    called.clear()
    words = [f"data.root={photos / 'val'}", f"data.val_root={photos / 'val'}", f"output={tmp_path}"]
    words += ["log.tensorboard=true", "log.preview=true", "evaluation.at_end=[retrieval, knn]", "trainer.epochs=1"]
    words += ["evaluation.gallery=8", "evaluation.galleries=2", "evaluation.k=3"]
    words += ["montage.ratios=[1,2,4,8]", "montage.images_per_canvas=[1,2,2,2]", "model.loss_weights=[1,1,1,1]"]
    run.pretrain(config.override(config.from_dict(TINY), words))
    assert (tmp_path / "tiny" / "report.html").exists()
    assert called == []
