"""The command line as users see it."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mcl import cli, config
from mcl.objectives import MCL
from mcl.train import checkpoint
from tests.conftest import ROOT
from tests.mcl.tiny import TINY

DEMO = str(ROOT / "mcl" / "presets" / "mcl_r18_fpn_demo.yaml")


def test_help_documents_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["pretrain", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for key in config.all_keys():
        assert f"{key.name} (" in text
        assert key.documentation in text
    assert "Annotated" not in text
    assert "trainer.accumulate (auto | int, default 1)" in text
    assert "trainer.devices (auto | int | list[int], default auto)" in text
    assert "augment.crop_scale (list[float], default [0.2, 1.0])" in text
    assert "trainer.compile (bool, default false)" in text


def test_a_reader_that_has_enough_is_no_error(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """For instance, mcl index CONFIG | head."""
    arguments = ["index", DEMO, f"data.root={photos / 'val'}", "data.val_root=", f"data.index={tmp_path}"]
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as pipe:  # flushes once more on exit, like the end of a process
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit, match=str(128 + signal.SIGPIPE)):
            cli.main(arguments)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", DEMO, "trainer.accumulate=foo"], r"error: trainer\.accumulate: Input should be auto or a whole"),
        (["pretrain", "nowhere.yaml"], r"error: nowhere\.yaml: cannot read the configuration"),
        (["preview", DEMO, "--step", "-1"], r"error: --step: the run has steps 0 to 139, not -1"),
        (["preview", DEMO, "--step", "140"], r"error: --step: the run has steps 0 to 139, not 140"),
        (["preview", DEMO, "--output", DEMO], r"error: .*montage_000000\.png: cannot write the picture \(.*\); choose"),
        (["budget", DEMO, "--plot", "/proc/budget.png"], r"error: --plot: /proc/budget\.png cannot be written"),
        (
            ["evaluate", "knn", "docs"],
            r"error: docs: a folder; name a checkpoint in it, such as docs/last\.pt",
        ),
        (["pretrain", DEMO, "data.rot=x"], r"error: data\.rot: no such key; did you mean data\.root\?"),
        (["evaluate", "knn", "nowhere.pt"], r"error: nowhere\.pt: no such checkpoint"),
        (["export", "nowhere.pt", "--to", "torchvision"], r"error: .*nowhere\.pt"),
        (["import-openselfsup", "nowhere.pth"], r"error: .*nowhere\.pth"),
        (["preview", DEMO, "data.root=/no/where"], r"error: data\.root: /no/where does not exist"),
        (["index", DEMO, "data.root=/no/where"], r"error: data\.root: /no/where does not exist"),
        (["index", DEMO, "data.val_root=/no/where"], r"error: data\.val_root: /no/where does not exist"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)


def test_only_the_configuration_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["pretrain"])
    assert capsys.readouterr().err.endswith("error: the following arguments are required: config\n")


def test_preview(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["preview", DEMO, "--step", "9", "--output", str(tmp_path), f"data.root={photos / 'train'}"])
    (picture,) = tmp_path.iterdir()
    assert capsys.readouterr().out.split() == [str(picture)]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_preview_goes_into_the_run(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Into output/name for a configuration; for a checkpoint, into the folder of its run, wherever that is now."""
    monkeypatch.chdir(tmp_path)
    cfg = config.load(DEMO, [f"data.root={photos / 'val'}", "data.val_root=", "output=runs", "name=a"])
    model = MCL(cfg)
    state = {"config": config.to_dict(cfg), "step": 1, "model": model.state_dict()}
    last = checkpoint.save(tmp_path / "moved" / "checkpoints", state, 1)
    alone = tmp_path / "alone" / "x.pt"
    alone.parent.mkdir()
    shutil.copy(last, alone)
    cli.main(["preview", DEMO, f"data.root={photos / 'val'}", "name=a"])
    assert capsys.readouterr().out.split() == ["runs/a/preview/montage_000000.png"]
    for file, folder in ((last, tmp_path / "moved"), (alone, alone.parent)):
        cli.main(["preview", str(file)])
        pictures = [str(folder / "preview" / name) for name in ("montage_000000.png", "features.png")]
        assert capsys.readouterr().out.split() == pictures
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "moved", "runs"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["a"]


def test_index(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints the numbers of images, classes and bad files, and the path of the index; the second time nothing is
    read."""
    shutil.copytree(photos / "val", tmp_path / "val")
    broken = min((tmp_path / "val" / "bird").iterdir())
    broken.write_text("hello")
    arguments = ["index", DEMO, f"data.root={tmp_path / 'val'}", f"data.val_root={photos / 'val'}"]
    arguments += [f"data.index={tmp_path / 'index'}"]
    cli.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path / 'val'}: 66 images in 26 classes, 1 of them bad (folders)"
    assert lines[1] == f"  {broken}: not an image, or its header is broken"
    assert re.fullmatch(r"  66 headers read in [0-9.]+ s, \d+ per second", lines[2])
    assert lines[4] == f"{photos / 'val'}: 66 images in 26 classes, 0 of them bad (folders)"
    indices = sorted(line.removeprefix("  index: ") for line in (lines[3], lines[-1]))
    assert indices == sorted(map(str, (tmp_path / "index").iterdir()))
    cli.main(arguments)
    assert capsys.readouterr().out.count("  0 headers read in ") == 2


def test_index_counts_what_pillow_decodes(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = min((photos / "val" / "bird").iterdir())
    shutil.copy(photo, tmp_path)
    with Image.open(photo) as image:
        image.convert("CMYK").save(tmp_path / "print.jpg")
        image.save(tmp_path / "scan.tif", tiffinfo={274: 6})
    cli.main(["index", DEMO, f"data.root={tmp_path}", "data.val_root=", f"data.index={tmp_path}"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}: 3 images, 0 of them bad (flat)"
    assert lines[1].startswith("  1 of them are decoded by Pillow, which is slower")


def test_names_of_files_may_be_any_bytes(tmp_path: Path, photos: Path) -> None:
    """For every command that prints file names, on a UTF-8 terminal: no name is lost, and the log can be read."""
    root = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    os.mkdir(root)
    for i, photo in enumerate(sorted((photos / "val").rglob("*.jpg"))[:8]):
        shutil.copy(photo, os.fsdecode(os.fsencode(root) + b"/%d\xff.jpg" % i))
    Path(os.fsdecode(os.fsencode(root) + b"/bad\xe9.jpg")).write_text("hello")
    values = copy.deepcopy(TINY) | {"data": {"root": root, "max_bad_fraction": 0.2}, "output": str(tmp_path / "runs")}
    values["trainer"]["epochs"] = 1
    values["evaluation"] = {"at_end": [], "gallery": 8, "galleries": 2}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    run = tmp_path / "runs" / "tiny"
    verbs = [
        ["index", tmp_path / "tiny.yaml"],
        ["pretrain", tmp_path / "tiny.yaml"],
        ["preview", run / "checkpoints" / "last.pt", "--output", tmp_path / "pictures"],
        ["evaluate", "retrieval", run / "checkpoints" / "last.pt"],
    ]
    code = f"from mcl import cli\nfor words in {[list(map(str, words)) for words in verbs]}: cli.main(words)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, env=os.environ | {"PYTHONUTF8": "1"}, check=True
    )
    assert b"Traceback" not in done.stdout + done.stderr
    said = done.stdout.decode()
    assert said.count("bad\\udce9.jpg: not an image") == 2  # from mcl index and mcl pretrain
    assert said.count("retrieval train") == 1
    assert "caf\\udce9/bad\\udce9.jpg: not an image" in (run / "train.log").read_text(encoding="utf-8")
    (bad,) = map(json.loads, (run / "bad_files.jsonl").read_text(encoding="utf-8").splitlines())
    assert os.path.exists(bad["path"])
    assert len(list((tmp_path / "pictures").iterdir())) == 2


def test_unknown_option() -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["doctor", "data.root=x"])


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["doctor"])
    text = capsys.readouterr().out
    assert "DALI" in text
    assert "torch" in text


def test_no_triton_and_no_network_in_our_code() -> None:
    for path in [*ROOT.glob("mcl/**/*.py"), *ROOT.glob("dali_pipelines/**/*.py")]:
        text = path.read_text()
        assert "import triton" not in text
        assert "urllib" not in text
